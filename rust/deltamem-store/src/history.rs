//! The graph of commits: order, ancestors, and the best common ancestor as Git finds it. It knows commits and their parents only.

use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet};

use crate::commit::{Commit, CommitId};

/// Commits by id. A parent that is not among them was pruned.
#[derive(Debug, Default)]
pub(crate) struct History(pub(crate) HashMap<CommitId, Commit>);

/// How two commits stand to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Relation {
    /// They are one commit.
    Same,
    /// The second is an ancestor of the first: nothing to merge.
    Ahead,
    /// The first is an ancestor of the second: a fast-forward.
    Behind,
    /// Both have commits of their own since their common ancestors; the best comes first.
    Diverged(Vec<CommitId>),
    /// They share no ancestor.
    Unrelated,
}

impl History {
    /// `start` and all its ancestors.
    pub(crate) fn ancestors(&self, start: impl IntoIterator<Item = CommitId>) -> HashSet<CommitId> {
        let mut seen = HashSet::new();
        let mut left: Vec<CommitId> = start.into_iter().filter(|id| self.0.contains_key(id)).collect();
        while let Some(id) = left.pop() {
            if seen.insert(id) {
                let parents = self.0.get(&id).map_or(&[][..], |commit| &commit.parents);
                left.extend(parents.iter().filter(|parent| self.0.contains_key(parent)));
            }
        }
        seen
    }

    /// `start` and its ancestors, children before parents, of commits without order the newest first; at most `limit`.
    pub(crate) fn log(&self, start: &[CommitId], limit: usize) -> Vec<&Commit> {
        let order = |commit: &Commit| (commit.generation, commit.time_ms, commit.id);
        let mut seen: HashSet<CommitId> = HashSet::new();
        let mut queue: BinaryHeap<(u64, u64, CommitId)> = BinaryHeap::new();
        let mut push = |queue: &mut BinaryHeap<_>, id: &CommitId| {
            if let Some(commit) = self.0.get(id)
                && seen.insert(*id)
            {
                queue.push(order(commit));
            }
        };
        for id in start {
            push(&mut queue, id);
        }
        let mut found = Vec::new();
        while found.len() < limit
            && let Some((_, _, id)) = queue.pop()
        {
            let commit = &self.0[&id];
            found.push(commit);
            for parent in &commit.parents {
                push(&mut queue, parent);
            }
        }
        found
    }

    /// The common ancestors of `a` and `b` that are no ancestors of another one. Of several, the newest comes first, then the one of
    /// the greater generation, then the one of the smaller id, so every caller chooses the same.
    pub(crate) fn merge_bases(&self, a: CommitId, b: CommitId) -> Vec<CommitId> {
        let of_b = self.ancestors([b]);
        let mut common: Vec<&Commit> = self
            .ancestors([a])
            .intersection(&of_b)
            .map(|id| &self.0[id])
            .collect();
        // An ancestor's generation is smaller, so a commit is best unless one that came before it in this order covers it.
        common.sort_unstable_by_key(|commit| (std::cmp::Reverse(commit.generation), commit.id));
        let mut covered: HashSet<CommitId> = HashSet::new();
        let mut best: Vec<&Commit> = Vec::new();
        for commit in common {
            if !covered.contains(&commit.id) {
                covered.extend(self.ancestors([commit.id]));
                best.push(commit);
            }
        }
        best.sort_unstable_by_key(|commit| {
            (std::cmp::Reverse((commit.time_ms, commit.generation)), commit.id)
        });
        best.into_iter().map(|commit| commit.id).collect()
    }

    pub(crate) fn relation(&self, a: CommitId, b: CommitId) -> Relation {
        if a == b {
            return Relation::Same;
        }
        let bases = self.merge_bases(a, b);
        match bases.first() {
            None => Relation::Unrelated,
            Some(base) if *base == b => Relation::Ahead,
            Some(base) if *base == a => Relation::Behind,
            Some(_) => Relation::Diverged(bases),
        }
    }

