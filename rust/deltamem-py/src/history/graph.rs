//! A memory's commits in reach of some of them, and the common ancestors of two sides as Git finds them. Where history was pruned, a
//! commit's parents are missing here.

use std::collections::{BTreeSet, HashMap, HashSet};

use deltamem_core::edits::merge::merge as merge_states;
use deltamem_store::{Commit, CommitId};

use super::{Memory, Result, same_model};

/// Commits by id.
pub(super) struct Graph(pub HashMap<CommitId, Commit>);

/// A common ancestor as a state: of several, their merge. Counts are its, too.
pub(super) struct Base {
    pub state: Vec<f32>,
    pub tokens_seen: i128,
    pub turns: i128,
}

impl Graph {
    /// All commits in reach of `starts`.
    pub(super) fn of(memory: Memory<'_>, starts: &[CommitId]) -> Result<Self> {
        let names: Vec<String> = starts.iter().map(ToString::to_string).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let commits = memory.store.log(memory.name, &names, usize::MAX)?;
        Ok(Self(
            commits.into_iter().map(|commit| (commit.id, commit)).collect(),
        ))
    }

    /// The parents of `commit` that are kept.
    pub(super) fn parents(&self, commit: &Commit) -> Vec<CommitId> {
        let kept = commit.parents.iter().filter(|id| self.0.contains_key(id));
        kept.copied().collect()
    }

    /// `starts` and everything that they come from.
    pub(super) fn ancestors(&self, starts: &[CommitId]) -> HashSet<CommitId> {
        let mut seen = HashSet::new();
        let mut left = starts.to_vec();
        while let Some(id) = left.pop() {
            if let Some(commit) = self.0.get(&id)
                && seen.insert(id)
            {
                left.extend(&commit.parents);
            }
        }
        seen
    }

    /// The common ancestors of `sides` and `other` that are no ancestors of another one; the newest first.
    pub(super) fn bases(&self, sides: &[CommitId], other: CommitId) -> Vec<CommitId> {
        let theirs = self.ancestors(&[other]);
        let mut common: Vec<&Commit> = self
            .ancestors(sides)
            .intersection(&theirs)
            .map(|id| &self.0[id])
            .collect();
        // An ancestor's generation is smaller, so whatever covers a commit comes before it.
        common.sort_unstable_by_key(|commit| (std::cmp::Reverse(commit.generation), commit.id));
        let mut covered = HashSet::new();
        let mut best = Vec::new();
        for commit in common {
            if !covered.contains(&commit.id) {
                covered.extend(self.ancestors(&[commit.id]));
                best.push(commit);
            }
        }
        best.sort_unstable_by_key(|commit| {
            (std::cmp::Reverse((commit.time_ms, commit.generation)), commit.id)
        });
        best.into_iter().map(|commit| commit.id).collect()
    }

    /// The merge of `bases`, as Git merges several common ancestors first; `None` without any: the empty memory.
    pub(super) fn base(&self, memory: Memory<'_>, bases: &[CommitId]) -> Result<Option<Base>> {
        let Some((first, rest)) = bases.split_first() else {
            return Ok(None);
        };
        let start = memory.snapshot(*first)?;
        let geometry = start.geometry();
        let mut merged = Base {
            state: start.memory().to_vec(),
            tokens_seen: i128::from(start.tokens_seen()),
            turns: i128::from(start.turns()),
        };
        let mut sides = vec![*first];
        for id in rest {
            let side = memory.snapshot(*id)?;
            same_model(&start, &side)?;
            let under = self.base(memory, &self.bases(&sides, *id))?;
            let (zeros, tokens_seen, turns) = (super::zeros(geometry), 0, 0);
            let (base, tokens_seen, turns) = under.as_ref().map_or((&zeros, tokens_seen, turns), |under| {
                (&under.state, under.tokens_seen, under.turns)
            });
            merged.state = merge_states(geometry, base, &merged.state, side.memory())?.state;
            merged.tokens_seen += i128::from(side.tokens_seen()) - tokens_seen;
            merged.turns += i128::from(side.turns()) - turns;
            sides.push(*id);
        }
        Ok(Some(merged))
    }

    /// Commits that come from `start`, itself left out, in an order in which parents come before children.
    pub(super) fn descendants(&self, start: CommitId) -> Vec<&Commit> {
        let mut order: Vec<&Commit> = self.0.values().collect();
        order.sort_unstable_by_key(|commit| (commit.generation, commit.id));
        let mut found = BTreeSet::from([start]);
        let mut after = Vec::new();
        for commit in order {
            if commit.parents.iter().any(|parent| found.contains(parent)) {
                found.insert(commit.id);
                after.push(commit);
            }
        }
        after
    }
}
