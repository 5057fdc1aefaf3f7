//! Numbers that are worked on together, eight or sixteen of them. What is written with them runs as vector instructions wherever a caller
//! names them, whatever the compiler does with loops: at link time it may leave a loop as it is for the sake of size.

/// The narrower of the two counts: what a rank is taken in when it does not fill sixteen.
pub const LANES: usize = 8;
/// The wider one.
pub const WIDE: usize = 16;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The most numbers that [`to_line`] skips: what room that is to begin at a cache line has beside its own.
pub const fn spare<T>() -> usize {
    LINE / size_of::<T>()
}

/// How many numbers of an allocation to skip for the first that begins a cache line, so that no register is filled from two of them; where the
/// allocator cannot say where that is, as many as there are to spare.
pub fn to_line<T>(numbers: &[T]) -> usize {
    numbers.as_ptr().align_offset(LINE).min(spare::<T>())
}

/// How `N` numbers are held and worked on. A value of the type stands for a processor that can do it. All ways give the same bits, but for
/// [`Lanes::multiply_add`].
pub trait Lanes<const N: usize>: Copy {
    /// `N` numbers.
    type Numbers: Copy;

    /// Numbers from memory.
    fn load(self, numbers: &[f32; N]) -> Self::Numbers;

    /// The numbers, to memory.
    fn store(self, numbers: Self::Numbers) -> [f32; N];

    /// One number in all lanes.
    fn splat(self, x: f32) -> Self::Numbers;

    /// a + b of each lane.
    fn add(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;

    /// a − b of each lane.
    fn subtract(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;

    /// a · b of each lane.
    fn multiply(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;

    /// a / b of each lane.
    fn divide(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;

    /// a of each lane where it is smaller than b, and b elsewhere.
    fn lower(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;

    /// a of each lane where it is greater than b, and b elsewhere.
    fn higher(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;

    /// a · b + c of each lane, rounded once where the processor has an instruction for it, and twice where it has none.
    fn multiply_add(self, a: Self::Numbers, b: Self::Numbers, c: Self::Numbers) -> Self::Numbers;
}

/// A set of instructions, for either count.
pub trait Vectors: Lanes<LANES> + Lanes<WIDE> {
    /// Rows of a state that [`crate::rule`] takes through the tokens together, as its registers allow: 8, 16 or 64.
    const STATE_ROWS: usize;

    /// Whether [`Vectors::transpose`] is more than moving number by number.
    const SQUARES: bool;

    /// Rows as columns.
    fn transpose(self, rows: [Eight<Self>; LANES]) -> [Eight<Self>; LANES];
}

/// Eight numbers of a set.
pub type Eight<E> = <E as Lanes<LANES>>::Numbers;

/// Plain loops, for any processor.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

// Taken in always: see `rule::scan_in`.
#[allow(clippy::inline_always)]
impl Vectors for Plain {
    const STATE_ROWS: usize = LANES;
    const SQUARES: bool = false;

    #[inline(always)]
    fn transpose(self, rows: [[f32; LANES]; LANES]) -> [[f32; LANES]; LANES] {
        let mut columns = rows;
        for (i, row) in rows.iter().enumerate() {
            for (column, &x) in columns.iter_mut().zip(row) {
                column[i] = x;
            }
        }
        columns
    }
}

#[allow(clippy::inline_always)]
impl<const N: usize> Lanes<N> for Plain {
    type Numbers = [f32; N];

    #[inline(always)]
    fn load(self, numbers: &[f32; N]) -> [f32; N] {
        *numbers
    }

    #[inline(always)]
    fn store(self, numbers: [f32; N]) -> [f32; N] {
        numbers
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; N] {
        [x; N]
    }

    #[inline(always)]
    fn add(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        let mut out = a;
        for lane in 0..N {
            out[lane] += b[lane];
        }
        out
    }

    #[inline(always)]
    fn subtract(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        let mut out = a;
        for lane in 0..N {
            out[lane] -= b[lane];
        }
        out
    }

    #[inline(always)]
    fn multiply(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        let mut out = a;
        for lane in 0..N {
            out[lane] *= b[lane];
        }
        out
    }

    #[inline(always)]
    fn divide(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        let mut out = a;
        for lane in 0..N {
            out[lane] /= b[lane];
        }
        out
    }

    #[inline(always)]
    fn lower(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        let mut out = b;
        for lane in 0..N {
            if a[lane] < b[lane] {
                out[lane] = a[lane];
            }
        }
        out
    }

    #[inline(always)]
    fn higher(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        let mut out = b;
        for lane in 0..N {
            if a[lane] > b[lane] {
                out[lane] = a[lane];
            }
        }
        out
    }

    // One instruction on aarch64, rounded once. Elsewhere two: without one for both, Rust would call a function for each number.
    #[inline(always)]
    fn multiply_add(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        let mut out = c;
        for lane in 0..N {
            out[lane] = if cfg!(target_arch = "aarch64") {
                a[lane].mul_add(b[lane], out[lane])
            } else {
                a[lane] * b[lane] + out[lane]
            };
        }
        out
    }
}
