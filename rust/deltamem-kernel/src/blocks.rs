//! Products with weights of 4 or 8 bits in blocks that share a scale, as `com.microsoft:MatMulNBits` has them at accuracy level 4: each block
//! of a row of x is rounded to 8 bits, products of whole numbers are summed over a block exactly, and the blocks' sums are added in float32,
//! one after the other. It knows nothing of graphs.
//!
//! The weights are packed in panels of 32 columns, read from front to back. Whatever number of rows there is, each sum is made in the same
//! order: a token has the same bits alone, in a prompt and among the tokens of others.

use std::marker::PhantomData;

use deltamem_core::lanes::Lanes;

use crate::aligned::Aligned;
use crate::dots::{Dots, DotsWork, IntegerInstructions};
use crate::layer::{Pool, share};

/// Columns of a panel.
const PANEL: usize = 32;
/// Of `inner`, what one step takes: four for each half of a byte, or for each of two registers.
const STEP: usize = 8;
/// Four bytes in one lane of a register.
type Four = [u8; 4];
/// How far ahead of the first rows' products their weights are asked for, in fours. They come from memory, and the processor alone does not
/// ask for enough of them.
const AHEAD: usize = 1536;
/// Products that a task has at least, so that handing it to a thread is worth it.
const SHARED: usize = 1 << 17;

/// How many bits a weight has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// Weights of 0 to 15 that stand for −8 to 7; two in a byte, the first in its lower half.
    Four,
    /// Weights of 0 to 255 that stand for −128 to 127.
    Eight,
}

impl Bits {
    const fn bytes(self, weights: usize) -> usize {
        match self {
            Self::Four => weights / 2,
            Self::Eight => weights,
        }
    }

    const fn zero(self) -> u8 {
        match self {
            Self::Four => 8,
            Self::Eight => 128,
        }
    }
}

/// What a matrix [inner, columns] in blocks looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockShape {
    /// Numbers in a row of x.
    pub inner: usize,
    /// Numbers in a row of the product.
    pub columns: usize,
    /// Weights of a column that share a scale: a power of two from 32 to 256. The last block of a column is filled up.
    pub block: usize,
    /// How many bits a weight has.
    pub bits: Bits,
}

impl BlockShape {
    /// Blocks of a column.
    const fn blocks(&self) -> usize {
        self.inner.div_ceil(self.block)
    }
}

/// Weights or a call that do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlocksError {
    /// A block of another length.
    #[error("blocks of {0} weights, expected 32, 64, 128 or 256")]
    Block(usize),
    /// Numbers that do not fill their shape.
    #[error("{name} holds {found} numbers, expected {expected}")]
    Length {
        /// What holds them.
        name: &'static str,
        /// How many there are.
        found: usize,
        /// How many there must be.
        expected: usize,
    },
    /// x whose rows are of another length.
    #[error("x holds {found} numbers, expected rows of {inner}")]
    Rows {
        /// How many there are.
        found: usize,
        /// How many a row has.
        inner: usize,
    },
    /// A matrix without rows or columns.
    #[error("a matrix of {inner} by {columns} weights has none")]
    Empty {
        /// Its rows.
        inner: usize,
        /// Its columns.
        columns: usize,
    },
}

/// A matrix in blocks, packed.
#[derive(Debug)]
pub struct Blocks {
    shape: BlockShape,
    instructions: IntegerInstructions,
    /// [panels][inner / 8][2][16 columns][4], each byte one weight of the first four and one of the next; of 8 bits twice as many.
    weights: Aligned<Four>,
    /// [panels][blocks][32].
    scales: Aligned<f32>,
}

/// What [`Blocks::multiply`] works in, kept between calls.
#[derive(Debug, Default)]
pub struct Rounded {
    /// [rows][blocks][block / 4], signed bytes.
    levels: Vec<Four>,
    /// [rows][blocks]: what a level of 1 stands for.
    scales: Vec<f32>,
    /// [rows][blocks]: the sum of a block's levels, times minus the weights' zero.
    starts: Vec<i32>,
}

