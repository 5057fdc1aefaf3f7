//! Two changes of one state put together: S = base + (ours − base) + (theirs − base), with figures for how much the two are in each other's
//! way. It knows three states; which one is the common ancestor, its caller knows.
//!
//! **The conflict.** G = dSᵀ dS is what a change dS wrote, seen from the side of the keys: r x r, a sum of the written keys' outer
//! products, each weighted by how much its read moved. The overlap of two changes is the cosine of their G:
//!
//! ```text
//! overlap = ⟨G_ours, G_theirs⟩ / (|G_ours| |G_theirs|)         ⟨G_ours, G_theirs⟩ = |dS_ours dS_theirsᵀ|²
//! ```
//!
//! Both G are positive semidefinite, so it lies in [0, 1]. It is 0 exactly when the keys of one are orthogonal to those of the other, and then
//! the merge is free of loss: each side's keys read what they read on that side. It is 1 when both wrote the same keys in the same
//! proportions, whatever the values. Angles between the subspaces would be the other choice; they do not know how much was written,
//! and after a turn of r tokens every subspace is the whole space. Values do not enter: writing the same value twice at one key is a
//! conflict too, since the sum holds it twice.

use super::{StateError, check_state, difference, dot, round, same_bits, widen};
use crate::geometry::Geometry;

/// Why states are not merged.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// One of the three is no state of the geometry.
    #[error(transparent)]
    State(#[from] StateError),
    /// The sum is larger than a float32.
    #[error(
        "the merged state would be {value:e} at number {index}, more than a float32 holds; at least one side is damaged, look at its diff"
    )]
    Overflow {
        /// Where, counted in the flat array.
        index: usize,
        /// The sum.
        value: f64,
    },
}

/// Which case a merge was. All but [`Case::ThreeWay`] are exact to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// Theirs is the base, or the same as ours: the result is ours.
    Ours,
    /// Ours is the base: the result is theirs, a fast-forward.
    Theirs,
    /// Both sides changed.
    ThreeWay,
}

/// A merged state and what it costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Merge {
    /// float32 [L, H, r, r].
    pub state: Vec<f32>,
    /// Which case it was.
    pub case: Case,
    /// Over all heads: `Σ ⟨G_ours, G_theirs⟩ / Σ |G_ours| |G_theirs|`, so that heads weigh by the energy of both changes.
    pub total: Conflict,
    /// The heads of layer 0, then those of layer 1, and so on, L·H in all.
    pub heads: Vec<Conflict>,
}

/// How much two changes are in each other's way. All three figures lie in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conflict {
    /// The overlap of the written keys. 0 when one side changed nothing.
    pub overlap: f64,
    /// What the keys that our side wrote lose, see [`merge`].
    pub loss_ours: f64,
    /// What the keys that their side wrote lose.
    pub loss_theirs: f64,
}

/// Merges two states that grew from `base`, float32 [L, H, r, r] each, in f64 with one rounding.
///
/// A side's loss: its own keys k, weighted as it wrote them, read `(S_merged − S_side) k` too much. With e the root of the mean square of that
/// and s that of its own read `S_side k`, the loss is e / √(e² + s²): 0 when its facts read as before, 0.71 when the disturbance is as large
/// as the read, 1 when nothing of the read is its own. `S_merged − S_side` is the other side's change, so no key has to be known:
/// `e² = ⟨G_side, G_other⟩` and `s² = ⟨G_side, S_sideᵀ S_side⟩`.
///
/// Two equal changes are one: the result is then that state, not the change made twice.
///
/// # Errors
/// [`MergeError`] when an array is no state of the geometry or the sum is no float32.
pub fn merge(geometry: Geometry, base: &[f32], ours: &[f32], theirs: &[f32]) -> Result<Merge, MergeError> {
    for (name, state) in [("base", base), ("ours", ours), ("theirs", theirs)] {
        check_state(geometry, name, state)?;
    }
    let (case, state) = if same_bits(theirs, base) || same_bits(ours, theirs) {
        (Case::Ours, ours.to_vec())
    } else if same_bits(ours, base) {
        (Case::Theirs, theirs.to_vec())
    } else {
        (Case::ThreeWay, add(base, ours, theirs)?)
    };
    let rank = geometry.rank();
    let block = rank * rank;
    let (mut total, mut heads) = (Sums::default(), Vec::new());
    for (base, (ours, theirs)) in base
        .chunks_exact(block)
        .zip(ours.chunks_exact(block).zip(theirs.chunks_exact(block)))
    {
        let sums = if case == Case::ThreeWay {
            Sums::of(rank, base, ours, theirs)
        } else {
            Sums::default()
        };
        total.add(&sums);
        heads.push(sums.conflict());
    }
    Ok(Merge {
        state,
        case,
        total: total.conflict(),
        heads,
    })
}

