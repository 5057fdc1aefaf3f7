//! What a state looks like from outside, head by head, and whether healthy states look like that: sizes, bounds that were learnt from
//! healthy ones, and a verdict in words. It sees states alone, float32 [L, H, r, r], and computes in f64. It knows no session, no graph
//! and no bundle; what a bundle's graph measures beside the state is held against its bounds here and made elsewhere.
//!
//! The rule itself bounds no state. Of one row s of S a write with `no_lambda` makes s + β (v − s·k) k, so |s|² changes by
//! (s·k + β (v − s·k))² − (s·k)², which is β² v² for a key orthogonal to s: with r ≥ 2 there always is one, and n such writes make
//! √n β v. With λ = 1 − β the map of s is λ − β k kᵀ, whose norm stays under 1, but comes as near to it as β does to 0 or 1. So without
//! learnt bounds nothing is refused but what no read can use ([`UNUSABLE`]).

mod spectrum;

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::geometry::Geometry;

/// A norm from which on a sum of squares of float32 numbers is infinite: the root of the largest of them. A state as large, or one with a
/// number that is not finite, gives no read that a norm or a softmax could use.
pub const UNUSABLE: f64 = 1.844_674_3e19;

/// Over how many turns a path is summed. One poisoned turn may look like a fact that is told; as many one behind the other do not.
pub const WINDOW: usize = 16;

/// The sizes of a state, [L, H] each, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Figures {
    /// Frobenius norms.
    pub norm: Vec<f64>,
    /// Spectral norms, the largest singular values: how long a read by a query of length 1 can be.
    pub spectral_norm: Vec<f64>,
    /// exp(−Σ p ln p) with p = σ² / Σ σ² over the singular values σ: 1 for one direction, r for r equal ones, 0 for no state. As
    /// `edits::diff` has it for a change.
    pub effective_rank: Vec<f64>,
    /// norm / √(effective rank): the size of a direction that is in use. Facts under keys of their own add directions and leave it; writes
    /// that contradict each other under one key raise it.
    pub concentration: Vec<f64>,
}

impl Figures {
    /// The figures of `state`, float32 [L, H, r, r]. NaN for a head that holds a number that is not finite. About 3 r³ multiplications a
    /// head.
    ///
    /// # Panics
    /// Never: a state of another length has the figures of the heads that are whole.
    pub fn of(geometry: Geometry, state: &[f32]) -> Self {
        let rank = geometry.rank();
        let mut figures = Self {
            norm: Vec::new(),
            spectral_norm: Vec::new(),
            effective_rank: Vec::new(),
            concentration: Vec::new(),
        };
        for head in state.chunks_exact(rank * rank) {
            if head.iter().any(|number| !number.is_finite()) {
                figures.push(f64::NAN, f64::NAN, f64::NAN);
                continue;
            }
            let energy: f64 = head.iter().map(|&number| f64::from(number).powi(2)).sum();
            let squares = spectrum::squared_singular_values(head, rank);
            let total: f64 = squares.iter().sum();
            let rank = if total > 0.0 {
                // Shares first: the squares of the smallest numbers have no logarithm.
                let entropy: f64 = squares
                    .iter()
                    .map(|square| square / total)
                    .filter(|&share| share > 0.0)
                    .map(|share| -share * share.ln())
                    .sum();
                entropy.exp().max(1.0)
            } else {
                0.0
            };
            let largest = squares.iter().copied().fold(0.0, f64::max);
            figures.push(energy.sqrt(), largest.sqrt(), rank);
        }
        figures
    }

    /// How far the state collapsed since it had the figures `before`, [L, H]: the factor by which its effective rank fell, times the part of
    /// today's energy that it had before, at most 1. So a first fact in a memory of noise is no collapse, and a memory that one key has
    /// taken over is.
    pub fn collapse_since(&self, before: &Self) -> Vec<f64> {
        let ranks = before.effective_rank.iter().zip(&self.effective_rank);
        let norms = before.norm.iter().zip(&self.norm);
        ranks
            .zip(norms)
            .map(|((rank_before, rank), (norm_before, norm))| {
                let had = if norm > norm_before {
                    (norm_before / norm).powi(2)
                } else {
                    1.0
                };
                // Below one direction there is nothing to fall to.
                had * rank_before / rank.max(1.0)
            })
            .collect()
    }

