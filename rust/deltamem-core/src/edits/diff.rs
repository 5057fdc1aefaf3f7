//! What changed between two states: sizes, angles, and the directions that moved most. It knows the two states and nothing of what lies
//! between them.

use super::svd::Svd;
use super::{StateError, check_state, difference, dot, widen};
use crate::geometry::Geometry;

/// Singular values below this part of the largest are rounding, and no directions.
const NOTHING: f64 = 1e-12;

/// What changed, for the whole memory and for each layer and head.
#[derive(Debug, Clone, PartialEq)]
pub struct Diff {
    /// The whole memory. Its effective rank is that of all heads' changes put into one block-diagonal matrix, so it counts directions over
    /// all heads: 1 to L·H·r.
    pub total: Change,
    /// The heads of layer 0, then those of layer 1, and so on, L·H in all.
    pub heads: Vec<HeadDiff>,
}

/// What changed in one head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadDiff {
    /// The layer, counted among those with a memory.
    pub layer: usize,
    /// The state head.
    pub head: usize,
    /// Sizes and angles.
    pub change: Change,
    /// The largest singular triples of `S_after − S_before`, at most as many as were asked for and as the change has.
    pub directions: Vec<Direction>,
}

/// Sizes and angles of a change. Norms are Frobenius norms, the inner product is the one that belongs to them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// `|S_before|`.
    pub norm_before: f64,
    /// `|S_after|`.
    pub norm_after: f64,
    /// `|S_after − S_before|`.
    pub norm_change: f64,
    /// Cosine of `S_before` and `S_after`. 1 when both are zero, 0 when one is.
    pub cosine: f64,
    /// Cosine of `S_after − S_before` with `S_before`: −1 for a mere decay, about 0 for new keys. 0 when one of the two is zero.
    pub cosine_of_change: f64,
    /// exp(−Σ p ln p) with p = σ² / Σ σ² over the singular values σ of the change: 1 for one direction, r for r equal ones, 0 for no change.
    pub effective_rank: f64,
}

/// One direction of a change: for a query along `key`, the read moved by `size` along `value`.
#[derive(Debug, Clone, PartialEq)]
pub struct Direction {
    /// The singular value σ.
    pub size: f64,
    /// u, the direction of the value, [r], of length 1.
    pub value: Vec<f64>,
    /// v, the direction of the key, [r], of length 1. Its largest component in size (the first of equals) is positive.
    pub key: Vec<f64>,
}

/// Compares two states, float32 [L, H, r, r] each. `directions` is how many of the directions that moved most are wanted of each head.
/// A head costs one singular value decomposition, about 10 r³ rotations' arithmetic.
///
/// # Errors
/// [`StateError`] when a length is not the geometry's or a number is not finite.
pub fn diff(
    geometry: Geometry,
    before: &[f32],
    after: &[f32],
    directions: usize,
) -> Result<Diff, StateError> {
    check_state(geometry, "before", before)?;
    check_state(geometry, "after", after)?;
    let rank = geometry.rank();
    let block = rank * rank;
    let (mut total, mut heads) = (Sums::default(), Vec::new());
    for (at, (before, after)) in before
        .chunks_exact(block)
        .zip(after.chunks_exact(block))
        .enumerate()
    {
        let moved = difference(before, after);
        let svd = Svd::of(&moved, rank);
        let sums = Sums::of(&widen(before), &widen(after), &moved, &svd);
        total.add(&sums);
        let largest = svd.values[0];
        let listed = svd
            .values
            .iter()
            .take_while(|&&value| value > NOTHING * largest)
            .take(directions);
        heads.push(HeadDiff {
            layer: at / geometry.heads(),
            head: at % geometry.heads(),
            change: sums.change(),
            directions: listed
                .enumerate()
                .map(|(i, &size)| Direction {
                    size,
                    value: svd.left(i).to_vec(),
                    key: svd.right(i).to_vec(),
                })
                .collect(),
        });
    }
    Ok(Diff {
        total: total.change(),
        heads,
    })
}

