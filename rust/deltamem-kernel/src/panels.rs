//! A matrix packed for products with few rows: its columns in panels as wide as the registers, each read from front to back once. It knows
//! nothing of what it multiplies.

use crate::half;
use crate::instructions::Arithmetic;

/// Columns of a panel, and of the narrow panels at the end.
const WIDE: usize = 32;
const NARROW: usize = 8;
/// Numbers of a vector register.
const LANES: usize = 8;

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
                self.multiply_panel::<A, S, { WIDE / LANES }>(panel, x, columns, into);
            } else {
                self.multiply_panel::<A, S, { NARROW / LANES }>(panel, x, columns, into);
            }
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply_panel<A: Arithmetic, S: Stored, const V: usize>(
        &self,
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
            let (mut sums, mut others) = ([[0.0; LANES]; V], [[0.0; LANES]; V]);
            for ((step, &a), &b) in eights.chunks_exact(V).zip(a).zip(b) {
                for v in 0..V {
                    let weights = wide(&step[v]);
                    add::<A>(a, &weights, &mut sums[v]);
                    add::<A>(b, &weights, &mut others[v]);
                }
            }
            put(into, row, &columns, &sums);
            put(into, row + 1, &columns, &others);
            row += 2;
        }
        if !pairs.remainder().is_empty() {
            let mut sums = [[0.0; LANES]; V];
            for (step, &a) in eights.chunks_exact(V).zip(pairs.remainder()) {
                for v in 0..V {
                    add::<A>(a, &wide(&step[v]), &mut sums[v]);
                }
            }
            put(into, row, &columns, &sums);
        }
    }
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn wide<S: Stored>(stored: &[S; LANES]) -> [f32; LANES] {
    let mut weights = [0.0; LANES];
    for lane in 0..LANES {
        weights[lane] = stored[lane].wide();
    }
    weights
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn add<A: Arithmetic>(x: f32, weights: &[f32; LANES], sums: &mut [f32; LANES]) {
    for lane in 0..LANES {
        sums[lane] = A::multiply_add(x, weights[lane], sums[lane]);
    }
}

/// Puts a row's sums, of the panel over `columns`, where they go. Not taken in: the sums are better kept in registers until here.
fn put<const V: usize>(
    into: &mut Into<'_>,
    row: usize,
    columns: &std::ops::Range<usize>,
    sums: &[[f32; LANES]; V],
) {
    let out = &mut into.values[row * into.stride + into.start..][columns.clone()];
    let sums = sums.as_flattened();
    if into.add {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out += sum;
        }
    } else {
        out.copy_from_slice(&sums[..out.len()]);
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
