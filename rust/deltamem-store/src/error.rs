//! Everything that can go wrong in a store. Each message names the thing, what was found, what was expected and what to do; the
//! binding maps each variant to one Python exception and adds nothing.

use std::path::PathBuf;

use deltamem_core::{Fingerprint, SnapshotError};

use crate::commit::CommitId;

/// What can go wrong in a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No memory, branch, tag or commit of this name.
    #[error("there is no {what} {name:?}{}; {hint}", place(in_memory.as_deref()))]
    NotFound {
        /// `memory`, `branch`, `tag`, `commit` or `file`.
        what: &'static str,
        /// The name asked for.
        name: String,
        /// The memory that was searched.
        in_memory: Option<String>,
        /// What to do.
        hint: String,
    },
    /// Something of this name exists already.
    #[error("there is a {what} {name:?} already; {hint}")]
    Exists {
        /// `memory`, `branch`, `tag` or `file`.
        what: &'static str,
        /// The name asked for.
        name: String,
        /// What to do.
        hint: &'static str,
    },
    /// The branch moved since it was read: another worker committed first. Nothing was written.
    #[error(
        "branch {branch:?} of memory {name:?} has head {}, expected {}: somebody else moved it; nothing was written: merge with the new \
         head and commit again, or reload it and redo the turn", head(found.as_ref()), head(expected.as_ref())
    )]
    Conflict {
        /// The memory.
        name: String,
        /// The branch.
        branch: String,
        /// The head that the caller built on; `None`: the branch should not exist.
        expected: Option<CommitId>,
        /// The head that the branch has; `None`: the branch does not exist.
        found: Option<CommitId>,
    },
    /// A commit of another model.
    #[error(
        "commit {commit} was written under fingerprint {found}, this model has {expected}: {}; load the bundle that wrote it",
        differing(differs)
    )]
    Fingerprint {
        /// The commit.
        commit: CommitId,
        /// The commit's fingerprint.
        found: Fingerprint,
        /// The model's fingerprint.
        expected: Fingerprint,
        /// Which of `backbone`, `adapter`, `tokenizer`, `config` differ; empty when that is not known.
        differs: Box<[&'static str]>,
    },
    /// A name that no memory, branch or tag may have, or a text over its limit.
    #[error("the {what} {found:?} {problem}; expected {expected}")]
    Name {
        /// Which name: `memory's name`, `branch's name`, `tag's name`, `message`, `meta`.
        what: &'static str,
        /// The name, shortened.
        found: String,
        /// What is wrong with it.
        problem: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// A text that names no commit, or one that cannot be used so.
    #[error("{text:?} of memory {name:?} {problem}")]
    Ref {
        /// The memory.
        name: String,
        /// The text, shortened.
        text: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// The memory's quota is used up. Nothing was written.
    #[error(
        "memory {name:?} would have {found} {what}, its quota is {limit}; raise the quota, let it prune the oldest history, or delete \
         branches and tags and run gc"
    )]
    Quota {
        /// The memory.
        name: String,
        /// `commits`, `bytes` or `refs`.
        what: &'static str,
        /// What there would be.
        found: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Bytes that are not what was written.
    #[error(
        "{place} is damaged: {what}; run verify to see what else is, and repair to save what is whole into a new store, or take a backup"
    )]
    Damaged {
        /// Which object, where.
        place: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A file or database that is no store.
    #[error(
        "{place} is no memory store: {what}; give the path of a store, or of a file that does not exist yet"
    )]
    NotAStore {
        /// The file or database.
        place: String,
        /// What was found.
        what: String,
    },
    /// A store or a file written by a later version.
    #[error("{place} has schema version {found}, this runtime reads up to {known}; update deltamem-rt")]
    Newer {
        /// The file or database.
        place: String,
        /// The version found.
        found: u32,
        /// The newest version that is known here.
        known: u32,
    },
    /// The store's key is missing, not needed, or another one.
    #[error("{place}: {problem}")]
    Key {
        /// The file or database.
        place: String,
        /// What is wrong and what to do.
        problem: &'static str,
    },
    /// Another process has the store open for writing.
    #[error(
        "{place} is held by another process, and one process at a time may write; close it there, open this one read-only where the \
         store shares its readers, or use a server for a fleet"
    )]
    Locked {
        /// The file.
        place: String,
    },
    /// The store was opened for reading only.
    #[error("{place} is open for reading only; open it for writing to change it")]
    ReadOnly {
        /// The file.
        place: String,
    },
    /// No room left. Nothing of the change is acknowledged.
    #[error(
        "no room is left in {place} ({reason}); the change was not acknowledged: free some space, then try again (the store needs not \
         be opened again)"
    )]
    Full {
        /// The file or server.
        place: String,
        /// The system's own words.
        reason: String,
    },
    /// The system failed to read or write. A change that was under way is not acknowledged: it is there whole or not at all.
    #[error(
        "{place}: {doing} failed ({source}); a change that was under way was not acknowledged: look at the log before you repeat it"
    )]
    Io {
        /// The file.
        place: String,
        /// What was being done.
        doing: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// The store did not answer in time, or is closed. A change that was under way is not acknowledged: it is there whole or not at all.
    #[error(
        "{place} does not answer: {reason}; a change that was under way was not acknowledged: try again, then look at the log"
    )]
    Unavailable {
        /// The file or server.
        place: String,
        /// What happened, with the time waited.
        reason: String,
    },
    /// An address that names no server, or a server that cannot serve a store: a wrong password, a replica, one that evicts.
    #[error("{place}: {problem}")]
    Server {
        /// The address, without its password.
        place: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Bytes of a state that are no snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl Error {
    pub(crate) fn damaged(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Damaged {
            place: place.into(),
            what: what.into(),
        }
    }

    pub(crate) fn no_memory(name: &str) -> Self {
        Self::NotFound {
            what: "memory",
            name: shortened(name),
            in_memory: None,
            hint: "Store.names() lists what there is, and the first commit makes it".into(),
        }
    }

    /// An error of reading or writing `path`.
    pub(crate) fn file(path: &std::path::Path, doing: &'static str, source: std::io::Error) -> Self {
        let place = path.display().to_string();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::Full {
                place,
                reason: source.to_string(),
            },
            std::io::ErrorKind::NotFound => Self::NotFound {
                what: "file",
                name: place,
                in_memory: None,
                hint: "check the path".into(),
            },
            std::io::ErrorKind::AlreadyExists => Self::Exists {
                what: "file",
                name: place,
                hint: "give another path, or remove it first",
            },
            _ => Self::Io { place, doing, source },
        }
    }
}

/// A path as messages show it.
pub(crate) fn place_of(path: &std::path::Path) -> String {
    PathBuf::from(path).display().to_string()
}

fn place(in_memory: Option<&str>) -> String {
    in_memory.map_or_else(String::new, |name| format!(" in memory {name:?}"))
}

fn head(id: Option<&CommitId>) -> String {
    id.map_or_else(|| "none".to_owned(), ToString::to_string)
}

fn differing(parts: &[&'static str]) -> String {
    if parts.is_empty() {
        "a memory means nothing to another model".to_owned()
    } else {
        format!("the {} differs", parts.join(", the "))
    }
}

/// At most 60 characters of `text`.
pub(crate) fn shortened(text: &str) -> String {
    match text.char_indices().nth(60) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}...", &text[..at]),
    }
}
