//! The squared singular values of a small square matrix without its singular vectors: the eigenvalues of its Gram matrix, by Householder's
//! reduction to three diagonals and the implicit QL iteration. `edits::svd` has the vectors too and takes some twenty times as long; a
//! look at every end of a turn needs the values only. Small values are off by rounding of the largest, which neither a norm nor an
//! entropy of shares can tell.

/// One eigenvalue takes two or three rounds; this is a stop, not a setting.
const MOST_ROUNDS: usize = 60;

/// σ² of `matrix`, row-major [r, r] and finite, in no order.
pub(super) fn squared_singular_values(matrix: &[f32], rank: usize) -> Vec<f64> {
    // The largest number becomes 1, so that no square over- or underflows.
    let largest = matrix.iter().fold(0.0_f32, |most, number| most.max(number.abs()));
    if largest == 0.0 {
        return vec![0.0; rank];
    }
    let scale = f64::from(largest);
    let rows: Vec<f64> = matrix.iter().map(|&number| f64::from(number) / scale).collect();
    let mut gram = vec![0.0; rank * rank];
    for i in 0..rank {
        for j in 0..=i {
            let product = dot(&rows[i * rank..][..rank], &rows[j * rank..][..rank]);
            gram[i * rank + j] = product;
            gram[j * rank + i] = product;
        }
    }
    let (mut diagonal, mut beside) = three_diagonals(&mut gram, rank);
    eigenvalues(&mut diagonal, &mut beside);
    diagonal
        .into_iter()
        .map(|value| value.max(0.0) * scale * scale)
        .collect()
}

/// A product of two vectors in eight sums side by side, which a processor adds at once.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (left, right) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = (left.remainder().iter().zip(right.remainder()))
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in left.zip(right) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// Householder's reduction of a symmetric matrix [n, n]: its diagonal, and what stands beside it (one shorter).
fn three_diagonals(matrix: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut beside = Vec::with_capacity(n);
    for k in 1..n {
        // The column below the diagonal is turned onto its first place: v = x ± |x| e, A ← A − v wᵀ − w vᵀ.
        let mut v: Vec<f64> = (k..n).map(|i| matrix[i * n + k - 1]).collect();
        // Squares that vanish beside the largest number, which is 1, turn nothing.
        if v[1..].iter().map(|x| x * x).sum::<f64>() < f64::MIN_POSITIVE {
            beside.push(v[0]);
            continue;
        }
        let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let turned = if v[0] > 0.0 { -length } else { length };
        v[0] -= turned;
        beside.push(turned);
        let half = 0.5 * v.iter().map(|x| x * x).sum::<f64>();
        let row = |i: usize| (k + i) * n + k..(k + i + 1) * n;
        let mut w: Vec<f64> = (0..v.len()).map(|i| dot(&matrix[row(i)], &v) / half).collect();
        let along = 0.5 * v.iter().zip(&w).map(|(v, w)| v * w).sum::<f64>() / half;
        for (w, v) in w.iter_mut().zip(&v) {
            *w -= along * v;
        }
        for i in 0..v.len() {
            for ((number, v_j), w_j) in matrix[row(i)].iter_mut().zip(&v).zip(&w) {
                *number -= v[i] * w_j + w[i] * v_j;
            }
        }
    }
    ((0..n).map(|i| matrix[i * n + i]).collect(), beside)
}

/// Turns the diagonal of a matrix of three diagonals into its eigenvalues, in place: from the top, a block is turned by plane rotations that
/// begin with a shift at its end and chase the number that falls beside the diagonals up to its start, until the number beside its
/// first place is rounding.
fn eigenvalues(diagonal: &mut [f64], beside: &mut Vec<f64>) {
    let n = diagonal.len();
    beside.push(0.0);
    // A number beside the diagonal moves no eigenvalue by more than itself: what is rounding of the largest may go.
    let rounding = f64::EPSILON * diagonal.iter().map(|value| value.abs()).fold(0.0, f64::max);
    for first in 0..n {
        for _ in 0..MOST_ROUNDS {
            let last = (first..n - 1)
                .find(|&at| beside[at].abs() <= rounding)
                .unwrap_or(n - 1);
            if last == first {
                break;
            }
            turn_block(diagonal, beside, first, last);
        }
    }
}

