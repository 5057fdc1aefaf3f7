//! Singular values of a small square matrix by one-sided Jacobi rotations in f64: exact to rounding, the same bits for the same matrix,
//! made for r ≤ 128. It knows matrices, not memories.

use super::dot;

/// One sweep goes over all pairs of columns. The tests' 10,000 matrices of r ≤ 128 needed at most 15; this is a stop, not a setting.
const MOST_SWEEPS: usize = 60;
/// Two columns are orthogonal when their cosine is below this.
const EXACT: f64 = 1e-14;

/// M = Σ σ u vᵀ of a square matrix, the largest σ first.
pub(super) struct Svd {
    rank: usize,
    /// Singular values, descending, [r].
    pub values: Vec<f64>,
    /// Rows: the left singular vectors, `[r, r]`; zeros where the singular value is 0.
    left: Vec<f64>,
    /// Rows: the right singular vectors, `[r, r]`.
    right: Vec<f64>,
}

impl Svd {
    /// The decomposition of `matrix`, row-major `[r, r]`. The sign of each pair is fixed: the component of v that is largest in size (the
    /// first of equals) is positive.
    pub fn of(matrix: &[f64], rank: usize) -> Self {
        let mut columns = transposed(matrix, rank);
        let mut basis = identity(rank);
        orthogonalize(&mut columns, &mut basis, rank, EXACT, f64::EPSILON);
        let norms: Vec<f64> = columns.chunks_exact(rank).map(|c| dot(c, c).sqrt()).collect();
        let mut order: Vec<usize> = (0..rank).collect();
        // A stable sort: equal values keep the order of their columns.
        order.sort_by(|&a, &b| norms[b].total_cmp(&norms[a]));
        let (mut left, mut right) = (Vec::new(), Vec::new());
        for &column in &order {
            let v = &basis[column * rank..][..rank];
            let w = &columns[column * rank..][..rank];
            let largest = v
                .iter()
                .fold(0.0_f64, |m, x| if x.abs() > m.abs() { *x } else { m });
            let sign = if largest < 0.0 { -1.0 } else { 1.0 };
            let scale = if norms[column] > 0.0 {
                sign / norms[column]
            } else {
                0.0
            };
            right.extend(v.iter().map(|x| x * sign));
            left.extend(w.iter().map(|x| x * scale));
        }
        Self {
            rank,
            values: order.iter().map(|&column| norms[column]).collect(),
            left,
            right,
        }
    }

    /// The i-th left singular vector u, [r]: on the side of the values.
    pub fn left(&self, i: usize) -> &[f64] {
        &self.left[i * self.rank..][..self.rank]
    }

    /// The i-th right singular vector v, [r]: on the side of the keys.
    pub fn right(&self, i: usize) -> &[f64] {
        &self.right[i * self.rank..][..self.rank]
    }
}

/// The identity, `[r, r]`.
pub(super) fn identity(rank: usize) -> Vec<f64> {
    let mut matrix = vec![0.0; rank * rank];
    for diagonal in matrix.iter_mut().step_by(rank + 1) {
        *diagonal = 1.0;
    }
    matrix
}

/// The transpose of a square matrix.
pub(super) fn transposed(matrix: &[f64], rank: usize) -> Vec<f64> {
    (0..rank * rank)
        .map(|at| matrix[at % rank * rank + at / rank])
        .collect()
}

/// Rotates the columns of W (each a contiguous run of r numbers in `columns`) until they are orthogonal, and those of `basis` with them. A
/// pair counts as orthogonal when its cosine is below `tolerance`, or its product below `floor` times the larger squared length: the
/// second lets columns alone that are only rounding of the large ones.
pub(super) fn orthogonalize(columns: &mut [f64], basis: &mut [f64], rank: usize, tolerance: f64, floor: f64) {
    for _ in 0..MOST_SWEEPS {
        let mut turned = false;
        for first in 0..rank {
            for second in first + 1..rank {
                let (p, q) = pair(columns, rank, first, second);
                let (pp, qq, pq) = (dot(p, p), dot(q, q), dot(p, q));
                if pq.abs() <= tolerance * pp.sqrt() * qq.sqrt() || pq.abs() <= floor * pp.max(qq) {
                    continue;
                }
                turned = true;
                let zeta = (qq - pp) / (2.0 * pq);
                let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                rotate(p, q, cosine, cosine * tangent);
                let (p, q) = pair(basis, rank, first, second);
                rotate(p, q, cosine, cosine * tangent);
            }
        }
        if !turned {
            break;
        }
    }
}

fn pair(all: &mut [f64], rank: usize, first: usize, second: usize) -> (&mut [f64], &mut [f64]) {
    let (head, tail) = all.split_at_mut(second * rank);
    (&mut head[first * rank..][..rank], &mut tail[..rank])
}

