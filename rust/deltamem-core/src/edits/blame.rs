//! Which commits a read comes from: signed shares that add up to the read. It walks a history from its newest state back, one state at a
//! time, and knows states and parents, no tokens and no gates.
//!
//! The last state is a sum of one term for each commit, `S_n = Σ C_i`. Commit i's share of the reads `S_n q` of some queries is
//!
//! ```text
//! share_i = Σ ⟨C_i q, S_n q⟩ / Σ |S_n q|²          over tokens, layers and heads
//! ```
//!
//! and the shares add up to 1 whatever the terms are. There are two ways to choose them, and they answer different questions:
//!
//! * [`Attribution::Difference`]: `C_i = S_i − S_{i−1}`, what the commit moved. Exact, no model behind it. It asks who moved the read to
//!   where it is now. A fact told in commit 3 that has decayed to a half since has a share of 2, and the commits after it −1 between
//!   them: their differences hold the decay of what they did not write. The fact's commit stands out, the shares are no parts of a whole.
//!   An overwritten fact is right on both sides: its own commit has `⟨v_old, v_new⟩ ≈ 0`, the later one `|v_new|²`.
//! * [`Attribution::Surviving`]: `C_i = W_i A_{i+1} … A_n`, what the commit wrote and later ones left of it, with `S_i = S_{i−1} A_i + W_i`. It asks
//!   whose writes the read consists of. Decay and erasure are charged to what decays, so a share is the part that is still there. `A_i`
//!   is estimated from `S_{i−1}` and `S_i` (the gates would give it, states do not), so each single share is an estimate; that they add up
//!   is exact. Where nothing of a fact is left, nothing of it can be blamed: the top share is then a later commit, and rightly so.
//!
//! `Difference` costs reads alone. `Surviving` decomposes each commit's change: 10 ms a head of rank 64, 0.02 ms of rank 8, 170 ms of rank 128 on
//! one core; ask all of a text's tokens at once, so that each commit is decomposed once.
//!
//! Neither sees inside a commit, and neither knows that a commit wrote a value because it read another: that goes through the model.
//!
//! A merge S = ours + theirs − base is linear, so its queries go on to ours and to theirs, and with the opposite sign to base, and the
//! commits of both sides get their own shares. What the merge itself gets is its rounding, and what was done to the state besides.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use super::survival::Survival;
use super::{StateError, check_finite, check_state, dot, widen};
use crate::geometry::Geometry;

/// How the last state is split among the commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Attribution {
    /// By what each commit moved. Names the commit that told a fact most often.
    #[default]
    Difference,
    /// By what is left of what each commit wrote. Says what the read consists of.
    Surviving,
}

/// Where a commit's state came from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Origin<'a, K> {
    /// It has no parent: all of its state is its own.
    Root,
    /// A turn on top of its parent.
    Commit {
        /// The parent.
        parent: K,
        /// The parent's state, [L, H, r, r].
        state: &'a [f32],
    },
    /// A three-way merge. One that was a fast-forward, or of two equal states, is a [`Origin::Commit`] on the parent that it equals.
    Merge {
        /// The first parent and its state.
        ours: (K, &'a [f32]),
        /// The second parent and its state.
        theirs: (K, &'a [f32]),
        /// The common ancestor and its state; `None` stands for the empty memory.
        base: Option<(K, &'a [f32])>,
    },
}

/// Why there is no blame.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BlameError {
    /// A state is none of the geometry.
    #[error(transparent)]
    State(#[from] StateError),
    /// The queries are not [Q, L, H, r] with Q of at least 1.
    #[error(
        "the queries hold {found} numbers, expected at least one token of {each} numbers (layers x heads x rank)"
    )]
    Queries {
        /// Numbers found.
        found: usize,
        /// Numbers of one token, L·H·r.
        each: usize,
    },
    /// The last state answers all queries with zero.
    #[error("the memory reads nothing for this text, so there is nothing to blame a commit for")]
    NothingRead,
    /// A commit came before one of its children, twice, or is none of the history.
    #[error(
        "commit {commit} does not come next: hand over each commit of the head's history once, after all of its children"
    )]
    Order {
        /// The commit, as its key prints.
        commit: String,
    },
    /// A history without any state.
    #[error("a history needs at least one state")]
    Empty,
}

