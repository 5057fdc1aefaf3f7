//! New kernels held against the rule on the card that they were compiled for, before anybody uses them: a small layer with all that a layer can have,
//! drawn once and for all, in one call and in pieces. A compiler or a card that does not do what it should is found here, and the
//! portable graph goes on.

use std::sync::Arc;

use deltamem_core::networks::{Delta, EditGate, Linear, NetworkError, PerProjection, Writes};

use crate::driver::{Buffer, Plain};
use crate::{Call, Correction, CudaError, Element, Kernels, Layer, Result, Rows, Sizes, Target, Values};

/// The largest difference of a state, of the largest number's size; of the decoder's numbers half of their last digit more.
const ALLOWED: f32 = 1e-4;

const WIDTH: usize = 150;
const BATCH: usize = 2;
const TOKENS: usize = 40;
/// Where the pieces end.
const ENDS: [usize; 3] = [1, 39, TOKENS];
const LAYERS: usize = 2;
const LAYER: usize = 1;
const EPSILON: f32 = 1e-5;

/// Runs the kernels on their card.
pub(crate) fn check(kernels: &Arc<Kernels>) -> Result<()> {
    let inputs = Inputs::draw(kernels.sizes());
    let (reads, states) = inputs
        .wanted()
        .map_err(|error| CudaError::Call(format!("the check of the kernels does not fit itself: {error}")))?;
    let correction = |from, width, start| Correction { from, width, start };
    let part = |stride, start, width, corrections: &[Correction]| Target {
        width,
        rows: Some(Rows { stride, start }),
        corrections: corrections.to_vec(),
        epsilon: None,
    };
    // What falls into fours: a packed projection of q, k and v, of which k is only brought, and the residual.
    let fours = Trial {
        columns: 40,
        targets: vec![
            part(40, 0, 20, &[correction(0, 20, 0)]),
            part(40, 20, 12, &[]),
            part(40, 32, 8, &[correction(20, 4, 4)]),
            part(16, 0, 16, &[correction(24, 16, 0)]),
        ],
        sources: vec![0, 0, 0, 1],
    };
    // What does not: two corrections on one projection that begins in the middle, and an output of its own with a norm.
    let odd = Trial {
        columns: 31,
        targets: vec![
            part(23, 2, 21, &[correction(1, 7, 3), correction(8, 10, 11)]),
            Target {
                width: 15,
                rows: None,
                corrections: vec![correction(18, 13, 1)],
                epsilon: Some(EPSILON),
            },
        ],
        sources: vec![0, 0],
    };
    for trial in [&fours, &odd] {
        let layer = Layer::new(Arc::clone(kernels), trial.targets.clone())?;
        let whole = trial.run(&layer, &inputs, &[TOKENS], true)?;
        let wanted = trial.wanted(&inputs, &reads);
        let element = kernels.sizes().element;
        let allowed = ALLOWED
            + match element {
                Element::Single => 0.0,
                Element::Half => 1.0 / 2048.0,
                Element::Brain => 1.0 / 256.0,
            };
        compare("the states", &whole.state, &states, ALLOWED)?;
        for (n, (found, wanted)) in whole.values.iter().zip(&wanted).enumerate() {
            let found: Vec<f32> = found.iter().map(|&bits| element.widen(bits)).collect();
            compare(&format!("the corrected values {n}"), &found, wanted, allowed)?;
        }
        // Steps in one launch, and in two.
        for in_one in [true, false] {
            if whole.bits() != trial.run(&layer, &inputs, &ENDS, in_one)?.bits() {
                return Err(CudaError::Wrong {
                    what: "a call and the same in pieces".into(),
                    found: f32::INFINITY,
                    allowed: 0.0,
                });
            }
        }
    }
    Ok(())
}

fn compare(what: &str, found: &[f32], wanted: &[f32], allowed: f32) -> Result<()> {
    let size = wanted.iter().fold(1.0, |size: f32, x| size.max(x.abs()));
    let mut largest = 0.0_f32;
    for (found, wanted) in found.iter().zip(wanted) {
        let apart = (found - wanted).abs() / size;
        largest = if apart.is_finite() {
            largest.max(apart)
        } else {
            f32::INFINITY
        };
    }
    if found.len() == wanted.len() && largest <= allowed {
        return Ok(());
    }
    Err(CudaError::Wrong {
        what: what.into(),
        found: largest,
        allowed,
    })
}