fn rotate(p: &mut [f64], q: &mut [f64], cosine: f64, sine: f64) {
    for (p, q) in p.iter_mut().zip(q) {
        (*p, *q) = (cosine * *p - sine * *q, sine * *p + cosine * *q);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::edits::simulation::Random;

    /// The largest error of Σ σ u vᵀ, of U and of V as orthonormal sets.
    fn errors(matrix: &[f64], rank: usize) -> (f64, f64, Svd) {
        let svd = Svd::of(matrix, rank);
        let (mut rebuilt, mut skewed) = (0.0_f64, 0.0_f64);
        for i in 0..rank {
            for j in 0..rank {
                let sum: f64 = (0..rank)
                    .map(|n| svd.values[n] * svd.left(n)[i] * svd.right(n)[j])
                    .sum();
                rebuilt = rebuilt.max((sum - matrix[i * rank + j]).abs());
                let unit = if i == j { 1.0 } else { 0.0 };
                skewed = skewed.max((dot(svd.right(i), svd.right(j)) - unit).abs());
                if svd.values[i].min(svd.values[j]) > 1e-6 * svd.values[0] {
                    skewed = skewed.max((dot(svd.left(i), svd.left(j)) - unit).abs());
                }
            }
        }
        (rebuilt, skewed, svd)
    }

    #[test]
    fn any_rank_is_rebuilt_from_its_singular_triples() {
        let mut random = Random::new(1);
        for rank in [1, 2, 3, 8, 17, 64, 128] {
            let matrix: Vec<f64> = (0..rank * rank).map(|_| random.normal()).collect();
            let (rebuilt, skewed, svd) = errors(&matrix, rank);
            assert!(
                rebuilt < 1e-11 && skewed < 1e-9,
                "rank {rank}: {rebuilt:e} {skewed:e}"
            );
            assert!(svd.values.is_sorted_by(|a, b| a >= b));
            for i in 0..rank {
                let v = svd.right(i);
                let largest = v.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
                assert!(
                    largest.unwrap_or(0.0) > 0.0,
                    "the sign of a direction is fixed by its key side"
                );
            }
        }
    }

    #[test]
    fn known_singular_values_come_out_whatever_their_spread() {
        // diag(3e5, 2, 1e-3, 0) between two rotations.
        let (c, s) = (0.6, 0.8);
        let left = [c, -s, 0.0, 0.0, s, c, 0.0, 0.0, 0.0, 0.0, c, s, 0.0, 0.0, -s, c];
        let values = [3e5, 2.0, 1e-3, 0.0];
        let right = [c, 0.0, s, 0.0, 0.0, c, 0.0, s, -s, 0.0, c, 0.0, 0.0, -s, 0.0, c];
        let mut matrix = [0.0; 16];
        for i in 0..4 {
            for j in 0..4 {
                matrix[i * 4 + j] = (0..4)
                    .map(|n| left[i * 4 + n] * values[n] * right[n * 4 + j])
                    .sum();
            }
        }
        let svd = Svd::of(&matrix, 4);
        for (found, expected) in svd.values.iter().zip(values) {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
    }

    #[test]
    fn zero_and_repeated_singular_values_are_no_trouble() {
        let (_, skewed, svd) = errors(&[0.0; 25], 5);
        assert!(skewed < 1e-15 && svd.values.iter().all(|&value| value.abs() < 1e-300));
        let (rebuilt, skewed, svd) = errors(&identity(6), 6);
        assert!(
            rebuilt < 1e-15 && skewed < 1e-15 && svd.values.iter().all(|&value| (value - 1.0).abs() < 1e-15)
        );
        // The largest and the smallest numbers that a state can hold.
        for scale in [f64::from(f32::MAX), 1e-45] {
            let matrix: Vec<f64> = [1.0, 0.5, -0.25, 1.0].iter().map(|x| x * scale).collect();
            let (rebuilt, skewed, _) = errors(&matrix, 2);
            assert!(rebuilt / scale < 1e-14 && skewed < 1e-14);
        }
    }

    proptest! {
        #[test]
        fn low_rank_matrices_have_as_many_singular_values(rank in 2..=24_usize, full in 1..=4_usize, seed: u64) {
            let (full, mut random) = (full.min(rank), Random::new(seed));
            let mut matrix = vec![0.0; rank * rank];
            for _ in 0..full {
                let (u, v): (Vec<f64>, Vec<f64>) = (0..rank).map(|_| (random.normal(), random.normal())).unzip();
                for (at, number) in matrix.iter_mut().enumerate() {
                    *number += u[at / rank] * v[at % rank];
                }
            }
            let (rebuilt, skewed, svd) = errors(&matrix, rank);
            prop_assert!(rebuilt < 1e-11 && skewed < 1e-8, "{rebuilt:e} {skewed:e}");
            prop_assert!(svd.values[full..].iter().all(|&value| value < 1e-12 * svd.values[0]));
            let again = Svd::of(&matrix, rank);
            prop_assert!(again.values == svd.values && again.left == svd.left && again.right == svd.right);
        }
    }
}
