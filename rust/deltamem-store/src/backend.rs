//! What a store needs from the place that keeps its bytes: groups of small values, one of which is the group's head, and one atomic
//! change per call, guarded by a compare-and-swap on that head. A backend knows nothing of commits, names or keys; it is given bytes
//! that are sealed already and gives them back unchanged.
//!
//! ```text
//! group (32 bytes: one memory)                one group more, all zero: the store's own header
//!   head                                      opaque bytes; the group exists as long as it has a head
//!   (kind, id of 32 bytes) -> value           commits, states, entries of the reflog
//! ```
//!
//! Every backend is held by the same suite, `tests/suite`.

use std::fmt;

use crate::error::Error;

pub mod memory;
pub mod redb;
pub mod redis;

/// One memory's place in the backend: 32 bytes made from its name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Group(pub [u8; 32]);

impl Group {
    /// The store's own group; its head is the store's header, and it holds no objects.
    pub const STORE: Self = Self([0; 32]);

    /// The group as 64 hex digits.
    pub fn to_hex(self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group({})", &self.to_hex()[..12])
    }
}

/// What a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// A commit's description, some 300 bytes.
    Commit = b'c',
    /// A memory's state, some KB.
    State = b's',
    /// An entry of the reflog, some 150 bytes.
    Log = b'l',
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Commit, Self::State, Self::Log];
}

/// A value's name inside its group.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// What the value is.
    pub kind: Kind,
    /// Which one.
    pub id: [u8; 32],
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({})", self.kind, Group(self.id).to_hex())
    }
}

/// What happens to a group's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadChange {
    /// The head stays as it is.
    Keep,
    /// The head becomes these bytes, which differ from all that it was before (every change of a memory counts up).
    Put(Vec<u8>),
    /// The group goes, with its head and all its values.
    Remove,
}

/// One change of one group: made whole, or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Which group.
    pub group: Group,
    /// The head that the group must have for the change to be made; `None`: it must have none.
    pub expected: Option<Vec<u8>>,
    /// Remove every value of the group first. Only together with `HeadChange::Put`.
    pub clear: bool,
    /// What becomes of the head.
    pub head: HeadChange,
    /// Values that go; one that is not there is no error.
    pub deletes: Vec<Key>,
    /// Values that are written, over what may be there. No key stands twice, nor in `deletes`.
    pub puts: Vec<(Key, Vec<u8>)>,
}

/// What came of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// All of it is made, and as durable as the backend makes anything.
    Done,
    /// The head was not the expected one, so nothing was changed.
    Refused {
        /// The head found.
        found: Option<Vec<u8>>,
    },
}

/// What stands in a group, read at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// The head; `None`: there is no such group.
    pub head: Option<Vec<u8>>,
    /// A value for each key asked for, in that order.
    pub values: Vec<Option<Vec<u8>>>,
}

/// Part of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// What was found. It may be less than the limit, or nothing, with more to come.
    pub items: Vec<T>,
    /// Where to go on; `None`: this was the last page.
    pub next: Option<Cursor>,
}

impl<T> Page<T> {
    /// A page of a listing in the order of ids: there may be more behind one that is full.
    fn of_ordered(items: Vec<T>, limit: usize, id: impl Fn(&T) -> [u8; 32]) -> Self {
        let last = items.last().filter(|_| items.len() >= limit);
        let next = last.map(|item| Cursor(id(item).to_vec()));
        Self { items, next }
    }
}

/// Where a listing goes on: bytes that only the backend understands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor(pub Vec<u8>);

/// A place that keeps groups.
///
/// Calls come from any number of threads. Listings give whatever is there during the whole listing at least once, in any order;
/// something that is added or goes meanwhile may be given or not, and something may be given twice.
pub trait Backend: fmt::Debug + Send + Sync {
    /// What messages call it: a path or an address without its password.
    fn place(&self) -> String;

    /// A group's head and the values of `keys`, all of one moment. One round trip.
    fn read(&self, group: Group, keys: &[Key]) -> Result<Read, Error>;

    /// Makes one change, guarded by its group's head. One round trip; it returns when the change is durable.
    ///
    /// # Errors
    /// After an error the change is there whole or not at all, and the caller does not know which.
    fn apply(&self, batch: Batch) -> Result<Applied, Error>;

    /// Up to about `limit` values of one kind in a group.
    fn list(
        &self,
        group: Group,
        kind: Kind,
        from: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<(Key, Vec<u8>)>, Error>;

    /// Up to about `limit` groups with their heads, the store's own left out.
    fn groups(&self, from: Option<&Cursor>, limit: usize) -> Result<Page<(Group, Vec<u8>)>, Error>;

    /// Makes the bytes of what was removed leave the place, as far as it can; the bytes used before and after.
    fn compact(&self) -> Result<Compacted, Error>;

    /// Looks for damage below the level of groups and values: pages, checksums, values without a head. Each finding is (where, what).
    fn check(&self) -> Result<Vec<(String, String)>, Error>;

    /// Bytes that the place takes.
    fn size(&self) -> Result<u64, Error>;

    /// Closes it: waits for what is under way, releases files and connections. Later calls are refused. Closing twice is no error.
    fn close(&self) -> Result<(), Error>;
}

/// What a compaction did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compacted {
    /// Bytes used before.
    pub before: u64,
    /// Bytes used after.
    pub after: u64,
}