/// Numbers between −2 and 2 in steps of 1/64, which every element type holds exactly; they look drawn and are always the same.
fn numbers(count: usize, salt: u32) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 24) as f32 / 64.0 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

fn scaled(count: usize, salt: u32, by: f32) -> Vec<f32> {
    numbers(count, salt).into_iter().map(|x| x * by).collect()
}

impl Element {
    /// A number of [`numbers`] as the decoder has it, in the lowest bits.
    fn narrow(self, x: f32) -> u32 {
        let bits = x.to_bits();
        match self {
            Self::Single => bits,
            Self::Brain => bits >> 16,
            // Normal in both: the exponent's bias differs by 112, the fraction by 13 bits.
            Self::Half if x != 0.0 => (bits >> 16 & 0x8000) | (((bits & 0x7FFF_FFFF) - (112 << 23)) >> 13),
            Self::Half => 0,
        }
    }

    fn widen(self, bits: u32) -> f32 {
        match self {
            Self::Single => f32::from_bits(bits),
            Self::Brain => f32::from_bits(bits << 16),
            Self::Half if bits & 0x7C00 == 0x7C00 => f32::NAN,
            Self::Half => {
                f32::from_bits((bits & 0x8000) << 16 | (bits & 0x7FFF) << 13)
                    * f32::from_bits((127 + 112) << 23)
            }
        }
    }

    fn upload(self, kernels: &Kernels, numbers: &[u32]) -> Result<Buffer> {
        let device = kernels.device();
        if self == Self::Single {
            let numbers: Vec<f32> = numbers.iter().map(|&bits| f32::from_bits(bits)).collect();
            return device.with(&numbers);
        }
        #[allow(clippy::cast_possible_truncation)] // they fill 16 bits
        let numbers: Vec<u16> = numbers.iter().map(|&bits| bits as u16).collect();
        device.with(&numbers)
    }

    fn download(self, buffer: &Buffer, count: usize) -> Result<Vec<u32>> {
        fn all<T: Plain>(buffer: &Buffer, count: usize, bits: impl Fn(T) -> u32) -> Result<Vec<u32>> {
            Ok(buffer.download::<T>(count)?.into_iter().map(bits).collect())
        }
        match self {
            Self::Single => all(buffer, count, f32::to_bits),
            Self::Half | Self::Brain => all(buffer, count, |bits: u16| bits.into()),
        }
    }
}

/// A layer's weights and what its calls bring; the decoder's numbers are made from `element`.
struct Inputs {
    sizes: Sizes,
    hidden: Vec<f32>,
    mask: Vec<f32>,
    /// [B, L, H, r, r].
    past: Vec<f32>,
    /// [D, W].
    networks: Vec<f32>,
    bias: Vec<f32>,
}

/// Targets, the columns of their corrections, and which of two sources each is made from.
struct Trial {
    columns: usize,
    targets: Vec<Target>,
    sources: Vec<u32>,
}

/// What calls leave.
struct Left {
    state: Vec<f32>,
    values: Vec<Vec<u32>>,
}

impl Left {
    fn bits(&self) -> Vec<u32> {
        let state = self.state.iter().map(|x| x.to_bits());
        state.chain(self.values.iter().flatten().copied()).collect()
    }
}

impl Inputs {
    fn draw(sizes: &Sizes) -> Self {
        let rows = BATCH * TOKENS;
        let state = sizes.reads() * sizes.rank;
        let width = sizes.proposal_width();
        // Keys that nobody makes unit vectors must be short, or the rule itself grows without end.
        let by = if sizes.normalize_qk {
            1.0 / (WIDTH as f32).sqrt()
        } else {
            0.5 / ((WIDTH * sizes.rank) as f32).sqrt()
        };
        Self {
            sizes: *sizes,
            hidden: numbers(rows * WIDTH, 1),
            mask: numbers(rows, 2)
                .into_iter()
                .map(|x| if x < 1.2 { 1.0 } else { 0.0 })
                .collect(),
            past: scaled(BATCH * LAYERS * state, 3, 0.25),
            networks: scaled(WIDTH * width, 4, by),
            bias: numbers(sizes.logits(), 5),
        }
    }

