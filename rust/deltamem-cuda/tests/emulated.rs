//! The kernels and all that starts them, without a card (see `emulator.c`): held against `deltamem-kernel`, cut in pieces, refused where
//! they are wrong, kept on disk, and what does not fit. One test runs on a card, where there is one. The emulator is for Linux.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::too_many_lines, missing_docs)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

mod emulator;
mod nvidia;

use std::sync::Arc;

use deltamem_core::{Gates, UpdateMode};
use deltamem_cuda::{
    Buffer, Cache, Call, Correction, CudaError, Driver, Element, Kernels, Layer, Machine, Options, Rows,
    SOURCE, Sizes, Target, Values,
};
use deltamem_kernel as kernel;

use crate::emulator::{build, counted, machine, mend, options, scratch};
use crate::nvidia::nvrtc_in_wheels;

const SINGLE: Sizes = Sizes {
    heads: 1,
    rank: 8,
    mode: UpdateMode::Standard,
    gates: Gates::Row,
    own_lambda: false,
    normalize_qk: true,
    element: Element::Single,
};

/// Numbers that look drawn and are always the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % end
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// Between −1 and 1.
    fn number(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    fn numbers(&mut self, count: usize, by: f32) -> Vec<f32> {
        (0..count).map(|_| self.number() * by).collect()
    }
}

/// The decoder's numbers, in the lowest bits of each.
fn narrow(element: Element, x: f32) -> u32 {
    match element {
        Element::Single => x.to_bits(),
        Element::Half => {
            let magnitude = x.abs().to_bits();
            let rounded = match magnitude {
                m if m >= 0x477F_F000 => 0x7C00,
                m if m >= 0x3880_0000 => (m - (112 << 23) + 0x0FFF + (m >> 13 & 1)) >> 13,
                m => (f32::from_bits(m) * f32::from_bits((127 + 24) << 23)).round_ties_even() as u32,
            };
            x.to_bits() >> 16 & 0x8000 | rounded
        }
        Element::Brain => (x.to_bits() + 0x7FFF + (x.to_bits() >> 16 & 1)) >> 16,
    }
}

fn widen(element: Element, bits: u32) -> f32 {
    match element {
        Element::Single => f32::from_bits(bits),
        Element::Half => {
            let scale = f32::from_bits((127 + 112) << 23);
            f32::from_bits((bits & 0x8000) << 16 | (bits & 0x7FFF) << 13) * scale
        }
        Element::Brain => f32::from_bits(bits << 16),
    }
}

fn rounded(element: Element, numbers: &[f32]) -> Vec<f32> {
    numbers
        .iter()
        .map(|&x| widen(element, narrow(element, x)))
        .collect()
}

/// One layer and one stream of tokens, all drawn.
struct Case {
    sizes: Sizes,
    width: usize,
    batch: usize,
    tokens: usize,
    layers: usize,
    layer: usize,
    columns: usize,
    targets: Vec<Target>,
    /// Whether a target's rows are changed where they lie.
    in_place: Vec<bool>,
    hidden: Vec<f32>,
    mask: Vec<f32>,
    past: Vec<f32>,
    networks: Vec<f32>,
    bias: Vec<f32>,
    corrections: Vec<f32>,
    norm: Vec<f32>,
    sources: Vec<Vec<f32>>,
}

/// What calls leave: the states, and each target's rows.
#[derive(Debug, PartialEq)]
struct Left {
    state: Vec<u32>,
    values: Vec<Vec<u32>>,
}

/// The rows of tokens `from` to `end` of each sequence of `tokens`.
fn cut<T: Copy>(all: &[T], width: usize, tokens: usize, from: usize, end: usize) -> Vec<T> {
    all.chunks_exact(tokens * width)
        .flat_map(|rows| &rows[from * width..end * width])
        .copied()
        .collect()
}

