//! The layer against its twin that is written to be read, `deltamem_core::networks`: shapes, rules, masks, spans, batches, storage, sets
//! of instructions, pools, and what does not fit.
#![allow(clippy::unwrap_used, clippy::float_cmp, clippy::too_many_lines, missing_docs)]

use std::sync::atomic::{AtomicUsize, Ordering};

use deltamem_core::networks::{Delta, EditGate, Linear, PerProjection, Writes};
use deltamem_core::{Gates, UpdateMode};
use deltamem_kernel::{
    Call, Correction, From, HeadNorm, Instructions, Layer, LayerError, Pool, Scratch, Settings, Spans,
    Storage, Target, Values,
};
use proptest::prelude::*;

const Q: usize = 24;
const PACKED: usize = 40;
const OUT: usize = 13;

/// Runs every task, from the last to the first.
struct Backwards(AtomicUsize);

impl Pool for Backwards {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.0.fetch_add(tasks, Ordering::Relaxed);
        (0..tasks).rev().for_each(task);
    }
}

/// Numbers between −1 and 1 that look drawn and are always the same.
fn numbers(count: usize, salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn assert_close(found: &[f32], wanted: &[f32]) {
    let apart = found.iter().zip(wanted).map(|(f, w)| (f - w).abs());
    let off = apart.fold(0.0, f32::max);
    assert!(off < 1e-5, "off by {off}");
}

fn scaled(count: usize, salt: u64, by: f32) -> Vec<f32> {
    numbers(count, salt).into_iter().map(|x| x * by).collect()
}

#[derive(Debug, Clone, Copy)]
struct Case {
    settings: Settings,
    batch: usize,
    tokens: usize,
    salt: u64,
}

/// Weights as the reference takes them, and as the graph holds them.
struct Weights {
    twin: EditGate,
    networks: Vec<f32>,
    gate_bias: Vec<f32>,
    /// [R, Q + OUT]: of q and o.
    corrections: Vec<f32>,
}

fn weights(settings: &Settings, salt: u64) -> Weights {
    let (width, reads, gates) = (settings.hidden, settings.read_width(), settings.gate_width());
    let by = 1.0 / (width as f32).sqrt();
    let part = |rows: usize, salt: u64| scaled(rows * width, salt, by * 2.0);
    let parts = [
        part(reads, salt + 1),
        part(reads, salt + 2),
        part(reads, salt + 3),
        part(gates, salt + 4),
        if settings.own_lambda {
            part(gates, salt + 5)
        } else {
            Vec::new()
        },
    ];
    let (beta_bias, lambda_bias) = (numbers(gates, salt + 6), numbers(gates, salt + 7));
    let [w_q, w_o] = [(Q, salt + 8), (OUT, salt + 9)].map(|(rows, salt)| numbers(rows * reads, salt));
    let linear = |weight: &Vec<f32>, bias: Option<&Vec<f32>>| {
        let rows = weight.len() / width;
        Linear::new(weight.clone(), bias.cloned(), rows, width).unwrap()
    };
    let twin = EditGate {
        heads: settings.heads,
        rank: settings.rank,
        query: linear(&parts[0], None),
        key: linear(&parts[1], None),
        value: linear(&parts[2], None),
        beta: linear(&parts[3], Some(&beta_bias)),
        lambda: settings.own_lambda.then(|| linear(&parts[4], Some(&lambda_bias))),
        delta: PerProjection {
            q: Some(Delta {
                weight: Linear::new(w_q.clone(), None, Q, reads).unwrap(),
                scale: 1.0,
            }),
            o: Some(Delta {
                weight: Linear::new(w_o.clone(), None, OUT, reads).unwrap(),
                scale: 1.0,
            }),
            ..PerProjection::default()
        },
        alpha: settings.rank as f32,
        normalize_qk: settings.normalize_qk,
        mode: settings.mode,
        gates: settings.gates,
    };
    // The graph has inputs in front, and the logit of 1 − λ.
    let mut networks = Vec::new();
    for d in 0..width {
        for (n, part) in parts.iter().enumerate() {
            let sign = if n == 4 { -1.0 } else { 1.0 };
            networks.extend(part.chunks_exact(width).map(|row| sign * row[d]));
        }
    }
    let mut gate_bias = beta_bias;
    if settings.own_lambda {
        gate_bias.extend(lambda_bias.iter().map(|x| -x));
    }
    let mut corrections = Vec::new();
    for r in 0..reads {
        corrections.extend(w_q.chunks_exact(reads).map(|row| row[r]));
        corrections.extend(w_o.chunks_exact(reads).map(|row| row[r]));
    }
    Weights {
        twin,
        networks,
        gate_bias,
        corrections,
    }
}

/// q is laid onto columns 3.. of rows of 40 that are changed in place, o onto a copy.
fn layer(settings: Settings, weights: &Weights, instructions: Instructions) -> Layer {
    let stride = Q + OUT;
    let correction = |from, width, start| Correction {
        matrix: &weights.corrections,
        stride,
        from,
        width,
        start,
        norm: None,
    };
    let rows = |stride| From::Rows { stride, start: 0 };
    let targets = vec![
        Target::new(&settings, PACKED, rows(PACKED), &[correction(0, Q, 3)], None).unwrap(),
        Target::new(&settings, OUT, rows(OUT), &[correction(Q, OUT, 0)], None).unwrap(),
    ];
    Layer::new(
        settings,
        &weights.networks,
        &weights.gate_bias,
        targets,
        instructions,
    )
    .unwrap()
}

/// What a call leaves: the packed rows, the copied rows, the states.
type Left = (Vec<f32>, Vec<f32>, Vec<f32>);

impl Case {
    fn state(&self) -> Vec<f32> {
        scaled(
            self.batch * self.settings.read_width() * self.settings.rank,
            self.salt + 20,
            0.5,
        )
    }

    fn hidden(&self) -> Vec<f32> {
        numbers(self.batch * self.tokens * self.settings.hidden, self.salt + 21)
    }

    fn mask(&self) -> Vec<f32> {
        let drawn = numbers(self.batch * self.tokens, self.salt + 22);
        drawn.iter().map(|&x| if x < 0.5 { 1.0 } else { 0.0 }).collect()
    }

    /// Runs the call in pieces that end at `ends`; each sequence of a batch is cut alike.
    fn run(&self, layer: &Layer, ends: &[usize], pool: &dyn Pool) -> Left {
        let (hidden, mask, mut state) = (self.hidden(), self.mask(), self.state());
        let (before_q, before_o) = self.before();
        let (mut packed, mut copied) = (before_q.clone(), vec![f32::NAN; before_o.len()]);
        let mut scratch = Scratch::default();
        let mut from = 0;
        for &end in ends {
            let cut = |all: &[f32], width: usize| -> Vec<f32> {
                let rows = all.chunks_exact(self.tokens * width);
                rows.flat_map(|rows| &rows[from * width..end * width])
                    .copied()
                    .collect()
            };
            let (mut q, o) = (cut(&packed, PACKED), cut(&before_o, OUT));
            let mut out = vec![f32::NAN; o.len()];
            let call = Call {
                batch: self.batch,
                tokens: end - from,
                hidden: &cut(&hidden, self.settings.hidden),
                write_mask: &cut(&mask, 1),
                state: &mut state,
                values: &mut [
                    Values {
                        out: &mut q,
                        source: None,
                    },
                    Values {
                        out: &mut out,
                        source: Some(&o),
                    },
                ],
                spans: None,
            };
            layer.forward(call, &mut scratch, pool).unwrap();
            for (all, part, width) in [(&mut packed, &q, PACKED), (&mut copied, &out, OUT)] {
                for (all, part) in all
                    .chunks_exact_mut(self.tokens * width)
                    .zip(part.chunks_exact((end - from) * width))
                {
                    all[from * width..end * width].copy_from_slice(part);
                }
            }
            from = end;
        }
        (packed, copied, state)
    }

    /// What the rows are before they are corrected.
    fn before(&self) -> (Vec<f32>, Vec<f32>) {
        let rows = self.batch * self.tokens;
        (
            numbers(rows * PACKED, self.salt + 23),
            numbers(rows * OUT, self.salt + 24),
        )
    }

    /// The same by the twin.
    fn wanted(&self, twin: &EditGate) -> Left {
        let (hidden, mask, mut state) = (self.hidden(), self.mask(), self.state());
        let (mut packed, mut copied) = self.before();
        let count = state.len() / self.batch;
        for b in 0..self.batch {
            let own = |width: usize| b * self.tokens * width..(b + 1) * self.tokens * width;
            let moves: Vec<bool> = mask[own(1)].iter().map(|&x| x != 0.0).collect();
            let corrections = twin
                .forward(
                    &hidden[own(self.settings.hidden)],
                    &mut state[b * count..][..count],
                    Writes::Tokens(&moves),
                )
                .unwrap();
            for (row, delta) in packed[own(PACKED)]
                .chunks_exact_mut(PACKED)
                .zip(corrections.q.unwrap().chunks_exact(Q))
            {
                row[3..].iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
            }
            copied[own(OUT)]
                .iter_mut()
                .zip(corrections.o.unwrap())
                .for_each(|(x, delta)| *x += delta);
        }
        (packed, copied, state)
    }
}

fn furthest(found: &Left, wanted: &Left) -> f32 {
    let pairs = [
        (&found.0, &wanted.0),
        (&found.1, &wanted.1),
        (&found.2, &wanted.2),
    ];
    let mut largest = 0.0;
    for (found, wanted) in pairs {
        assert_eq!(found.len(), wanted.len());
        let size = wanted.iter().fold(1.0, |size: f32, x| size.max(x.abs()));
        for (f, w) in found.iter().zip(wanted) {
            assert!(f.is_finite());
            largest = f32::max(largest, (f - w).abs() / size);
        }
    }
    largest
}

fn bits(left: &Left) -> Vec<u32> {
    [&left.0, &left.1, &left.2]
        .into_iter()
        .flatten()
        .map(|x| x.to_bits())
        .collect()
}

fn case() -> impl Strategy<Value = Case> {
    let rank = prop_oneof![1..=9_usize, Just(16), Just(33)];
    let mode = prop_oneof![
        Just(UpdateMode::Standard),
        Just(UpdateMode::LambdaOutside),
        Just(UpdateMode::NoLambda)
    ];
    let gates = prop_oneof![Just(Gates::Row), Just(Gates::Head)];
    let flags = (any::<bool>(), prop::bool::weighted(0.8));
    (
        1..=70_usize,
        1..=3_usize,
        rank,
        mode,
        gates,
        flags,
        1..=3_usize,
        1..=40_usize,
        any::<u32>(),
    )
        .prop_map(
            |(hidden, heads, rank, mode, gates, (own_lambda, normalize_qk), batch, tokens, salt)| Case {
                settings: Settings {
                    hidden,
                    heads,
                    rank,
                    mode,
                    gates,
                    own_lambda,
                    normalize_qk,
                    storage: Storage::Single,
                },
                batch,
                // Keys that are not unit vectors let a state grow with every token, and rounding with it.
                tokens: if normalize_qk { tokens } else { 1 + tokens % 3 },
                salt: u64::from(salt),
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_layer_is_its_twin_for_any_shape_rule_and_mask(case in case()) {
        let weights = weights(&case.settings, case.salt);
        let wanted = case.wanted(&weights.twin);
        for instructions in Instructions::available() {
            let layer = layer(case.settings, &weights, instructions);
            let found = case.run(&layer, &[case.tokens], &Backwards(AtomicUsize::new(0)));
            let off = furthest(&found, &wanted);
            prop_assert!(off < 2e-5, "{instructions}: off by {off}");
        }
    }

    #[test]
    fn any_split_of_a_call_gives_the_same_bits(case in case(), cuts in prop::collection::vec(0..40_usize, 0..4)) {
        let weights = weights(&case.settings, case.salt);
        let layer = layer(case.settings, &weights, Instructions::best());
        let mut ends: Vec<usize> = cuts.into_iter().map(|cut| 1 + cut % case.tokens).chain([case.tokens]).collect();
        ends.sort_unstable();
        ends.dedup();
        let pool = Backwards(AtomicUsize::new(0));
        prop_assert_eq!(bits(&case.run(&layer, &ends, &pool)), bits(&case.run(&layer, &[case.tokens], &pool)));
    }

    #[test]
    fn half_precision_is_off_by_its_rounding(mut case in case()) {
        case.settings.normalize_qk = true;
        case.tokens = case.tokens.min(8);
        let weights = weights(&case.settings, case.salt);
        case.settings.storage = Storage::Half;
        let layer = layer(case.settings, &weights, Instructions::best());
        let off = furthest(&case.run(&layer, &[case.tokens], &Backwards(AtomicUsize::new(0))), &case.wanted(&weights.twin));
        prop_assert!(off < 2e-2, "off by {off}");
    }
}

fn settings() -> Settings {
    Settings {
        hidden: 300,
        heads: 2,
        rank: 8,
        mode: UpdateMode::Standard,
        gates: Gates::Row,
        own_lambda: true,
        normalize_qk: true,
        storage: Storage::Single,
    }
}

#[test]
fn a_pool_shares_a_long_call_and_changes_no_bit() {
    let case = Case {
        settings: settings(),
        batch: 1,
        tokens: 333,
        salt: 7,
    };
    let weights = weights(&case.settings, case.salt);
    let layer = layer(case.settings, &weights, Instructions::best());
    let pool = Backwards(AtomicUsize::new(0));
    let whole = case.run(&layer, &[case.tokens], &pool);
    assert!(
        pool.0.swap(0, Ordering::Relaxed) > 40,
        "a call of 333 tokens was not shared"
    );
    let steps: Vec<usize> = (1..=case.tokens).collect();
    assert_eq!(bits(&case.run(&layer, &steps, &pool)), bits(&whole));
    assert_eq!(pool.0.into_inner(), 0, "calls of one token were shared");
    assert!(furthest(&whole, &case.wanted(&weights.twin)) < 2e-5);
}

#[test]
fn spans_are_gathered_over_calls_and_written_behind_the_tokens() {
    let settings = settings();
    let (salt, tokens) = (3, 20);
    let weights = weights(&settings, salt);
    let layer = layer(settings, &weights, Instructions::best());
    let case = Case {
        settings,
        batch: 1,
        tokens,
        salt,
    };
    let ids: Vec<i32> = (0..20).map(|t| if t % 7 == 0 { -1 } else { t / 6 }).collect();
    let mut state = case.state();
    let wanted = weights
        .twin
        .forward(&case.hidden(), &mut state, Writes::Spans(&ids))
        .unwrap()
        .o
        .unwrap();

    let (hidden, mut found) = (case.hidden(), case.state());
    let spans: Vec<Vec<f32>> = (0..4)
        .map(|s| {
            let size = ids.iter().filter(|&&id| id == s).count() as f32;
            ids.iter()
                .map(|&id| if id == s { 1.0 / size } else { 0.0 })
                .collect()
        })
        .collect();
    let mut gathered = vec![0.0; 4 * settings.proposal_width()];
    let mut corrected = Vec::new();
    for (from, to) in [(0, 9), (9, 20)] {
        let before = found.clone();
        let (mut q, mut out) = (vec![0.0; (to - from) * PACKED], vec![0.0; (to - from) * OUT]);
        let weights: Vec<f32> = spans.iter().flat_map(|span| &span[from..to]).copied().collect();
        let call = Call {
            batch: 1,
            tokens: to - from,
            hidden: &hidden[from * settings.hidden..to * settings.hidden],
            write_mask: &vec![0.0; to - from],
            state: &mut found,
            values: &mut [
                Values {
                    out: &mut q,
                    source: None,
                },
                Values {
                    out: &mut out,
                    source: None,
                },
            ],
            spans: Some(Spans {
                weights: &weights,
                mask: &[if to == 20 { 1.0 } else { 0.0 }; 4],
                gathered: &mut gathered,
            }),
        };
        layer
            .forward(call, &mut Scratch::default(), &Backwards(AtomicUsize::new(0)))
            .unwrap();
        assert!(
            to == 20 || before == found,
            "a span was written before it was complete"
        );
        corrected.extend(out);
    }
    for (found, wanted) in [(&found, &state), (&corrected, &wanted)] {
        assert_close(found, wanted);
    }
}

#[test]
fn norms_are_taken_in() {
    let settings = settings();
    let weights = weights(&settings, 5);
    let (own, heads) = (
        numbers(OUT, 40),
        HeadNorm {
            weights: numbers(4, 41),
            epsilon: 1e-3,
        },
    );
    let stride = Q + OUT;
    let q = Correction {
        matrix: &weights.corrections,
        stride,
        from: 0,
        width: Q,
        start: 0,
        norm: None,
    };
    let o = Correction {
        from: Q,
        width: OUT,
        norm: Some((&own, 1e-2)),
        ..q
    };
    let targets = vec![
        // The middle of a packed projection.
        Target::new(
            &settings,
            Q,
            From::Rows { stride: 50, start: 5 },
            &[q],
            Some(heads.clone()),
        )
        .unwrap(),
        Target::new(&settings, OUT, From::Nothing, &[o], None).unwrap(),
    ];
    let layer = Layer::new(
        settings,
        &weights.networks,
        &weights.gate_bias,
        targets,
        Instructions::best(),
    )
    .unwrap();
    let case = Case {
        settings,
        batch: 1,
        tokens: 9,
        salt: 5,
    };
    let (source, mut state) = (numbers(9 * 50, 42), case.state());
    let (mut found_q, mut found_o) = (vec![f32::NAN; 9 * Q], vec![f32::NAN; 9 * OUT]);
    let call = Call {
        batch: 1,
        tokens: 9,
        hidden: &case.hidden(),
        write_mask: &[1.0; 9],
        state: &mut state,
        values: &mut [
            Values {
                out: &mut found_q,
                source: Some(&source),
            },
            Values {
                out: &mut found_o,
                source: None,
            },
        ],
        spans: None,
    };
    layer
        .forward(call, &mut Scratch::default(), &Backwards(AtomicUsize::new(0)))
        .unwrap();

    let norm = |x: &[f32], weights: &[f32], epsilon: f32| -> Vec<f32> {
        let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        x.iter()
            .zip(weights)
            .map(|(x, weight)| x / (mean + epsilon).sqrt() * weight)
            .collect()
    };
    let mut state = case.state();
    let wanted = weights
        .twin
        .forward(&case.hidden(), &mut state, Writes::Tokens(&[true; 9]))
        .unwrap();
    let (delta_q, delta_o) = (wanted.q.unwrap(), wanted.o.unwrap());
    let mut wanted_q = Vec::new();
    for (row, delta) in source.chunks_exact(50).zip(delta_q.chunks_exact(Q)) {
        let sum: Vec<f32> = row[5..5 + Q]
            .iter()
            .zip(delta)
            .map(|(x, delta)| x + delta)
            .collect();
        wanted_q.extend(
            sum.chunks_exact(4)
                .flat_map(|head| norm(head, &heads.weights, heads.epsilon)),
        );
    }
    let wanted_o: Vec<f32> = delta_o
        .chunks_exact(OUT)
        .flat_map(|delta| norm(delta, &own, 1e-2))
        .collect();
    for (found, wanted) in [(&found_q, &wanted_q), (&found_o, &wanted_o)] {
        assert_close(found, wanted);
    }
}

#[test]
fn numbers_that_are_none_go_through_and_end_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        let case = Case {
            settings: settings(),
            batch: 1,
            tokens: 3,
            salt: 1,
        };
        let weights = weights(&case.settings, 1);
        let layer = layer(case.settings, &weights, Instructions::best());
        let (mut hidden, mut state) = (case.hidden(), case.state());
        hidden[case.settings.hidden + 1] = bad;
        let (mut q, mut out) = (vec![0.0; 3 * PACKED], vec![0.0; 3 * OUT]);
        let call = Call {
            batch: 1,
            tokens: 3,
            hidden: &hidden,
            write_mask: &[1.0; 3],
            state: &mut state,
            values: &mut [
                Values {
                    out: &mut q,
                    source: None,
                },
                Values {
                    out: &mut out,
                    source: None,
                },
            ],
            spans: None,
        };
        layer
            .forward(call, &mut Scratch::default(), &Backwards(AtomicUsize::new(0)))
            .unwrap();
        assert!(
            q[..PACKED].iter().all(|x| x.is_finite()),
            "the token in front was touched"
        );
        assert_eq!(
            state.iter().all(|x| x.is_finite()),
            bad == f32::MAX,
            "{bad} left the state as it was"
        );
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name_and_nothing_is_touched() {
    let settings = settings();
    let weights = weights(&settings, 1);
    let best = Instructions::best();
    let new = |networks: &[f32], bias: &[f32]| {
        Layer::new(settings, networks, bias, Vec::new(), best)
            .unwrap_err()
            .to_string()
    };
    assert!(new(&weights.networks[1..], &weights.gate_bias).starts_with("networks holds"));
    assert!(new(&weights.networks, &weights.gate_bias[1..]).starts_with("gate_bias holds"));
    let none = Settings { rank: 0, ..settings };
    assert!(matches!(
        Layer::new(none, &[], &[], Vec::new(), best),
        Err(LayerError::Rule(_))
    ));
    let empty = Settings {
        hidden: 0,
        ..settings
    };
    assert!(Layer::new(empty, &[], &weights.gate_bias, Vec::new(), best).is_err());
    let good = Correction {
        matrix: &weights.corrections,
        stride: Q + OUT,
        from: 0,
        width: Q,
        start: 0,
        norm: None,
    };
    let rows = From::Rows {
        stride: PACKED,
        start: 0,
    };
    for (wrong, width, from) in [
        (Correction { stride: Q, ..good }, PACKED, rows),
        (
            Correction {
                from: OUT + 1,
                ..good
            },
            PACKED,
            rows,
        ),
        (Correction { start: 20, ..good }, PACKED, rows),
        (
            Correction {
                start: usize::MAX,
                ..good
            },
            PACKED,
            rows,
        ),
        (
            Correction {
                norm: Some((&[1.0], 0.0)),
                ..good
            },
            PACKED,
            rows,
        ),
        (
            good,
            PACKED,
            From::Rows {
                stride: PACKED,
                start: 1,
            },
        ),
        (good, 0, From::Nothing),
    ] {
        assert!(
            Target::new(&settings, width, from, &[wrong], None).is_err(),
            "{wrong:?}"
        );
    }
    let odd = HeadNorm {
        weights: vec![1.0; 7],
        epsilon: 0.0,
    };
    assert!(Target::new(&settings, PACKED, rows, &[good], Some(odd)).is_err());

    let layer = layer(settings, &weights, best);
    let case = Case {
        settings,
        batch: 1,
        tokens: 2,
        salt: 1,
    };
    let before = case.state();
    for wrong in 0..6 {
        let (mut state, mut q, mut out) = (before.clone(), vec![7.0; 2 * PACKED], vec![7.0; 2 * OUT]);
        let less = |n: usize, at: usize| n - usize::from(wrong == at);
        let call = Call {
            batch: 1,
            tokens: 2,
            hidden: &case.hidden()[..less(600, 0)],
            write_mask: &[1.0; 2][..less(2, 1)],
            state: &mut state[..less(256 / 2, 2)],
            values: &mut [
                Values {
                    out: &mut q[..less(2 * PACKED, 3)],
                    source: None,
                },
                Values {
                    out: &mut out,
                    source: (wrong == 4).then_some(&[1.0][..]),
                },
            ],
            spans: (wrong == 5).then_some(Spans {
                weights: &[],
                mask: &[1.0],
                gathered: &mut [],
            }),
        };
        let error = layer
            .forward(call, &mut Scratch::default(), &Backwards(AtomicUsize::new(0)))
            .unwrap_err();
        assert!(matches!(error, LayerError::Length { .. }), "{error}");
        assert!(state == before && q == vec![7.0; 2 * PACKED], "{error}");
    }
}

#[test]
#[ignore = "prints times: cargo test --release -p deltamem-kernel --test rule -- --ignored --nocapture"]
fn how_fast_layers_are() {
    for (hidden, rank, gates, tokens) in [
        (128, 96, Gates::Head, 1),
        (128, 96, Gates::Head, 128),
        (1024, 8, Gates::Row, 1),
        (1024, 8, Gates::Row, 128),
    ] {
        let case = Case {
            settings: Settings {
                hidden,
                rank,
                gates,
                heads: 1,
                mode: UpdateMode::Standard,
                own_lambda: false,
                normalize_qk: true,
                storage: Storage::Single,
            },
            batch: 1,
            tokens,
            salt: 3,
        };
        let weights = weights(&case.settings, case.salt);
        print!("D {hidden}, rank {rank}, {tokens} tokens, µs a token:");
        for instructions in Instructions::available() {
            let layer = layer(case.settings, &weights, instructions);
            let (hidden, mask, mut state) = (case.hidden(), case.mask(), case.state());
            let (mut packed, source) = case.before();
            let (mut out, mut scratch) = (source.clone(), Scratch::default());
            let mut best = f64::MAX;
            for _ in 0..200 {
                let began = std::time::Instant::now();
                let call = Call {
                    batch: 1,
                    tokens,
                    hidden: &hidden,
                    write_mask: &mask,
                    state: &mut state,
                    values: &mut [
                        Values {
                            out: &mut packed,
                            source: None,
                        },
                        Values {
                            out: &mut out,
                            source: Some(&source),
                        },
                    ],
                    spans: None,
                };
                layer
                    .forward(call, &mut scratch, &Backwards(AtomicUsize::new(0)))
                    .unwrap();
                best = best.min(began.elapsed().as_secs_f64());
            }
            print!(" {instructions} {:.3}", best * 1e6 / tokens as f64);
        }
        println!();
    }
}
