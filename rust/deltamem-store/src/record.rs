//! A memory's record: what its head in the backend says. All of its refs stand here, so one compare-and-swap moves any of them; and an
//! entry of the reflog, which keeps every move.

use std::collections::{BTreeMap, BTreeSet};

use crate::codec::{self, Reader, Writer};
use crate::commit::{CommitId, StateId};
use crate::name::{MAX_NAME, MAX_REF_NAME};

const ENCODING: u8 = 1;

/// The most branches and tags of one memory.
pub const MAX_REFS: usize = 4096;

/// A branch or a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RefKind {
    /// Moves with each commit.
    Branch,
    /// Stays.
    Tag,
}

impl RefKind {
    /// `branch` or `tag`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Branch => "branch",
            Self::Tag => "tag",
        }
    }

    fn encode(self) -> u8 {
        match self {
            Self::Branch => 0,
            Self::Tag => 1,
        }
    }

    fn decode(byte: u8) -> codec::Result<Self> {
        match byte {
            0 => Ok(Self::Branch),
            1 => Ok(Self::Tag),
            other => Err(format!("a ref of kind {other}, expected 0 or 1")),
        }
    }
}

/// What becomes of a commit that would go over the quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// It is refused with [`Error::Quota`](crate::Error::Quota).
    #[default]
    Refuse,
    /// The oldest commits go, down to seven eighths of the quota; no commit that a branch or a tag names ever goes.
    Prune,
}

/// How much one memory may keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Commits; `None`: any number.
    pub commits: Option<u64>,
    /// Bytes of commits and states as they are kept; `None`: any number.
    pub bytes: Option<u64>,
    /// What happens beyond that.
    pub when_full: WhenFull,
}

/// What one memory keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Commits.
    pub commits: u64,
    /// Bytes of commits and states as they are kept. A state that is committed again after others counts again until the next gc.
    pub bytes: u64,
}

/// Where a branch or a tag points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RefEntry {
    pub target: CommitId,
    /// The target's state and generation, so that a commit on top needs no read.
    pub state: StateId,
    pub generation: u64,
    /// The number of its last move in the reflog.
    pub log: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub name: String,
    /// Random: tells this memory from an earlier one of the same name.
    pub instance: [u8; 16],
    /// Counts every change of the record.
    pub version: u64,
    pub created_ms: u64,
    /// When it last changed: a time to live counts from here.
    pub touched_ms: u64,
    pub ttl_ms: Option<u64>,
    pub limits: Limits,
    pub usage: Usage,
    /// The branch that HEAD means.
    pub head: String,
    pub refs: BTreeMap<(RefKind, String), RefEntry>,
    /// The number of the next move in the reflog.
    pub moves: u64,
    /// The lowest number that the reflog may still hold.
    pub oldest_move: u64,
    /// Commits whose parents were pruned, or not saved by a repair.
    pub shallow: BTreeSet<CommitId>,
}

impl Record {
    pub(crate) fn expired(&self, now_ms: u64) -> bool {
        self.ttl_ms
            .is_some_and(|ttl| now_ms >= self.touched_ms.saturating_add(ttl))
    }

    pub(crate) fn branch(&self, name: &str) -> Option<&RefEntry> {
        self.refs.get(&(RefKind::Branch, name.to_owned()))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u8(ENCODING)
            .text(&self.name)
            .raw(&self.instance)
            .u64(self.version)
            .u64(self.created_ms)
            .u64(self.touched_ms)
            .maybe_u64(self.ttl_ms)
            .maybe_u64(self.limits.commits)
            .maybe_u64(self.limits.bytes)
            .u8(u8::from(self.limits.when_full == WhenFull::Prune))
            .u64(self.usage.commits)
            .u64(self.usage.bytes)
            .text(&self.head)
            .u64(self.moves)
            .u64(self.oldest_move)
            .u64(self.shallow.len() as u64);
        for id in &self.shallow {
            out.raw(&id.0);
        }
        out.u64(self.refs.len() as u64);
        for ((kind, name), entry) in &self.refs {
            out.u8(kind.encode())
                .text(name)
                .raw(&entry.target.0)
                .raw(&entry.state.0)
                .u64(entry.generation)
                .u64(entry.log);
        }
        out.0
    }