/// One commit's part of the read.
#[derive(Debug, Clone, PartialEq)]
pub struct Share<K> {
    /// The commit.
    pub commit: K,
    /// Its share of the read. Signed; negative where the commit works against what is read now.
    pub share: f64,
    /// The share's parts by layer, [L], which add up to it. Divide by [`Blamed::layers`] for the share within a layer.
    pub layers: Vec<f64>,
}

/// A read, split among commits.
#[derive(Debug, Clone, PartialEq)]
pub struct Blamed<K> {
    /// One share for each commit that was visited, the newest first.
    pub shares: Vec<Share<K>>,
    /// What commits that were not visited hold: 1 minus all shares. About 1e-16 when the walk went to the root.
    pub rest: f64,
    /// `Σ |S_n q|²` over tokens and heads.
    pub energy: f64,
    /// The part of the energy in each layer, [L]; adds up to 1.
    pub layers: Vec<f64>,
}

impl<K> Blamed<K> {
    /// The commit with the largest share; the newest of equals.
    pub fn top(&self) -> Option<&Share<K>> {
        self.shares
            .iter()
            .reduce(|top, share| if share.share > top.share { share } else { top })
    }
}

/// A walk through a history, newest commit first. It holds Q·L·H·r numbers for the reads and as many for each commit that waits to be visited:
/// one on a straight line. `K` names a commit.
#[derive(Debug, Clone)]
pub struct Blame<K> {
    geometry: Geometry,
    attribution: Attribution,
    /// `S_n q`, [Q, L, H, r].
    reads: Vec<f64>,
    energy: f64,
    layers: Vec<f64>,
    /// For each commit that waits, the queries that its state is asked, [Q, L, H, r].
    waiting: BTreeMap<K, Vec<f64>>,
    visited: BTreeSet<K>,
    shares: Vec<Share<K>>,
}

impl<K: Ord + Clone + Debug> Blame<K> {
    /// Begins at the commit `head` with its `state` [L, H, r, r] and the `queries` of some tokens, [Q, L, H, r].
    ///
    /// # Errors
    /// [`BlameError`] when an array does not fit, or when the state reads nothing for these queries.
    pub fn new(
        geometry: Geometry,
        attribution: Attribution,
        head: K,
        state: &[f32],
        queries: &[f32],
    ) -> Result<Self, BlameError> {
        check_state(geometry, "the head's state", state)?;
        let each = geometry.layers() * geometry.heads() * geometry.rank();
        if queries.is_empty() || !queries.len().is_multiple_of(each) {
            return Err(BlameError::Queries {
                found: queries.len(),
                each,
            });
        }
        check_finite("queries", queries)?;
        let queries = widen(queries);
        let mut reads = vec![0.0; queries.len()];
        add_reads(geometry, 1.0, state, &queries, &mut reads);
        let layers = products(geometry, &reads, &reads);
        let energy: f64 = layers.iter().sum();
        if energy <= 0.0 {
            return Err(BlameError::NothingRead);
        }
        Ok(Self {
            geometry,
            attribution,
            reads,
            energy,
            layers: layers.into_iter().map(|layer| layer / energy).collect(),
            waiting: BTreeMap::from([(head, queries)]),
            visited: BTreeSet::new(),
            shares: Vec::new(),
        })
    }

    /// Commits that can still take a part of the read. None: the walk is done.
    pub fn waiting(&self) -> impl Iterator<Item = &K> {
        self.waiting.keys()
    }