impl Blocks {
    /// Packs weights [columns, blocks, bytes of a block] with scales [columns, blocks].
    ///
    /// # Errors
    /// [`BlocksError`] where the block is of another length than 32, 64, 128 or 256, or weights or scales do not fill the shape.
    pub fn pack(
        weights: &[u8],
        scales: &[f32],
        shape: BlockShape,
        instructions: IntegerInstructions,
    ) -> Result<Self, BlocksError> {
        let BlockShape {
            inner,
            columns,
            block,
            bits,
        } = shape;
        if ![32, 64, 128, 256].contains(&block) {
            return Err(BlocksError::Block(block));
        }
        if inner == 0 || columns == 0 {
            return Err(BlocksError::Empty { inner, columns });
        }
        let blocks = shape.blocks();
        let column = bits.bytes(blocks * block);
        fits("the weights", weights.len(), columns.saturating_mul(column))?;
        fits("the scales", scales.len(), columns.saturating_mul(blocks))?;
        let panels = columns.div_ceil(PANEL);
        let size = column * PANEL / 4;
        // Weights behind the last column are zeros, as their scales are.
        let mut packed = Aligned::zeros(panels * size);
        for (panel, own) in packed
            .numbers_mut()
            .chunks_exact_mut(size)
            .zip(weights.chunks(PANEL * column))
        {
            for (lane, column) in own.chunks_exact(column).enumerate() {
                let (fours, _) = column.as_chunks::<4>();
                for (register, &four) in panel[lane..].iter_mut().step_by(PANEL).zip(fours) {
                    *register = match bits {
                        Bits::Four => halves_apart(four),
                        Bits::Eight => four,
                    };
                }
            }
        }
        let mut own_scales = Aligned::zeros(panels * blocks * PANEL);
        let size = blocks * PANEL;
        for (panel, own) in own_scales
            .numbers_mut()
            .chunks_exact_mut(size)
            .zip(scales.chunks(size))
        {
            for (lane, column) in own.chunks_exact(blocks).enumerate() {
                for (scale, &own) in panel[lane..].iter_mut().step_by(PANEL).zip(column) {
                    *scale = own;
                }
            }
        }
        Ok(Self {
            shape,
            instructions,
            weights: packed,
            scales: own_scales,
        })
    }

    /// What it looks like.
    pub fn shape(&self) -> BlockShape {
        self.shape
    }

    /// x [rows, inner] times the matrix, into `out` [rows, columns].
    ///
    /// # Errors
    /// [`BlocksError`] where x or out do not fill their shape; out is as it was then.
    pub fn multiply(
        &self,
        x: &[f32],
        out: &mut [f32],
        rounded: &mut Rounded,
        pool: &dyn Pool,
    ) -> Result<(), BlocksError> {
        let BlockShape { inner, columns, .. } = self.shape;
        if !x.len().is_multiple_of(inner) {
            return Err(BlocksError::Rows {
                found: x.len(),
                inner,
            });
        }
        let rows = x.len() / inner;
        fits("the product", out.len(), rows.saturating_mul(columns))?;
        rounded.room(rows, &self.shape);
        self.round(x, rounded, pool);
        let panels = columns.div_ceil(PANEL);
        let own = SHARED.div_ceil(rows.max(1) * inner * PANEL).min(panels);
        let into = Columns::new(out, columns);
        let task = |n: usize| {
            let panels = n * own..panels.min((n + 1) * own);
            self.instructions.run(Multiply {
                matrix: self,
                rounded,
                panels,
                into: &into,
            });
        };
        match panels.div_ceil(own) {
            1 => task(0),
            tasks => pool.run(tasks, &task),
        }
        Ok(())
    }

    /// Rounds the rows; many of them in parallel.
    fn round(&self, x: &[f32], rounded: &mut Rounded, pool: &dyn Pool) {
        let BlockShape { inner, block, .. } = self.shape;
        let blocks = self.shape.blocks();
        let own = (SHARED / 8).div_ceil(inner);
        let tasks = x
            .chunks(own * inner)
            .zip(rounded.levels.chunks_mut(own * blocks * block / 4))
            .zip(rounded.scales.chunks_mut(own * blocks))
            .zip(rounded.starts.chunks_mut(own * blocks))
            .map(|(((x, levels), scales), starts)| Round {
                shape: self.shape,
                x,
                levels,
                scales,
                starts,
            });
        if tasks.len() == 1 {
            tasks.for_each(|task| self.instructions.run(task));
        } else {
            share(pool, tasks, |task| self.instructions.run(task));
        }
    }
}

/// Eight weights of 4 bits, two in a byte, with the first four in the lower halves and the others in the upper.
fn halves_apart(pairs: Four) -> Four {
    let weight = |n: usize| pairs[n / 2] >> (4 * (n % 2)) & 15;
    std::array::from_fn(|n| weight(n) | weight(n + 4) << 4)
}

fn fits(name: &'static str, found: usize, expected: usize) -> Result<(), BlocksError> {
    if found == expected {
        Ok(())
    } else {
        Err(BlocksError::Length {
            name,
            found,
            expected,
        })
    }
}

