//! A history without the change of one of its commits. It knows states, no tokens and no gates, and so it is an estimate with an error
//! figure, except where the commit was the last one.
//!
//! With the keys, values and gates of all later turns as they were, the later states are linear in the earlier one, so replaying them from
//! `S_{c−1}` in place of `S_c` gives exactly
//!
//! ```text
//! S' = S_n − (S_c − S_{c−1}) M_{c+1} … M_n
//! ```
//!
//! where `M_i` is what turn i left of an older state. States tell `A_i` instead of `M_i`, the estimate of [`blame`](super::blame)'s
//! `Surviving`, and A stands in M's place here. Subtracting the plain difference, M = 1, is far worse: it takes out what later
//! turns had long let decay or overwritten, and leaves its negative behind.
//!
//! What this is not: a replay through the model. Later turns read the memory, so what they wrote may hold what they had read of the redacted
//! commit (a reply that repeats the fact writes it again, and that is a change of its own). Whoever must be sure replays the text
//! without that turn, or rolls back to before it.

use super::survival::Survival;
use super::{StateError, check_state, difference, dot, round, same_bits};
use crate::geometry::Geometry;

/// One commit's change on its way to the last state.
#[derive(Debug, Clone, PartialEq)]
pub struct Removal {
    geometry: Geometry,
    /// What is left of `S_c − S_{c−1}`, [L, H, r, r].
    change: Vec<f64>,
    /// The squared error that is expected in it, [L·H].
    error: Vec<f64>,
    /// `|S_c − S_{c−1}|`.
    size: f64,
    /// `S_{c−1}` and `S_c`, as long as no later state came.
    adjacent: Option<(Vec<f32>, Vec<f32>)>,
}

/// A state without a commit's change.
#[derive(Debug, Clone, PartialEq)]
pub struct Redacted {
    /// float32 [L, H, r, r].
    pub state: Vec<f32>,
    /// The size of what was taken out, as a part of the change that the commit had made: 1 right after it, 0 when nothing was left. 0
    /// also for a commit that changed nothing.
    pub survived: f64,
    /// What could not be separated: the expected size of the error in what was taken out, as a part of the commit's change. From the
    /// standard error of each ρ of A, carried along; in simulated histories the true error was 0.4 to 1.5 times this. 0 is exact.
    pub unseparated: f64,
}

/// Two histories whose removals do not belong together.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RedactError {
    /// A state is none of the geometry.
    #[error(transparent)]
    State(#[from] StateError),
    /// The sides of a merge carry removals of two geometries.
    #[error(
        "the sides of the merge carry removals for memories of {ours} and of {theirs}; they must be of one model"
    )]
    Geometry {
        /// Of one side.
        ours: Geometry,
        /// Of the other.
        theirs: Geometry,
    },
    /// The history ends before the commit.
    #[error(
        "redaction needs the state before the commit, the commit's own, and all later ones, found {found} in all"
    )]
    TooFew {
        /// States found.
        found: usize,
    },
    /// The result is larger than a float32.
    #[error(
        "the redacted state would be {value:e} at number {index}, more than a float32 holds; roll back to before the commit instead"
    )]
    Overflow {
        /// Where, counted in the flat array.
        index: usize,
        /// The number.
        value: f64,
    },
}

impl Removal {
    /// Begins with the commit's own change, between the states `before` and `after` it, [L, H, r, r].
    ///
    /// # Errors
    /// [`StateError`] when one of them is no state of the geometry.
    pub fn of(geometry: Geometry, before: &[f32], after: &[f32]) -> Result<Self, StateError> {
        check_state(geometry, "before", before)?;
        check_state(geometry, "after", after)?;
        let change = difference(before, after);
        Ok(Self {
            geometry,
            size: dot(&change, &change).sqrt(),
            change,
            error: vec![0.0; geometry.layers() * geometry.heads()],
            adjacent: Some((before.to_vec(), after.to_vec())),
        })
    }