    /// The commits that go first when room is short, parents before children: none of `kept`.
    pub(crate) fn oldest_first(&self, kept: &BTreeSet<CommitId>) -> Vec<&Commit> {
        let mut order: Vec<&Commit> = self
            .0
            .values()
            .filter(|commit| !kept.contains(&commit.id))
            .collect();
        order.sort_unstable_by_key(|commit| (commit.generation, commit.time_ms, commit.id));
        order
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use deltamem_core::Fingerprint;
    use proptest::prelude::*;

    use super::*;
    use crate::commit::StateId;

    fn id(n: usize) -> CommitId {
        CommitId([u8::try_from(n).unwrap(); 32])
    }

    /// Commit n has the parents of entry n, all smaller than n.
    fn graph(parents: &[Vec<usize>], times: &[u64]) -> History {
        let mut history = History::default();
        for (n, parents) in parents.iter().enumerate() {
            let generation = parents
                .iter()
                .map(|p| history.0[&id(*p)].generation)
                .max()
                .unwrap_or(0)
                + 1;
            let commit = Commit {
                id: id(n),
                parents: parents.iter().map(|p| id(*p)).collect(),
                generation,
                branch: String::new(),
                state: StateId([0; 32]),
                state_bytes: 0,
                fingerprint: Fingerprint([0; 32]),
                parts: None,
                tokens_seen: 0,
                time_ms: times.get(n).copied().unwrap_or(0),
                message: String::new(),
                meta: String::new(),
            };
            history.0.insert(id(n), commit);
        }
        history
    }

    #[test]
    fn the_textbook_graphs() {
        // 0 - 1 - 2 - 4
        //      \- 3 - 5
        let fork = graph(&[vec![], vec![0], vec![1], vec![1], vec![2], vec![3]], &[]);
        assert_eq!(fork.merge_bases(id(4), id(5)), [id(1)]);
        assert_eq!(fork.relation(id(4), id(2)), Relation::Ahead);
        assert_eq!(fork.relation(id(1), id(5)), Relation::Behind);
        assert_eq!(fork.relation(id(4), id(5)), Relation::Diverged(vec![id(1)]));
        // Criss-cross: 1 and 2 were merged both ways, so both are best; the newer one comes first, whoever asks.
        let cross = [vec![], vec![0], vec![0], vec![1, 2], vec![2, 1]];
        let crossed = graph(&cross, &[0, 10, 20, 0, 0]);
        assert_eq!(crossed.merge_bases(id(3), id(4)), [id(2), id(1)]);
        assert_eq!(crossed.merge_bases(id(4), id(3)), [id(2), id(1)]);
        let apart = graph(&[vec![], vec![]], &[]);
        assert_eq!(apart.relation(id(0), id(1)), Relation::Unrelated);
    }

    proptest! {
        /// Against the definition: a best common ancestor is a common one that no other common one descends from.
        #[test]
        fn best_common_ancestors_are_those_of_the_definition(
            raw in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..4_u8), 1..40),
            times in prop::collection::vec(0..5_u64, 40),
            (a, b) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        ) {
            let parents: Vec<Vec<usize>> = raw.iter().enumerate().map(|(n, (p, q, kind))| {
                if n == 0 || *kind == 0 { return vec![]; }
                let (p, q) = (p.index(n), q.index(n));
                if *kind == 3 && p != q { vec![p, q] } else { vec![p] }
            }).collect();
            let n = parents.len();
            // reach[i][j]: j is i or an ancestor of i, by the closure of the relation itself.
            let mut reach = vec![vec![false; n]; n];
            for i in 0..n {
                reach[i][i] = true;
                for p in &parents[i] {
                    let through = reach[*p].clone();
                    for (there, more) in reach[i].iter_mut().zip(through) { *there |= more; }
                }
            }
            let (a, b) = (a.index(n), b.index(n));
            let common: Vec<usize> = (0..n).filter(|j| reach[a][*j] && reach[b][*j]).collect();
            let expected: BTreeSet<CommitId> = common.iter()
                .filter(|j| !common.iter().any(|k| k != *j && reach[*k][**j]))
                .map(|j| id(*j)).collect();
            let history = graph(&parents, &times);
            let found = history.merge_bases(id(a), id(b));
            prop_assert_eq!(&found, &history.merge_bases(id(b), id(a)));
            prop_assert_eq!(found.len(), expected.len());
            prop_assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected);
            let log = history.log(&[id(a), id(b)], usize::MAX);
            prop_assert_eq!(log.len(), (0..n).filter(|j| reach[a][*j] || reach[b][*j]).count());
            for (at, commit) in log.iter().enumerate() {
                for parent in &commit.parents {
                    prop_assert!(log[at..].iter().any(|later| later.id == *parent), "children come first");
                }
            }
        }
    }
}