impl Rounded {
    fn room(&mut self, rows: usize, shape: &BlockShape) {
        let blocks = rows * shape.blocks();
        self.levels.resize(blocks * shape.block / 4, [0; 4]);
        self.scales.resize(blocks, 0.0);
        self.starts.resize(blocks, 0);
    }
}

/// Rows of x to be rounded.
struct Round<'a> {
    shape: BlockShape,
    x: &'a [f32],
    levels: &'a mut [Four],
    scales: &'a mut [f32],
    starts: &'a mut [i32],
}

#[allow(clippy::inline_always)] // see `instructions::Work`
impl DotsWork for Round<'_> {
    #[inline(always)]
    fn run<D: Dots<N>, const N: usize>(self, dots: D) {
        let BlockShape { inner, block, .. } = self.shape;
        let zero = i32::from(self.shape.bits.zero());
        let blocks = self.shape.blocks();
        let floats = dots.floats();
        let mut last = [0.0; 256];
        for (row, x) in self.x.chunks_exact(inner).enumerate() {
            for n in 0..blocks {
                let own = &x[n * block..inner.min((n + 1) * block)];
                let own = if own.len() == block {
                    own
                } else {
                    last[..own.len()].copy_from_slice(own);
                    last[own.len()..block].fill(0.0);
                    &last[..block]
                };
                let (numbers, _) = own.as_chunks::<N>();
                let none = floats.splat(0.0);
                // What is not finite is not to be rounded away: times 0 it is NaN, and so is all that comes of the block.
                let (mut largest, mut poison) = (none, none);
                for numbers in numbers {
                    let x = floats.load(numbers);
                    largest = floats.higher(floats.higher(x, floats.subtract(none, x)), largest);
                    poison = floats.multiply_add(x, none, poison);
                }
                let largest = floats.store(largest).iter().fold(0.0_f32, |a, &b| a.max(b));
                let poison: f32 = floats.store(poison).iter().sum();
                let at = row * blocks + n;
                let scale = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                self.scales[at] = largest / 127.0 + poison;
                let scale = floats.splat(scale);
                let levels = &mut self.levels[at * block / 4..][..block / 4];
                let mut sum = dots.repeat(0);
                for (numbers, levels) in numbers.iter().zip(levels.chunks_exact_mut(N / 4)) {
                    let rounded = dots.round(floats.multiply(floats.load(numbers), scale));
                    sum = dots.add(sum, rounded);
                    dots.narrow(rounded, levels);
                }
                // What is not finite is rounded to anything.
                self.starts[at] = dots.sum(sum).wrapping_mul(-zero);
            }
        }
    }
}

/// Panels of a product.
struct Multiply<'a> {
    matrix: &'a Blocks,
    rounded: &'a Rounded,
    panels: std::ops::Range<usize>,
    into: &'a Columns<'a>,
}

#[allow(clippy::inline_always)]
impl DotsWork for Multiply<'_> {
    #[inline(always)]
    fn run<D: Dots<N>, const N: usize>(self, dots: D) {
        match self.matrix.shape.bits {
            Bits::Four => self.panels::<D, N, true>(dots),
            Bits::Eight => self.panels::<D, N, false>(dots),
        }
    }
}