impl Case {
    fn draw(sizes: Sizes, dice: &mut Dice) -> Self {
        let width = dice.one_of(&[1, 8, 63, 64, 65, 130, 200]);
        let (batch, tokens) = dice.one_of(&[(1, 70), (2, 33), (5, 9), (3, 2), (1, 37), (12, 3), (2, 65)]);
        let layers = 1 + dice.below(3);
        let fours = dice.below(2) == 0;
        let size = |dice: &mut Dice| {
            let n = 1 + dice.below(40);
            if fours { n.next_multiple_of(4) } else { n }
        };
        let mut columns = 0;
        let mut correct = |dice: &mut Dice, width: usize| {
            let from = columns;
            let own = if fours { width } else { 1 + dice.below(width) };
            let start = dice.below(width - own + 1);
            columns += own;
            Correction {
                from,
                width: own,
                start,
            }
        };
        // A packed projection in three parts, or q alone in its place, and the residual or an output of its own.
        let mut targets = Vec::new();
        let mut in_place = Vec::new();
        if dice.below(2) == 0 {
            let splits = [size(dice), size(dice), size(dice)];
            for n in 0..3 {
                let corrections = if n == 1 {
                    Vec::new()
                } else {
                    vec![correct(dice, splits[n])]
                };
                targets.push(Target {
                    width: splits[n],
                    rows: Some(Rows {
                        stride: splits.iter().sum(),
                        start: splits[..n].iter().sum(),
                    }),
                    corrections,
                    epsilon: None,
                });
                in_place.push(false);
            }
        } else {
            let own = size(dice) + 300 * dice.below(2);
            let own = if fours { own.next_multiple_of(4) } else { own };
            targets.push(Target {
                width: own,
                rows: Some(Rows {
                    stride: own,
                    start: 0,
                }),
                corrections: vec![correct(dice, own), correct(dice, own)],
                epsilon: None,
            });
            in_place.push(dice.below(2) == 0);
        }
        let own = size(dice) + 200 * dice.below(2);
        let own = if fours { own.next_multiple_of(4) } else { own };
        let residual = dice.below(2) == 0;
        targets.push(Target {
            width: own,
            rows: residual.then_some(Rows {
                stride: own,
                start: 0,
            }),
            corrections: vec![correct(dice, own)],
            epsilon: (dice.below(3) == 0).then_some(1e-5),
        });
        in_place.push(residual && dice.below(2) == 0);

        let rows = batch * tokens;
        let element = sizes.element;
        let state = sizes.reads() * sizes.rank;
        // Keys that nobody makes unit vectors must be short, or the rule itself grows without end.
        let rank = if sizes.normalize_qk { 1 } else { sizes.rank };
        let by = 2.0 / ((width * rank) as f32).sqrt();
        let norm = targets.last().unwrap().corrections[0].width;
        let mask: Vec<f32> = (0..rows)
            .map(|_| if dice.below(4) > 0 { 1.0 } else { 0.0 })
            .collect();
        Self {
            hidden: rounded(element, &dice.numbers(rows * width, 1.0)),
            mask,
            past: dice.numbers(batch * layers * state, 0.5),
            networks: dice.numbers(width * sizes.proposal_width(), by),
            bias: dice.numbers(sizes.logits(), 1.0),
            corrections: dice.numbers(sizes.reads() * columns, 1.0 / (sizes.reads() as f32).sqrt()),
            norm: dice.numbers(norm, 1.0),
            sources: targets
                .iter()
                .map(|target| {
                    let stride = target.rows.map_or(0, |rows| rows.stride);
                    rounded(element, &dice.numbers(rows * stride, 1.0))
                })
                .collect(),
            layer: dice.below(layers),
            sizes,
            width,
            batch,
            tokens,
            layers,
            columns,
            targets,
            in_place,
        }
    }

    /// This layer's states of the past.
    fn state(&self) -> Vec<f32> {
        let own = self.sizes.reads() * self.sizes.rank;
        let rows = self.past.chunks_exact(self.layers * own);
        rows.flat_map(|row| &row[self.layer * own..][..own])
            .copied()
            .collect()
    }

