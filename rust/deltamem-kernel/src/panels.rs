//! A matrix packed for products: its columns in panels as wide as the registers, each read from front to back. It knows nothing of what it
//! multiplies.
//!
//! A single row, a decode step's, waits for the weights: several panels are read at once. Of many rows as many as the registers hold sums
//! for go through a panel together, and a piece of a panel that fits into the innermost cache meets all rows of a tile before the next
//! piece comes. Each sum is made in the order of `inner`, one product after the other, whichever way it goes.

use deltamem_core::lanes::{LANES, Lanes, WIDE};

use crate::aligned::Aligned;
use crate::half;
use crate::instructions::{Arithmetic, Halves};

/// Columns of a panel, and of the narrow panels at the end.
const PANEL: usize = 2 * WIDE;
const NARROW: usize = LANES;
/// Rows that meet a piece of a panel, a multiple of every [`Arithmetic::ROWS`].
const TILE: usize = 48;
/// How much of `inner` a piece has: 16 KiB in a panel of 32 columns.
const DEPTH: usize = 128;

/// A matrix [inner, columns] in panels of 32 columns and then of 8, each [inner, width]; the last one is filled up with zeros.
#[derive(Debug)]
pub(crate) struct Panels {
    inner: usize,
    columns: usize,
    numbers: Numbers,
}

#[derive(Debug)]
enum Numbers {
    Single(Aligned<f32>),
    Half(Aligned<u16>),
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
    /// Room for a piece of a panel in f32, where it is not kept so.
    type Room;

    fn room() -> Self::Room;

    /// Weights, in f32.
    fn wide<A: Halves<N>, const N: usize>(arithmetic: A, stored: &[Self; N]) -> A::Numbers;

    /// A piece of a panel, in f32.
    fn piece<'a, A: Arithmetic>(arithmetic: A, stored: &'a [Self], room: &'a mut Self::Room) -> &'a [f32];
}

#[allow(clippy::inline_always)]
impl Stored for f32 {
    type Room = ();

    fn room() {}

    #[inline(always)]
    fn wide<A: Halves<N>, const N: usize>(arithmetic: A, stored: &[f32; N]) -> A::Numbers {
        arithmetic.load(stored)
    }

    #[inline(always)]
    fn piece<'a, A: Arithmetic>(_: A, stored: &'a [f32], (): &'a mut ()) -> &'a [f32] {
        stored
    }
}

#[allow(clippy::inline_always)]
impl Stored for u16 {
    type Room = OnLine<[f32; DEPTH * PANEL]>;

    #[inline(always)]
    fn room() -> Self::Room {
        OnLine([0.0; DEPTH * PANEL])
    }

    #[inline(always)]
    fn wide<A: Halves<N>, const N: usize>(arithmetic: A, stored: &[u16; N]) -> A::Numbers {
        arithmetic.widen(stored)
    }

    #[inline(always)]
    fn piece<'a, A: Arithmetic>(arithmetic: A, stored: &'a [u16], room: &'a mut Self::Room) -> &'a [f32] {
        let piece = &mut room.0[..stored.len()];
        let (eights, _) = piece.as_chunks_mut::<LANES>();
        for (eight, stored) in eights.iter_mut().zip(stored.as_chunks::<LANES>().0) {
            *eight = Lanes::<LANES>::store(arithmetic, arithmetic.widen(stored));
        }
        piece
    }
}

/// From the beginning of a cache line on.
#[repr(align(64))]
struct OnLine<T>(T);

