//! Whole memories from one place to another: a fork inside a store, export to one file and import from it. The file:
//!
//! ```text
//! "deltamem-memory\n"   u32 version (1)
//! record                u64 length, bytes       name, quotas, refs, where history was cut
//! commits               u64 count, each u64 length, bytes
//! states                u64 count, each u64 length, bytes: snapshots in safetensors form
//! moves                 u64 count, each u64 length, bytes: the reflog
//! BLAKE3                32 bytes, of everything before
//! ```
//!
//! It is not encrypted, whatever the store is.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;

use deltamem_core::Snapshot;

use crate::backend::Kind;
use crate::codec::{Reader, Writer};
use crate::commit::{Commit, CommitId, StateId};
use crate::error::{Error, place_of};
use crate::history::History;
use crate::name::{check_memory, check_ref};
use crate::record::{Move, Record, RefEntry, RefKind, move_id};
use crate::store::{Edit, Opened, Store, Target};

/// The version of the file's format that is written.
pub const EXPORT_VERSION: u32 = 1;

const MAGIC: &[u8; 16] = b"deltamem-memory\n";
const CONTEXT: &str = "deltamem_rt store: export 1";
/// The largest file that is read, and the largest value in it.
const MAX_FILE: u64 = 4 << 30;
const MAX_VALUE: usize = 1 << 30;

/// A memory outside a store.
pub(crate) struct Whole {
    pub record: Record,
    pub commits: BTreeMap<CommitId, Vec<u8>>,
    pub states: BTreeMap<StateId, Vec<u8>>,
    pub moves: BTreeMap<u64, Vec<u8>>,
}

impl Store {
    /// Copies a memory to a new name, where it goes its own way: all branches, tags and the reflog, or with `at` only the history of
    /// that commit, on a branch with the name of the one in use. Nothing is shared with the original: deleting one leaves the other.
    ///
    /// # Errors
    /// [`Error::Exists`] when the new name is taken, [`Error::NotFound`], and as for [`Store::resolve`].
    pub fn fork(&self, name: &str, new_name: &str, at: Option<&str>) -> Result<(), Error> {
        check_memory(new_name)?;
        let whole = self.reading(name, |opened| {
            let mut whole = self.gather(opened)?;
            if let Some(text) = at {
                let start = self.resolve_in(opened, text, None)?;
                let history = self.history(opened)?;
                only(&mut whole, &history, &start);
            }
            Ok(whole)
        })?;
        self.plant(new_name, &whole, "fork")
    }

    /// Writes a memory to a file: complete, with a checksum, in one form whatever the backend. The file is not encrypted. It appears
    /// under its name only when it is whole and on disk.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Exists`] when the file exists; [`Error::Io`] and [`Error::Full`].
    pub fn export(&self, name: &str, path: &Path) -> Result<(), Error> {
        let whole = self.reading(name, |opened| self.gather(opened))?;
        write_whole(path, &encode(&whole))
    }

    /// Reads a memory from a file that [`Store::export`] wrote, under its own name or another one; the name.
    ///
    /// # Errors
    /// [`Error::Exists`] when the name is taken; [`Error::NotAStore`], [`Error::Newer`] and [`Error::Damaged`] for other files.
    pub fn import(&self, path: &Path, new_name: Option<&str>) -> Result<String, Error> {
        let bytes = read_whole(path)?;
        let whole = decode(&bytes, &place_of(path))?;
        let name = new_name.unwrap_or(&whole.record.name).to_owned();
        check_memory(&name)?;
        self.plant(&name, &whole, "import")?;
        Ok(name)
    }

    /// Everything that a memory holds and that is in reach.
    fn gather(&self, opened: &Opened) -> Result<Whole, Error> {
        let mut whole = Whole {
            record: opened.record.clone(),
            commits: BTreeMap::new(),
            states: BTreeMap::new(),
            moves: BTreeMap::new(),
        };
        let mut moves = Vec::new();
        self.each_value(opened.group, Kind::Log, |key, value| {
            let bytes = self.open_value(opened, key, &value)?;
            let entry = Move::decode(&bytes).map_err(|what| Error::damaged(format!("{key:?}"), what))?;
            whole.moves.insert(entry.number, bytes);
            moves.push(entry);
            Ok(())
        })?;
        let history = self.history(opened)?;
        let named = opened.record.refs.values().map(|entry| entry.target);
        let passed = moves
            .iter()
            .flat_map(|entry| entry.old.into_iter().chain(entry.new));
        for id in history.ancestors(named.chain(passed)) {
            let commit = &history.0[&id];
            whole.commits.insert(id, commit.encode());
            if let Entry::Vacant(free) = whole.states.entry(commit.state) {
                free.insert(self.state_of(opened, commit.state)?);
            }
        }
        Ok(whole)
    }

