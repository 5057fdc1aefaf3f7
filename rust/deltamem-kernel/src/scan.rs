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