/// The sums of a tile's rows in one panel, between two of its pieces.
type Sums = OnLine<[[f32; PANEL]; TILE]>;

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
                Numbers::Half(Aligned::new(numbers.into_iter().map(half::narrow)))
            } else {
                Numbers::Single(Aligned::new(numbers.into_iter()))
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
            Numbers::Single(numbers) => self.multiply_stored(arithmetic, numbers.numbers(), x, into),
            Numbers::Half(numbers) => self.multiply_stored(arithmetic, numbers.numbers(), x, into),
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
        if x.len() == self.inner {
            return self.multiply_row(arithmetic, numbers, x, into);
        }
        let padded = self.columns.next_multiple_of(NARROW);
        let (mut sums, mut room) = (OnLine([[0.0; PANEL]; TILE]), S::room());
        for (tile, x) in x.chunks(TILE * self.inner).enumerate() {
            let tile = Rows {
                x,
                first: tile * TILE,
            };
            for (first, width) in panels(padded) {
                let panel = &numbers[self.inner * first..][..self.inner * width];
                let columns = first..(first + width).min(self.columns);
                for from in (0..self.inner).step_by(DEPTH) {
                    let to = (from + DEPTH).min(self.inner);
                    let weights = S::piece(arithmetic, &panel[from * width..to * width], &mut room);
                    let piece = Piece {
                        inner: self.inner,
                        from,
                        to,
                        columns: columns.clone(),
                    };
                    if width == NARROW {
                        piece.multiply::<A, LANES, 1, 1>(arithmetic, weights, &tile, &mut sums, into);
                    } else if A::ROWS >= 8 {
                        piece.multiply::<A, WIDE, 2, 2>(arithmetic, weights, &tile, &mut sums, into);
                    } else if A::ROWS >= 6 {
                        piece.multiply::<A, LANES, 4, 2>(arithmetic, weights, &tile, &mut sums, into);
                    } else {
                        piece.multiply::<A, LANES, 4, 1>(arithmetic, weights, &tile, &mut sums, into);
                    }
                }
            }
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply_row<A: Arithmetic, S: Stored>(
        &self,
        arithmetic: A,
        numbers: &[S],
        x: &[f32],
        into: &mut Into<'_>,
    ) {
        let padded = self.columns.next_multiple_of(NARROW);
        let mut first = 0;
        while first < padded {
            let wide = (padded - first) / PANEL;
            first += if wide >= 4 && A::ROWS >= 8 {
                self.multiply_panels::<A, S, WIDE, 2, 4>(arithmetic, numbers, first, x, into)
            } else if wide >= 2 && A::ROWS >= 6 {
                self.multiply_panels::<A, S, WIDE, 2, 2>(arithmetic, numbers, first, x, into)
            } else if wide >= 1 {
                self.multiply_panels::<A, S, WIDE, 2, 1>(arithmetic, numbers, first, x, into)
            } else {
                self.multiply_panels::<A, S, LANES, 1, 1>(arithmetic, numbers, first, x, into)
            };
        }
    }

    /// One row through `P` panels of `V` times `N` columns from column `first` on. Returns how many columns these are.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply_panels<A: Halves<N>, S: Stored, const N: usize, const V: usize, const P: usize>(
        &self,
        arithmetic: A,
        numbers: &[S],
        first: usize,
        x: &[f32],
        into: &mut Into<'_>,
    ) -> usize {
        let (inner, width) = (self.inner, V * N);
        let mut panels: [&[[[S; N]; V]]; P] = [&[]; P];
        for (p, panel) in panels.iter_mut().enumerate() {
            let own = &numbers[inner * (first + p * width)..][..inner * width];
            *panel = &own.as_chunks::<N>().0.as_chunks::<V>().0[..inner];
        }
        let mut sums = [[arithmetic.splat(0.0); V]; P];
        for (k, &x) in x[..inner].iter().enumerate() {
            let x = arithmetic.splat(x);
            for p in 0..P {
                for v in 0..V {
                    let weights = S::wide(arithmetic, &panels[p][k][v]);
                    sums[p][v] = arithmetic.multiply_add(x, weights, sums[p][v]);
                }
            }
        }
        let mut kept = OnLine([[0.0; PANEL]; P]);
        for (kept, sums) in kept.0.iter_mut().zip(&sums) {
            for (kept, &sums) in kept.as_chunks_mut::<N>().0.iter_mut().zip(sums) {
                *kept = arithmetic.store(sums);
            }
        }
        for (p, sums) in kept.0.iter().enumerate() {
            let first = first + p * width;
            put(
                arithmetic,
                into,
                0,
                &(first..(first + width).min(self.columns)),
                sums,
            );
        }
        P * width
    }
}

/// A piece of a panel: `from` to `to` of `inner`.
struct Piece {
    inner: usize,
    from: usize,
    to: usize,
    columns: std::ops::Range<usize>,
}

