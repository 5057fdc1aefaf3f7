//! What a commit left of the state before it, estimated from the two states alone. It knows nothing of what came earlier or later.
//!
//! The tokens of a commit turn each row s of a state into s M + w. M, the product of the tokens' keep − erase · k kᵀ, holds the decay and the
//! erasure, w what was written. The gates are not kept, so M must be guessed from S before and S after:
//!
//! ```text
//! A = V diag(ρ) Vᵀ      V [r, r]: the directions of the keys that the commit wrote, ρ [r]: how much it left of the state along each
//! ρ_j = clamp(⟨S_after v_j, S_before v_j⟩ / |S_before v_j|², 0, 1)
//! W = S_after − S_before A        what the commit wrote;  V: the eigenvectors of Wᵀ W
//! ```
//!
//! The idea: erasing and writing share their keys, so the directions in which M differs from a plain decay are those of W. Along each, the
//! old content that survived is the part of the new column that still points where the old one did; a new value is not correlated with
//! the old. V and W need each other, so W begins as `S_after − S_before` and both are improved [`PASSES`] times. Directions that were not
//! written all get the same ρ, the decay, and a key that was overwritten gets 0.
//!
//! Where it errs: a new value that resembles the old one looks like survival (telling the same fact again leaves the first commit
//! as its source), rows with gates of their own share one A here, and r rows are few numbers at small r. `docs/log.md` has the figures.

use super::svd::{identity, orthogonalize};
use super::{difference, dot, widen};
use crate::geometry::Geometry;

/// How often the directions are taken from what was written with them. From the second time on little changes.
const PASSES: usize = 3;
/// Any orthonormal basis gives an exact split of the state into old and new, so the directions need few digits.
const LOOSE: f64 = 1e-5;

/// A for each layer and head.
pub(super) struct Survival {
    rank: usize,
    heads: Vec<Head>,
}

struct Head {
    /// Rows: the directions v, `[r, r]`, orthonormal.
    directions: Vec<f64>,
    /// ρ, [r].
    kept: Vec<f64>,
    /// The square of ρ's standard error as a regression over the rows, no more than the square of ρ's distance to the farther of 0 and 1.
    error: Vec<f64>,
}

impl Survival {
    /// Estimates A between two states [L, H, r, r] whose lengths have been checked.
    pub fn between(geometry: Geometry, before: &[f32], after: &[f32]) -> Self {
        let rank = geometry.rank();
        let heads = before
            .chunks_exact(rank * rank)
            .zip(after.chunks_exact(rank * rank))
            .map(|(before, after)| Head::between(rank, before, after))
            .collect();
        Self { rank, heads }
    }

    /// x ← x A for each row x of `rows` [n, r], which belong to the `head`-th of all L·H heads. A is symmetric, so this is A x too.
    pub fn apply(&self, head: usize, rows: &mut [f64]) {
        let Head { directions, kept, .. } = &self.heads[head];
        let mut moved = vec![0.0; self.rank];
        for row in rows.chunks_exact_mut(self.rank) {
            moved.fill(0.0);
            for (v, kept) in directions.chunks_exact(self.rank).zip(kept) {
                let along = kept * dot(row, v);
                for (moved, v) in moved.iter_mut().zip(v) {
                    *moved += along * v;
                }
            }
            row.copy_from_slice(&moved);
        }
    }

    /// The expected squared error of `rows` A: `Σ_j |rows v_j|²` · the squared standard error of `ρ_j`.
    pub fn squared_error(&self, head: usize, rows: &[f64]) -> f64 {
        let Head {
            directions, error, ..
        } = &self.heads[head];
        let along = |v: &[f64]| -> f64 { rows.chunks_exact(self.rank).map(|row| dot(row, v).powi(2)).sum() };
        directions
            .chunks_exact(self.rank)
            .zip(error)
            .map(|(v, error)| along(v) * error)
            .sum()
    }
}

