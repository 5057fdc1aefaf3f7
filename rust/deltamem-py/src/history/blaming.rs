//! Which commits a read comes from: the walk of `deltamem_core::edits::blame` through a memory's history, merges with it.

use std::collections::HashMap;

use deltamem_core::edits::blame::{Attribution, Blame, Origin};
use deltamem_core::{Geometry, Snapshot};
use deltamem_store::{Commit, CommitId};

use super::graph::Graph;
use super::{Memory, Result};

/// What takes a share. A merge's common ancestors are merged first where there are several; those merges are no commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Node {
    /// The state that is not committed yet.
    Now,
    Commit(CommitId),
    /// The first so many common ancestors of a merge commit, merged.
    Base(CommitId, usize),
}

/// One commit's part of a read.
pub(crate) struct Part {
    /// `None`: what is not committed yet.
    pub commit: Option<Commit>,
    pub share: f64,
    /// By layer, [L].
    pub layers: Vec<f64>,
}

/// A read, split among commits.
pub(crate) struct Blamed {
    /// The newest first.
    pub parts: Vec<Part>,
    /// What commits that were not visited hold.
    pub rest: f64,
    /// |S q|² over all tokens and heads.
    pub energy: f64,
    /// The energy's parts by layer, [L].
    pub layers: Vec<f64>,
    /// Merges on the way.
    pub merges: usize,
}

/// Splits what `now` reads for the `queries` [Q, L, H, r] among the last `limit` commits from `head` on. `changed` says that `now` holds
/// more than `head`'s state.
pub(crate) fn blame(
    memory: Memory<'_>,
    head: Option<CommitId>,
    now: &Snapshot,
    changed: bool,
    queries: &[f32],
    attribution: Attribution,
    limit: usize,
) -> Result<Blamed> {
    let graph = match head {
        Some(head) => Graph::of(memory, &[head])?,
        None => Graph(HashMap::new()),
    };
    let start = match head {
        Some(head) if !changed => Node::Commit(head),
        _ => Node::Now,
    };
    let mut walk = Walk {
        memory,
        graph: &graph,
        geometry: now.geometry(),
        states: HashMap::new(),
        merges: 0,
    };
    walk.states.insert(start, now.memory().to_vec());
    let mut blame = Blame::new(walk.geometry, attribution, start, now.memory(), queries)?;
    let mut visited = 0;
    while let Some(node) = walk.next(&blame) {
        if let Node::Commit(_) = node {
            if visited == limit {
                break;
            }
            visited += 1;
        }
        if !walk.visit(&mut blame, node, head)? {
            break;
        }
    }
    let merges = walk.merges;
    let found = blame.finish();
    let mut parts: Vec<Part> = Vec::new();
    for share in found.shares {
        let commit = match share.commit {
            Node::Now => None,
            Node::Commit(id) => graph.0.get(&id).cloned(),
            Node::Base(id, _) => {
                // Its rounding is the merge's.
                if let Some(part) = parts
                    .iter_mut()
                    .find(|part| part.commit.as_ref().is_some_and(|commit| commit.id == id))
                {
                    part.share += share.share;
                    for (sum, layer) in part.layers.iter_mut().zip(share.layers) {
                        *sum += layer;
                    }
                }
                continue;
            }
        };
        parts.push(Part {
            commit,
            share: share.share,
            layers: share.layers,
        });
    }
    Ok(Blamed {
        parts,
        rest: found.rest,
        energy: found.energy,
        layers: found.layers,
        merges,
    })
}

struct Walk<'a> {
    memory: Memory<'a>,
    graph: &'a Graph,
    geometry: Geometry,
    /// States that were read and are not done with.
    states: HashMap<Node, Vec<f32>>,
    merges: usize,
}