    pub(crate) fn decode(bytes: &[u8]) -> codec::Result<Self> {
        let mut from = Reader::new(bytes);
        encoding(&mut from, "record")?;
        let mut record = Self {
            name: from.text(MAX_NAME, "name")?,
            instance: from.array("instance")?,
            version: from.u64("version")?,
            created_ms: from.u64("creation")?,
            touched_ms: from.u64("last change")?,
            ttl_ms: from.maybe_u64("time to live")?,
            limits: Limits {
                commits: from.maybe_u64("quota")?,
                bytes: from.maybe_u64("quota")?,
                when_full: match from.u8("policy")? {
                    0 => WhenFull::Refuse,
                    1 => WhenFull::Prune,
                    other => return Err(format!("policy {other}, expected 0 or 1")),
                },
            },
            usage: Usage {
                commits: from.u64("usage")?,
                bytes: from.u64("usage")?,
            },
            head: from.text(MAX_REF_NAME, "HEAD")?,
            moves: from.u64("moves")?,
            oldest_move: from.u64("oldest move")?,
            shallow: BTreeSet::new(),
            refs: BTreeMap::new(),
        };
        for _ in 0..from.count(32, "shallow commits")? {
            record.shallow.insert(CommitId(from.array("a shallow commit")?));
        }
        let refs = from.count(89, "refs")?;
        if refs > MAX_REFS {
            return Err(format!("{refs} refs, at most {MAX_REFS} are allowed"));
        }
        for _ in 0..refs {
            let kind = RefKind::decode(from.u8("ref")?)?;
            let name = from.text(MAX_REF_NAME, "ref's name")?;
            let entry = RefEntry {
                target: CommitId(from.array("ref's commit")?),
                state: StateId(from.array("ref's state")?),
                generation: from.u64("ref's generation")?,
                log: from.u64("ref's move")?,
            };
            record.refs.insert((kind, name), entry);
        }
        from.end()?;
        Ok(record)
    }
}

/// One move of one branch or tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// Counts the memory's moves from 0.
    pub number: u64,
    /// What moved.
    pub kind: RefKind,
    /// Its name.
    pub name: String,
    /// Where it was; `None`: it was made by this move.
    pub old: Option<CommitId>,
    /// Where it is; `None`: it was deleted by this move.
    pub new: Option<CommitId>,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// Why: `commit`, `merge`, `branch`, `tag`, `rollback`, `fast-forward`, `delete`, `fork`, `import`, `repair`.
    pub why: String,
    /// The number of its move before; `None`: there was none.
    pub previous: Option<u64>,
}

impl Move {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u8(ENCODING)
            .u64(self.number)
            .u8(self.kind.encode())
            .text(&self.name)
            .maybe_id(self.old.as_ref().map(|id| &id.0))
            .maybe_id(self.new.as_ref().map(|id| &id.0))
            .u64(self.time_ms)
            .text(&self.why)
            .maybe_u64(self.previous);
        out.0
    }

    pub(crate) fn decode(bytes: &[u8]) -> codec::Result<Self> {
        let mut from = Reader::new(bytes);
        encoding(&mut from, "move")?;
        let entry = Self {
            number: from.u64("number")?,
            kind: RefKind::decode(from.u8("ref")?)?,
            name: from.text(MAX_REF_NAME, "ref's name")?,
            old: from.maybe_id("old commit")?.map(CommitId),
            new: from.maybe_id("new commit")?.map(CommitId),
            time_ms: from.u64("time")?,
            why: from.text(64, "reason")?,
            previous: from.maybe_u64("previous move")?,
        };
        from.end()?;
        Ok(entry)
    }
}

/// A move's id in the backend.
pub(crate) fn move_id(number: u64) -> [u8; 32] {
    let mut id = [0; 32];
    id[24..].copy_from_slice(&number.to_be_bytes());
    id
}

fn encoding(from: &mut Reader<'_>, what: &str) -> codec::Result<()> {
    match from.u8("encoding")? {
        ENCODING => Ok(()),
        other => Err(format!("a {what} of encoding {other}, expected {ENCODING}")),
    }
}