    fn push(&mut self, norm: f64, spectral_norm: f64, effective_rank: f64) {
        self.norm.push(norm);
        self.spectral_norm.push(spectral_norm);
        self.effective_rank.push(effective_rank);
        // A state of nothing has no directions.
        self.concentration.push(norm / effective_rank.max(1.0).sqrt());
    }
}

/// `|after − before|` of each head, Frobenius, [L, H]; infinite where a number of either is not finite.
pub fn distance(geometry: Geometry, before: &[f32], after: &[f32]) -> Vec<f64> {
    let block = geometry.rank() * geometry.rank();
    before
        .chunks_exact(block)
        .zip(after.chunks_exact(block))
        .map(|(before, after)| {
            let sum: f64 = before
                .iter()
                .zip(after)
                .map(|(&before, &after)| (f64::from(after) - f64::from(before)).powi(2))
                .sum();
            if sum.is_finite() {
                sum.sqrt()
            } else {
                f64::INFINITY
            }
        })
        .collect()
}

/// `|after − before|` of each head in the nuclear norm, the sum of the singular values, [L, H]; infinite where a number of either is not
/// finite. About 3 r³ multiplications a head.
fn nuclear_distance(geometry: Geometry, before: &[f32], after: &[f32]) -> Vec<f64> {
    let rank = geometry.rank();
    before
        .chunks_exact(rank * rank)
        .zip(after.chunks_exact(rank * rank))
        .map(|(before, after)| {
            let moved: Vec<f32> = before.iter().zip(after).map(|(a, b)| b - a).collect();
            if moved.iter().all(|number| number.is_finite()) {
                let squares = spectrum::squared_singular_values(&moved, rank);
                squares.into_iter().map(f64::sqrt).sum()
            } else {
                f64::INFINITY
            }
        })
        .collect()
}

/// After how many turns a [`Churn`] keeps a state to measure from, and how many of them it keeps.
const MARK_EVERY: usize = 8;
const MARKS: usize = 4;

/// How much of what a session's last turns did to a state came to nothing, [L, H]: the lengths of the turns' changes, added up, minus the
/// length of all they changed together, in the nuclear norm. There writes under keys of their own add up, however many they are, and
/// are no churn; contradictions under one key, and noise that goes over the same ground again and again, are little else.
///
/// It looks back over 25 to 33 turns, from a state that it keeps after every eighth.
#[derive(Debug, Clone, Default)]
pub struct Churn {
    /// States on the way, oldest first, and how far the turns since have gone.
    marks: VecDeque<(Vec<f32>, Vec<f64>)>,
    /// Turns since the last mark.
    since: usize,
}

/// What a [`Churn`] would be with one more turn.
#[derive(Debug, Clone, PartialEq)]
pub struct NextChurn {
    /// The figure, [L, H].
    pub churn: Vec<f64>,
    /// How far the turn went, in the nuclear norm, [L, H].
    pub turn: Vec<f64>,
}

impl Churn {
    /// The churn when a turn from `before` to `after` is the last one. Nothing is kept yet.
    pub fn with(&self, geometry: Geometry, before: &[f32], after: &[f32]) -> NextChurn {
        let turn = nuclear_distance(geometry, before, after);
        let churn = match self.marks.front() {
            None => vec![0.0; turn.len()],
            Some((state, gone)) => {
                let together = nuclear_distance(geometry, state, after);
                let gone = gone.iter().zip(&turn).map(|(gone, turn)| gone + turn);
                // Never below 0 but by rounding.
                gone.zip(&together)
                    .map(|(gone, together)| (gone - together).max(0.0))
                    .collect()
            }
        };
        NextChurn { churn, turn }
    }