    /// Makes a memory out of a whole one, in one batch.
    pub(crate) fn plant(&self, name: &str, whole: &Whole, why: &str) -> Result<(), Error> {
        self.changing(name, |opened| {
            if opened.is_some() {
                return Err(Error::Exists {
                    what: "memory",
                    name: name.to_owned(),
                    hint: "take another name, or delete it first",
                });
            }
            let mut edit = self.new_memory(name, &whole.record.head, self.now())?;
            let from = &whole.record;
            edit.record.refs.clone_from(&from.refs);
            edit.record.shallow.clone_from(&from.shallow);
            (edit.record.limits, edit.record.ttl_ms) = (from.limits, from.ttl_ms);
            (edit.record.moves, edit.record.oldest_move) = (from.moves, from.oldest_move);
            edit.record.created_ms = from.created_ms;
            let mut bytes = 0;
            for (id, encoded) in &whole.commits {
                bytes += edit.put(Kind::Commit, &id.0, encoded)?;
            }
            for (id, state) in &whole.states {
                bytes += edit.put(Kind::State, &id.0, state)?;
            }
            for (number, entry) in &whole.moves {
                edit.put(Kind::Log, &move_id(*number), entry)?;
            }
            edit.record.usage.commits = whole.commits.len() as u64;
            edit.record.usage.bytes = bytes;
            note_origin(&mut edit, why);
            Ok((edit, ()))
        })
    }
}

/// Writes down where the branch in use came from: a move that goes nowhere.
fn note_origin(edit: &mut Edit, why: &str) {
    let head = edit.record.head.clone();
    if let Some(entry) = edit.record.branch(&head).copied() {
        let to = Target {
            id: entry.target,
            state: entry.state,
            generation: entry.generation,
        };
        edit.move_ref(RefKind::Branch, &head, Some(to), why);
    }
}

/// Leaves the history of `start` only, on the branch in use.
fn only(whole: &mut Whole, history: &History, start: &Commit) {
    let kept = history.ancestors([start.id]);
    whole.commits.retain(|id, _| kept.contains(id));
    let states: BTreeSet<StateId> = kept.iter().map(|id| history.0[id].state).collect();
    whole.states.retain(|id, _| states.contains(id));
    whole.moves.clear();
    let record = &mut whole.record;
    record.shallow.retain(|id| kept.contains(id));
    (record.moves, record.oldest_move) = (0, 0);
    record.refs.clear();
    let mut edit = Edit::empty(record.clone());
    let head = record.head.clone();
    edit.move_ref(RefKind::Branch, &head, Some(Target::from(start)), "fork");
    record.refs = edit.record.refs;
    record.moves = edit.record.moves;
    for entry in edit.moves {
        whole.moves.insert(entry.number, entry.encode());
    }
}

fn encode(whole: &Whole) -> Vec<u8> {
    let mut out = Writer::default();
    out.raw(MAGIC).u32(EXPORT_VERSION).bytes(&whole.record.encode());
    out.u64(whole.commits.len() as u64);
    for bytes in whole.commits.values() {
        out.bytes(bytes);
    }
    out.u64(whole.states.len() as u64);
    for bytes in whole.states.values() {
        out.bytes(bytes);
    }
    out.u64(whole.moves.len() as u64);
    for bytes in whole.moves.values() {
        out.bytes(bytes);
    }
    let check = blake3::derive_key(CONTEXT, &out.0);
    out.raw(&check);
    out.0
}

