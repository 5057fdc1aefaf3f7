//! A branch's history without the change of one of its commits: every later commit is made again, with its state as it would be without.

use std::collections::{HashMap, HashSet};

use deltamem_core::edits::redact::Removal;
use deltamem_store::{Commit, CommitId, Error, NewCommit, RefKind};

use super::graph::Graph;
use super::{Memory, Problem, Result, with_state};

/// What a redaction came to.
pub(crate) struct Redacted {
    /// The branch's head afterwards.
    pub head: Commit,
    /// How many commits were made again.
    pub rewritten: usize,
    /// What was left of the change in the branch's state, as a part of it.
    pub survived: f64,
    /// The expected error in what was taken out, as a part of the change.
    pub unseparated: f64,
    /// Branches and tags that still have the commit in their history.
    pub still_in: Vec<(RefKind, String)>,
}

/// Takes `redacted` out of the history of `branch`, whose head is `head`.
pub(crate) fn redact(
    memory: Memory<'_>,
    branch: &str,
    head: CommitId,
    redacted: CommitId,
) -> Result<Redacted> {
    let Memory { store, name } = memory;
    let graph = Graph::of(memory, &[head])?;
    let Some(commit) = graph.0.get(&redacted) else {
        return Err(Problem::Refused(format!(
            "commit {redacted} is not in the history of branch {branch:?}; name a branch that has it"
        )));
    };
    let parent = match commit.parents[..] {
        [] => None,
        [parent] if graph.0.contains_key(&parent) => Some(parent),
        [_] => {
            return Err(Problem::Refused(format!(
                "what was before commit {redacted} was pruned, so its change is not known any more; delete the memory, or roll back"
            )));
        }
        _ => {
            return Err(Problem::Refused(format!(
                "commit {redacted} is a merge and has no change of its own; redact the commits that it merged"
            )));
        }
    };
    let later = graph.descendants(redacted);
    if parent.is_none() && later.is_empty() {
        return Err(Problem::Refused(format!(
            "commit {redacted} is all that branch {branch:?} has; delete the memory"
        )));
    }

    // A branch of its own until everything is there; then the real one moves, if it is still where it was.
    let temporary = format!("redacting/{}", &redacted.to_string()[..16]);
    drop_branch(memory, &temporary)?;
    let made = rewrite(memory, &graph, &later, redacted, parent, head, &temporary);
    let result = made.and_then(|(new_head, survived, unseparated)| {
        let moved = store.rollback(name, branch, &new_head.to_string(), Some(head))?;
        Ok((moved, survived, unseparated))
    });
    drop_branch(memory, &temporary)?;
    let (head, survived, unseparated) = result?;

    let mut still_in = Vec::new();
    for entry in store.info(name)?.refs {
        let reached = Graph::of(memory, &[entry.target])?;
        if reached.0.contains_key(&redacted) {
            still_in.push((entry.kind, entry.name));
        }
    }
    Ok(Redacted {
        head,
        rewritten: later.len(),
        survived,
        unseparated,
        still_in,
    })
}

fn drop_branch(memory: Memory<'_>, branch: &str) -> Result<()> {
    match memory.store.delete_branch(memory.name, branch) {
        Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What carries through a merge whose common ancestors are `bases`.
fn base_removal(
    graph: &Graph,
    removals: &HashMap<CommitId, Removal>,
    bases: &[CommitId],
) -> Result<Option<Removal>> {
    let Some((first, rest)) = bases.split_first() else {
        return Ok(None);
    };
    let mut merged = removals.get(first).cloned();
    let mut sides = vec![*first];
    for id in rest {
        let under = base_removal(graph, removals, &graph.bases(&sides, *id))?;
        merged = Removal::merge(merged.as_ref(), removals.get(id), under.as_ref())?;
        sides.push(*id);
    }
    Ok(merged)
}

fn rewrite(
    memory: Memory<'_>,
    graph: &Graph,
    later: &[&Commit],
    redacted: CommitId,
    parent: Option<CommitId>,
    head: CommitId,
    temporary: &str,
) -> Result<(CommitId, f64, f64)> {
    let Memory { store, name } = memory;
    let own = memory.snapshot(redacted)?;
    let geometry = own.geometry();
    let before = match parent {
        Some(parent) => memory.snapshot(parent)?.memory().to_vec(),
        None => super::zeros(geometry),
    };
    let mut removals = HashMap::from([(redacted, Removal::of(geometry, &before, own.memory())?)]);
    // Where each commit that goes has its successor; `None`: nothing is left of it.
    let mut successors: HashMap<CommitId, Option<CommitId>> = HashMap::from([(redacted, parent)]);
    let mut figures = (1.0, 0.0);
    let mut at: Option<CommitId> = None;
    for commit in later {
        let state = memory.snapshot(commit.id)?;
        let removal = match commit.parents[..] {
            [one] => {
                let mut removal = removals[&one].clone();
                removal.advance(memory.snapshot(one)?.memory(), state.memory())?;
                Some(removal)
            }
            [ours, theirs] => {
                let bits = |id: CommitId| -> Result<bool> {
                    let other = memory.snapshot(id)?;
                    let same = state.memory().iter().map(|x| x.to_bits());
                    Ok(same.eq(other.memory().iter().map(|x| x.to_bits())))
                };
                if bits(ours)? {
                    removals.get(&ours).cloned()
                } else if bits(theirs)? {
                    removals.get(&theirs).cloned()
                } else {
                    let base = base_removal(graph, &removals, &graph.bases(&[ours], theirs))?;
                    Removal::merge(removals.get(&ours), removals.get(&theirs), base.as_ref())?
                }
            }
            _ => None,
        };
        let snapshot = match &removal {
            None => state,
            Some(removal) => {
                let without = removal.clone().finish(state.memory())?;
                if commit.id == head {
                    figures = (without.survived, without.unseparated);
                }
                let (tokens_seen, turns) = (state.tokens_seen(), state.turns());
                with_state(&state, without.state, tokens_seen.into(), turns.into())?
            }
        };
        if let Some(removal) = removal {
            removals.insert(commit.id, removal);
        }
        let mut seen = HashSet::new();
        let parents: Vec<CommitId> = commit
            .parents
            .iter()
            .filter_map(|id| successors.get(id).copied().unwrap_or(Some(*id)))
            .filter(|id| seen.insert(*id))
            .collect();
        if at != parents.first().copied() {
            match (parents.first(), store.head(name, temporary)?) {
                (Some(first), None) => {
                    store.branch(name, temporary, &first.to_string())?;
                }
                (Some(first), Some(_)) => {
                    store.rollback(name, temporary, &first.to_string(), None)?;
                }
                (None, _) => drop_branch(memory, temporary)?,
            }
            at = parents.first().copied();
        }
        let made = store.commit(
            name,
            &NewCommit {
                branch: temporary,
                expected: at,
                merged: parents.get(1).copied(),
                snapshot: &snapshot,
                parts: commit.parts,
                message: &commit.message,
                meta: Some(&commit.meta),
            },
        )?;
        at = Some(made.id);
        successors.insert(commit.id, at);
    }
    let last = successors.get(&head).copied().flatten().or(parent);
    match last {
        Some(last) => Ok((last, figures.0, figures.1)),
        None => Err(Problem::Refused("nothing is left of the branch".into())),
    }
}
