//! What a memory's commits tell together with the mathematics of states (`deltamem_core::edits`): differences, merges, whose writes a read
//! consists of, and a history without one of its commits. It knows stores and states; it knows no model, no session and no Python.

mod blaming;
mod graph;
mod merging;
mod redacting;

use deltamem_core::edits::StateError;
use deltamem_core::edits::blame::BlameError;
use deltamem_core::edits::diff::Diff;
use deltamem_core::edits::merge::MergeError;
use deltamem_core::edits::redact::RedactError;
use deltamem_core::{Geometry, Snapshot, SnapshotError};
use deltamem_store::{Commit, CommitId, Error, Store};

pub(crate) use blaming::{Blamed, blame};
pub(crate) use merging::{Case, Merged, Uncommitted, WARN_FROM, bring_up, merge};
pub(crate) use redacting::{Redacted, redact};

/// What can go wrong here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    #[error(transparent)]
    Store(#[from] Error),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Merge(#[from] MergeError),
    #[error(transparent)]
    Blame(#[from] BlameError),
    #[error(transparent)]
    Redact(#[from] RedactError),
    #[error("{0}")]
    Refused(String),
}

impl From<SnapshotError> for Problem {
    fn from(error: SnapshotError) -> Self {
        Self::Store(error.into())
    }
}

pub(crate) type Result<T> = std::result::Result<T, Problem>;

/// One memory of a store.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a> {
    pub store: &'a Store,
    pub name: &'a str,
}

impl Memory<'_> {
    /// The state of a commit.
    pub(crate) fn snapshot(&self, id: CommitId) -> Result<Snapshot> {
        Ok(self.store.checkout(self.name, &id.to_string())?.1)
    }

    /// A commit of the memory.
    pub(crate) fn commit(&self, id: CommitId) -> Result<Commit> {
        Ok(self.store.show(self.name, &id.to_string())?)
    }
}

/// Compares two states; `before` of `None` is the empty memory.
pub(crate) fn diff(before: Option<&Snapshot>, after: &Snapshot, directions: usize) -> Result<Diff> {
    let geometry = after.geometry();
    let empty = vec![0.0; geometry.elements()];
    let before = match before {
        Some(before) => {
            same_model(before, after)?;
            before.memory()
        }
        None => &empty[..],
    };
    Ok(deltamem_core::edits::diff::diff(
        geometry,
        before,
        after.memory(),
        directions,
    )?)
}

/// States of two models have nothing to do with each other.
fn same_model(a: &Snapshot, b: &Snapshot) -> Result<()> {
    if a.fingerprint() == b.fingerprint() && a.geometry() == b.geometry() {
        return Ok(());
    }
    Err(Problem::Refused(format!(
        "the states were written under two models, fingerprints {} and {}; states of one model only can be compared or merged",
        a.fingerprint(),
        b.fingerprint()
    )))
}

/// `like` with another memory and other counts.
fn with_state(like: &Snapshot, state: Vec<f32>, tokens_seen: i128, turns: i128) -> Result<Snapshot> {
    let count = |number: i128| u64::try_from(number.max(0)).unwrap_or(u64::MAX);
    Ok(Snapshot::new(
        like.geometry(),
        like.fingerprint(),
        state.into(),
        count(tokens_seen),
        count(turns),
        like.sampler(),
    )?)
}

fn zeros(geometry: Geometry) -> Vec<f32> {
    vec![0.0; geometry.elements()]
}