impl Piece {
    /// Adds the piece's products to the sums of a tile's rows; after the last piece they go where the product goes. The piece's weights are
    /// [to - from][W][N], and of the `W` times `N` columns `V` times `N` are worked on at once.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply<A: Arithmetic + Lanes<N>, const N: usize, const W: usize, const V: usize>(
        &self,
        arithmetic: A,
        weights: &[f32],
        tile: &Rows<'_>,
        sums: &mut Sums,
        into: &mut Into<'_>,
    ) {
        let weights = weights.as_chunks::<N>().0.as_chunks::<W>().0;
        let rows = tile.x.len() / self.inner;
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            row += if A::ROWS == 8 && left > 4 {
                self.multiply_rows::<A, N, W, V, 8>(arithmetic, weights, tile, row, sums, into)
            } else if A::ROWS == 6 && left > 3 {
                self.multiply_rows::<A, N, W, V, 6>(arithmetic, weights, tile, row, sums, into)
            } else if A::ROWS == 6 && left > 1 {
                self.multiply_rows::<A, N, W, V, 3>(arithmetic, weights, tile, row, sums, into)
            } else if A::ROWS != 6 && left > 1 {
                self.multiply_rows::<A, N, W, V, 4>(arithmetic, weights, tile, row, sums, into)
            } else {
                self.multiply_rows::<A, N, W, V, 1>(arithmetic, weights, tile, row, sums, into)
            };
        }
    }

    /// `R` of the tile's rows from `row` on, and how many those are. Where fewer are left, the last one fills up.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn multiply_rows<A: Lanes<N>, const N: usize, const W: usize, const V: usize, const R: usize>(
        &self,
        arithmetic: A,
        weights: &[[[f32; N]; W]],
        tile: &Rows<'_>,
        row: usize,
        sums: &mut Sums,
        into: &mut Into<'_>,
    ) -> usize {
        let depth = self.to - self.from;
        let weights = &weights[..depth];
        let last = tile.x.len() / self.inner - 1;
        let found = R.min(last + 1 - row);
        let mut rows: [&[f32]; R] = [&[]; R];
        for (r, x) in rows.iter_mut().enumerate() {
            *x = &tile.x[(row + r).min(last) * self.inner + self.from..][..depth];
        }
        let kept = &mut sums.0[row..][..R];
        for first in (0..W).step_by(V) {
            let mut own = [[arithmetic.splat(0.0); V]; R];
            if self.from > 0 {
                for r in 0..R {
                    let kept = &kept[r].as_chunks::<N>().0[first..][..V];
                    for v in 0..V {
                        own[r][v] = arithmetic.load(&kept[v]);
                    }
                }
            }
            for k in 0..depth {
                let mut step = [arithmetic.splat(0.0); V];
                for v in 0..V {
                    step[v] = arithmetic.load(&weights[k][first + v]);
                }
                for r in 0..R {
                    let x = arithmetic.splat(rows[r][k]);
                    for v in 0..V {
                        own[r][v] = arithmetic.multiply_add(x, step[v], own[r][v]);
                    }
                }
            }
            for r in 0..R {
                let kept = &mut kept[r].as_chunks_mut::<N>().0[first..][..V];
                for v in 0..V {
                    kept[v] = arithmetic.store(own[r][v]);
                }
            }
        }
        if self.to == self.inner {
            for (r, kept) in kept.iter().take(found).enumerate() {
                put::<A, N>(arithmetic, into, tile.first + row + r, &self.columns, kept);
            }
        }
        found
    }
}

/// Rows of a tile, [rows, inner], the `first` of them in the product.
struct Rows<'a> {
    x: &'a [f32],
    first: usize,
}

/// Puts a row's sums, of the panel over `columns`, where they go.
#[inline(always)]
#[allow(clippy::inline_always)]
fn put<A: Lanes<N>, const N: usize>(
    arithmetic: A,
    into: &mut Into<'_>,
    row: usize,
    columns: &std::ops::Range<usize>,
    sums: &[f32],
) {
    let out = &mut into.values[row * into.stride + into.start..][columns.clone()];
    let sums = &sums[..out.len()];
    if !into.add {
        out.copy_from_slice(sums);
        return;
    }
    let (whole, rest) = out.as_chunks_mut::<N>();
    let (sums, others) = sums.as_chunks::<N>();
    for (out, sums) in whole.iter_mut().zip(sums) {
        *out = arithmetic.store(arithmetic.add(arithmetic.load(out), arithmetic.load(sums)));
    }
    for (out, sum) in rest.iter_mut().zip(others) {
        *out += sum;
    }
}