    /// Carries the change through one later commit, from the state `before` it to the state `after` it.
    ///
    /// # Errors
    /// [`StateError`] when one of them is no state of the geometry; nothing is changed then.
    pub fn advance(&mut self, before: &[f32], after: &[f32]) -> Result<(), StateError> {
        check_state(self.geometry, "before", before)?;
        check_state(self.geometry, "after", after)?;
        let rank = self.geometry.rank();
        let survival = Survival::between(self.geometry, before, after);
        for (head, (rows, error)) in self
            .change
            .chunks_exact_mut(rank * rank)
            .zip(&mut self.error)
            .enumerate()
        {
            let (there, added) = (dot(rows, rows), survival.squared_error(head, rows));
            survival.apply(head, rows);
            // An error shrinks with the change that it sits in.
            let left = if there > 0.0 { dot(rows, rows) / there } else { 0.0 };
            *error = *error * left + added;
        }
        self.adjacent = None;
        Ok(())
    }

    /// Carries the change through a three-way merge, ours + theirs − base, from the sides that have it (those whose history holds the
    /// commit). `None` when no side has it. Where all three have it, the errors from before the base are counted once.
    ///
    /// # Errors
    /// [`RedactError::Geometry`] when the removals are of two geometries.
    pub fn merge(
        ours: Option<&Self>,
        theirs: Option<&Self>,
        base: Option<&Self>,
    ) -> Result<Option<Self>, RedactError> {
        let sides = [(ours, 1.0), (theirs, 1.0), (base, -1.0)];
        let Some(first) = sides.iter().find_map(|(side, _)| *side) else {
            return Ok(None);
        };
        let mut merged = Self {
            change: vec![0.0; first.change.len()],
            error: vec![0.0; first.error.len()],
            adjacent: None,
            ..first.clone()
        };
        for (side, sign) in sides {
            let Some(side) = side else { continue };
            if side.geometry != merged.geometry {
                return Err(RedactError::Geometry {
                    ours: merged.geometry,
                    theirs: side.geometry,
                });
            }
            for (sum, change) in merged.change.iter_mut().zip(&side.change) {
                *sum += sign * change;
            }
            for (sum, error) in merged.error.iter_mut().zip(&side.error) {
                *sum += sign * error;
            }
        }
        for side in [ours, theirs].into_iter().flatten() {
            for (sum, error) in merged.error.iter_mut().zip(&side.error) {
                *sum = sum.max(*error);
            }
        }
        Ok(Some(merged))
    }

    /// Takes what is left of the change out of the last state, [L, H, r, r]. Where that is the commit's own state, the result is the state
    /// before it, to the bit.
    ///
    /// # Errors
    /// [`RedactError`] when it is no state of the geometry, or the result is no float32.
    pub fn finish(self, state: &[f32]) -> Result<Redacted, RedactError> {
        check_state(self.geometry, "the last state", state)?;
        let part = |size: f64| if self.size > 0.0 { size / self.size } else { 0.0 };
        let (survived, unseparated) = (
            part(dot(&self.change, &self.change).sqrt()),
            part(self.error.iter().sum::<f64>().sqrt()),
        );
        let state = match self.adjacent {
            Some((before, after)) if same_bits(&after, state) => before,
            _ => subtract(state, &self.change)?,
        };
        Ok(Redacted {
            state,
            survived,
            unseparated,
        })
    }
}

fn subtract(state: &[f32], change: &[f64]) -> Result<Vec<f32>, RedactError> {
    let numbers = state.iter().zip(change).enumerate();
    numbers
        .map(|(index, (&state, &change))| {
            let value = f64::from(state) - change;
            let rest = round(value);
            if rest.is_finite() {
                Ok(rest)
            } else {
                Err(RedactError::Overflow { index, value })
            }
        })
        .collect()
}

