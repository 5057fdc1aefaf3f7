//! One memory layer's launches: what each kernel is told, how many blocks of it there are, and in which order they go. It allocates
//! nothing, waits for nothing and loads nothing, so that a run can be captured as a CUDA graph.

use std::ops::Range;
use std::sync::Arc;

use crate::driver::Function;
use crate::{CudaError, Kernels, Result};

// As in kernels.cu.
const PART: usize = 64;
const COLUMNS: usize = 32;
const FEW: usize = 4;
const MANY: usize = 8;
const PROPOSING: u32 = 256;
const WHOLE_STEP: u32 = 512;
const WIDE: u32 = 128;
const ROWS: usize = 8;
const PREPARING: usize = 96;
/// Threads of the kernel that makes a step in one launch, and the widest networks that it has.
pub(crate) const STEP: usize = 512;
/// The most numbers of the networks that each of its blocks reads.
const SMALL: usize = 96 << 10;
/// The most sequences that it is worth it for: each has blocks of its own, which read the networks again.
const ALONE: usize = 8;
const MOST_TARGETS: usize = 4;
const MOST_CORRECTIONS: usize = 4;
/// Bytes that four numbers must lie at a multiple of: of the decoder's 4 · element, of the weights these.
const FOUR_FLOATS: u64 = 16;

/// An address on the card; 0: none.
pub type Address = u64;

/// A correction: columns of the layer's matrix, laid onto a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Correction {
    /// The first of its columns in the matrix.
    pub from: usize,
    /// How many are its own.
    pub width: usize,
    /// Where in the target's rows they are laid.
    pub start: usize,
}

/// Rows that a target's are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Numbers in a row.
    pub stride: usize,
    /// The first that is the target's.
    pub start: usize,
}

/// A value of the decoder's that the layer corrects, or only brings from a packed projection.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// Numbers in one of its rows.
    pub width: usize,
    /// What they are made from; none: the target is the correction alone.
    pub rows: Option<Rows>,
    /// What is laid on it, four at most.
    pub corrections: Vec<Correction>,
    /// The epsilon of the RMS norm of its one correction, where that has one.
    pub epsilon: Option<f32>,
}

/// Where a call's rows of one target lie.
#[derive(Debug, Clone, Copy, Default)]
pub struct Values {
    /// [B, T, width]; receives the corrected rows.
    pub out: Address,
    /// [B, T, stride]: what they are made from. It may be `out` where the rows are the same.
    pub source: Address,
    /// float32 [the correction's width]: the weights of its norm.
    pub norm: Address,
}

/// What one call brings, and where it lies on the card. All but the decoder's numbers are float32.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Sequences, B.
    pub batch: usize,
    /// Tokens of each, T.
    pub tokens: usize,
    /// D.
    pub width: usize,
    /// C, the columns of the corrections.
    pub columns: usize,
    /// The memory's layers, L, and which of them it is.
    pub layers: usize,
    /// This layer's number among them.
    pub layer: usize,
    /// [B, T, D]: the attention's input.
    pub hidden: Address,
    /// [B, T]: tokens whose mask is 0 leave the state as it is.
    pub write_mask: Address,
    /// [B, L, H, r, r].
    pub past_memory: Address,
    /// [D, W].
    pub networks: Address,
    /// [W − 3 H·r].
    pub gate_bias: Address,
    /// [H·r, C].
    pub corrections: Address,
    /// [B, 1, H, r, r]: the state after the call.
    pub present_memory: Address,
    /// As many numbers as [`Layer::work`] says.
    pub work: Address,
    /// The targets' rows, in the targets' order.
    pub values: &'a [Values],
    /// The stream's handle.
    pub stream: usize,
}

/// One memory layer on a card. Its weights stay where the graph has them.
#[derive(Debug)]
pub struct Layer {
    kernels: Arc<Kernels>,
    targets: Vec<Target>,
}