    /// What `deltamem-kernel` makes of it, in float32: the states, and each target's rows.
    fn wanted(&self) -> (Vec<f32>, Vec<Vec<f32>>) {
        let sizes = &self.sizes;
        let settings = kernel::Settings {
            hidden: self.width,
            heads: sizes.heads,
            rank: sizes.rank,
            mode: sizes.mode,
            gates: sizes.gates,
            own_lambda: sizes.own_lambda,
            normalize_qk: sizes.normalize_qk,
            storage: kernel::Storage::Single,
        };
        let targets = self.targets.iter().map(|target| {
            let own: Vec<_> = target
                .corrections
                .iter()
                .map(|own| kernel::Correction {
                    matrix: &self.corrections,
                    stride: self.columns,
                    from: own.from,
                    width: own.width,
                    start: own.start,
                    norm: target.epsilon.map(|epsilon| (self.norm.as_slice(), epsilon)),
                })
                .collect();
            let from = target
                .rows
                .map_or(kernel::From::Nothing, |rows| kernel::From::Rows {
                    stride: rows.stride,
                    start: rows.start,
                });
            kernel::Target::new(&settings, target.width, from, &own, None).unwrap()
        });
        let layer = kernel::Layer::new(
            settings,
            &self.networks,
            &self.bias,
            targets.collect(),
            kernel::Instructions::best(),
        )
        .unwrap();
        let mut state = self.state();
        let rows = self.batch * self.tokens;
        let mut outs: Vec<Vec<f32>> = self.targets.iter().map(|t| vec![0.0; rows * t.width]).collect();
        let mut values: Vec<_> = outs
            .iter_mut()
            .zip(&self.targets)
            .zip(&self.sources)
            .map(|((out, target), source)| kernel::Values {
                out,
                source: target.rows.map(|_| source.as_slice()),
            })
            .collect();
        let call = kernel::Call {
            batch: self.batch,
            tokens: self.tokens,
            hidden: &self.hidden,
            write_mask: &self.mask,
            state: &mut state,
            values: &mut values,
            spans: None,
        };
        layer
            .forward(call, &mut kernel::Scratch::default(), &Alone)
            .unwrap();
        (state, outs)
    }

    /// The calls that end at `ends`, on the card.
    #[allow(unsafe_code)]
    fn run(&self, kernels: &Arc<Kernels>, ends: &[usize]) -> Left {
        let device = kernels.device();
        let element = self.sizes.element;
        let send = |numbers: &[f32]| {
            if element == Element::Single {
                return device.with(numbers).unwrap();
            }
            let bits: Vec<u16> = numbers.iter().map(|&x| narrow(element, x) as u16).collect();
            device.with(&bits).unwrap()
        };
        let layer = Layer::new(Arc::clone(kernels), self.targets.clone()).unwrap();
        let networks = device.with(&self.networks).unwrap();
        let bias = device.with(&self.bias).unwrap();
        let corrections = device.with(&self.corrections).unwrap();
        let norm = device.with(&self.norm).unwrap();
        let own = self.sizes.reads() * self.sizes.rank;
        let present = device.allocate(self.batch * own * 4).unwrap();
        let mut past = self.past.clone();
        let mut left = Left {
            state: Vec::new(),
            values: self
                .targets
                .iter()
                .map(|target| vec![0; self.batch * self.tokens * target.width])
                .collect(),
        };
        let mut from = 0;
        for &end in ends {
            let tokens = end - from;
            let piece = |all: &[f32], width: usize| cut(all, width, self.tokens, from, end);
            let hidden = send(&piece(&self.hidden, self.width));
            let mask = device.with(&piece(&self.mask, 1)).unwrap();
            let before = device.with(&past).unwrap();
            let room = layer.work(self.batch, tokens, self.width).unwrap();
            let work = device.allocate(room * 4).unwrap();
            let mut outs = Vec::new();
            let mut sources = Vec::new();
            let mut values = Vec::new();
            for (n, target) in self.targets.iter().enumerate() {
                let source = target
                    .rows
                    .map(|rows| send(&piece(&self.sources[n], rows.stride)));
                let address = source.as_ref().map_or(0, Buffer::address);
                let out = if self.in_place[n] {
                    source.unwrap()
                } else {
                    sources.push(source);
                    device
                        .allocate(self.batch * tokens * target.width * element.bytes())
                        .unwrap()
                };
                values.push(Values {
                    out: out.address(),
                    source: address,
                    norm: if target.epsilon.is_some() {
                        norm.address()
                    } else {
                        0
                    },
                });
                outs.push(out);
            }
            let call = Call {
                batch: self.batch,
                tokens,
                width: self.width,
                columns: self.columns,
                layers: self.layers,
                layer: self.layer,
                hidden: hidden.address(),
                write_mask: mask.address(),
                past_memory: before.address(),
                networks: networks.address(),
                gate_bias: bias.address(),
                corrections: corrections.address(),
                present_memory: present.address(),
                work: work.address(),
                values: &values,
                stream: 0,
            };
            // SAFETY: all of these are the emulator's, of the sizes of the call, and live until it is done.
            unsafe { layer.forward(&call) }.unwrap();
            device.synchronize(0).unwrap();
            let state = present.download::<f32>(self.batch * own).unwrap();
            for (all, state) in past
                .chunks_exact_mut(self.layers * own)
                .zip(state.chunks_exact(own))
            {
                all[self.layer * own..][..own].copy_from_slice(state);
            }
            left.state = state.iter().map(|x| x.to_bits()).collect();
            for ((all, out), target) in left.values.iter_mut().zip(&outs).zip(&self.targets) {
                let width = target.width;
                let count = self.batch * tokens * width;
                let found: Vec<u32> = if element == Element::Single {
                    out.download::<f32>(count)
                        .unwrap()
                        .iter()
                        .map(|x| x.to_bits())
                        .collect()
                } else {
                    out.download::<u16>(count)
                        .unwrap()
                        .into_iter()
                        .map(u32::from)
                        .collect()
                };
                for (all, found) in all
                    .chunks_exact_mut(self.tokens * width)
                    .zip(found.chunks_exact((tokens * width).max(1)))
                {
                    all[from * width..end * width].copy_from_slice(found);
                }
            }
            from = end;
        }
        left
    }
}