/// base + (ours − base) + (theirs − base), rounded once. A number that one side left alone is the other side's, to the bit.
fn add(base: &[f32], ours: &[f32], theirs: &[f32]) -> Result<Vec<f32>, MergeError> {
    let numbers = base.iter().zip(ours.iter().zip(theirs)).enumerate();
    numbers
        .map(|(index, (&base, (&ours, &theirs)))| {
            if ours.to_bits() == base.to_bits() {
                return Ok(theirs);
            }
            if theirs.to_bits() == base.to_bits() {
                return Ok(ours);
            }
            let value = f64::from(ours) + (f64::from(theirs) - f64::from(base));
            let sum = round(value);
            if sum.is_finite() {
                Ok(sum)
            } else {
                Err(MergeError::Overflow { index, value })
            }
        })
        .collect()
}

/// Sums over heads from which the figures come.
#[derive(Default)]
struct Sums {
    /// `⟨G_ours, G_theirs⟩`.
    shared: f64,
    /// `|G_ours| |G_theirs|`.
    most: f64,
    /// `⟨G_side, S_sideᵀ S_side⟩` of ours and of theirs.
    read_ours: f64,
    read_theirs: f64,
}

impl Sums {
    fn of(rank: usize, base: &[f32], ours: &[f32], theirs: &[f32]) -> Self {
        let (change_ours, change_theirs) = (difference(base, ours), difference(base, theirs));
        // ⟨AᵀA, BᵀB⟩ = |A Bᵀ|², which cannot come out negative.
        let size = |a: &[f64]| squared_products(rank, a, a).sqrt();
        Self {
            shared: squared_products(rank, &change_ours, &change_theirs),
            most: size(&change_ours) * size(&change_theirs),
            read_ours: squared_products(rank, &widen(ours), &change_ours),
            read_theirs: squared_products(rank, &widen(theirs), &change_theirs),
        }
    }

    fn add(&mut self, other: &Self) {
        self.shared += other.shared;
        self.most += other.most;
        self.read_ours += other.read_ours;
        self.read_theirs += other.read_theirs;
    }

    fn conflict(&self) -> Conflict {
        Conflict {
            overlap: part(self.shared, self.most).min(1.0),
            loss_ours: part(self.shared, self.shared + self.read_ours).sqrt(),
            loss_theirs: part(self.shared, self.shared + self.read_theirs).sqrt(),
        }
    }
}