    /// What the rule makes of them: the reads [B, T, R] and the states behind the call.
    fn wanted(&self) -> std::result::Result<(Vec<f32>, Vec<f32>), NetworkError> {
        let sizes = &self.sizes;
        let (reads, gates, width) = (sizes.reads(), sizes.gate_width(), sizes.proposal_width());
        let network = |from: usize, rows: usize, bias: Option<usize>, sign: f32| {
            let weight: Vec<f32> = (from..from + rows)
                .flat_map(|column| (0..WIDTH).map(move |d| sign * self.networks[d * width + column]))
                .collect();
            let bias = bias.map(|at| self.bias[at..at + rows].iter().map(|x| sign * x).collect());
            Linear::new(weight, bias, rows, WIDTH)
        };
        // The reads themselves are the corrections of a matrix of ones.
        let mut one = vec![0.0; reads * reads];
        one.iter_mut().step_by(reads + 1).for_each(|x| *x = 1.0);
        let twin = EditGate {
            heads: sizes.heads,
            rank: sizes.rank,
            query: network(0, reads, None, 1.0)?,
            key: network(reads, reads, None, 1.0)?,
            value: network(2 * reads, reads, None, 1.0)?,
            beta: network(3 * reads, gates, Some(0), 1.0)?,
            lambda: if sizes.own_lambda {
                Some(network(3 * reads + gates, gates, Some(gates), -1.0)?)
            } else {
                None
            },
            delta: PerProjection {
                q: Some(Delta {
                    weight: Linear::new(one, None, reads, reads)?,
                    scale: 1.0,
                }),
                ..PerProjection::default()
            },
            alpha: sizes.rank as f32,
            normalize_qk: sizes.normalize_qk,
            mode: sizes.mode,
            gates: sizes.gates,
        };
        let layer = reads * sizes.rank;
        let (mut all, mut states) = (Vec::new(), Vec::new());
        for (b, (hidden, mask)) in self
            .hidden
            .chunks_exact(TOKENS * WIDTH)
            .zip(self.mask.chunks_exact(TOKENS))
            .enumerate()
        {
            let mut state = self.past[(b * LAYERS + LAYER) * layer..][..layer].to_vec();
            let moves: Vec<bool> = mask.iter().map(|&x| x != 0.0).collect();
            let made = twin.forward(hidden, &mut state, Writes::Tokens(&moves))?;
            all.extend(made.q.unwrap_or_default());
            states.extend(state);
        }
        Ok((all, states))
    }
}

/// The rows of tokens `from` to `end` of each sequence.
fn cut<T: Copy>(all: &[T], width: usize, from: usize, end: usize) -> Vec<T> {
    let rows = all.chunks_exact(TOKENS * width);
    rows.flat_map(|rows| &rows[from * width..end * width])
        .copied()
        .collect()
}

impl Trial {
    /// [R, columns].
    fn corrections(&self, sizes: &Sizes) -> Vec<f32> {
        scaled(
            sizes.reads() * self.columns,
            6,
            1.0 / (sizes.reads() as f32).sqrt(),
        )
    }

    /// The rows that a target is made from, [B, T, stride].
    fn source(&self, n: usize) -> Vec<f32> {
        let stride = self.targets[n].rows.map_or(0, |rows| rows.stride);
        numbers(BATCH * TOKENS * stride, 7 + self.sources[n])
    }

    fn norm(&self, n: usize) -> Vec<f32> {
        scaled(
            self.targets[n].corrections.first().map_or(0, |own| own.width),
            9,
            0.5,
        )
    }

    /// What each target should be, from the reads.
    fn wanted(&self, inputs: &Inputs, reads: &[f32]) -> Vec<Vec<f32>> {
        let inner = inputs.sizes.reads();
        let matrix = self.corrections(&inputs.sizes);
        let one = |n: usize, target: &Target| {
            let (source, norm) = (self.source(n), self.norm(n));
            let mut out = Vec::with_capacity(BATCH * TOKENS * target.width);
            for (row, reads) in reads.chunks_exact(inner).enumerate() {
                let mut own = match target.rows {
                    Some(rows) => source[row * rows.stride + rows.start..][..target.width].to_vec(),
                    None => vec![0.0; target.width],
                };
                for correction in &target.corrections {
                    let mut delta = vec![0.0_f32; correction.width];
                    for (read, weights) in reads.iter().zip(matrix.chunks_exact(self.columns)) {
                        for (delta, weight) in delta.iter_mut().zip(&weights[correction.from..]) {
                            *delta += read * weight;
                        }
                    }
                    if let Some(epsilon) = target.epsilon {
                        let squares: f32 = delta.iter().map(|x| x * x).sum();
                        let factor = 1.0 / (squares / correction.width as f32 + epsilon).sqrt();
                        delta
                            .iter_mut()
                            .zip(&norm)
                            .for_each(|(x, weight)| *x *= factor * weight);
                    }
                    own[correction.start..]
                        .iter_mut()
                        .zip(delta)
                        .for_each(|(x, delta)| *x += delta);
                }
                out.extend(own);
            }
            out
        };
        self.targets
            .iter()
            .enumerate()
            .map(|(n, target)| one(n, target))
            .collect()
    }