/// One round over the block `first..=last`, from its end to its start, with Wilkinson's shift.
fn turn_block(diagonal: &mut [f64], beside: &mut [f64], first: usize, last: usize) {
    let half = (diagonal[first + 1] - diagonal[first]) / (2.0 * beside[first]);
    let shift = diagonal[first] - beside[first] / (half + half.hypot(1.0).copysign(half));
    let (mut cosine, mut sine, mut moved) = (1.0, 1.0, 0.0);
    let mut bulge = diagonal[last] - shift;
    for at in (first..last).rev() {
        let (off, kept) = (sine * beside[at], cosine * beside[at]);
        let length = off.hypot(bulge);
        beside[at + 1] = length;
        if length == 0.0 {
            // The block falls apart here: the rest of it is turned in a round of its own.
            diagonal[at + 1] -= moved;
            beside[last] = 0.0;
            return;
        }
        (sine, cosine) = (off / length, bulge / length);
        let below = diagonal[at + 1] - moved;
        let turned = (diagonal[at] - below) * sine + 2.0 * cosine * kept;
        moved = sine * turned;
        diagonal[at + 1] = below + moved;
        bulge = cosine * turned - kept;
    }
    diagonal[first] -= moved;
    beside[first] = bulge;
    beside[last] = 0.0;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation)]
    use proptest::prelude::*;

    use super::*;
    use crate::edits::singular_values;

    /// The largest difference from the rotations' σ², over the largest σ².
    fn off(matrix: &[f32], rank: usize) -> f64 {
        let wide: Vec<f64> = matrix.iter().map(|&x| f64::from(x)).collect();
        let exact: Vec<f64> = singular_values(&wide, rank).iter().map(|s| s * s).collect();
        let mut found = squared_singular_values(matrix, rank);
        assert_eq!(found.len(), rank);
        found.sort_by(|a, b| b.total_cmp(a));
        let most = found
            .iter()
            .zip(&exact)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        if exact[0] > 0.0 { most / exact[0] } else { most }
    }

    #[test]
    fn matrices_that_are_diagonal_or_nothing_or_of_one_number() {
        assert_eq!(squared_singular_values(&[0.0; 9], 3), [0.0; 3]);
        assert_eq!(squared_singular_values(&[-3.0], 1), [9.0]);
        for rank in [1, 2, 5, 64] {
            let diagonal: Vec<f32> = (0..rank * rank)
                .map(|at| {
                    if at % (rank + 1) == 0 {
                        2.0 + (at % 3) as f32
                    } else {
                        0.0
                    }
                })
                .collect();
            assert!(off(&diagonal, rank) < 1e-14);
        }
    }

    #[test]
    fn the_largest_and_the_smallest_numbers_that_a_state_can_hold() {
        for scale in [f32::MAX, 1e-38] {
            let matrix = [1.0, 0.5, -0.25, 1.0].map(|x| x * scale);
            assert!(off(&matrix, 2) < 1e-14, "{scale:e}: {:e}", off(&matrix, 2));
        }
        let mut apart = [1e-45_f32; 16];
        apart[5] = f32::MAX;
        assert!(off(&apart, 4) < 1e-14);
    }

    proptest! {
        #[test]
        fn squares_are_those_of_the_decomposition(
            (rank, numbers) in (1..=40_usize).prop_flat_map(|rank| {
                let number = prop_oneof![3 => -2.0_f32..2.0, 1 => Just(0.0_f32), 1 => -1e-4_f32..1e-4];
                (Just(rank), prop::collection::vec(number, rank * rank))
            }),
            few in 1..=3_usize,
        ) {
            prop_assert!(off(&numbers, rank) < 1e-13, "{:e}", off(&numbers, rank));
            // Of low rank: rows that repeat.
            let few = few.min(rank);
            let low: Vec<f32> = (0..rank * rank).map(|at| numbers[at / rank % few * rank + at % rank]).collect();
            prop_assert!(off(&low, rank) < 1e-13, "{:e}", off(&low, rank));
        }
    }
}