struct Alone;

impl kernel::Pool for Alone {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// The largest difference, of the largest number's size.
fn apart(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let size = wanted.iter().fold(1.0, |size: f32, x| size.max(x.abs()));
    found.iter().zip(wanted).fold(0.0, |largest: f32, (f, w)| {
        assert!(f.is_finite());
        largest.max((f - w).abs() / size)
    })
}

/// Sizes that have every mode, kind of gates, own λ or not, norm or not, and element, with ranks that fill nothing and heads of all sorts.
fn all_sizes() -> Vec<Sizes> {
    let mut dice = Dice(7);
    let ranks = [1, 2, 3, 4, 5, 7, 8, 8, 9, 12, 15, 16, 17, 24, 32, 33, 48, 63, 64];
    let modes = [
        UpdateMode::Standard,
        UpdateMode::LambdaOutside,
        UpdateMode::NoLambda,
    ];
    let mut all = Vec::new();
    for (n, rank) in ranks.into_iter().enumerate() {
        all.push(Sizes {
            heads: if rank > 16 { 1 + n % 2 } else { 1 + n % 4 },
            rank,
            mode: modes[n % 3],
            gates: if n % 4 < 2 { Gates::Row } else { Gates::Head },
            own_lambda: dice.below(2) == 0,
            normalize_qk: n % 5 > 0,
            element: [Element::Single, Element::Half, Element::Brain][n / 2 % 3],
        });
    }
    all
}

/// Holds kernels of all sizes against the processor's own layer, `cases` drawn ones of each, whole and cut. States may be off by `allowed`,
/// the decoder's numbers by four times as much, since a norm makes what is small larger. How far the states were off.
fn hold(machine: &Machine, cases: usize, allowed: f32) -> f32 {
    let mut dice = Dice(0x5EED);
    let mut furthest = 0.0_f32;
    for sizes in all_sizes() {
        let kernels = machine.kernels(sizes).unwrap();
        for _ in 0..cases {
            let case = Case::draw(sizes, &mut dice);
            let whole = case.run(&kernels, &[case.tokens]);
            let (state, values) = case.wanted();
            let found: Vec<f32> = whole.state.iter().map(|&bits| f32::from_bits(bits)).collect();
            let off = apart(&found, &state);
            furthest = furthest.max(off);
            assert!(off < allowed, "states off by {off}: {sizes:?}");
            for (n, (found, wanted)) in whole.values.iter().zip(&values).enumerate() {
                let found: Vec<f32> = found.iter().map(|&bits| widen(sizes.element, bits)).collect();
                let off = apart(&found, wanted);
                let rounding = match sizes.element {
                    Element::Single => 0.0,
                    Element::Half => 1.0 / 2048.0,
                    Element::Brain => 1.0 / 256.0,
                };
                let width = case.width;
                assert!(
                    off < 4.0 * allowed + rounding,
                    "value {n} off by {off}: {sizes:?}, width {width}"
                );
            }
            // One by one, and at drawn places.
            let single: Vec<usize> = (1..=case.tokens).collect();
            let mut drawn: Vec<usize> = (0..3).map(|_| 1 + dice.below(case.tokens)).collect();
            drawn.push(case.tokens);
            drawn.sort_unstable();
            drawn.dedup();
            for ends in [single, drawn] {
                assert_eq!(case.run(&kernels, &ends), whole, "cut at {ends:?}: {sizes:?}");
            }
        }
    }
    furthest
}

#[test]
fn the_kernels_compute_what_the_processors_own_layer_computes_and_cuts_never_show() {
    println!("states off by {:e} at most", hold(machine(), 2, 5e-6));
}

/// The same on a card, where there is one. Run it with `--nocapture`: it says whether it did.
#[test]
fn so_they_do_on_a_card() {
    let device = match Driver::open(None).and_then(|driver| driver.device(0)) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    };
    let mut options = Options::of_device(0);
    options.cache = Cache::default();
    options.compiler = nvrtc_in_wheels().into_iter().next();
    let machine = Machine::open(options).unwrap();
    let off = hold(&machine, 8, 1e-5);
    println!(
        "{}, compute capability {}: states off by {off:e} at most",
        machine.describe(),
        device.architecture()
    );
}