    /// The turn that `next` was made with, from `before`, counts.
    pub fn take(&mut self, next: &NextChurn, before: &[f32]) {
        if self.since.is_multiple_of(MARK_EVERY) {
            if self.marks.len() == MARKS {
                self.marks.pop_front();
            }
            self.marks
                .push_back((before.to_vec(), vec![0.0; next.turn.len()]));
            self.since = 0;
        }
        self.since += 1;
        for (_, gone) in &mut self.marks {
            for (gone, turn) in gone.iter_mut().zip(&next.turn) {
                *gone += turn;
            }
        }
    }
}

/// What healthy memories of a bundle stay under. [L, H] where not said otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// Frobenius norms.
    pub norm: Vec<Vec<f64>>,
    /// Spectral norms.
    pub spectral_norm: Vec<Vec<f64>>,
    /// Effective ranks.
    pub effective_rank: Vec<Vec<f64>>,
    /// Norms over the roots of effective ranks.
    pub concentration: Vec<Vec<f64>>,
    /// How far one turn moves the state.
    pub change: Vec<Vec<f64>>,
    /// How far [`WINDOW`] turns move it, turn by turn and added up.
    pub path: Vec<Vec<f64>>,
    /// How far one turn collapses the state ([`Figures::collapse_since`]); missing where it was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collapse: Option<Vec<Vec<f64>>>,
    /// How much of what the last turns did came to nothing ([`Churn`]); missing where it was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub churn: Option<Vec<Vec<f64>>>,
    /// In how many directions at once [`WINDOW`] turns move it: the nuclear norms of their changes minus the Frobenius norms, added up;
    /// missing where it was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scatter: Option<Vec<Vec<f64>>>,
    /// |correction| / |what it corrects|, [L, delta heads]; missing where the graph does not measure it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta_ratio: Option<Vec<Vec<f64>>>,
    /// The mean of β, [L, 1]; missing where the graph does not measure it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_mean: Option<Vec<Vec<f64>>>,
}

impl Bounds {
    /// Every bound that there is, with its name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Vec<Vec<f64>>)> {
        [
            ("norm", Some(&self.norm)),
            ("spectral_norm", Some(&self.spectral_norm)),
            ("effective_rank", Some(&self.effective_rank)),
            ("concentration", Some(&self.concentration)),
            ("change", Some(&self.change)),
            ("path", Some(&self.path)),
            ("collapse", self.collapse.as_ref()),
            ("churn", self.churn.as_ref()),
            ("scatter", self.scatter.as_ref()),
            ("delta_ratio", self.delta_ratio.as_ref()),
            ("beta_mean", self.beta_mean.as_ref()),
        ]
        .into_iter()
        .filter_map(|(name, bound)| bound.map(|bound| (name, bound)))
    }

    /// The first bound that does not fit a memory of `geometry` with so many delta heads, as (its name, what it is, what it must be).
    ///
    /// # Errors
    /// These three, for whoever reads a file.
    pub fn check(
        &self,
        geometry: Geometry,
        delta_heads: usize,
    ) -> Result<(), (&'static str, String, String)> {
        for (name, bound) in self.named() {
            let columns = match name {
                "delta_ratio" => delta_heads,
                "beta_mean" => 1,
                _ => geometry.heads(),
            };
            let rows: Vec<usize> = bound.iter().map(Vec::len).collect();
            if rows.len() != geometry.layers() || rows.iter().any(|&row| row != columns) {
                let expected = format!("[{}, {columns}] numbers", geometry.layers());
                return Err((
                    name,
                    format!("{} rows, the first of {:?}", rows.len(), rows.first()),
                    expected,
                ));
            }
            if let Some(wrong) = bound
                .iter()
                .flatten()
                .find(|bound| !bound.is_finite() || **bound < 0.0)
            {
                return Err((name, wrong.to_string(), "finite numbers, 0 or more".into()));
            }
        }
        Ok(())
    }
}