impl Head {
    fn between(rank: usize, before: &[f32], after: &[f32]) -> Self {
        let mut written = difference(before, after);
        let (before, after) = (widen(before), widen(after));
        let mut head = Self {
            directions: identity(rank),
            kept: vec![1.0; rank],
            error: vec![0.0; rank],
        };
        if written.iter().all(|&change| change == 0.0) {
            return head;
        }
        for _ in 0..PASSES {
            // W V, column by column, begun at the last directions: close to orthogonal from the second pass on.
            let mut columns = times(&written, &head.directions, rank);
            orthogonalize(&mut columns, &mut head.directions, rank, LOOSE, LOOSE);
            let (old, new) = (
                times(&before, &head.directions, rank),
                times(&after, &head.directions, rank),
            );
            written.copy_from_slice(&after);
            for (j, (old, new)) in old.chunks_exact(rank).zip(new.chunks_exact(rank)).enumerate() {
                let there = dot(old, old);
                let kept = if there > 0.0 {
                    (dot(new, old) / there).clamp(0.0, 1.0)
                } else {
                    0.0
                };
                let unexplained: f64 = old.iter().zip(new).map(|(o, n)| (n - kept * o).powi(2)).sum();
                let freedom = (rank - 1).max(1) as f64;
                let widest = kept.max(1.0 - kept).powi(2);
                head.kept[j] = kept;
                head.error[j] = if there > 0.0 {
                    widest.min(unexplained / (freedom * there))
                } else {
                    widest
                };
                let v = &head.directions[j * rank..][..rank];
                for (row, old) in written.chunks_exact_mut(rank).zip(old) {
                    for (written, v) in row.iter_mut().zip(v) {
                        *written -= kept * old * v;
                    }
                }
            }
        }
        head
    }
}

/// M v for each direction v, one after the other: `[directions, rows of M]`.
fn times(matrix: &[f64], directions: &[f64], rank: usize) -> Vec<f64> {
    directions
        .chunks_exact(rank)
        .flat_map(|v| matrix.chunks_exact(rank).map(move |row| dot(row, v)))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::edits::simulation::Random;

    fn survivors(rank: usize, before: &[f32], after: &[f32]) -> Vec<f64> {
        let survival = Survival::between(Geometry::new(1, 1, rank).unwrap(), before, after);
        let mut rows = widen(before);
        survival.apply(0, &mut rows);
        rows
    }

    fn largest(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn a_plain_decay_is_found_to_be_one() {
        let mut random = Random::new(3);
        let before: Vec<f32> = (0..64).map(|_| super::super::round(random.normal())).collect();
        let after: Vec<f32> = before.iter().map(|s| s * 0.5).collect();
        assert!(largest(&survivors(8, &before, &after), &widen(&after)) < 1e-12);
    }

    #[test]
    fn an_overwritten_key_survives_nowhere_and_the_others_whole() {
        let mut random = Random::new(4);
        let rank = 32;
        let before: Vec<f64> = (0..rank * rank).map(|_| random.normal()).collect();
        let key = random.unit(rank);
        // A value at right angles to what the key recalls, so that the estimate has nothing to be wrong about.
        let recalled: Vec<f64> = before.chunks_exact(rank).map(|row| dot(row, &key)).collect();
        let mut value: Vec<f64> = (0..rank).map(|_| random.normal()).collect();
        let along = dot(&value, &recalled) / dot(&recalled, &recalled);
        for (value, recalled) in value.iter_mut().zip(&recalled) {
            *value -= along * recalled;
        }
        let (mut after, mut expected) = (before.clone(), before.clone());
        for i in 0..rank {
            for j in 0..rank {
                after[i * rank + j] += (value[i] - recalled[i]) * key[j];
                expected[i * rank + j] -= recalled[i] * key[j];
            }
        }
        let [before, after] =
            [before, after].map(|s| s.into_iter().map(super::super::round).collect::<Vec<_>>());
        let off = largest(&survivors(rank, &before, &after), &expected);
        assert!(off < 1e-4, "{off}");
    }

    #[test]
    fn an_unchanged_state_survives_to_the_bit_and_an_empty_one_has_nothing_to_leave() {
        let before: Vec<f32> = vec![1.5, -2.0, 0.25, 3.0];
        assert!(largest(&survivors(2, &before, &before), &widen(&before)) == 0.0);
        assert!(survivors(2, &[0.0; 4], &before).iter().all(|&s| s == 0.0));
        assert!(survivors(2, &before, &[0.0; 4]).iter().all(|&s| s == 0.0));
        assert!(
            survivors(1, &[2.0], &[1.0])
                .iter()
                .all(|&s| (s - 1.0).abs() < 1e-15)
        );
    }
}