#[test]
fn tokens_that_do_not_write_leave_every_bit_and_no_tokens_bring_the_state() {
    let kernels = machine().kernels(SINGLE).unwrap();
    let mut case = Case::draw(SINGLE, &mut Dice(3));
    case.mask.fill(0.0);
    let before: Vec<u32> = case.state().iter().map(|x| x.to_bits()).collect();
    let whole = case.run(&kernels, &[case.tokens]);
    assert_eq!(whole.state, before);
    let single: Vec<usize> = (1..=case.tokens).collect();
    assert_eq!(case.run(&kernels, &single), whole);
    case.mask.fill(1.0);
    assert_ne!(case.run(&kernels, &[case.tokens]).state, before);
    // A call of no tokens.
    let none = case.run(&kernels, &[0]);
    assert_eq!(none.state, before);
}

#[test]
fn a_sequence_gets_the_same_bits_alone_and_among_others() {
    let kernels = machine().kernels(SINGLE).unwrap();
    let mut dice = Dice(11);
    let case = std::iter::repeat_with(|| Case::draw(SINGLE, &mut dice))
        .find(|case| case.batch > 2 && case.tokens > 1)
        .unwrap();
    let (whole, rows) = (case.run(&kernels, &[case.tokens]), case.tokens);
    let own = SINGLE.reads() * SINGLE.rank;
    for b in 0..case.batch {
        let part = |all: &[f32], width: usize| all[b * width..(b + 1) * width].to_vec();
        let alone = Case {
            sizes: SINGLE,
            width: case.width,
            batch: 1,
            tokens: rows,
            layers: case.layers,
            layer: case.layer,
            columns: case.columns,
            targets: case.targets.clone(),
            in_place: case.in_place.clone(),
            hidden: part(&case.hidden, rows * case.width),
            mask: part(&case.mask, rows),
            past: part(&case.past, case.layers * own),
            networks: case.networks.clone(),
            bias: case.bias.clone(),
            corrections: case.corrections.clone(),
            norm: case.norm.clone(),
            sources: case
                .sources
                .iter()
                .map(|all| part(all, all.len() / case.batch))
                .collect(),
        };
        let found = alone.run(&kernels, &[rows]);
        assert_eq!(found.state, whole.state[b * own..][..own]);
        for (found, whole) in found.values.iter().zip(&whole.values) {
            assert_eq!(*found, whole[b * found.len()..][..found.len()]);
        }
    }
}

#[test]
fn a_step_of_few_is_one_launch_of_many_two_and_a_prompt_three() {
    let folder = tempfile::tempdir().unwrap();
    let library = build(folder.path(), &[]);
    let machine = Machine::open(options(&library, Cache::default())).unwrap();
    let mut dice = Dice(5);
    for (normed, few) in [(false, true), (true, true), (false, false), (true, false)] {
        let kernels = machine.kernels(SINGLE).unwrap();
        let case = std::iter::repeat_with(|| Case::draw(SINGLE, &mut dice))
            .find(|case| (case.batch <= 8) == few && case.targets.last().unwrap().epsilon.is_some() == normed)
            .unwrap();
        for (ends, expected) in [
            (1, if few { 1 } else { 2 }),
            (case.tokens, if normed { 4 } else { 3 }),
        ] {
            let before = counted(&library, "emulator_launches");
            case.run(&kernels, &[ends]);
            assert_eq!(counted(&library, "emulator_launches") - before, expected);
        }
    }
}