    /// Runs the calls that end at `ends` on the card.
    #[allow(unsafe_code)]
    fn run(&self, layer: &Layer, inputs: &Inputs, ends: &[usize], in_one: bool) -> Result<Left> {
        let kernels = layer.kernels();
        let (device, sizes) = (kernels.device(), &inputs.sizes);
        let element = sizes.element;
        let networks = device.with(&inputs.networks)?;
        let bias = device.with(&inputs.bias)?;
        let corrections = device.with(&self.corrections(sizes))?;
        let mut past = device.with(&inputs.past)?;
        let own = sizes.reads() * sizes.rank;
        let present = device.allocate(BATCH * own * size_of::<f32>())?;
        let norms = (0..self.targets.len())
            .map(|n| device.with(&self.norm(n)))
            .collect::<Result<Vec<_>>>()?;
        let sources: Vec<Vec<u32>> = (0..self.targets.len())
            .map(|n| self.source(n).into_iter().map(|x| element.narrow(x)).collect())
            .collect();
        let hidden: Vec<u32> = inputs.hidden.iter().map(|&x| element.narrow(x)).collect();
        let mut left = Left {
            state: Vec::new(),
            values: self
                .targets
                .iter()
                .map(|target| vec![0; BATCH * TOKENS * target.width])
                .collect(),
        };
        let mut from = 0;
        for &end in ends {
            let tokens = end - from;
            let hidden = element.upload(kernels, &cut(&hidden, WIDTH, from, end))?;
            let mask = device.with(&cut(&inputs.mask, 1, from, end))?;
            let work = layer.work(BATCH, tokens, WIDTH).unwrap_or(0);
            let work = device.allocate(work * size_of::<f32>())?;
            let (mut values, mut kept) = (Vec::new(), Vec::new());
            for (n, target) in self.targets.iter().enumerate() {
                let out = device.allocate(BATCH * tokens * target.width * element.bytes())?;
                let mut own = Values {
                    out: out.address(),
                    source: 0,
                    norm: if target.epsilon.is_some() {
                        norms[n].address()
                    } else {
                        0
                    },
                };
                if let Some(rows) = target.rows {
                    let source = element.upload(kernels, &cut(&sources[n], rows.stride, from, end))?;
                    own.source = source.address();
                    kept.push(source);
                }
                values.push(own);
                kept.push(out);
            }
            let call = Call {
                batch: BATCH,
                tokens,
                width: WIDTH,
                columns: self.columns,
                layers: LAYERS,
                layer: LAYER,
                hidden: hidden.address(),
                write_mask: mask.address(),
                past_memory: past.address(),
                networks: networks.address(),
                gate_bias: bias.address(),
                corrections: corrections.address(),
                present_memory: present.address(),
                work: work.address(),
                values: &values,
                stream: 0,
            };
            // SAFETY: all of these lie on the kernels' card, in the sizes of the call, and are freed behind the wait.
            unsafe { layer.launch(&call, in_one)? };
            device.synchronize(0)?;
            left.state = present.download(BATCH * own)?;
            // The next piece goes on from there.
            let mut states = inputs.past.clone();
            for (all, state) in states
                .chunks_exact_mut(LAYERS * own)
                .zip(left.state.chunks_exact(own))
            {
                all[LAYER * own..][..own].copy_from_slice(state);
            }
            past.upload(&states)?;
            let outs = kept
                .iter()
                .filter(|buffer| values.iter().any(|own| own.out == buffer.address()));
            for ((all, target), out) in left.values.iter_mut().zip(&self.targets).zip(outs) {
                let width = target.width;
                let found = element.download(out, BATCH * tokens * width)?;
                for (all, found) in all
                    .chunks_exact_mut(TOKENS * width)
                    .zip(found.chunks_exact(tokens * width))
                {
                    all[from * width..end * width].copy_from_slice(found);
                }
            }
            from = end;
        }
        Ok(left)
    }
}