impl Walk<'_> {
    /// What comes next: a merge's base straight behind it, else the commit of the greatest generation, whose children are all done.
    fn next(&self, blame: &Blame<Node>) -> Option<Node> {
        blame.waiting().copied().max_by_key(|node| match node {
            Node::Now => (2, 0, *node),
            Node::Base(_, count) => (1, *count as u64, *node),
            Node::Commit(id) => (
                0,
                self.graph.0.get(id).map_or(0, |commit| commit.generation),
                *node,
            ),
        })
    }

    fn state(&mut self, node: Node) -> Result<Vec<f32>> {
        if let Some(state) = self.states.get(&node) {
            return Ok(state.clone());
        }
        let state = match node {
            Node::Commit(id) => self.memory.snapshot(id)?.memory().to_vec(),
            Node::Base(merge, count) => {
                let bases = self.bases(merge);
                self.graph
                    .base(self.memory, &bases[..count])?
                    .map_or_else(|| super::zeros(self.geometry), |base| base.state)
            }
            Node::Now => super::zeros(self.geometry),
        };
        self.states.insert(node, state.clone());
        Ok(state)
    }

    /// The common ancestors of a merge commit's parents.
    fn bases(&self, merge: CommitId) -> Vec<CommitId> {
        match self.graph.0.get(&merge).map(|commit| &commit.parents[..]) {
            Some([ours, theirs]) => self.graph.bases(&[*ours], *theirs),
            _ => Vec::new(),
        }
    }

    /// The node that stands for these common ancestors of `merge`.
    fn base_node(merge: CommitId, bases: &[CommitId]) -> Option<Node> {
        match bases {
            [] => None,
            [one] => Some(Node::Commit(*one)),
            several => Some(Node::Base(merge, several.len())),
        }
    }

    /// Gives `node` its share; false where history ends because it was pruned.
    fn visit(&mut self, blame: &mut Blame<Node>, node: Node, head: Option<CommitId>) -> Result<bool> {
        let state = self.state(node)?;
        let sides = match node {
            Node::Now => (head.map(Node::Commit), None, None),
            Node::Commit(id) => {
                let commit = &self.graph.0[&id];
                let parents = self.graph.parents(commit);
                if parents.len() < commit.parents.len() {
                    return Ok(false);
                }
                match parents[..] {
                    [] => (None, None, None),
                    [one] => (Some(Node::Commit(one)), None, None),
                    [ours, theirs, ..] => {
                        self.merges += 1;
                        let base = Self::base_node(id, &self.bases(id));
                        (Some(Node::Commit(ours)), Some(Node::Commit(theirs)), base)
                    }
                }
            }
            Node::Base(merge, count) => {
                // The last of these ancestors was merged into those before it.
                let bases = self.bases(merge);
                let under = self.graph.bases(&bases[..count - 1], bases[count - 1]);
                let before = if count == 2 {
                    Node::Commit(bases[0])
                } else {
                    Node::Base(merge, count - 1)
                };
                let base = match under[..] {
                    [] => None,
                    // Of several, the newest stands for all: the difference is charged to the merge.
                    [one, ..] => Some(Node::Commit(one)),
                };
                (Some(before), Some(Node::Commit(bases[count - 1])), base)
            }
        };
        match sides {
            (None, ..) => blame.visit(&node, &state, &Origin::Root)?,
            (Some(parent), None, _) => {
                let before = self.state(parent)?;
                let origin = Origin::Commit {
                    parent,
                    state: &before,
                };
                blame.visit(&node, &state, &origin)?;
            }
            (Some(ours), Some(theirs), base) => {
                let (ours_state, theirs_state) = (self.state(ours)?, self.state(theirs)?);
                let base_state = base.map(|base| self.state(base)).transpose()?;
                let equals = |other: &[f32]| {
                    state
                        .iter()
                        .map(|x| x.to_bits())
                        .eq(other.iter().map(|x| x.to_bits()))
                };
                let origin = if equals(&ours_state) {
                    Origin::Commit {
                        parent: ours,
                        state: &ours_state,
                    }
                } else if equals(&theirs_state) {
                    Origin::Commit {
                        parent: theirs,
                        state: &theirs_state,
                    }
                } else {
                    Origin::Merge {
                        ours: (ours, &ours_state),
                        theirs: (theirs, &theirs_state),
                        base: base.zip(base_state.as_deref()),
                    }
                };
                blame.visit(&node, &state, &origin)?;
            }
        }
        self.states.remove(&node);
        Ok(true)
    }
}