/// What is held against the bounds. What is not known is not held.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The state's own figures.
    pub figures: &'a Figures,
    /// How far the last turn moved it, [L, H].
    pub change: Option<&'a [f64]>,
    /// How far the last [`WINDOW`] turns did, added up, [L, H].
    pub path: Option<&'a [f64]>,
    /// How far the last turn collapsed it, [L, H].
    pub collapse: Option<&'a [f64]>,
    /// How much of what the last turns did came to nothing, [L, H].
    pub churn: Option<&'a [f64]>,
    /// In how many directions at once the last [`WINDOW`] turns moved it, [L, H].
    pub scatter: Option<&'a [f64]>,
    /// |correction| / |what it corrects|, [L, delta heads].
    pub delta_ratio: Option<&'a [f64]>,
    /// The mean of β, [L].
    pub beta_mean: Option<&'a [f64]>,
}

/// Why the memory is not healthy, in words; empty when nothing speaks against it. Without `bounds` only what no read can use is named.
/// `layers`: the model's layers that have the memory, by which they are named.
pub fn reasons(
    seen: Seen<'_>,
    layers: &[usize],
    heads: usize,
    delta_heads: usize,
    bounds: Option<&Bounds>,
) -> Vec<String> {
    let mut reasons = Vec::new();
    let unusable = |norm: &f64| !norm.is_finite() || *norm >= UNUSABLE;
    if let Some(at) = seen.figures.norm.iter().position(unusable) {
        reasons.push(format!(
            "layer {}, head {}: numbers that are not finite, or too large for a read (norm {:.3e})",
            layer_name(layers, at / heads),
            at % heads,
            seen.figures.norm[at]
        ));
    }
    let Some(bounds) = bounds else { return reasons };
    let sizes = [
        (
            "a norm of",
            Some(&seen.figures.norm[..]),
            Some(&bounds.norm),
            heads,
        ),
        (
            "a spectral norm of",
            Some(&seen.figures.spectral_norm),
            Some(&bounds.spectral_norm),
            heads,
        ),
        (
            "an effective rank of",
            Some(&seen.figures.effective_rank),
            Some(&bounds.effective_rank),
            heads,
        ),
        (
            "a concentration of",
            Some(&seen.figures.concentration),
            Some(&bounds.concentration),
            heads,
        ),
        ("moved in one turn by", seen.change, Some(&bounds.change), heads),
        ("moved in its last turns by", seen.path, Some(&bounds.path), heads),
        (
            "collapsed in one turn by a factor of",
            seen.collapse,
            bounds.collapse.as_ref(),
            heads,
        ),
        (
            "its last turns undid each other by",
            seen.churn,
            bounds.churn.as_ref(),
            heads,
        ),
        (
            "its last turns scattered their writes by",
            seen.scatter,
            bounds.scatter.as_ref(),
            heads,
        ),
        (
            "corrections against what they correct at",
            seen.delta_ratio,
            bounds.delta_ratio.as_ref(),
            delta_heads,
        ),
        ("a mean β of", seen.beta_mean, bounds.beta_mean.as_ref(), 1),
    ];
    for (words, found, bound, columns) in sizes {
        if let (Some(found), Some(bound)) = (found, bound) {
            reasons.extend(over(words, found, bound, layers, columns));
        }
    }
    reasons
}

/// The model's number of the memory's layer `at`.
fn layer_name(layers: &[usize], at: usize) -> usize {
    layers.get(at).copied().unwrap_or(at)
}