    /// Gives `commit`, whose state is `state`, its share, and asks its parents for the rest. Each commit comes once, after all of its
    /// children. A walk may stop at any point: what older commits hold is then [`Blamed::rest`].
    ///
    /// # Errors
    /// [`BlameError`] when a state does not fit or the commit does not come next; nothing is changed then.
    pub fn visit(&mut self, commit: &K, state: &[f32], origin: &Origin<'_, K>) -> Result<(), BlameError> {
        let geometry = self.geometry;
        check_state(geometry, "a commit's state", state)?;
        let parents: Vec<(&K, f64, &[f32])> = match origin {
            Origin::Root => Vec::new(),
            Origin::Commit { parent, state } => vec![(parent, 1.0, state)],
            Origin::Merge { ours, theirs, base } => {
                let sides = [(&ours.0, 1.0, ours.1), (&theirs.0, 1.0, theirs.1)];
                let base = base.as_ref().map(|(base, state)| (base, -1.0, *state));
                sides.into_iter().chain(base).collect()
            }
        };
        for (parent, _, state) in &parents {
            check_state(geometry, "a parent's state", state)?;
            if *parent == commit || self.visited.contains(*parent) {
                return Err(order(*parent));
            }
        }
        let Some(mut queries) = self.waiting.remove(commit) else {
            return Err(order(commit));
        };
        let mut own = vec![0.0; queries.len()];
        add_reads(geometry, 1.0, state, &queries, &mut own);
        if let (Attribution::Surviving, Origin::Commit { state: before, .. }) = (self.attribution, origin) {
            // S_i q = W_i q + S_{i−1} (A_i q): the parent is asked for A_i q.
            let survival = Survival::between(geometry, before, state);
            let heads = geometry.layers() * geometry.heads();
            for (at, query) in queries.chunks_exact_mut(geometry.rank()).enumerate() {
                survival.apply(at % heads, query);
            }
        }
        for (parent, sign, state) in parents {
            add_reads(geometry, -sign, state, &queries, &mut own);
            let asked = self
                .waiting
                .entry(parent.clone())
                .or_insert_with(|| vec![0.0; queries.len()]);
            for (asked, query) in asked.iter_mut().zip(&queries) {
                *asked += sign * query;
            }
        }
        let layers: Vec<f64> = products(geometry, &own, &self.reads)
            .into_iter()
            .map(|product| product / self.energy)
            .collect();
        self.shares.push(Share {
            commit: commit.clone(),
            share: layers.iter().sum(),
            layers,
        });
        self.visited.insert(commit.clone());
        Ok(())
    }

    /// The shares so far.
    pub fn finish(self) -> Blamed<K> {
        Blamed {
            rest: 1.0 - self.shares.iter().map(|share| share.share).sum::<f64>(),
            shares: self.shares,
            energy: self.energy,
            layers: self.layers,
        }
    }
}

/// Blames the commits of a straight line. `states` are (name, state [L, H, r, r]) from the newest back; all of the oldest state counts as its
/// own. Two states are held at a time.
///
/// # Errors
/// [`BlameError`] when an array does not fit, a name comes twice, or the newest state reads nothing for these queries.
pub fn blame<K: Ord + Clone + Debug, S: AsRef<[f32]>>(
    geometry: Geometry,
    attribution: Attribution,
    states: impl IntoIterator<Item = (K, S)>,
    queries: &[f32],
) -> Result<Blamed<K>, BlameError> {
    let mut states = states.into_iter();
    let (mut commit, mut state) = states.next().ok_or(BlameError::Empty)?;
    let mut blame = Blame::new(geometry, attribution, commit.clone(), state.as_ref(), queries)?;
    for (parent, before) in states {
        let origin = Origin::Commit {
            parent: parent.clone(),
            state: before.as_ref(),
        };
        blame.visit(&commit, state.as_ref(), &origin)?;
        (commit, state) = (parent, before);
    }
    blame.visit(&commit, state.as_ref(), &Origin::Root)?;
    Ok(blame.finish())
}

fn order<K: Debug>(commit: &K) -> BlameError {
    BlameError::Order {
        commit: format!("{commit:?}"),
    }
}

/// reads ← reads + sign · S q for each of the queries [Q, L, H, r].
fn add_reads(geometry: Geometry, sign: f64, state: &[f32], queries: &[f64], reads: &mut [f64]) {
    let rank = geometry.rank();
    let state = widen(state);
    let tokens = queries
        .chunks_exact(rank)
        .zip(reads.chunks_exact_mut(rank))
        .zip(state.chunks_exact(rank * rank).cycle());
    for ((query, read), block) in tokens {
        for (read, row) in read.iter_mut().zip(block.chunks_exact(rank)) {
            *read += sign * dot(row, query);
        }
    }
}