/// The memory that a file holds; all of it checked before any of it is used.
fn decode(bytes: &[u8], place: &str) -> Result<Whole, Error> {
    if !bytes.starts_with(MAGIC) {
        return Err(Error::NotAStore {
            place: place.to_owned(),
            what: format!(
                "it begins with {:?}, an exported memory with \"deltamem-memory\"",
                String::from_utf8_lossy(&bytes[..bytes.len().min(16)])
            ),
        });
    }
    let damaged = |what: String| Error::damaged(place, what);
    let mut from = Reader::new(&bytes[MAGIC.len()..]);
    let version = from.u32("version").map_err(damaged)?;
    if version > EXPORT_VERSION {
        return Err(Error::Newer {
            place: place.to_owned(),
            found: version,
            known: EXPORT_VERSION,
        });
    }
    let Some((content, check)) = bytes.split_last_chunk::<32>() else {
        return Err(damaged(format!("it has {} bytes", bytes.len())));
    };
    if blake3::derive_key(CONTEXT, content) != *check {
        return Err(damaged(format!(
            "its checksum does not belong to its {} bytes; it was cut or changed",
            bytes.len()
        )));
    }
    let mut from = Reader::new(&content[MAGIC.len() + 4..]);
    parse(&mut from).map_err(damaged)
}

fn parse(from: &mut Reader<'_>) -> Result<Whole, String> {
    let record = Record::decode(from.bytes(MAX_VALUE, "record")?)?;
    check_memory(&record.name).map_err(|error| error.to_string())?;
    let mut commits = BTreeMap::new();
    let mut decoded = HashMap::new();
    for _ in 0..from.count(8, "commits")? {
        let bytes = from.bytes(MAX_VALUE, "a commit")?;
        let commit = Commit::decode(bytes)?;
        check_ref("branch's name", &commit.branch).map_err(|error| error.to_string())?;
        commits.insert(commit.id, bytes.to_vec());
        decoded.insert(commit.id, commit);
    }
    let mut states = BTreeMap::new();
    for _ in 0..from.count(8, "states")? {
        let bytes = from.bytes(MAX_VALUE, "a state")?;
        Snapshot::from_bytes(bytes).map_err(|error| error.to_string())?;
        states.insert(StateId::of(bytes), bytes.to_vec());
    }
    let mut moves = BTreeMap::new();
    for _ in 0..from.count(8, "moves")? {
        let bytes = from.bytes(MAX_VALUE, "a move")?;
        let number = Move::decode(bytes)?.number;
        if number >= record.moves {
            return Err(format!("move {number}, expected less than {}", record.moves));
        }
        moves.insert(number, bytes.to_vec());
    }
    from.end()?;
    for commit in decoded.values() {
        let cut = record.shallow.contains(&commit.id);
        if let Some(parent) = commit.parents.iter().find(|id| !cut && !commits.contains_key(id)) {
            return Err(format!(
                "commit {} has the parent {parent}, which is not in it",
                commit.id
            ));
        }
        if !states.contains_key(&commit.state) {
            return Err(format!(
                "commit {} has the state {}, which is not in it",
                commit.id, commit.state
            ));
        }
    }
    for ((kind, name), entry) in &record.refs {
        check_ref("ref's name", name).map_err(|error| error.to_string())?;
        let fits = |commit: &Commit| {
            RefEntry {
                target: commit.id,
                state: commit.state,
                generation: commit.generation,
                ..*entry
            } == *entry
        };
        if !decoded.get(&entry.target).is_some_and(fits) {
            return Err(format!(
                "the {} {name:?} names commit {}, which is not in it",
                kind.word(),
                entry.target
            ));
        }
    }
    Ok(Whole {
        record,
        commits,
        states,
        moves,
    })
}

fn read_whole(path: &Path) -> Result<Vec<u8>, Error> {
    let length = std::fs::metadata(path)
        .map_err(|error| Error::file(path, "reading it", error))?
        .len();
    if length > MAX_FILE {
        return Err(Error::NotAStore {
            place: place_of(path),
            what: format!("it has {length} bytes, an exported memory at most {MAX_FILE}"),
        });
    }
    std::fs::read(path).map_err(|error| Error::file(path, "reading it", error))
}

/// Writes a file that appears whole and synced or not at all, readable by its owner only.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let failed = |doing| move |error| Error::file(path, doing, error);
    if path.exists() {
        return Err(failed("writing it")(std::io::ErrorKind::AlreadyExists.into()));
    }
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    let written = (|| {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(part, path)?;
        sync_directory(path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(part);
    }
    written.map_err(failed("writing it"))
}

/// Makes a new name in a directory survive a power cut.
pub(crate) fn sync_directory(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        std::fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}