/// Sums that add up over heads.
#[derive(Default)]
struct Sums {
    before: f64,
    after: f64,
    product: f64,
    moved: f64,
    moved_with_before: f64,
    /// Σ σ² and Σ σ² ln σ².
    energy: f64,
    energy_log: f64,
}

impl Sums {
    fn of(before: &[f64], after: &[f64], moved: &[f64], svd: &Svd) -> Self {
        let (mut energy, mut energy_log) = (0.0, 0.0);
        for square in svd
            .values
            .iter()
            .map(|value| value * value)
            .filter(|&square| square > 0.0)
        {
            energy += square;
            energy_log += square * square.ln();
        }
        Self {
            before: dot(before, before),
            after: dot(after, after),
            product: dot(before, after),
            moved: dot(moved, moved),
            moved_with_before: dot(moved, before),
            energy,
            energy_log,
        }
    }

    fn add(&mut self, other: &Self) {
        self.before += other.before;
        self.after += other.after;
        self.product += other.product;
        self.moved += other.moved;
        self.moved_with_before += other.moved_with_before;
        self.energy += other.energy;
        self.energy_log += other.energy_log;
    }

    fn change(&self) -> Change {
        let both_zero = self.before == 0.0 && self.after == 0.0;
        Change {
            norm_before: self.before.sqrt(),
            norm_after: self.after.sqrt(),
            norm_change: self.moved.sqrt(),
            cosine: if both_zero {
                1.0
            } else {
                cosine(self.product, self.before, self.after)
            },
            cosine_of_change: cosine(self.moved_with_before, self.moved, self.before),
            // −Σ p ln p with p = s / E is ln E − Σ s ln s / E. Rounding may not push it below one direction.
            effective_rank: if self.energy > 0.0 {
                (self.energy.ln() - self.energy_log / self.energy).exp().max(1.0)
            } else {
                0.0
            },
        }
    }
}