/// The place where `found` is over its bound by most, and how many others are.
fn over(words: &str, found: &[f64], bounds: &[Vec<f64>], layers: &[usize], columns: usize) -> Option<String> {
    let excess = |(found, bound): (&f64, &f64)| found / bound.max(f64::MIN_POSITIVE);
    let over: Vec<(usize, f64)> = found
        .iter()
        .zip(bounds.iter().flatten())
        .enumerate()
        .filter(|(_, (found, bound))| found > bound)
        .map(|(at, pair)| (at, excess(pair)))
        .collect();
    let &(at, _) = over.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let layer = layer_name(layers, at / columns);
    let place = match columns {
        1 => format!("layer {layer}"),
        _ => format!("layer {layer}, head {}", at % columns),
    };
    let others = match over.len() {
        1 => String::new(),
        n => format!(" (and {} more of {})", n - 1, found.len()),
    };
    let bound = bounds[at / columns][at % columns];
    Some(format!(
        "{place}: {words} {:.4}, healthy ones stay under {bound:.4}{others}",
        found[at]
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use super::*;

    fn bounds(value: f64) -> Bounds {
        let same = || vec![vec![value; 2]; 2];
        Bounds {
            norm: same(),
            spectral_norm: same(),
            effective_rank: same(),
            concentration: same(),
            change: same(),
            path: same(),
            collapse: None,
            churn: None,
            scatter: None,
            delta_ratio: None,
            beta_mean: Some(vec![vec![value]; 2]),
        }
    }

    fn geometry() -> Geometry {
        Geometry::new(2, 2, 2).unwrap()
    }

    #[test]
    fn figures_are_those_of_each_head() {
        let mut state = [0.0; 16];
        state[4..8].copy_from_slice(&[3.0, 0.0, 0.0, 3.0]);
        state[8..12].copy_from_slice(&[0.0, 0.0, 0.0, -5.0]);
        state[12] = f32::NAN;
        let figures = Figures::of(geometry(), &state);
        assert_eq!(figures.norm[..3], [0.0, 18.0_f64.sqrt(), 5.0]);
        assert_eq!(figures.spectral_norm[..3], [0.0, 3.0, 5.0]);
        assert!((figures.effective_rank[1] - 2.0).abs() < 1e-12);
        assert_eq!((figures.effective_rank[0], figures.effective_rank[2]), (0.0, 1.0));
        assert!(figures.norm[3].is_nan() && figures.concentration[3].is_nan());
        assert!((figures.concentration[1] - 3.0).abs() < 1e-12);
        assert_eq!((figures.concentration[0], figures.concentration[2]), (0.0, 5.0));
    }

    #[test]
    fn a_state_under_its_bounds_is_healthy_and_one_over_them_is_named() {
        let (mut state, good) = ([0.5; 16], bounds(3.0));
        let said = |state: &[f32], change: &[f64], bounds: Option<&Bounds>| {
            let figures = Figures::of(geometry(), state);
            let seen = Seen {
                figures: &figures,
                change: Some(change),
                path: None,
                collapse: None,
                churn: None,
                scatter: None,
                delta_ratio: None,
                beta_mean: Some(&[0.1, 0.2]),
            };
            reasons(seen, &[3, 7], 2, 1, bounds)
        };
        assert_eq!(said(&state, &[0.0; 4], Some(&good)), Vec::<String>::new());
        state[8..12].fill(2.0);
        let found = said(&state, &[0.0, 9.0, 0.0, 4.0], Some(&good));
        assert_eq!(
            found,
            [
                "layer 7, head 0: a norm of 4.0000, healthy ones stay under 3.0000",
                "layer 7, head 0: a spectral norm of 4.0000, healthy ones stay under 3.0000",
                "layer 7, head 0: a concentration of 4.0000, healthy ones stay under 3.0000",
                "layer 3, head 1: moved in one turn by 9.0000, healthy ones stay under 3.0000 (and 1 more of 4)",
            ]
        );
        // Without bounds only what no read can use.
        assert!(said(&state, &[9.0; 4], None).is_empty());
        for broken in [f32::INFINITY, f32::NAN, 3e19] {
            state[5] = broken;
            let found = said(&state, &[0.0; 4], None);
            assert!(
                found.len() == 1 && found[0].starts_with("layer 3, head 1: numbers"),
                "{found:?}"
            );
        }
    }

    #[test]
    fn a_distance_is_that_of_each_head_and_never_hides_a_hole() {
        let (before, mut after) = ([1.0; 16], [1.0; 16]);
        after[4] = 4.0;
        after[12] = f32::NAN;
        assert_eq!(
            distance(geometry(), &before, &after),
            [0.0, 3.0, 0.0, f64::INFINITY]
        );
    }

    #[test]
    fn a_memory_that_one_key_takes_over_collapses_and_a_first_fact_in_noise_does_not() {
        let of = |numbers: [f32; 4]| Figures::of(Geometry::new(1, 1, 2).unwrap(), &numbers);
        let full = of([1.0, 0.0, 0.0, 1.0]);
        let (wiped, noise) = (of([1.0, 0.0, 0.0, 0.0]), of([0.1, 0.0, 0.0, 0.1]));
        assert!((wiped.collapse_since(&full)[0] - 2.0).abs() < 1e-12);
        assert!((wiped.collapse_since(&noise)[0] - 0.04).abs() < 1e-7);
        assert!((full.collapse_since(&wiped)[0] - 0.25).abs() < 1e-12);
        assert_eq!(of([0.0; 4]).collapse_since(&of([0.0; 4])), [0.0]);
    }

    /// A state of one head that holds `value` under the key `at`.
    fn under(at: usize, value: f32) -> Vec<f32> {
        let mut state = vec![0.0; 64 * 64];
        state[at] = value;
        state
    }

    #[test]
    fn facts_under_keys_of_their_own_are_no_churn_and_contradictions_are() {
        let geometry = Geometry::new(1, 1, 64).unwrap();
        let (mut facts, mut state) = (Churn::default(), vec![0.0; 64 * 64]);
        for at in 0..40 {
            let mut after = state.clone();
            after[at * 65] = 3.0;
            let next = facts.with(geometry, &state, &after);
            assert!(next.churn[0] < 1e-6, "fact {at}: {}", next.churn[0]);
            facts.take(&next, &state);
            state = after;
        }
        let mut last = Vec::new();
        let (mut churn, mut state) = (Churn::default(), under(0, 0.0));
        for turn in 0..40 {
            let after = under(0, if turn % 2 == 0 { 3.0 } else { -3.0 });
            let next = churn.with(geometry, &state, &after);
            last.push(next.churn[0]);
            churn.take(&next, &state);
            state = after;
        }
        // The first turn goes 3 away from nothing; every later one 6, back or forth, and only where it ends is left.
        let expected = |turns: usize| (3 + 6 * (turns - 1)) as f64 - 3.0;
        for turns in 1..=33 {
            assert!(
                (last[turns - 1] - expected(turns)).abs() < 1e-5,
                "{turns} turns: {}",
                last[turns - 1]
            );
        }
        // The first mark is gone: 26 turns of 6 are left, forth and back from a state that lies at −3.
        assert!((last[33] - 26.0 * 6.0).abs() < 1e-5, "{}", last[33]);
    }

    #[test]
    fn a_turn_that_does_not_count_leaves_no_churn_and_a_hole_is_infinitely_far() {
        let geometry = Geometry::new(1, 1, 64).unwrap();
        let mut churn = Churn::default();
        let (nothing, fact) = (under(0, 0.0), under(0, 3.0));
        let next = churn.with(geometry, &nothing, &fact);
        churn.take(&next, &nothing);
        let wrong = churn.with(geometry, &fact, &under(0, -3.0));
        assert!((wrong.churn[0] - 6.0).abs() < 1e-5);
        assert_eq!(churn.with(geometry, &fact, &fact).churn, [0.0]);
        assert_eq!(
            nuclear_distance(geometry, &fact, &under(5, f32::NAN)),
            [f64::INFINITY]
        );
    }

    #[test]
    fn bounds_of_another_shape_or_without_sense_are_refused_by_name() {
        assert_eq!(bounds(1.0).check(geometry(), 2), Ok(()));
        let mut short = bounds(1.0);
        short.change.pop();
        assert_eq!(short.check(geometry(), 2).unwrap_err().0, "change");
        assert_eq!(bounds(-1.0).check(geometry(), 2).unwrap_err().0, "norm");
        let mut wide = bounds(1.0);
        wide.delta_ratio = Some(vec![vec![1.0; 2]; 2]);
        assert_eq!(wide.check(geometry(), 3).unwrap_err().0, "delta_ratio");
    }
}