/// Redacts a commit of a straight line. `states` are those of its parent (or zeros), its own, and all later ones in order, [L, H, r, r] each. Two are
/// held at a time.
///
/// # Errors
/// [`RedactError`] when there are fewer than two states, one does not fit, or the result is no float32.
pub fn redact<S: AsRef<[f32]>>(
    geometry: Geometry,
    states: impl IntoIterator<Item = S>,
) -> Result<Redacted, RedactError> {
    let mut states = states.into_iter();
    let parent = states.next().ok_or(RedactError::TooFew { found: 0 })?;
    let mut last = states.next().ok_or(RedactError::TooFew { found: 1 })?;
    let mut removal = Removal::of(geometry, parent.as_ref(), last.as_ref())?;
    for state in states {
        removal.advance(last.as_ref(), state.as_ref())?;
        last = state;
    }
    removal.finish(last.as_ref())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use proptest::prelude::*;

    use super::*;
    use crate::edits::merge::merge;
    use crate::edits::simulation::{Random, World, small_worlds};

    fn norm(a: &[f64]) -> f64 {
        dot(a, a).sqrt()
    }

    #[test]
    fn the_last_commit_is_redacted_to_the_bit() {
        let geometry = Geometry::new(1, 1, 2).unwrap();
        let (before, after) = ([1e-20_f32, -0.0, 3.0, 0.1], [1e20_f32, 5.0, 3.0, 0.3]);
        let redacted = redact(geometry, [before, after]).unwrap();
        assert!(same_bits(&redacted.state, &before));
        assert_eq!((redacted.survived, redacted.unseparated), (1.0, 0.0));
    }

    #[test]
    fn a_decayed_fact_is_taken_out_as_far_as_it_is_still_there() {
        let geometry = Geometry::new(1, 1, 2).unwrap();
        let states = [[0.0, 0.0, 0.0, 4.0], [8.0, 0.0, 0.0, 4.0], [4.0, 0.0, 0.0, 2.0]];
        let redacted = redact(geometry, states).unwrap();
        assert_eq!((redacted.survived, redacted.unseparated), (0.5, 0.0));
        assert_eq!(redacted.state, [0.0, 0.0, 0.0, 2.0]);
    }

    #[test]
    fn a_change_that_was_merged_in_is_taken_out_of_the_merge() {
        let world = World {
            commits: 6,
            ..small_worlds()[0].1
        };
        let geometry = world.geometry();
        let history = world.history(3);
        let (base, ours) = (&history.states[2], &history.states[3]);
        let theirs = &world.branch(9, base, 1).states[1];
        let merged = merge(geometry, base, ours, theirs).unwrap().state;
        let removal = Removal::of(geometry, base, theirs).unwrap();
        let removal = Removal::merge(None, Some(&removal), None).unwrap().unwrap();
        let redacted = removal.finish(&merged).unwrap();
        let off = norm(&difference(ours, &redacted.state)) / norm(&difference(base, ours));
        assert!(off < 1e-6 && redacted.unseparated == 0.0, "{off}");
        // A change from before the base is there once, however many sides carry it.
        let old = Removal::of(geometry, &history.states[1], base).unwrap();
        let again = Removal::merge(Some(&old), Some(&old), Some(&old))
            .unwrap()
            .unwrap();
        assert_eq!((&again.change, &again.error), (&old.change, &old.error));
        assert_eq!(Removal::merge(None, None, None).unwrap(), None);
        let other = Removal::of(Geometry::new(1, 1, 1).unwrap(), &[0.0], &[1.0]).unwrap();
        assert!(matches!(
            Removal::merge(Some(&old), Some(&other), None),
            Err(RedactError::Geometry { .. })
        ));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let geometry = Geometry::new(1, 1, 1).unwrap();
        assert_eq!(redact(geometry, [[1.0]]), Err(RedactError::TooFew { found: 1 }));
        assert!(matches!(
            redact(geometry, [[1.0], [f32::NAN]]),
            Err(RedactError::State(_))
        ));
        assert!(matches!(
            redact(geometry, [[1.0, 2.0]; 2]),
            Err(RedactError::State(_))
        ));
        let removal = Removal::of(geometry, &[f32::MAX], &[-f32::MAX]).unwrap();
        let error = removal.finish(&[f32::MAX]).unwrap_err();
        assert!(matches!(error, RedactError::Overflow { index: 0, .. }), "{error}");
        let idle = redact(geometry, [[1.0], [1.0], [5.0]]).unwrap();
        assert_eq!(
            (idle.state, idle.survived, idle.unseparated),
            (vec![5.0], 0.0, 0.0)
        );
    }

    proptest! {
        #[test]
        fn any_history_gives_finite_figures_within_their_bounds(
            rank in 1..=9_usize, commits in 2..=5_usize, seed: u64
        ) {
            let geometry = Geometry::new(2, 1, rank).unwrap();
            let mut random = Random::new(seed);
            let states: Vec<Vec<f32>> =
                (0..commits).map(|_| (0..geometry.elements()).map(|_| round(random.normal())).collect()).collect();
            let redacted = redact(geometry, &states).unwrap();
            // No later commit adds to a change: A shrinks every direction or leaves it.
            prop_assert!((0.0..=1.0 + 1e-12).contains(&redacted.survived), "{}", redacted.survived);
            prop_assert!(redacted.unseparated.is_finite() && redacted.unseparated >= 0.0);
            prop_assert!(redacted.unseparated <= (commits as f64 - 2.0).sqrt() + 1e-9);
            prop_assert!(redacted.state.iter().all(|number| number.is_finite()));
        }
    }

    #[test]
    fn a_redacted_history_is_close_to_one_that_never_had_the_commit() {
        judge(0..2);
    }

    #[test]
    #[ignore = "long: the figures of docs/log.md, over 40 histories of each world"]
    fn redacted_histories_are_close_to_those_that_never_had_the_commit() {
        judge(0..40);
    }

    /// Against the same tokens run again without those of the commit.
    fn judge(seeds: std::ops::Range<u64>) {
        for (name, world) in small_worlds() {
            // The error of the redacted state as a part of the commit's change, with the plain difference, and as the figure says.
            let (mut found, mut plain, mut figure, mut count) = (0.0, 0.0, 0.0, 0.0);
            let (mut leaks, mut ratios) = ((0.0, 0.0, 0.0), Vec::new());
            for seed in seeds.clone() {
                let history = world.history(seed);
                let last = &history.states[world.commits];
                for commit in (1..world.commits).step_by(4) {
                    let truth = history.without(commit);
                    let redacted = redact(world.geometry(), &history.states[commit - 1..]).unwrap();
                    let change = difference(&history.states[commit - 1], &history.states[commit]);
                    let size = norm(&change);
                    let error = norm(&difference(&truth, &redacted.state)) / size;
                    let left = difference(&truth, last);
                    let plainly: Vec<f64> = change.iter().zip(&left).map(|(c, l)| c - l).collect();
                    found += error;
                    plain += norm(&plainly) / size;
                    figure += redacted.unseparated;
                    ratios.push(error / redacted.unseparated);
                    count += 1.0;
                    // What the redacted commit's key still reads beyond what it would have read.
                    let key = &history.facts[commit - 1].key;
                    let reads = [&truth, &redacted.state, last].map(|state| world.read(state, key));
                    let off =
                        |a: &[f64], b: &[f64]| norm(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>());
                    leaks.0 += off(&reads[1], &reads[0]);
                    leaks.1 += off(&reads[2], &reads[0]);
                    leaks.2 += norm(&reads[2]);
                }
            }
            ratios.sort_by(f64::total_cmp);
            println!(
                "{name}: error of the change taken out {:.3}, plain difference {:.3}, figure {:.3}; error / figure 10 to 90 %: {:.2} to {:.2}; \
                 read of the redacted key off by {:.3} of the read before, unredacted {:.3}",
                found / count,
                plain / count,
                figure / count,
                ratios[ratios.len() / 10],
                ratios[ratios.len() * 9 / 10],
                leaks.0 / leaks.2,
                leaks.1 / leaks.2,
            );
            assert!(found < 0.35 * plain, "{name}: {found} against {plain}");
            assert!(
                (0.33..3.0).contains(&(figure / found)),
                "{name}: the figure says {figure}, it is {found}"
            );
        }
    }
}