fn cosine(product: f64, square: f64, other_square: f64) -> f64 {
    // The root of the product, so that a state and itself are at exactly 1. Squares of float32 norms leave room for it.
    let lengths = (square * other_square).sqrt();
    if lengths > 0.0 {
        (product / lengths).clamp(-1.0, 1.0)
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use proptest::prelude::*;

    use super::*;

    fn geometry(layers: usize, heads: usize, rank: usize) -> Geometry {
        Geometry::new(layers, heads, rank).unwrap()
    }

    #[test]
    fn a_written_fact_is_the_direction_that_moved_most() {
        // Layer 1, head 0 of [2, 2, 3, 3]: the value (0, 3, 4) is written at the key (0, −1, 0).
        let geometry = geometry(2, 2, 3);
        let before = vec![0.0; geometry.elements()];
        let mut after = before.clone();
        (after[2 * 9 + 4], after[2 * 9 + 7]) = (-3.0, -4.0);
        let diff = diff(geometry, &before, &after, 2).unwrap();
        let head = &diff.heads[2];
        assert_eq!((head.layer, head.head), (1, 0));
        assert_eq!(head.directions.len(), 1, "one key was written");
        let Direction { size, value, key } = &head.directions[0];
        assert!((size - 5.0).abs() < 1e-12);
        // The sign rule turns the key to (0, 1, 0) and the value with it.
        assert_eq!(key, &[0.0, 1.0, 0.0]);
        assert!((value[1] + 0.6).abs() < 1e-12 && (value[2] + 0.8).abs() < 1e-12);
        assert_eq!(head.change.cosine, 0.0);
        assert_eq!(head.change.effective_rank, 1.0);
        assert!(diff.heads[0].directions.is_empty());
        assert_eq!(
            (diff.heads[0].change.cosine, diff.heads[0].change.effective_rank),
            (1.0, 0.0)
        );
        assert_eq!((diff.total.norm_before, diff.total.norm_change), (0.0, 5.0));
        assert_eq!(diff.total.effective_rank, 1.0);
    }

    #[test]
    fn a_decay_points_against_the_state_and_a_turn_shows_in_the_cosine() {
        let geometry = geometry(1, 1, 2);
        let decay = diff(geometry, &[2.0, 0.0, 0.0, 2.0], &[1.0, 0.0, 0.0, 1.0], 9).unwrap();
        assert_eq!((decay.total.cosine, decay.total.cosine_of_change), (1.0, -1.0));
        assert!((decay.total.effective_rank - 2.0).abs() < 1e-12);
        assert_eq!(decay.heads[0].directions.len(), 2);
        let turned = diff(geometry, &[1.0, 0.0, 0.0, 0.0], &[0.0, 1.0, 0.0, 0.0], 0).unwrap();
        assert_eq!(turned.total.cosine, 0.0);
        assert!((turned.total.cosine_of_change + 0.5_f64.sqrt()).abs() < 1e-12);
        assert!(turned.heads[0].directions.is_empty());
    }

    #[test]
    fn two_heads_with_one_direction_each_are_two_directions_in_all() {
        let geometry = geometry(1, 2, 2);
        let after = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0];
        let diff = diff(geometry, &[0.0; 8], &after, 1).unwrap();
        assert!((diff.total.effective_rank - 2.0).abs() < 1e-12);
    }

    #[test]
    fn states_of_another_shape_or_with_holes_are_refused_by_name() {
        let geometry = geometry(1, 1, 2);
        let error = diff(geometry, &[0.0; 4], &[0.0; 8], 1).unwrap_err();
        assert!(
            error.to_string().contains("after holds 8 numbers, expected 4"),
            "{error}"
        );
        for hole in [f32::NAN, f32::INFINITY] {
            let error = diff(geometry, &[0.0, 0.0, hole, 0.0], &[0.0; 4], 1).unwrap_err();
            assert!(
                matches!(
                    error,
                    StateError::NotFinite {
                        name: "before",
                        index: 2,
                        ..
                    }
                ),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn figures_are_finite_within_their_bounds_and_turn_round_with_the_states(
            (layers, heads, rank, before, after) in (1..=2_usize, 1..=2_usize, 1..=9_usize).prop_flat_map(|(l, h, r)| {
                let number = prop_oneof![Just(0.0_f32), -2.0_f32..2.0, Just(f32::MIN_POSITIVE), Just(f32::MAX)];
                let state = prop::collection::vec(number, l * h * r * r);
                (Just(l), Just(h), Just(r), state.clone(), state)
            })
        ) {
            let geometry = geometry(layers, heads, rank);
            let there = diff(geometry, &before, &after, rank).unwrap();
            let back = diff(geometry, &after, &before, 0).unwrap();
            prop_assert_eq!(there.total.norm_change, back.total.norm_change);
            prop_assert_eq!(there.total.cosine, back.total.cosine);
            for (change, most) in there.heads.iter().map(|h| (h.change, rank)).chain([(there.total, layers * heads * rank)]) {
                prop_assert!(change.norm_before.is_finite() && change.norm_after.is_finite() && change.norm_change.is_finite());
                prop_assert!((-1.0..=1.0).contains(&change.cosine) && (-1.0..=1.0).contains(&change.cosine_of_change));
                let least = if change.norm_change > 0.0 { 1.0 } else { 0.0 };
                prop_assert!(change.effective_rank >= least && change.effective_rank <= most as f64 * (1.0 + 1e-9));
            }
            // All directions together are the change.
            for (head, (before, after)) in there.heads.iter().zip(before.chunks(rank * rank).zip(after.chunks(rank * rank))) {
                for (at, moved) in difference(before, after).iter().enumerate() {
                    let sum: f64 = head.directions.iter().map(|d| d.size * d.value[at / rank] * d.key[at % rank]).sum();
                    prop_assert!((sum - moved).abs() <= 1e-11 * head.change.norm_change);
                }
            }
        }
    }
}