/// part / whole, and 0 of nothing.
fn part(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// |A Bᵀ|² of two row-major matrices `[r, r]`.
fn squared_products(rank: usize, a: &[f64], b: &[f64]) -> f64 {
    a.chunks_exact(rank)
        .flat_map(|row| b.chunks_exact(rank).map(move |other| dot(row, other).powi(2)))
        .sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use proptest::prelude::*;

    use super::*;
    use crate::edits::simulation::{Random, small_worlds};

    fn bits(state: &[f32]) -> Vec<u32> {
        state.iter().map(|number| number.to_bits()).collect()
    }

    /// base with `value` added at `key`, for one head.
    fn told(base: &[f32], value: &[f32], key: &[f32]) -> Vec<f32> {
        let rank = key.len();
        let at = |i: usize| base[i] + value[i / rank] * key[i % rank];
        (0..rank * rank).map(at).collect()
    }

    #[test]
    fn facts_at_orthogonal_keys_are_both_there_and_nothing_is_lost() {
        let geometry = Geometry::new(1, 1, 3).unwrap();
        let base = told(&[0.0; 9], &[1.0, 1.0, 1.0], &[0.0, 0.0, 1.0]);
        let ours = told(&base, &[2.0, 0.0, 1.0], &[1.0, 0.0, 0.0]);
        let theirs = told(&base, &[0.0, 5.0, 1.0], &[0.0, 1.0, 0.0]);
        let merged = merge(geometry, &base, &ours, &theirs).unwrap();
        assert_eq!(merged.case, Case::ThreeWay);
        assert_eq!(merged.state, [2.0, 0.0, 1.0, 0.0, 5.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(
            merged.total,
            Conflict {
                overlap: 0.0,
                loss_ours: 0.0,
                loss_theirs: 0.0
            }
        );
    }

    #[test]
    fn two_values_at_one_key_are_a_whole_conflict() {
        let geometry = Geometry::new(1, 1, 2).unwrap();
        let (zero, key) = ([0.0; 4], [0.6, 0.8]);
        let ours = told(&zero, &[1.0, 0.0], &key);
        let theirs = told(&zero, &[0.0, 3.0], &key);
        let Conflict {
            overlap,
            loss_ours,
            loss_theirs,
        } = merge(geometry, &zero, &ours, &theirs).unwrap().total;
        assert!((overlap - 1.0).abs() < 1e-6);
        // Ours reads 1 and is disturbed by 3, theirs the other way round.
        assert!((loss_ours - 3.0 / 10.0_f64.sqrt()).abs() < 1e-6);
        assert!((loss_theirs - 1.0 / 10.0_f64.sqrt()).abs() < 1e-6);
    }

    #[test]
    fn the_overlap_of_two_single_keys_is_their_squared_cosine() {
        let geometry = Geometry::new(1, 1, 2).unwrap();
        let ours = told(&[0.0; 4], &[1.0, 2.0], &[1.0, 0.0]);
        let theirs = told(&[0.0; 4], &[-3.0, 1.0], &[0.6, 0.8]);
        let overlap = merge(geometry, &[0.0; 4], &ours, &theirs).unwrap().total.overlap;
        assert!((overlap - 0.36).abs() < 1e-6, "{overlap}");
    }

    #[test]
    fn heads_weigh_by_the_energy_of_their_changes() {
        let geometry = Geometry::new(1, 2, 1).unwrap();
        // Both heads write the only key there is; in the second one, theirs changes nothing.
        let merged = merge(geometry, &[0.0; 2], &[1.0, 9.0], &[2.0, 0.0]).unwrap();
        assert_eq!(merged.state, [3.0, 9.0]);
        assert_eq!((merged.heads[0].overlap, merged.heads[1].overlap), (1.0, 0.0));
        assert_eq!(merged.total.overlap, 1.0);
    }

    #[test]
    fn a_sum_beyond_float32_is_refused_and_so_are_wrong_shapes() {
        let geometry = Geometry::new(1, 1, 1).unwrap();
        let error = merge(geometry, &[0.0], &[f32::MAX], &[f32::MAX / 2.0]).unwrap_err();
        assert!(matches!(error, MergeError::Overflow { index: 0, .. }), "{error}");
        let error = merge(geometry, &[0.0], &[1.0], &[1.0; 2]).unwrap_err();
        assert!(error.to_string().contains("theirs holds 2 numbers"), "{error}");
        assert!(merge(geometry, &[f32::NAN], &[1.0], &[1.0]).is_err());
    }

    fn states() -> impl Strategy<Value = (Geometry, Vec<f32>, Vec<f32>, Vec<f32>)> {
        (1..=2_usize, 1..=2_usize, 1..=8_usize).prop_flat_map(|(layers, heads, rank)| {
            let geometry = Geometry::new(layers, heads, rank).unwrap();
            let number = prop_oneof![4 => -2.0_f32..2.0, 1 => Just(0.0_f32), 1 => Just(-0.0_f32), 1 => Just(1e-40_f32)];
            let state = prop::collection::vec(number, geometry.elements());
            (Just(geometry), state.clone(), state.clone(), state)
        })
    }

    #[test]
    fn facts_of_both_branches_are_recalled_after_a_merge() {
        judge(0..4);
    }

    #[test]
    #[ignore = "long: the figures of docs/log.md, over 40 merges of each world"]
    fn facts_of_both_branches_are_recalled_after_many_merges() {
        judge(0..40);
    }

    /// A common history of 4 facts, then 4 on each branch. A fact is recalled when its value is the nearest, by cosine, of all that were told.
    fn judge(seeds: std::ops::Range<u64>) {
        for (name, world) in small_worlds() {
            let (mut asked, mut alone, mut recalled) = (0.0, 0.0, 0.0);
            let mut figures = [0.0; 3];
            for seed in seeds.clone() {
                let old = world.branch(3 * seed, &vec![0.0; world.geometry().elements()], 4);
                let base = &old.states[4];
                let sides = [1, 2].map(|side| world.branch(3 * seed + side, base, 4));
                let [ours, theirs] = [&sides[0].states[4], &sides[1].states[4]];
                let merged = merge(world.geometry(), base, ours, theirs).unwrap();
                let Conflict {
                    overlap,
                    loss_ours,
                    loss_theirs,
                } = merged.total;
                for (sum, figure) in figures.iter_mut().zip([overlap, loss_ours, loss_theirs]) {
                    *sum += figure / seeds.clone().count() as f64;
                }
                let all = || old.facts.iter().chain(&sides[0].facts).chain(&sides[1].facts);
                let mut random = Random::new(seed ^ 0xF00D);
                for side in &sides {
                    for fact in side.facts.iter().filter(|fact| !fact.overwritten) {
                        let query = fact.asked(&world, &mut random);
                        let knows = |state: &[f32]| {
                            let read = world.read(state, &query);
                            let own = fact.cosine(&read);
                            f64::from(u8::from(all().all(|other| other.cosine(&read) <= own)))
                        };
                        asked += 1.0;
                        alone += knows(&side.states[4]);
                        recalled += knows(&merged.state);
                    }
                }
            }
            println!(
                "{name}: recalled on their own branch {:.3}, after the merge {:.3}; overlap {:.3}, loss of ours {:.3}, of theirs {:.3}",
                alone / asked,
                recalled / asked,
                figures[0],
                figures[1],
                figures[2],
            );
            assert!(
                recalled / asked >= 0.9,
                "{name}: {recalled} of {asked}, {alone} without the merge"
            );
        }
    }

    proptest! {
        #[test]
        fn a_side_without_changes_gives_the_other_to_the_bit((geometry, base, ours, _) in states()) {
            let forward = merge(geometry, &base, &base, &ours).unwrap();
            prop_assert_eq!(bits(&forward.state), bits(&ours));
            prop_assert!(bits(&base) == bits(&ours) || forward.case == Case::Theirs);
            let kept = merge(geometry, &base, &ours, &base).unwrap();
            prop_assert_eq!((bits(&kept.state), kept.case), (bits(&ours), Case::Ours));
            let same = merge(geometry, &base, &ours, &ours).unwrap();
            prop_assert_eq!((bits(&same.state), same.case), (bits(&ours), Case::Ours));
            for merged in [forward, kept, same] {
                prop_assert_eq!(merged.total, Conflict { overlap: 0.0, loss_ours: 0.0, loss_theirs: 0.0 });
                prop_assert_eq!(merged.heads.len(), geometry.layers() * geometry.heads());
            }
        }

        #[test]
        fn a_merge_is_the_sum_and_does_not_care_for_the_order((geometry, base, ours, theirs) in states()) {
            let merged = merge(geometry, &base, &ours, &theirs).unwrap();
            let turned = merge(geometry, &base, &theirs, &ours).unwrap();
            if bits(&ours) == bits(&theirs) {
                return Ok(());
            }
            for (at, (&found, &other)) in merged.state.iter().zip(&turned.state).enumerate() {
                let expected = f64::from(ours[at]) + f64::from(theirs[at]) - f64::from(base[at]);
                prop_assert!((f64::from(found) - expected).abs() <= 1e-7 * expected.abs().max(1e-30));
                prop_assert!((found - other).abs() <= f32::EPSILON * found.abs());
            }
            for (here, there) in merged.heads.iter().zip(&turned.heads).chain([(&merged.total, &turned.total)]) {
                prop_assert!((here.overlap - there.overlap).abs() < 1e-12);
                prop_assert!((here.loss_ours - there.loss_theirs).abs() < 1e-12);
                for figure in [here.overlap, here.loss_ours, here.loss_theirs] {
                    prop_assert!((0.0..=1.0).contains(&figure), "{}", figure);
                }
            }
        }

        #[test]
        fn the_losses_are_those_of_the_reads_at_the_written_keys(rank in 2..=12_usize, facts in 1..=4_usize, seed: u64) {
            // The keys of a side are the right singular directions of its change, weighted by the singular values.
            let geometry = Geometry::new(1, 1, rank).unwrap();
            let mut random = Random::new(seed);
            let mut state = |from: &[f32]| {
                let mut state = from.to_vec();
                for _ in 0..facts {
                    let (value, key) = (random.unit(rank), random.unit(rank));
                    let [value, key] = [value, key].map(|x| x.into_iter().map(round).collect::<Vec<f32>>());
                    state = told(&state, &value, &key);
                }
                state
            };
            let base = state(&vec![0.0; rank * rank]);
            let (ours, theirs) = (state(&base), state(&base));
            let merged = merge(geometry, &base, &ours, &theirs).unwrap();
            let svd = crate::edits::svd::Svd::of(&difference(&base, &ours), rank);
            let (disturbance, own) = (difference(&ours, &merged.state), widen(&ours));
            let energy = |matrix: &[f64]| -> f64 {
                (0..rank).map(|i| {
                    let read = |row: &[f64]| (svd.values[i] * dot(row, svd.right(i))).powi(2);
                    matrix.chunks_exact(rank).map(read).sum::<f64>()
                }).sum()
            };
            let expected = (energy(&disturbance) / (energy(&disturbance) + energy(&own))).sqrt();
            prop_assert!((merged.total.loss_ours - expected).abs() < 1e-5, "{} {}", merged.total.loss_ours, expected);
        }
    }
}
