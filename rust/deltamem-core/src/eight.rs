//! Eight numbers that are worked on together. What is written with them runs as vector instructions wherever a caller names them, whatever
//! the compiler does with loops: at link time it may leave a loop as it is for the sake of size.

/// Numbers in an [`Eight`].
pub const LANES: usize = 8;

/// How eight numbers are held and worked on. A value of the type stands for a processor that can do it. All ways give the same bits.
pub trait Eight: Copy {
    /// Eight numbers.
    type Numbers: Copy;

    /// Eight numbers from memory.
    fn load(self, numbers: &[f32; LANES]) -> Self::Numbers;

    /// The numbers, to memory.
    fn store(self, numbers: Self::Numbers) -> [f32; LANES];

    /// One number eight times.
    fn splat(self, x: f32) -> Self::Numbers;

    /// a + b of each lane.
    fn add(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;

    /// a − b of each lane.
    fn subtract(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;

    /// a · b of each lane.
    fn multiply(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;
}

/// Plain loops, for any processor.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

// Taken in always: see `rule::scan_in`.
#[allow(clippy::inline_always)]
impl Eight for Plain {
    type Numbers = [f32; LANES];

    #[inline(always)]
    fn load(self, numbers: &[f32; LANES]) -> [f32; LANES] {
        *numbers
    }

    #[inline(always)]
    fn store(self, numbers: [f32; LANES]) -> [f32; LANES] {
        numbers
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    fn add(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        let mut out = a;
        for lane in 0..LANES {
            out[lane] += b[lane];
        }
        out
    }

    #[inline(always)]
    fn subtract(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        let mut out = a;
        for lane in 0..LANES {
            out[lane] -= b[lane];
        }
        out
    }

    #[inline(always)]
    fn multiply(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        let mut out = a;
        for lane in 0..LANES {
            out[lane] *= b[lane];
        }
        out
    }
}
