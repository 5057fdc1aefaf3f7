//! Where a session stands in its store: the memory, the branch, the commit that it grew on. It knows stores and snapshots, no Python.

use std::sync::Arc;

use deltamem_core::Snapshot;
use deltamem_store::{Commit, CommitId, Error, Model, NewCommit, Parts, Store};

use crate::history::{Memory, Problem, Result};

/// A session's place in a store.
pub(crate) struct Kept {
    pub store: Arc<Store>,
    pub name: String,
    /// `None`: on a commit that was checked out by itself.
    pub branch: Option<String>,
    /// The commit that the session grew on, with its state.
    pub head: Option<(Commit, Snapshot)>,
    pub autocommit: bool,
    pub model: Model,
    pub parts: Parts,
}

impl Kept {
    /// Stands at the head of `branch`, or before the first commit of a memory that does not exist yet.
    pub(crate) fn open(
        store: Arc<Store>,
        name: String,
        branch: String,
        autocommit: bool,
        parts: Parts,
        model: Model,
    ) -> std::result::Result<Self, Error> {
        let head = match store.head(&name, &branch)? {
            Some(id) => Some(store.checkout_for(&name, &id.to_string(), &model)?),
            None => match store.info(&name) {
                Err(Error::NotFound { .. }) => None,
                Err(error) => return Err(error),
                Ok(info) => {
                    return Err(Error::NotFound {
                        what: "branch",
                        name: branch,
                        in_memory: Some(name),
                        hint: format!(
                            "open the session on {:?} and make the branch with session.branch(), or with Store.branch()",
                            info.head
                        ),
                    });
                }
            },
        };
        Ok(Self {
            store,
            name,
            branch: Some(branch),
            head,
            autocommit,
            model,
            parts,
        })
    }

    pub(crate) fn memory(&self) -> Memory<'_> {
        Memory {
            store: &self.store,
            name: &self.name,
        }
    }

    pub(crate) fn head_id(&self) -> Option<CommitId> {
        self.head.as_ref().map(|(commit, _)| commit.id)
    }

    /// The branch, or why there is none.
    pub(crate) fn on(&self) -> Result<&str> {
        self.branch.as_deref().ok_or_else(|| {
            let at = self.head_id().map(|id| id.to_string()).unwrap_or_default();
            Problem::Refused(format!(
                "the session stands on commit {} and on no branch; session.branch(name) makes one here, session.checkout(branch) goes to one",
                &at[..at.len().min(12)]
            ))
        })
    }

    /// The commit that `text` means here: HEAD is where the session stands.
    pub(crate) fn resolve(&self, text: &str) -> Result<CommitId> {
        let end = text
            .find("@{")
            .unwrap_or_else(|| text.find(['~', '^']).unwrap_or(text.len()));
        let (base, rest) = text.split_at(end);
        let text = match base {
            "" | "HEAD" | "@" if !text.is_empty() => {
                let Some(head) = self.head_id() else {
                    return Err(Problem::Store(Error::NotFound {
                        what: "commit",
                        name: text.to_owned(),
                        in_memory: Some(self.name.clone()),
                        hint: "the session has no commit yet: session.commit() makes the first".into(),
                    }));
                };
                if rest.starts_with("@{") {
                    format!("{}{rest}", self.on()?)
                } else {
                    format!("{head}{rest}")
                }
            }
            _ => text.to_owned(),
        };
        Ok(self.store.resolve(&self.name, &text)?)
    }

    /// A commit and its state, if it is this model's.
    pub(crate) fn load(&self, id: CommitId) -> Result<(Commit, Snapshot)> {
        Ok(self
            .store
            .checkout_for(&self.name, &id.to_string(), &self.model)?)
    }

    /// Commits `snapshot` on the session's branch.
    pub(crate) fn commit(&mut self, snapshot: Snapshot, message: &str, meta: Option<&str>) -> Result<Commit> {
        let commit = self.store.commit(
            &self.name,
            &NewCommit {
                branch: self.on()?,
                expected: self.head_id(),
                merged: None,
                snapshot: &snapshot,
                parts: Some(self.parts),
                message,
                meta,
            },
        )?;
        self.head = Some((commit.clone(), snapshot));
        Ok(commit)
    }

    /// Whether a session with this memory and these counts holds something that its head does not.
    pub(crate) fn differs(&self, memory: &Arc<[f32]>, tokens_seen: u64, turns: u64) -> bool {
        let Some((_, head)) = &self.head else {
            return tokens_seen > 0 || turns > 0 || memory.iter().any(|number| number.to_bits() != 0);
        };
        if (head.tokens_seen(), head.turns()) != (tokens_seen, turns) {
            return true;
        }
        !Arc::ptr_eq(head.memory(), memory)
            && !head
                .memory()
                .iter()
                .map(|x| x.to_bits())
                .eq(memory.iter().map(|x| x.to_bits()))
    }
}