#[allow(clippy::inline_always)]
impl Multiply<'_> {
    #[inline(always)]
    fn panels<D: Dots<N>, const N: usize, const NARROW: bool>(&self, dots: D) {
        let rows = self.rounded.scales.len() / self.matrix.shape.blocks();
        for panel in self.panels.clone() {
            for first in (0..PANEL).step_by(2 * N) {
                let mut row = 0;
                while row < rows {
                    let left = rows - row;
                    row += if D::ROWS == 6 && left >= 6 {
                        self.rows::<D, N, 6, NARROW>(dots, panel, first, row)
                    } else if D::ROWS == 6 && left >= 4 {
                        self.rows::<D, N, 4, NARROW>(dots, panel, first, row)
                    } else if D::ROWS == 3 && left >= 3 {
                        self.rows::<D, N, 3, NARROW>(dots, panel, first, row)
                    } else if left >= 2 {
                        self.rows::<D, N, 2, NARROW>(dots, panel, first, row)
                    } else {
                        self.rows::<D, N, 1, NARROW>(dots, panel, first, row)
                    };
                }
            }
        }
    }

    /// `R` rows through two registers of columns, from column `first` of the panel on. Returns `R`.
    #[inline(always)]
    fn rows<D: Dots<N>, const N: usize, const R: usize, const NARROW: bool>(
        &self,
        dots: D,
        panel: usize,
        first: usize,
        row: usize,
    ) -> usize {
        let BlockShape { columns, block, .. } = self.matrix.shape;
        let blocks = self.matrix.shape.blocks();
        let floats = dots.floats();
        // Of 4 bits one register has both fours of a step, of 8 bits each has its own.
        let step = if NARROW { PANEL } else { 2 * PANEL };
        let weights = &self.matrix.weights.numbers()[panel * blocks * block / STEP * step..]
            [..blocks * block / STEP * step];
        let scales = &self.matrix.scales.numbers()[panel * blocks * PANEL..][..blocks * PANEL];
        let levels: [&[Four]; R] = std::array::from_fn(|r| {
            &self.rounded.levels[(row + r) * blocks * block / 4..][..blocks * block / 4]
        });
        let own: [&[f32]; R] = std::array::from_fn(|r| &self.rounded.scales[(row + r) * blocks..][..blocks]);
        let starts: [&[i32]; R] =
            std::array::from_fn(|r| &self.rounded.starts[(row + r) * blocks..][..blocks]);
        let mut sums = [[floats.splat(0.0); 2]; R];
        for n in 0..blocks {
            let mut whole: [[D::Integers; 2]; R] = std::array::from_fn(|r| [dots.repeat(starts[r][n]); 2]);
            let weights = &weights[n * block / STEP * step..][..block / STEP * step];
            let levels: [&[[Four; 2]]; R] =
                std::array::from_fn(|r| levels[r][n * block / 4..][..block / 4].as_chunks::<2>().0);
            for (k, weights) in weights.chunks_exact(step).enumerate() {
                if row == 0 {
                    for line in (0..step * 2 * N / PANEL).step_by(16) {
                        dots.prefetch(weights, first + line + AHEAD);
                    }
                }
                for v in 0..2 {
                    let at = first + v * N;
                    let (low, high) = if NARROW {
                        let both = dots.bytes(&weights[at..][..N]);
                        (dots.low(both), dots.high(both))
                    } else {
                        (
                            dots.bytes(&weights[at..][..N]),
                            dots.bytes(&weights[PANEL + at..][..N]),
                        )
                    };
                    for (whole, levels) in whole.iter_mut().zip(&levels) {
                        let [a, b] = levels[k].map(i32::from_ne_bytes);
                        let sum = dots.dot::<NARROW>(whole[v], low, dots.repeat(a));
                        whole[v] = dots.dot::<NARROW>(sum, high, dots.repeat(b));
                    }
                }
            }
            for v in 0..2 {
                let scale = floats.load(at::<N>(scales, n * PANEL + first + v * N));
                for r in 0..R {
                    let scale = floats.multiply(scale, floats.splat(own[r][n]));
                    sums[r][v] = floats.multiply_add(dots.to_floats(whole[r][v]), scale, sums[r][v]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, &sums) in sums.iter().enumerate() {
                let from = panel * PANEL + first + v * N;
                if from < columns {
                    let own = &floats.store(sums)[..N.min(columns - from)];
                    self.into.put(row + r, from, own);
                }
            }
        }
        R
    }
}

/// `N` numbers from `from` on.
#[inline(always)]
#[allow(clippy::inline_always)]
fn at<const N: usize>(numbers: &[f32], from: usize) -> &[f32; N] {
    let (own, _) = numbers[from..][..N].as_chunks::<N>();
    &own[0]
}

/// Rows that several threads write, each its own columns.
struct Columns<'a> {
    numbers: *mut f32,
    count: usize,
    stride: usize,
    lent: PhantomData<&'a mut [f32]>,
}

// SAFETY: what is shared is the place, and `put` writes only where its caller alone does.
#[allow(unsafe_code)]
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    fn new(out: &'a mut [f32], stride: usize) -> Self {
        Self {
            numbers: out.as_mut_ptr(),
            count: out.len(),
            stride,
            lent: PhantomData,
        }
    }

    /// Writes columns `from` on of a row. No two tasks of a product have a column in common.
    #[inline(always)]
    #[allow(clippy::inline_always, unsafe_code)]
    fn put(&self, row: usize, from: usize, numbers: &[f32]) {
        let start = row * self.stride + from;
        assert!(from + numbers.len() <= self.stride && start + numbers.len() <= self.count);
        // SAFETY: it lies within the slice that is lent to `self`, by the line above; each column is of one panel, each panel of one task.
        unsafe {
            std::ptr::copy_nonoverlapping(numbers.as_ptr(), self.numbers.add(start), numbers.len());
        }
    }
}
