//! Where a session stands in its store: the memory, the branch, the commit that it grew on. It knows stores and snapshots, no Python.

use std::sync::Arc;

use deltamem_core::Snapshot;
use deltamem_store::{Commit, CommitId, Error, Model, NewCommit, Parts, StateId, Store};

use crate::history::{Memory, Merged, Problem, Result, Uncommitted, bring_up};

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
    /// A commit whose fate is not known, because the store failed in the middle of it.
    doubt: Option<Doubt>,
}

/// A commit that may have been made.
struct Doubt {
    /// Its parent.
    parent: Option<CommitId>,
    /// Its state.
    state: StateId,
    /// What the session held then.
    held: Snapshot,
    message: String,
    meta: Option<String>,
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
            doubt: None,
        })
    }

    /// Stands somewhere else.
    pub(crate) fn stand(&mut self, head: Option<(Commit, Snapshot)>) {
        self.head = head;
        self.doubt = None;
    }

    /// Finds out what became of a commit whose fate was not known. If it was made, what it holds is not committed a second time.
    pub(crate) fn clear(&mut self) -> Result<()> {
        let (Some(doubt), Some(branch)) = (&self.doubt, &self.branch) else {
            return Ok(());
        };
        let found = self.store.head(&self.name, branch)?;
        if let Some(found) = found
            && Some(found) != self.head_id()
        {
            let log = self.store.log(&self.name, &[&found.to_string()], usize::MAX)?;
            let made = log.into_iter().find(|commit| {
                commit.state == doubt.state && commit.parents.first() == doubt.parent.as_ref()
            });
            if let Some(made) = made {
                // One that was put on top of another worker's commit holds more than the session, which goes on from what it held:
                // it stands on that other commit then, as if it had not seen its own yet.
                let on = match doubt.parent {
                    Some(parent) if Some(parent) != self.head_id() => self.memory().commit(parent)?,
                    _ => made,
                };
                self.head = Some((on, doubt.held.clone()));
            }
        }
        self.doubt = None;
        Ok(())
    }

    /// Whether it is not known if the last commit was made.
    pub(crate) fn in_doubt(&self) -> bool {
        self.doubt.is_some()
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
        let again = self
            .doubt
            .as_ref()
            .is_some_and(|doubt| doubt.message == message && doubt.meta.as_deref() == meta);
        let before = self.head_id();
        self.clear()?;
        if let Some((head, _)) = &self.head
            && again
            && Some(head.id) != before
            && head.state == StateId::of(&snapshot.to_bytes())
        {
            // The same commit asked for again, and it was made the first time.
            return Ok(head.clone());
        }
        let parent = self.head_id();
        let made = self.store.commit(
            &self.name,
            &NewCommit {
                branch: self.on()?,
                expected: parent,
                merged: None,
                snapshot: &snapshot,
                parts: Some(self.parts),
                message,
                meta,
            },
        );
        match made {
            Ok(commit) => {
                self.stand(Some((commit.clone(), snapshot)));
                Ok(commit)
            }
            Err(error) => {
                if fate_unknown(&error) {
                    self.doubt = Some(Doubt {
                        parent,
                        state: StateId::of(&snapshot.to_bytes()),
                        held: snapshot,
                        message: message.to_owned(),
                        meta: meta.map(str::to_owned),
                    });
                }
                Err(error.into())
            }
        }
    }

    /// Commits the end of a turn, unless it is there already.
    pub(crate) fn commit_turn(&mut self, snapshot: Snapshot) -> Result<()> {
        self.clear()?;
        if self.differs(snapshot.memory(), snapshot.tokens_seen(), snapshot.turns()) {
            let meta = format!("{{\"turn\":{}}}", snapshot.turns());
            self.commit(snapshot, "", Some(&meta))?;
        }
        Ok(())
    }

    /// Puts what a session holds beyond its head on top of its branch.
    pub(crate) fn bring_up(&mut self, now: &Snapshot, message: &str, meta: Option<&str>) -> Result<Merged> {
        self.clear()?;
        let changed = self.differs(now.memory(), now.tokens_seen(), now.turns());
        let mut tried = None;
        let merged = bring_up(
            self.memory(),
            &Uncommitted {
                branch: self.on()?,
                grown_on: self.head.as_ref().map(|(commit, state)| (commit.id, state)),
                state: changed.then_some(now),
                fingerprint: self.model.fingerprint,
                parts: self.parts,
                message,
                meta,
                count_turns: self.autocommit,
            },
            &mut tried,
        );
        if let Err(Problem::Store(error)) = &merged
            && fate_unknown(error)
            && let Some((parent, state)) = tried
        {
            self.doubt = Some(Doubt {
                parent,
                state,
                held: now.clone(),
                message: message.to_owned(),
                meta: meta.map(str::to_owned),
            });
        }
        merged
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

/// Whether a change that ended so may have been made.
fn fate_unknown(error: &Error) -> bool {
    matches!(
        error,
        Error::Io { .. } | Error::Unavailable { .. } | Error::Full { .. }
    )
}
