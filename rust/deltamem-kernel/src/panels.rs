//! A matrix packed for products with few rows: its columns in panels as wide as the registers, each read from front to back once. It knows
//! nothing of what it multiplies.

use deltamem_core::eight::LANES;

use crate::half;
use crate::instructions::Arithmetic;

/// Columns of a panel, and of the narrow panels at the end.
const WIDE: usize = 32;
const NARROW: usize = LANES;

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
trait Stored: Sized {
    /// Eight weights, in f32.
    fn wide<A: Arithmetic>(arithmetic: A, stored: &[Self; LANES]) -> A::Numbers;
}

impl Stored for f32 {
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn wide<A: Arithmetic>(arithmetic: A, stored: &[f32; LANES]) -> A::Numbers {
        arithmetic.load(stored)
    }
}

impl Stored for u16 {
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn wide<A: Arithmetic>(arithmetic: A, stored: &[u16; LANES]) -> A::Numbers {
        arithmetic.widen(stored)
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
    pub(crate) fn multiply<A: Arithmetic>(&self, arithmetic: A, x: &[f32], into: &mut Into<'_>) {
        match &self.numbers {
            Numbers::Single(numbers) => self.multiply_stored(arithmetic, numbers, x, into),
            Numbers::Half(numbers) => self.multiply_stored(arithmetic, numbers, x, into),
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply_stored<A: Arithmetic, S: Stored>(
        &self,
        arithmetic: A,
        numbers: &[S],
        x: &[f32],
        into: &mut Into<'_>,
    ) {
        let padded = self.columns.next_multiple_of(NARROW);
        for (first, width) in panels(padded) {
            let panel = &numbers[self.inner * first..][..self.inner * width];
            let columns = first..(first + width).min(self.columns);
            if width == WIDE {
                self.multiply_panel::<A, S, { WIDE / LANES }>(arithmetic, panel, x, columns, into);
            } else {
                self.multiply_panel::<A, S, { NARROW / LANES }>(arithmetic, panel, x, columns, into);
            }
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply_panel<A: Arithmetic, S: Stored, const V: usize>(
        &self,
        arithmetic: A,
        panel: &[S],
        x: &[f32],
        columns: std::ops::Range<usize>,
        into: &mut Into<'_>,
    ) {
        let (eights, _) = panel.as_chunks::<LANES>();
        let mut pairs = x.chunks_exact(2 * self.inner);
        let mut row = 0;
        for pair in &mut pairs {
            let (a, b) = pair.split_at(self.inner);
            let zero = arithmetic.splat(0.0);
            let (mut sums, mut others) = ([zero; V], [zero; V]);
            for ((step, &a), &b) in eights.chunks_exact(V).zip(a).zip(b) {
                let (a, b) = (arithmetic.splat(a), arithmetic.splat(b));
                for v in 0..V {
                    let weights = S::wide(arithmetic, &step[v]);
                    sums[v] = arithmetic.multiply_add(a, weights, sums[v]);
                    others[v] = arithmetic.multiply_add(b, weights, others[v]);
                }
            }
            put(arithmetic, into, row, &columns, &sums);
            put(arithmetic, into, row + 1, &columns, &others);
            row += 2;
        }
        if !pairs.remainder().is_empty() {
            let mut sums = [arithmetic.splat(0.0); V];
            for (step, &a) in eights.chunks_exact(V).zip(pairs.remainder()) {
                let a = arithmetic.splat(a);
                for v in 0..V {
                    sums[v] = arithmetic.multiply_add(a, S::wide(arithmetic, &step[v]), sums[v]);
                }
            }
            put(arithmetic, into, row, &columns, &sums);
        }
    }
}

/// Puts a row's sums, of the panel over `columns`, where they go.
#[inline(always)]
#[allow(clippy::inline_always)]
fn put<A: Arithmetic, const V: usize>(
    arithmetic: A,
    into: &mut Into<'_>,
    row: usize,
    columns: &std::ops::Range<usize>,
    sums: &[A::Numbers; V],
) {
    let out = &mut into.values[row * into.stride + into.start..][columns.clone()];
    let (eights, rest) = out.as_chunks_mut::<LANES>();
    for (eight, &sums) in eights.iter_mut().zip(sums) {
        let sums = if into.add {
            arithmetic.add(arithmetic.load(eight), sums)
        } else {
            sums
        };
        *eight = arithmetic.store(sums);
    }
    if let Some(&sums) = sums.get(eights.len()) {
        for (out, sum) in rest.iter_mut().zip(arithmetic.store(sums)) {
            *out = if into.add { *out + sum } else { sum };
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