// What the kernels take, field by field as there.

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawCorrection {
    from: i64,
    width: i64,
    start: i64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawTarget {
    source: Address,
    out: Address,
    norm: Address,
    stride: i64,
    begin: i64,
    width: i64,
    slices: i64,
    count: i64,
    corrections: [RawCorrection; MOST_CORRECTIONS],
    epsilon: f32,
    unused: f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawCall {
    hidden: Address,
    mask: Address,
    past: Address,
    networks: Address,
    bias: Address,
    corrections: Address,
    state: Address,
    work: Address,
    past_stride: i64,
    batch: i64,
    tokens: i64,
    width: i64,
    columns: i64,
    parts: i64,
    slices: i64,
    targets: i64,
    target: [RawTarget; MOST_TARGETS],
}

/// What the kernels check that both sides mean the same by.
pub(crate) const CALL_BYTES: usize = size_of::<RawCall>();

impl Layer {
    /// A layer with these targets.
    ///
    /// # Errors
    /// [`CudaError::Call`] when a correction does not lie in its target, or there are too many.
    pub fn new(kernels: Arc<Kernels>, targets: Vec<Target>) -> Result<Self> {
        if targets.len() > MOST_TARGETS {
            return Err(CudaError::Size {
                what: "the number of corrected values",
                found: targets.len(),
                most: MOST_TARGETS,
            });
        }
        for target in &targets {
            target.check()?;
        }
        if targets.iter().filter(|target| target.epsilon.is_some()).count() > 1 {
            return Err(CudaError::Call(
                "found norms on the corrections of two values, expected one at most".into(),
            ));
        }
        Ok(Self { kernels, targets })
    }

    /// The kernels.
    pub fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    /// The targets.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Numbers of `work` for a call of B sequences of T tokens of width D; `None` where that is no number.
    pub fn work(&self, batch: usize, tokens: usize, width: usize) -> Option<usize> {
        let rows = batch.checked_mul(tokens)?;
        let each = if tokens == 1 { parts(width) } else { 1 };
        rows.checked_mul(each)?
            .checked_mul(self.kernels.sizes().proposal_width())
    }

    /// Starts the call on its stream; any split of a stream of tokens into calls gives the same bits. With no tokens the state is brought, and
    /// no more.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the call does not fit the layer; nothing was started then. [`CudaError::Driver`] when the card fails.
    ///
    /// # Safety
    /// Every address is one of the card's, of as many numbers as its field says, which nobody else writes until the stream is behind the call
    /// (nor reads, where the call writes); the layer lives as long.
    #[allow(unsafe_code)]
    pub unsafe fn forward(&self, call: &Call<'_>) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.launch(call, true) }
    }

    /// As [`Layer::forward`]; `whole` lets a step go in one launch, where it can.
    ///
    /// # Safety
    /// As there.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn launch(&self, call: &Call<'_>, whole: bool) -> Result<()> {
        if call.batch == 0 {
            return Ok(());
        }
        let sizes = *self.kernels.sizes();
        let step = self.step(call).filter(|_| whole);
        let columns = if step.is_some() {
            STEP
        } else if call.tokens > 1 && self.in_fours(call) {
            4 * WIDE as usize
        } else {
            WIDE as usize
        };
        let raw = self.raw(call, columns)?;
        let rows = call.batch * call.tokens;
        let tiles = sizes.proposal_width().div_ceil(COLUMNS);
        let slices: usize = raw.slices.try_into().unwrap_or(0);
        let device = self.kernels.device();
        let _entered = device.enter()?;
        let start = |function: Function, blocks: &[usize], threads: u32| {
            // SAFETY: the kernels take a `RawCall`, as `CALL_BYTES` assured when they were compiled. Its addresses are the caller's, its sizes
            // were checked against the targets, and the module is that of `self.kernels`.
            unsafe { device.launch(function, count(blocks)?, threads, call.stream, &raw) }
        };
        let kernels = &self.kernels;
        if let Some(step) = step {
            return start(step, &[rows, slices.max(1)], WHOLE_STEP);
        }
        if call.tokens == 1 {
            start(
                kernels.propose,
                &[parts(call.width), tiles, rows.div_ceil(FEW)],
                PROPOSING,
            )?;
            return start(kernels.remember, &[rows, slices.max(1)], WIDE);
        }
        let scanning = 2 * sizes.rank.next_multiple_of(32) + PREPARING;
        if rows > 0 {
            start(kernels.propose_many, &[tiles, rows.div_ceil(MANY)], PROPOSING)?;
        }
        start(
            kernels.scan,
            &[call.batch, sizes.heads],
            u32::try_from(scanning).unwrap_or(0),
        )?;
        if rows == 0 {
            return Ok(());
        }
        if slices > 0 {
            let correct = if columns > WIDE as usize {
                kernels.correct_fours
            } else {
                kernels.correct
            };
            start(correct, &[slices, rows.div_ceil(ROWS)], WIDE)?;
        }
        if self.targets.iter().any(|target| target.epsilon.is_some()) {
            start(kernels.correct_normed, &[rows], WIDE)?;
        }
        Ok(())
    }

    /// The kernel that makes the call in one launch, where it is a step of few sequences with small networks.
    fn step(&self, call: &Call<'_>) -> Option<Function> {
        let small = call.width.saturating_mul(self.kernels.sizes().proposal_width()) <= SMALL;
        self.kernels
            .step
            .filter(|_| call.tokens == 1 && call.batch <= ALONE && small)
    }

    /// What the kernels are told, where a block has so many columns.
    fn raw(&self, call: &Call<'_>, columns: usize) -> Result<RawCall> {
        self.check(call)?;
        let sizes = self.kernels.sizes();
        let state = sizes.reads() * sizes.rank;
        let before = state as u64 * call.layer as u64 * size_of::<f32>() as u64;
        let mut raw = RawCall {
            hidden: call.hidden,
            mask: call.write_mask,
            past: call.past_memory + before,
            networks: call.networks,
            bias: call.gate_bias,
            corrections: call.corrections,
            state: call.present_memory,
            work: call.work,
            past_stride: number(state.saturating_mul(call.layers))?,
            batch: number(call.batch)?,
            tokens: number(call.tokens)?,
            width: number(call.width)?,
            columns: number(call.columns)?,
            parts: number(parts(call.width))?,
            slices: 0,
            targets: number(self.targets.len())?,
            target: [RawTarget::default(); MOST_TARGETS],
        };
        for ((raw_target, target), values) in raw.target.iter_mut().zip(&self.targets).zip(call.values) {
            let slices = if target.epsilon.is_none() {
                target.width.div_ceil(columns)
            } else {
                // In a prompt it has a kernel of its own.
                usize::from(call.tokens == 1)
            };
            let rows = target.rows.unwrap_or(Rows { stride: 0, start: 0 });
            *raw_target = RawTarget {
                source: values.source,
                out: values.out,
                norm: if target.epsilon.is_some() { values.norm } else { 0 },
                stride: number(rows.stride)?,
                begin: number(rows.start)?,
                width: number(target.width)?,
                slices: number(slices)?,
                count: number(target.corrections.len())?,
                corrections: Default::default(),
                epsilon: target.epsilon.unwrap_or(0.0),
                unused: 0.0,
            };
            for (raw, own) in raw_target.corrections.iter_mut().zip(&target.corrections) {
                *raw = RawCorrection {
                    from: number(own.from)?,
                    width: number(own.width)?,
                    start: number(own.start)?,
                };
            }
            raw.slices += raw_target.slices;
        }
        Ok(raw)
    }

    /// Whether every row, correction and address of targets without a norm falls into fours.
    fn in_fours(&self, call: &Call<'_>) -> bool {
        let element = self.kernels.sizes().element.bytes() as u64;
        let four = |numbers: &[usize]| numbers.iter().all(|n| n.is_multiple_of(4));
        call.columns.is_multiple_of(4)
            && call.corrections.is_multiple_of(FOUR_FLOATS)
            && self
                .targets
                .iter()
                .zip(call.values)
                .filter(|(target, _)| target.epsilon.is_none())
                .all(|(target, values)| {
                    let rows = target.rows.unwrap_or(Rows { stride: 0, start: 0 });
                    four(&[target.width, rows.stride, rows.start])
                        && target
                            .corrections
                            .iter()
                            .all(|own| four(&[own.from, own.width, own.start]))
                        && (values.source | values.out).is_multiple_of(4 * element)
                })
    }

    fn check(&self, call: &Call<'_>) -> Result<()> {
        let refuse = |what: String| Err(CudaError::Call(what));
        let sizes = self.kernels.sizes();
        if call.width == 0 || call.layer >= call.layers {
            return refuse(format!(
                "hidden has {} numbers a row and this is layer {} of {}, expected 1 or more and a smaller layer",
                call.width, call.layer, call.layers
            ));
        }
        if call.values.len() != self.targets.len() {
            return refuse(format!(
                "found the rows of {} values, expected {}",
                call.values.len(),
                self.targets.len()
            ));
        }
        // Tensors without numbers may lie nowhere.
        let needed = [
            call.hidden,
            call.write_mask,
            call.networks,
            call.gate_bias,
            call.corrections,
            call.work,
        ];
        let some = call.tokens > 0;
        if call.past_memory == 0 || call.present_memory == 0 || (some && needed.contains(&0)) {
            return refuse("an address of the call is missing".into());
        }
        for (target, values) in self.targets.iter().zip(call.values) {
            if some {
                target.check_values(values)?;
            }
            if let Some(own) = target
                .corrections
                .iter()
                .find(|own| own.from.saturating_add(own.width) > call.columns)
            {
                return refuse(format!(
                    "a correction of columns {} to {} does not lie in the {} columns of corrections",
                    own.from,
                    own.from.saturating_add(own.width),
                    call.columns
                ));
            }
        }
        // Blocks read the old state while another one writes the new one.
        let bytes = |count: usize| count.saturating_mul(size_of::<f32>()) as u64;
        let state = sizes.reads() * sizes.rank;
        let span = |from: Address, count: usize| -> Range<u64> { from..from.saturating_add(bytes(count)) };
        let past = span(
            call.past_memory,
            state.saturating_mul(call.layers).saturating_mul(call.batch),
        );
        let present = span(call.present_memory, state.saturating_mul(call.batch));
        if past.start < present.end && present.start < past.end {
            return refuse(
                "the memory before and behind the call lie in the same place, expected two".into(),
            );
        }
        Ok(())
    }
}

impl Target {
    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(CudaError::Call(what));
        if self.corrections.len() > MOST_CORRECTIONS {
            return Err(CudaError::Size {
                what: "the number of one value's corrections",
                found: self.corrections.len(),
                most: MOST_CORRECTIONS,
            });
        }
        if self.width == 0 {
            return refuse("a corrected value has rows of no numbers".into());
        }
        if let Some(own) = self
            .corrections
            .iter()
            .find(|own| own.width == 0 || own.start.saturating_add(own.width) > self.width)
        {
            return refuse(format!(
                "a correction of columns {} to {} does not lie in the {} columns of its target",
                own.start,
                own.start.saturating_add(own.width),
                self.width
            ));
        }
        if let Some(rows) = self.rows
            && rows.start.saturating_add(self.width) > rows.stride
        {
            return refuse(format!(
                "a part of columns {} to {} does not lie in the {} columns of its projection",
                rows.start,
                rows.start.saturating_add(self.width),
                rows.stride
            ));
        }
        if self.epsilon.is_some() && self.corrections.len() != 1 {
            return refuse(format!(
                "a value with a norm on its correction has {} corrections, expected 1",
                self.corrections.len()
            ));
        }
        Ok(())
    }

    fn check_values(&self, values: &Values) -> Result<()> {
        let apart = self.rows.is_some_and(|rows| rows.stride != self.width);
        let what = if values.out == 0 {
            "a value has no place to go to"
        } else if self.rows.is_some() != (values.source != 0) {
            "a value is made from rows and has none, or has some and is made from nothing"
        } else if self.epsilon.is_some() != (values.norm != 0) {
            "a value's correction has a norm without weights, or weights without a norm"
        } else if values.source == values.out && apart {
            "a value lies over the wider rows that it is made from"
        } else {
            return Ok(());
        };
        Err(CudaError::Call(what.into()))
    }
}

/// Parts of the networks' sums: they hang on the width alone.
fn parts(width: usize) -> usize {
    width.div_ceil(PART)
}

/// A number as the kernels take it.
fn number(n: usize) -> Result<i64> {
    i64::try_from(n).map_err(|_| CudaError::Call(format!("a size of {n} is too large")))
}

/// Blocks of one launch.
fn count(blocks: &[usize]) -> Result<u32> {
    let all = blocks
        .iter()
        .try_fold(1_usize, |all, &n| all.checked_mul(n))
        .and_then(|all| i32::try_from(all).ok());
    let all = all.and_then(|all| u32::try_from(all).ok());
    all.ok_or_else(|| {
        CudaError::Call(format!(
            "a call of {blocks:?} blocks is too large, use fewer tokens at once"
        ))
    })
}