/// Σ ⟨a, b⟩ by layer, [L], of two arrays [Q, L, H, r].
fn products(geometry: Geometry, a: &[f64], b: &[f64]) -> Vec<f64> {
    let width = geometry.heads() * geometry.rank();
    let mut layers = vec![0.0; geometry.layers()];
    for (at, (a, b)) in a.chunks_exact(width).zip(b.chunks_exact(width)).enumerate() {
        layers[at % geometry.layers()] += dot(a, b);
    }
    layers
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;
    use crate::edits::merge::merge;
    use crate::edits::simulation::{Random, World, small_worlds};

    const BOTH: [Attribution; 2] = [Attribution::Difference, Attribution::Surviving];

    fn told(states: &[Vec<f32>]) -> impl Iterator<Item = (usize, &Vec<f32>)> {
        states.iter().enumerate().rev()
    }

    #[test]
    fn two_facts_are_told_apart_and_an_overwritten_one_is_the_later_commits() {
        let geometry = Geometry::new(1, 1, 2).unwrap();
        // Commit 1 writes (1, 0) at key 0, commit 2 (0, 1) at key 1, commit 3 (0, 3) at key 0 in place of (1, 0).
        let states = [
            vec![0.0; 4],
            vec![1.0, 0.0, 0.0, 0.0],
            vec![1.0, 0.0, 0.0, 1.0],
            vec![0.0, 0.0, 3.0, 1.0],
        ];
        for attribution in BOTH {
            let shares = |upto: usize, query: [f32; 2]| {
                let blamed = blame(geometry, attribution, told(&states[..=upto]), &query).unwrap();
                assert!(blamed.rest.abs() < 1e-15);
                blamed
                    .shares
                    .iter()
                    .rev()
                    .map(|share| share.share)
                    .collect::<Vec<_>>()
            };
            assert_eq!(shares(2, [1.0, 0.0]), [0.0, 1.0, 0.0]);
            assert_eq!(shares(2, [0.0, 1.0]), [0.0, 0.0, 1.0]);
            assert_eq!(shares(3, [1.0, 0.0]), [0.0, 0.0, 0.0, 1.0]);
            assert_eq!(shares(3, [0.0, 1.0]), [0.0, 0.0, 1.0, 0.0]);
        }
    }

    #[test]
    fn decay_is_the_later_commits_as_a_difference_and_the_facts_own_as_survival() {
        let geometry = Geometry::new(1, 1, 2).unwrap();
        let states = [vec![0.0; 4], vec![2.0, 0.0, 0.0, 0.0], vec![1.0, 0.0, 0.0, 0.0]];
        let shares = |attribution| {
            let blamed = blame(geometry, attribution, told(&states), &[1.0, 0.0]).unwrap();
            blamed.shares.iter().map(|share| share.share).collect::<Vec<_>>()
        };
        assert_eq!(shares(Attribution::Difference), [-1.0, 2.0, 0.0]);
        assert_eq!(shares(Attribution::Surviving), [0.0, 1.0, 0.0]);
    }

    #[test]
    fn the_commits_of_both_sides_of_a_merge_have_their_own_shares() {
        let world = World {
            commits: 9,
            ..small_worlds()[0].1
        };
        let history = world.history(5);
        let (geometry, states) = (world.geometry(), &history.states);
        // base = 3; ours goes on to 6. Theirs: other turns on top of 3.
        let theirs = world.branch(6, &states[3], 3);
        let merged = merge(geometry, &states[3], &states[6], &theirs.states[3])
            .unwrap()
            .state;
        let last = world.branch(7, &merged, 1).states[1].clone();
        for attribution in BOTH {
            let mut asked = 0;
            for (side, facts) in [("ours", &history.facts[3..6]), ("theirs", &theirs.facts[..])] {
                for (at, fact) in facts.iter().enumerate().filter(|(_, fact)| !fact.overwritten) {
                    let name = |side: &str, at: usize| format!("{side}{at}");
                    let mut walk =
                        Blame::new(geometry, attribution, "last".to_owned(), &last, &fact.key).unwrap();
                    let merge = Origin::Commit {
                        parent: "merge".to_owned(),
                        state: &merged,
                    };
                    walk.visit(&"last".to_owned(), &last, &merge).unwrap();
                    let both = Origin::Merge {
                        ours: (name("ours", 2), &states[6][..]),
                        theirs: (name("theirs", 2), &theirs.states[3][..]),
                        base: Some((name("base", 3), &states[3][..])),
                    };
                    walk.visit(&"merge".to_owned(), &merged, &both).unwrap();
                    for (side, states) in [("theirs", &theirs.states[..]), ("ours", &states[3..=6])] {
                        for at in (0..3).rev() {
                            let parent = if at == 0 {
                                name("base", 3)
                            } else {
                                name(side, at - 1)
                            };
                            let origin = Origin::Commit {
                                parent,
                                state: &states[at],
                            };
                            walk.visit(&name(side, at), &states[at + 1], &origin).unwrap();
                        }
                    }
                    assert_eq!(walk.waiting().collect::<Vec<_>>(), [&name("base", 3)]);
                    walk.visit(&name("base", 3), &states[3], &Origin::Root).unwrap();
                    let blamed = walk.finish();
                    assert!(blamed.rest.abs() < 1e-12, "{}", blamed.rest);
                    assert_eq!(blamed.top().unwrap().commit, name(side, at), "{attribution:?}");
                    let merge = blamed
                        .shares
                        .iter()
                        .find(|share| share.commit == "merge")
                        .unwrap();
                    assert!(merge.share.abs() < 1e-6, "a merge holds its rounding only");
                    asked += 1;
                }
            }
            assert!(asked >= 4);
        }
    }

    #[test]
    fn what_was_not_visited_is_the_rest() {
        let world = small_worlds()[0].1;
        let history = world.history(8);
        let query = &history.facts[0].key;
        for attribution in BOTH {
            let whole = blame(world.geometry(), attribution, told(&history.states), query).unwrap();
            let last = history.states.len() - 1;
            let mut walk =
                Blame::new(world.geometry(), attribution, last, &history.states[last], query).unwrap();
            for at in (last - 2..=last).rev() {
                let origin = Origin::Commit {
                    parent: at - 1,
                    state: &history.states[at - 1],
                };
                walk.visit(&at, &history.states[at], &origin).unwrap();
            }
            let part = walk.finish();
            assert_eq!(part.shares, whole.shares[..3]);
            let older: f64 = whole.shares[3..].iter().map(|share| share.share).sum();
            assert!((part.rest - older).abs() < 1e-9);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let geometry = Geometry::new(1, 1, 2).unwrap();
        let (zero, one) = ([0.0; 4], [1.0; 4]);
        let new = |state: &[f32], queries: &[f32]| {
            Blame::new(geometry, Attribution::Surviving, 1, state, queries).map(|_| ())
        };
        assert_eq!(new(&zero, &[1.0, 0.0]), Err(BlameError::NothingRead));
        assert_eq!(new(&one, &[0.0, 0.0]), Err(BlameError::NothingRead));
        assert_eq!(new(&one, &[]), Err(BlameError::Queries { found: 0, each: 2 }));
        assert_eq!(
            new(&one, &[1.0; 3]),
            Err(BlameError::Queries { found: 3, each: 2 })
        );
        assert!(matches!(new(&one, &[f32::NAN, 0.0]), Err(BlameError::State(_))));
        assert!(matches!(new(&one[..3], &[1.0, 0.0]), Err(BlameError::State(_))));
        let empty: [(u8, Vec<f32>); 0] = [];
        assert_eq!(
            blame(geometry, Attribution::Difference, empty, &[1.0, 0.0]),
            Err(BlameError::Empty)
        );

        let mut walk = Blame::new(geometry, Attribution::Surviving, 2, &one, &[1.0, 0.0]).unwrap();
        let commit = |parent| Origin::Commit {
            parent,
            state: &zero[..],
        };
        let early = walk.visit(&1, &zero, &Origin::Root).unwrap_err();
        assert!(
            early.to_string().contains("commit 1 does not come next"),
            "{early}"
        );
        assert!(walk.visit(&2, &one, &commit(2)).is_err(), "its own parent");
        let short = Origin::Commit {
            parent: 1,
            state: &zero[..3],
        };
        assert!(matches!(walk.visit(&2, &one, &short), Err(BlameError::State(_))));
        walk.visit(&2, &one, &commit(1)).unwrap();
        assert!(walk.visit(&2, &one, &commit(1)).is_err(), "twice");
        assert!(walk.visit(&1, &zero, &commit(2)).is_err(), "a circle");
        walk.visit(&1, &zero, &Origin::Root).unwrap();
        let blamed = walk.finish();
        assert_eq!((blamed.shares.len(), blamed.rest), (2, 0.0));
    }

    proptest! {
        #[test]
        fn shares_add_up_to_one_in_all_and_to_the_reads_part_in_every_layer(
            (layers, heads, rank) in (1..=3_usize, 1..=2_usize, 1..=9_usize), commits in 1..=5_usize, tokens in 1..=4_usize, seed: u64
        ) {
            let geometry = Geometry::new(layers, heads, rank).unwrap();
            let mut random = Random::new(seed);
            // Any states at all: the law needs no rule behind them.
            let mut numbers = |count: usize| (0..count).map(|_| super::super::round(random.normal())).collect::<Vec<f32>>();
            let states: Vec<Vec<f32>> = (0..commits).map(|_| numbers(geometry.elements())).collect();
            let queries = numbers(tokens * layers * heads * rank);
            for attribution in BOTH {
                let blamed = blame(geometry, attribution, told(&states), &queries).unwrap();
                let most: f64 = blamed.shares.iter().map(|share| share.share.abs()).sum();
                prop_assert_eq!(blamed.shares.len(), commits);
                prop_assert!(blamed.rest.abs() < 1e-12 * most.max(1.0), "{}", blamed.rest);
                prop_assert!((blamed.layers.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                for layer in 0..layers {
                    let sum: f64 = blamed.shares.iter().map(|share| share.layers[layer]).sum();
                    prop_assert!((sum - blamed.layers[layer]).abs() < 1e-12 * most.max(1.0));
                }
            }
        }
    }

    #[test]
    fn the_top_share_is_the_commit_that_told_the_fact() {
        judge(0..3);
    }

    #[test]
    #[ignore = "long: the figures of docs/log.md, over 40 histories of each world"]
    fn the_top_share_is_the_commit_that_told_the_fact_in_many_histories() {
        judge(0..40);
    }

    /// The share of facts whose commit has the top share, and the mean distance of the shares from those that the gates give.
    fn judge(seeds: std::ops::Range<u64>) {
        for (name, world) in small_worlds() {
            let (mut asked, mut recalled) = (0, 0);
            // [attribution or truth], over all facts and over those that the memory still recalls.
            let (mut named, mut named_recalled, mut off) = ([0; 3], [0; 3], [0.0; 2]);
            for seed in seeds.clone() {
                let history = world.history(seed);
                let last = &history.states[world.commits];
                let truth = history.true_terms();
                let mut random = Random::new(seed ^ 0xABCD);
                for (at, fact) in history.facts.iter().enumerate() {
                    if fact.overwritten {
                        continue;
                    }
                    let query = fact.asked(&world, &mut random);
                    let read = world.read(last, &query);
                    let knows = fact.cosine(&read) > 0.5;
                    let energy: f64 = read.iter().map(|x| x * x).sum();
                    let true_shares: Vec<f64> = truth
                        .iter()
                        .map(|term| dot(&world.read(term, &query), &read) / energy)
                        .collect();
                    let mut tops = vec![];
                    for (which, attribution) in BOTH.into_iter().enumerate() {
                        let blamed =
                            blame(world.geometry(), attribution, told(&history.states), &query).unwrap();
                        tops.push(blamed.top().unwrap().commit);
                        off[which] += blamed
                            .shares
                            .iter()
                            .map(|share| (share.share - true_shares[share.commit]).abs())
                            .sum::<f64>();
                    }
                    tops.push(
                        (0..true_shares.len())
                            .max_by(|&a, &b| true_shares[a].total_cmp(&true_shares[b]))
                            .unwrap(),
                    );
                    asked += 1;
                    recalled += i32::from(knows);
                    for (which, top) in tops.into_iter().enumerate() {
                        named[which] += i32::from(top == at + 1);
                        named_recalled[which] += i32::from(knows && top == at + 1);
                    }
                }
            }
            let part = |count: i32, of: i32| f64::from(count) / f64::from(of);
            println!(
                "{name}: {asked} facts, {recalled} recalled; top share right (difference, surviving, gates known): all {:.3?}, recalled {:.3?}; \
                 distance of all shares from the gates' (difference, surviving): {:.3?}",
                named.map(|count| part(count, asked)),
                named_recalled.map(|count| part(count, recalled)),
                off.map(|off| off / f64::from(asked)),
            );
            assert!(
                recalled >= 12,
                "{name}: {recalled} facts recalled are too few to judge"
            );
            for which in [0, 1] {
                assert!(
                    part(named_recalled[which], recalled) >= 0.9,
                    "{name}: {named_recalled:?} of {recalled}"
                );
            }
            assert!(
                off[1] < 0.35 * off[0],
                "{name}: survival is closer to what the gates say: {off:?}"
            );
        }
    }
}