/// (first column, width) of each panel over `padded` columns.
#[inline]
fn panels(padded: usize) -> impl Iterator<Item = (usize, usize)> {
    let wide = padded / PANEL * PANEL;
    (0..wide)
        .step_by(PANEL)
        .map(|first| (first, PANEL))
        .chain((wide..padded).step_by(NARROW).map(|first| (first, NARROW)))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::instructions::{Instructions, Work};

    struct Product<'a>(&'a Panels, &'a [f32], &'a mut [f32]);

    impl Work for Product<'_> {
        type Output = ();

        #[inline(always)]
        #[allow(clippy::inline_always)]
        fn run<A: Arithmetic>(self, arithmetic: A) {
            let stride = self.0.columns();
            let mut into = Into {
                values: self.2,
                stride,
                start: 0,
                add: false,
            };
            self.0.multiply(arithmetic, self.1, &mut into);
        }
    }

    /// Numbers between −1 and 1 that look drawn.
    fn numbers(count: usize) -> Vec<f32> {
        (0_u32..)
            .take(count)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 8) as f32 / (1_u32 << 23) as f32 - 1.0)
            .collect()
    }

    #[test]
    fn a_product_is_one_in_f64_and_has_the_same_bits_row_by_row() {
        // Around the sizes of pieces, tiles, panels and groups of rows.
        for (inner, columns) in [
            (1, 1),
            (127, 33),
            (128, 40),
            (129, 64),
            (300, 161),
            (513, 8),
            (40, 290),
        ] {
            let matrix = numbers(inner * columns);
            for narrow in [false, true] {
                let panels = Panels::pack(&matrix, inner, columns, 0, columns, narrow);
                let kept = |x: f32| if narrow { half::widen(half::narrow(x)) } else { x };
                for rows in [1, 2, 3, 5, 7, 8, 13, 48, 53, 97] {
                    let x = numbers(rows * inner);
                    let wanted = |row: usize, column: usize| -> f64 {
                        let own = x[row * inner..][..inner].iter().enumerate();
                        own.map(|(k, &x)| f64::from(x) * f64::from(kept(matrix[k * columns + column])))
                            .sum()
                    };
                    for instructions in Instructions::available() {
                        let mut whole = vec![f32::NAN; rows * columns];
                        instructions.run(Product(&panels, &x, &mut whole));
                        for (row, (found, x)) in whole.chunks(columns).zip(x.chunks(inner)).enumerate() {
                            let mut alone = vec![f32::NAN; columns];
                            instructions.run(Product(&panels, x, &mut alone));
                            for (column, (&found, &alone)) in found.iter().zip(&alone).enumerate() {
                                let what =
                                    format!("{instructions}, {rows} x {inner} x {columns}: {row}, {column}");
                                assert_eq!(found.to_bits(), alone.to_bits(), "{what}");
                                let off = (f64::from(found) - wanted(row, column)).abs();
                                assert!(off < 1e-4, "{what}: off by {off}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[ignore = "prints GFLOP/s: cargo test --release -p deltamem-kernel --lib -- --ignored --nocapture"]
    fn how_fast_products_are() {
        let shapes = [
            (1024, 32),
            (1024, 64),
            (1024, 256),
            (256, 384),
            (256, 289),
            (96, 256),
            (8, 2048),
            (64, 2048),
            (64, 1024),
        ];
        for (inner, columns) in shapes {
            for narrow in [false, true] {
                let matrix: Vec<f32> = (0..inner * columns)
                    .map(|n| (n % 17) as f32 * 0.1 - 0.8)
                    .collect();
                let panels = Panels::pack(&matrix, inner, columns, 0, columns, narrow);
                print!("{inner:5} x {columns:4} {}", if narrow { "f16" } else { "f32" });
                for rows in [1, 16, 128, 512] {
                    let x: Vec<f32> = (0..rows * inner).map(|n| (n % 13) as f32 * 0.1 - 0.6).collect();
                    let mut out = vec![0.0; rows * columns];
                    let calls = (20_000_000 / (rows * inner * columns)).max(1);
                    print!("  {rows:3} rows");
                    for instructions in Instructions::available() {
                        let mut best = f64::MAX;
                        for _ in 0..15 {
                            let began = Instant::now();
                            for _ in 0..calls {
                                instructions.run(Product(&panels, &x, std::hint::black_box(&mut out)));
                            }
                            best = best.min(began.elapsed().as_secs_f64() / calls as f64);
                        }
                        print!(" {:6.1}", 2.0 * (rows * inner * columns) as f64 / best / 1e9);
                    }
                }
                println!();
            }
        }
    }
}
