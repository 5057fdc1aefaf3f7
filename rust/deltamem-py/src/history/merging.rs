//! Merges of commits, and of a session's uncommitted state with a branch that moved.

use std::time::Duration;

use deltamem_core::edits::merge::{Conflict, merge as merge_states};
use deltamem_core::{Fingerprint, Snapshot};
use deltamem_store::{Commit, CommitId, Error, NewCommit, Parts, StateId};

use super::graph::{Base, Graph};
use super::{Memory, Problem, Result, same_model, with_state, zeros};

/// Losses from here on are worth a warning. A side's loss is e / √(e² + s²), with s what its own facts read and e what the other side adds
/// to that. A read that is decoded by its nearest value tips where e = s (loss .71). The warning comes at e = s/2, half-way
/// there: 1/√5. For changes of equal size that is an overlap of a quarter.
pub(crate) const WARN_FROM: f64 = 0.447_213_595_499_957_9;

/// How often a branch may move under a merge that is being made. Each time means that another worker's commit went through.
const ATTEMPTS: u32 = 500;

/// Which case a merge was.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    /// Their side holds nothing new.
    UpToDate,
    /// Our side had nothing of its own.
    FastForward,
    /// Both had.
    ThreeWay,
}

/// What a merge came to.
pub(crate) struct Merged {
    pub case: Case,
    /// The branch's head afterwards; `None`: there is no commit yet.
    pub head: Option<(Commit, Snapshot)>,
    /// The common ancestors that were found, the newest first.
    pub bases: Vec<CommitId>,
    /// How much the two sides are in each other's way; `None` where nothing had to be added.
    pub conflict: Option<Conflict>,
}

/// ours + theirs − base.
fn sum(base: Option<&Base>, ours: &Snapshot, theirs: &Snapshot) -> Result<(Snapshot, Conflict)> {
    same_model(ours, theirs)?;
    let geometry = ours.geometry();
    let empty = Base {
        state: zeros(geometry),
        tokens_seen: 0,
        turns: 0,
    };
    let base = base.unwrap_or(&empty);
    let merged = merge_states(geometry, &base.state, ours.memory(), theirs.memory())?;
    let all = |a: u64, b: u64, base: i128| i128::from(a) + i128::from(b) - base;
    let snapshot = with_state(
        ours,
        merged.state,
        all(ours.tokens_seen(), theirs.tokens_seen(), base.tokens_seen),
        all(ours.turns(), theirs.turns(), base.turns),
    )?;
    Ok((snapshot, merged.total))
}

/// Merges commit `theirs` into a branch whose head is `head`. `text` is what the caller called it.
pub(crate) fn merge(
    memory: Memory<'_>,
    branch: &str,
    head: CommitId,
    theirs: CommitId,
    text: &str,
    message: &str,
    meta: Option<&str>,
) -> Result<Merged> {
    let graph = Graph::of(memory, &[head, theirs])?;
    let bases = graph.bases(&[head], theirs);
    if bases.first() == Some(&theirs) {
        return Ok(Merged {
            case: Case::UpToDate,
            head: Some((memory.commit(head)?, memory.snapshot(head)?)),
            bases,
            conflict: None,
        });
    }
    if bases.first() == Some(&head) {
        let commit = memory.store.fast_forward(memory.name, branch, head, theirs)?;
        return Ok(Merged {
            case: Case::FastForward,
            head: Some((commit, memory.snapshot(theirs)?)),
            bases,
            conflict: None,
        });
    }
    let (ours_state, theirs_state) = (memory.snapshot(head)?, memory.snapshot(theirs)?);
    let base = graph.base(memory, &bases)?;
    let (snapshot, conflict) = sum(base.as_ref(), &ours_state, &theirs_state)?;
    let words = format!("merge {text} into {branch}");
    let commit = memory.store.commit(
        memory.name,
        &NewCommit {
            branch,
            expected: Some(head),
            merged: Some(theirs),
            snapshot: &snapshot,
            parts: graph.0.get(&head).and_then(|commit| commit.parts),
            message: if message.is_empty() { &words } else { message },
            meta,
        },
    )?;
    Ok(Merged {
        case: Case::ThreeWay,
        head: Some((commit, snapshot)),
        bases,
        conflict: Some(conflict),
    })
}