/// Changes to the kernels, each a mistake that a compiler or a card could make as well, and which the check must find.
const MISTAKES: [(&str, &str); 13] = [
    (
        "(sums[0] + sums[1]) + (sums[2] + sums[3])",
        "sums[0] + sums[1] + sums[2]",
    ),
    ("fmaf(amount, key, keep * x)", "fmaf(amount, key, x)"),
    ("fmaf(-erase, recall, written)", "fmaf(erase, recall, written)"),
    (
        "i64 row = first + leaf;\n    if (leaf < FEW",
        "i64 row = first;\n    if (leaf < FEW",
    ),
    ("int writes = call->mask[own->row] != 0.0f;", "int writes = 1;"),
    (
        "reads[i] = recalled(own->kept, q);",
        "reads[i] = recalled(own->kept, q) + k[0];",
    ),
    ("own->value += sum;", "own->value += 2.0f * sum;"),
    (
        "sums[part * W + column] = sum;",
        "sums[part * W + column] = sum + sum;",
    ),
    ("fmaxf(sqrtf(sum), 1e-6f)", "sum"),
    ("factor * target->norm[n]", "factor"),
    ("values[n][e] += sums[n][e]", "values[n][e] -= sums[n][e]"),
    // A barrier that is missing: the drawn order of the threads brings it out.
    (
        "room->gates[g] = gate_of(room->proposal, call->bias, g);\n    __syncthreads();",
        "room->gates[g] = gate_of(room->proposal, call->bias, g);",
    ),
    // And one that not all threads reach.
    (
        "    float *state = call->state + own->row * (R * RANK);",
        "    float *state = call->state + own->row * (R * RANK);\n    if (threadIdx.x == 3) return;",
    ),
];

#[test]
fn wrong_kernels_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let library = build(folder.path(), &[]);
    let cache = folder.path().join("cache");
    for (right, wrong) in MISTAKES {
        assert_eq!(SOURCE.matches(right).count(), 1, "{right}");
        let mut options = options(&library, Cache::in_folder(&cache));
        options.source = SOURCE.replace(right, wrong);
        let sizes = Sizes { heads: 2, ..SINGLE };
        let Err(error) = Machine::open(options).unwrap().kernels(sizes) else {
            panic!("taken: {wrong}")
        };
        match &error {
            CudaError::Wrong { found, allowed, .. } => assert!(found > allowed),
            CudaError::Driver { found, .. } => {
                assert_eq!(found, "unspecified launch failure");
                mend(&library);
            }
            other => panic!("{wrong}: {other}"),
        }
        assert!(error.to_string().len() > 40);
    }
    // Nothing of that was kept.
    assert!(!cache.exists() || cache.read_dir().unwrap().next().is_none());
    // What is no program at all says why.
    let mut options = options(&library, Cache::default());
    options.source = SOURCE.replace("INSIDE float recalled", "INSIDE float recalls");
    let error = Machine::open(options).unwrap().kernels(SINGLE).unwrap_err();
    assert!(matches!(error, CudaError::Compiler { .. }));
    assert!(error.to_string().contains("recalled"));
}

#[test]
fn an_image_is_compiled_once_and_a_damaged_file_anew() {
    let folder = tempfile::tempdir().unwrap();
    let library = build(folder.path(), &[]);
    let cache = folder.path().join("cache");
    let compiled = || counted(&library, "emulator_compilations");
    let open = || Machine::open(options(&library, Cache::in_folder(&cache))).unwrap();
    let machine = open();
    let kernels = machine.kernels(SINGLE).unwrap();
    // The same for everybody who asks while somebody has them.
    assert!(Arc::ptr_eq(&kernels, &machine.kernels(SINGLE).unwrap()));
    assert_eq!(compiled(), 1);
    // Another process finds the file.
    open().kernels(SINGLE).unwrap();
    assert_eq!(compiled(), 1);
    let files = || -> Vec<_> {
        cache
            .read_dir()
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect()
    };
    let [file] = &files()[..] else {
        panic!("{:?}", files())
    };
    let whole = std::fs::read(file).unwrap();
    for at in [0, 20, 45, 60, whole.len() - 1] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        std::fs::write(file, damaged).unwrap();
        let before = compiled();
        open().kernels(SINGLE).unwrap();
        assert_eq!(compiled(), before + 1, "byte {at}");
        assert_eq!(files().len(), 1);
    }
    // Other sizes and another text have files of their own.
    let before = compiled();
    open().kernels(Sizes { rank: 4, ..SINGLE }).unwrap();
    let mut other = options(&library, Cache::in_folder(&cache));
    other.source = format!("{SOURCE}\n// another");
    Machine::open(other).unwrap().kernels(SINGLE).unwrap();
    assert_eq!(compiled(), before + 2);
    assert_eq!(files().len(), 3);
    // The kernels outlive the machine.
    drop(machine);
    let case = Case::draw(SINGLE, &mut Dice(9));
    case.run(&kernels, &[case.tokens]);
}

