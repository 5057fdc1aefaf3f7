//! The rule with the best instructions that the processor has. The rule itself is `deltamem_core::rule`'s.

use deltamem_core::Gates;
use deltamem_core::rule::{self, Room, RuleError, Tokens};

use crate::instructions::{Arithmetic, Instructions, Work};

/// `deltamem_core::rule::scan`, fast. The sets of instructions differ in the last bits, for some round a product and a sum once; with one of
/// them any split of the tokens into calls gives the same bits.
///
/// # Errors
/// [`RuleError`] when a length does not fit; nothing is touched then.
pub fn scan(
    heads: usize,
    rank: usize,
    gates: Gates,
    tokens: &Tokens<'_>,
    state: &mut [f32],
    reads: &mut [f32],
) -> Result<(), RuleError> {
    Instructions::best().run(Scan {
        heads,
        rank,
        gates,
        tokens,
        state,
        reads,
        room: &mut Room::default(),
    })
}

/// One run of the rule.
pub(crate) struct Scan<'a, 't> {
    pub(crate) heads: usize,
    pub(crate) rank: usize,
    pub(crate) gates: Gates,
    pub(crate) tokens: &'a Tokens<'t>,
    pub(crate) state: &'a mut [f32],
    pub(crate) reads: &'a mut [f32],
    pub(crate) room: &'a mut Room,
}

impl Work for Scan<'_, '_> {
    type Output = Result<(), RuleError>;

    #[inline(always)]
    #[allow(clippy::inline_always)] // see `instructions::Work`
    fn run<A: Arithmetic>(self, arithmetic: A) -> Self::Output {
        let Self {
            heads, rank, gates, ..
        } = self;
        rule::scan_in(
            arithmetic,
            self.room,
            heads,
            rank,
            gates,
            self.tokens,
            self.state,
            self.reads,
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Instant;

    use super::*;

    const RANKS: [usize; 18] = [
        1, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 96, 130,
    ];

    /// Numbers between −1 and 1 that look drawn.
    fn numbers(count: usize, salt: u32) -> Vec<f32> {
        (0_u32..)
            .take(count)
            .map(|n| ((n ^ salt << 20).wrapping_mul(2_654_435_761) >> 8) as f32 / (1_u32 << 23) as f32 - 1.0)
            .collect()
    }

    #[test]
    fn every_set_follows_the_rule_and_any_split_gives_the_same_bits() {
        let (count, heads) = (11, 2);
        for (rank, gates) in RANKS
            .iter()
            .flat_map(|&rank| [(rank, Gates::Row), (rank, Gates::Head)])
        {
            let (vector, gate) = (heads * rank, heads * gates.per_head(rank));
            let [mut q, mut k, v] = [1, 2, 3].map(|salt| numbers(count * vector, salt));
            deltamem_core::gates::l2_normalize(&mut q, rank);
            deltamem_core::gates::l2_normalize(&mut k, rank);
            let [keep, erase, write] = [4, 5, 6].map(|salt| {
                numbers(count * gate, salt)
                    .into_iter()
                    .map(f32::abs)
                    .collect::<Vec<_>>()
            });
            let mask: Vec<bool> = (0..count).map(|n| n % 4 != 2).collect();
            let before = numbers(vector * rank, 7);
            let tokens = |from: usize, to: usize| Tokens {
                q: &q[from * vector..to * vector],
                k: &k[from * vector..to * vector],
                v: &v[from * vector..to * vector],
                keep: &keep[from * gate..to * gate],
                erase: &erase[from * gate..to * gate],
                write: &write[from * gate..to * gate],
                mask: &mask[from..to],
            };
            let (mut wanted, mut wanted_reads) = (before.clone(), vec![f32::NAN; count * vector]);
            rule::scan(
                heads,
                rank,
                gates,
                &tokens(0, count),
                &mut wanted,
                &mut wanted_reads,
            )
            .unwrap();
            for instructions in Instructions::available() {
                let run = |ends: &[usize]| {
                    let (mut state, mut reads) = (before.clone(), vec![f32::NAN; count * vector]);
                    let (mut from, mut room) = (0, Room::default());
                    for &to in ends {
                        let scan = Scan {
                            heads,
                            rank,
                            gates,
                            tokens: &tokens(from, to),
                            state: &mut state,
                            reads: &mut reads[from * vector..to * vector],
                            room: &mut room,
                        };
                        instructions.run(scan).unwrap();
                        from = to;
                    }
                    state.extend(reads);
                    state
                };
                let whole = run(&[count]);
                for (found, wanted) in whole.iter().zip(wanted.iter().chain(&wanted_reads)) {
                    assert!(
                        (found - wanted).abs() < 1e-5,
                        "{instructions}, rank {rank}, {gates}: {found}, expected {wanted}"
                    );
                }
                let bits = |all: Vec<f32>| all.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                let whole = bits(whole);
                assert!(
                    whole == bits(run(&[1, 3, 4, 8, count])),
                    "{instructions}, rank {rank}, {gates}"
                );
                assert!(
                    whole == bits(run(&(1..=count).collect::<Vec<_>>())),
                    "{instructions}, rank {rank}, {gates}"
                );
            }
        }
    }

    #[test]
    #[ignore = "prints times: cargo test --release -p deltamem-kernel --lib -- --ignored --nocapture"]
    fn how_fast_scans_are() {
        for count in [1, 512] {
            for rank in [8, 16, 24, 32, 64, 96, 128] {
                for gates in [Gates::Row, Gates::Head] {
                    let some = |count: usize, by: f32| -> Vec<f32> {
                        (0..count).map(|n| (n % 17) as f32 * by - 8.0 * by).collect()
                    };
                    let by = 0.2 / (rank as f32).sqrt();
                    let [q, k, v] = [(); 3].map(|()| some(count * rank, by));
                    let gate = vec![0.5; count * gates.per_head(rank)];
                    let (mut state, mut reads) = (vec![0.0; rank * rank], vec![0.0; count * rank]);
                    let tokens = Tokens {
                        q: &q,
                        k: &k,
                        v: &v,
                        keep: &gate,
                        erase: &gate,
                        write: &gate,
                        mask: &vec![true; count],
                    };
                    print!("{count:3} tokens, rank {rank:3}, {gates:4}, µs:");
                    for instructions in Instructions::available() {
                        let mut best = f64::MAX;
                        let mut room = Room::default();
                        for _ in 0..100 {
                            let began = Instant::now();
                            for _ in 0..8 {
                                let scan = Scan {
                                    heads: 1,
                                    rank,
                                    gates,
                                    tokens: &tokens,
                                    state: std::hint::black_box(&mut state),
                                    reads: &mut reads,
                                    room: &mut room,
                                };
                                instructions.run(scan).unwrap();
                            }
                            best = best.min(began.elapsed().as_secs_f64() / 8.0);
                        }
                        print!(" {:8.2}", best * 1e6);
                    }
                    println!();
                }
            }
        }
    }
}