/// A state that grew on `head` and is to go onto its branch, wherever that is by now.
pub(crate) struct Uncommitted<'a> {
    pub branch: &'a str,
    /// The commit that the state grew on, with its own state; `None`: the empty memory.
    pub grown_on: Option<(CommitId, &'a Snapshot)>,
    /// The state; `None`: there is nothing uncommitted.
    pub state: Option<&'a Snapshot>,
    pub fingerprint: Fingerprint,
    pub parts: Parts,
    pub message: &'a str,
    pub meta: Option<&'a str>,
    /// Without a meta: the commit says how many turns its state has seen.
    pub count_turns: bool,
}

/// Puts what is uncommitted on top of the branch's present head: theirs + (ours − what it grew on), whatever happened in between, and
/// again while others commit first. `tried` is the parent and the state of the last commit that was tried: after an error of the store it
/// may have been made.
pub(crate) fn bring_up(
    memory: Memory<'_>,
    ours: &Uncommitted<'_>,
    tried: &mut Option<(Option<CommitId>, StateId)>,
) -> Result<Merged> {
    let Memory { store, name } = memory;
    let grown_on = ours.grown_on.map(|(id, _)| id);
    let base = ours.grown_on.map(|(_, snapshot)| Base {
        state: snapshot.memory().to_vec(),
        tokens_seen: i128::from(snapshot.tokens_seen()),
        turns: i128::from(snapshot.turns()),
    });
    let model = deltamem_store::Model {
        fingerprint: ours.fingerprint,
        parts: Some(ours.parts),
    };
    let mut last = None;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            rest(attempt);
        }
        let found = store.head(name, ours.branch)?;
        if found.is_none() && grown_on.is_some() {
            // Deleted by somebody: it must not come back by itself.
            return Err(Problem::Store(Error::Conflict {
                name: name.to_owned(),
                branch: ours.branch.to_owned(),
                expected: grown_on,
                found: None,
            }));
        }
        let theirs = found
            .filter(|found| Some(*found) != grown_on)
            .map(|found| store.checkout_for(name, &found.to_string(), &model))
            .transpose()?;
        let bases: Vec<CommitId> = grown_on.into_iter().collect();
        let (case, snapshot, conflict) = match (ours.state, &theirs) {
            (None, Some(_)) => {
                return Ok(Merged {
                    case: Case::FastForward,
                    head: theirs,
                    bases,
                    conflict: None,
                });
            }
            (None, None) => {
                let head = match ours.grown_on {
                    Some((id, snapshot)) => Some((memory.commit(id)?, snapshot.clone())),
                    None => None,
                };
                return Ok(Merged {
                    case: Case::UpToDate,
                    head,
                    bases,
                    conflict: None,
                });
            }
            (Some(state), None) => (Case::UpToDate, state.clone(), None),
            (Some(state), Some((_, theirs))) => {
                let (snapshot, conflict) = sum(base.as_ref(), state, theirs)?;
                (Case::ThreeWay, snapshot, Some(conflict))
            }
        };
        *tried = Some((found, StateId::of(&snapshot.to_bytes())));
        let turns = format!("{{\"turn\":{}}}", snapshot.turns());
        let committed = store.commit(
            name,
            &NewCommit {
                branch: ours.branch,
                expected: found,
                merged: None,
                snapshot: &snapshot,
                parts: Some(ours.parts),
                message: ours.message,
                meta: ours.meta.or(ours.count_turns.then_some(&turns)),
            },
        );
        match committed {
            Ok(commit) => {
                return Ok(Merged {
                    case,
                    head: Some((commit, snapshot)),
                    bases,
                    conflict,
                });
            }
            Err(error @ Error::Conflict { .. }) => last = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(last.map_or_else(
        || Problem::Refused("the merge was never tried; please report this".into()),
        Problem::Store,
    ))
}

/// Rests longer after each lost attempt, at most 32 ms and some, and not in step with the others.
fn rest(attempt: u32) {
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::from(since.subsec_nanos()));
    let most = 1_000_u64 << attempt.min(5);
    std::thread::sleep(Duration::from_micros(nanos / 7 % most));
}
