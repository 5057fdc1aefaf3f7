//! A matrix packed for products with few rows: its columns in panels as wide as the registers, each read from front to back once. It knows
//! nothing of what it multiplies.

use crate::half;
use crate::instructions::Arithmetic;

/// Columns of a panel, and of the narrow panels at the end.
const WIDE: usize = 32;
const NARROW: usize = 8;

/// A matrix [inner, columns] in panels of 32 columns and then of 8, each [inner, width]; the last one is filled up with zeros.
#[derive(Debug)]
pub(crate) struct Panels {
    inner: usize,
    columns: usize,
    numbers: Numbers,
}

#[derive(Debug)]
enum Numbers {
    Single(Vec<f32>),
    Half(Vec<u16>),
}

/// Where the rows of a product go.
#[derive(Debug)]
pub(crate) struct Into<'a> {
    /// Row after row.
    pub(crate) values: &'a mut [f32],
    /// From one row to the next.
    pub(crate) stride: usize,
    /// Where in a row the product begins.
    pub(crate) start: usize,
    /// Whether it is added to what is there.
    pub(crate) add: bool,
}

/// How a weight is kept.
trait Stored: Copy {
    fn wide(self) -> f32;
}

impl Stored for f32 {
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn wide(self) -> f32 {
        self
    }
}

impl Stored for u16 {
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn wide(self) -> f32 {
        half::widen(self)
    }
}

impl Panels {
    /// Packs columns `from` to `from + columns` of the row-major matrix [inner, stride]. In half precision if `narrow`, unless a number is
    /// too large for it.
    pub(crate) fn pack(
        matrix: &[f32],
        inner: usize,
        stride: usize,
        from: usize,
        columns: usize,
        narrow: bool,
    ) -> Self {
        let padded = columns.next_multiple_of(NARROW);
        let mut numbers = Vec::with_capacity(inner * padded);
        for (first, width) in panels(padded) {
            for row in matrix.chunks_exact(stride.max(1)).take(inner) {
                let own = &row[from..from + columns];
                let last = (first + width).min(columns);
                numbers.extend_from_slice(&own[first..last]);
                numbers.resize(numbers.len() + first + width - last, 0.0);
            }
        }
        let fits = numbers.iter().all(|x| x.abs() <= half::LARGEST);
        Self {
            inner,
            columns,
            numbers: if narrow && fits {
                Numbers::Half(numbers.into_iter().map(half::narrow).collect())
            } else {
                Numbers::Single(numbers)
            },
        }
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// x [rows, inner] times the matrix, into rows of the caller's. The order of the sums is the same for any number of rows.
    #[inline(always)]
    #[allow(clippy::inline_always)] // see `instructions::Work`
    pub(crate) fn multiply<A: Arithmetic>(&self, x: &[f32], into: &mut Into<'_>) {
        match &self.numbers {
            Numbers::Single(numbers) => self.multiply_stored::<A, f32>(numbers, x, into),
            Numbers::Half(numbers) => self.multiply_stored::<A, u16>(numbers, x, into),
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply_stored<A: Arithmetic, S: Stored>(&self, numbers: &[S], x: &[f32], into: &mut Into<'_>) {
        let padded = self.columns.next_multiple_of(NARROW);
        for (first, width) in panels(padded) {
            let panel = &numbers[self.inner * first..][..self.inner * width];
            let columns = first..(first + width).min(self.columns);
            if width == WIDE {
                self.multiply_panel::<A, S, WIDE>(panel, x, columns, into);
            } else {
                self.multiply_panel::<A, S, NARROW>(panel, x, columns, into);
            }
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply_panel<A: Arithmetic, S: Stored, const W: usize>(
        &self,
        panel: &[S],
        x: &[f32],
        columns: std::ops::Range<usize>,
        into: &mut Into<'_>,
    ) {
        let (steps, _) = panel.as_chunks::<W>();
        let mut put = |row: usize, sums: &[f32; W]| {
            let out = &mut into.values[row * into.stride + into.start..][columns.clone()];
            if into.add {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out += sum;
                }
            } else {
                out.copy_from_slice(&sums[..out.len()]);
            }
        };
        let mut rows = x.chunks_exact(2 * self.inner);
        let mut row = 0;
        for two in &mut rows {
            let (a, b) = two.split_at(self.inner);
            let (mut sums, mut others) = ([0.0_f32; W], [0.0_f32; W]);
            for ((step, &a), &b) in steps.iter().zip(a).zip(b) {
                for lane in 0..W {
                    let weight = step[lane].wide();
                    sums[lane] = A::multiply_add(a, weight, sums[lane]);
                    others[lane] = A::multiply_add(b, weight, others[lane]);
                }
            }
            put(row, &sums);
            put(row + 1, &others);
            row += 2;
        }
        if !rows.remainder().is_empty() {
            let mut sums = [0.0_f32; W];
            for (step, &a) in steps.iter().zip(rows.remainder()) {
                for lane in 0..W {
                    sums[lane] = A::multiply_add(a, step[lane].wide(), sums[lane]);
                }
            }
            put(row, &sums);
        }
    }
}

/// (first column, width) of each panel over `padded` columns.
#[inline]
fn panels(padded: usize) -> impl Iterator<Item = (usize, usize)> {
    let wide = padded / WIDE * WIDE;
    (0..wide)
        .step_by(WIDE)
        .map(|first| (first, WIDE))
        .chain((wide..padded).step_by(NARROW).map(|first| (first, NARROW)))
}