#[test]
fn a_machine_is_shared_while_somebody_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let library = build(folder.path(), &[]);
    let machine = Machine::shared(0, Some(&library)).unwrap();
    assert!(Arc::ptr_eq(
        &machine,
        &Machine::shared(0, Some(&library)).unwrap()
    ));
    assert_eq!(machine.describe(), "NVRTC 13.2 for sm_90");
    assert_eq!(machine.device().architecture(), 90);
    // Others in the process go by the thread's context: it is as it was.
    let kernels = machine.kernels(SINGLE).unwrap();
    let case = Case::draw(SINGLE, &mut Dice(13));
    case.run(&kernels, &[case.tokens]);
    drop(kernels);
    assert_eq!(counted(&library, "emulator_entered"), 0);
}

#[test]
fn what_is_missing_is_said_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("nowhere.so");
    let error = Driver::open(Some(&nowhere)).unwrap_err().to_string();
    assert!(
        error.contains("cannot open shared object file") && error.contains("install the driver"),
        "{error}"
    );
    let library = build(folder.path(), &[]);
    let mut without = options(&library, Cache::default());
    without.compiler = Some(nowhere);
    let error = Machine::open(without).unwrap_err().to_string();
    assert!(error.contains("onnxruntime-gpu[cuda,cudnn]"), "{error}");
    // A library that is another one.
    let mut wrong = options(&library, Cache::default());
    wrong.driver = Some("libm.so.6".into());
    let error = Machine::open(wrong).unwrap_err().to_string();
    assert!(
        error.contains("it has no cuInit") && error.contains("undefined symbol"),
        "{error}"
    );
    // A card that is not there, and no card at all.
    let mut second = options(&library, Cache::default());
    second.device = 1;
    let error = Machine::open(second).unwrap_err().to_string();
    assert!(
        error.contains("looking for the card: invalid device ordinal (error 101)"),
        "{error}"
    );
    let none = scratch(folder.path(), "none");
    let library = build(&none, &["-DDEVICES=0"]);
    let error = Machine::open(options(&library, Cache::default()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("no CUDA-capable device"), "{error}");
}

#[test]
fn a_card_newer_than_the_compiler_gets_intermediate_code_and_one_too_old_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for (architecture, target) in [("86", "sm_80"), ("121", "compute_90")] {
        let library = build(
            &scratch(folder.path(), architecture),
            &[&format!("-DARCHITECTURE={architecture}")],
        );
        let machine = Machine::open(options(&library, Cache::default())).unwrap();
        assert_eq!(machine.describe(), format!("NVRTC 13.2 for {target}"));
        machine.kernels(SINGLE).unwrap();
    }
    let older = build(&scratch(folder.path(), "older"), &["-DARCHITECTURE=61"]);
    let error = Machine::open(options(&older, Cache::default()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("6.1") && error.contains("[75, 80, 90]"), "{error}");
}

#[test]
fn sizes_that_there_are_no_kernels_of_are_refused_before_anything_is_compiled() {
    for (sizes, expected) in [
        (
            Sizes { rank: 65, ..SINGLE },
            "the rank is 65, and the kernels have at most 64",
        ),
        (
            Sizes {
                heads: 17,
                rank: 64,
                ..SINGLE
            },
            "1088, and the kernels have at most 1024",
        ),
        (Sizes { heads: 0, ..SINGLE }, "found 0 state heads of rank 8"),
    ] {
        let error = machine().kernels(sizes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // The largest there is.
    let most = Sizes {
        heads: 16,
        rank: 64,
        own_lambda: true,
        ..SINGLE
    };
    machine().kernels(most).unwrap();
}

#[test]
#[allow(unsafe_code)]
fn what_does_not_fit_is_refused_before_anything_is_started() {
    let kernels = machine().kernels(SINGLE).unwrap();
    let target = |width: usize, rows: Option<Rows>, from: usize, own: usize, start: usize| Target {
        width,
        rows,
        corrections: vec![Correction {
            from,
            width: own,
            start,
        }],
        epsilon: None,
    };
    let rows = Some(Rows { stride: 12, start: 4 });
    let refused = |targets: Vec<Target>| Layer::new(Arc::clone(&kernels), targets).unwrap_err().to_string();
    assert!(refused(vec![target(8, rows, 0, 6, 3)]).contains("columns 3 to 9 does not lie in the 8"));
    assert!(refused(vec![target(9, rows, 0, 6, 3)]).contains("columns 4 to 13 does not lie in the 12"));
    assert!(refused(vec![target(0, None, 0, 1, 0)]).contains("rows of no numbers"));
    assert!(refused(vec![target(8, None, 0, 8, 0); 5]).contains("at most 4"));
    let mut normed = target(8, None, 0, 8, 0);
    normed.epsilon = Some(1e-6);
    assert!(refused(vec![normed.clone(), normed.clone()]).contains("expected one at most"));
    normed.corrections.push(normed.corrections[0]);
    assert!(refused(vec![normed]).contains("2 corrections, expected 1"));

    let layer = Layer::new(Arc::clone(&kernels), vec![target(8, rows, 0, 6, 1)]).unwrap();
    let values = [Values {
        out: 1 << 20,
        source: 2 << 20,
        norm: 0,
    }];
    let good = Call {
        batch: 1,
        tokens: 2,
        width: 16,
        columns: 6,
        layers: 2,
        layer: 1,
        hidden: 3 << 20,
        write_mask: 4 << 20,
        past_memory: 5 << 20,
        networks: 6 << 20,
        gate_bias: 7 << 20,
        corrections: 8 << 20,
        present_memory: 9 << 20,
        work: 10 << 20,
        values: &values,
        stream: 0,
    };
    // SAFETY: none of these is started, as each is refused.
    let refused = |call: Call<'_>| unsafe { layer.forward(&call) }.unwrap_err().to_string();
    assert!(refused(Call { columns: 5, ..good }).contains("columns 0 to 6 does not lie in the 5"));
    assert!(refused(Call { layer: 2, ..good }).contains("layer 2 of 2"));
    assert!(refused(Call { width: 0, ..good }).contains("hidden has 0"));
    assert!(refused(Call { values: &[], ..good }).contains("found the rows of 0 values, expected 1"));
    assert!(refused(Call { work: 0, ..good }).contains("an address"));
    let over = Call {
        present_memory: good.past_memory + 256,
        ..good
    };
    assert!(refused(over).contains("the same place"));
    for (wrong, expected) in [
        (Values { out: 0, ..values[0] }, "no place"),
        (
            Values {
                source: 0,
                ..values[0]
            },
            "is made from rows and has none",
        ),
        (Values { norm: 1, ..values[0] }, "weights without a norm"),
        (
            Values {
                out: values[0].source,
                ..values[0]
            },
            "lies over the wider rows",
        ),
    ] {
        assert!(
            refused(Call {
                values: &[wrong],
                ..good
            })
            .contains(expected),
            "{expected}"
        );
    }
    let many = Call {
        tokens: 1 << 40,
        ..good
    };
    assert!(refused(many).contains("too large"));
    assert_eq!(layer.work(usize::MAX, 2, 64), None);
    assert_eq!(layer.work(3, 1, 130), Some(3 * 3 * 32));
    assert_eq!(layer.work(3, 5, 130), Some(3 * 5 * 32));
}

/// What the emulator is there to catch, in a process of its own, since it ends there.
#[test]
fn the_emulator_ends_a_process_that_writes_beside_its_memory() {
    const BESIDE: &str = "DELTAMEM_TEST_BESIDE";
    if std::env::var_os(BESIDE).is_some() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(&build(folder.path(), &[]), Cache::default());
        // One number behind the end of the last row.
        options.source = SOURCE.replace(
            "state[j] = row[j];",
            "{ state[j] = row[j]; if (b == 1 && head == HEADS - 1 && i == RANK - 1) state[RANK] = 0.0f; }",
        );
        let _ = Machine::open(options)
            .unwrap()
            .kernels(Sizes { rank: 3, ..SINGLE });
        return;
    }
    let name = "the_emulator_ends_a_process_that_writes_beside_its_memory";
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(BESIDE, "1")
        .output()
        .unwrap();
    assert!(!done.status.success());
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(said.contains("something wrote beside a block"), "{said}");
}
