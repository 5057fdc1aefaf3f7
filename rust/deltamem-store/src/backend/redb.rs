//! The embedded backend: one file, by redb. A thread of its own writes: it takes every change that waits, makes them in one
//! transaction, and each caller returns after the fsync that holds its change. Readers read the last transaction and wait for nobody.
//!
//! redb promises no more than an error *or a panic* for a file that was changed behind its back, unless every open reads the whole file
//! (`Builder::set_check_integrity_on_open`). So each call into it stands in [`guarded`], which turns a panic into [`Error::Damaged`]; what
//! it returns is checked again by the store, value by value.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use parking_lot::{Mutex, RwLock};
use redb::{
    Builder, ConcurrencyMode, Database, Durability, ReadOnlyDatabase, ReadTransaction, ReadableDatabase,
    ReadableTable, TableDefinition, TableError, WriteTransaction,
};

use super::memory::last;
use super::{Applied, Backend, Batch, Compacted, Cursor, Group, HeadChange, Key, Kind, Page, Read};
use crate::error::Error;

mod carve;
mod media;
mod overlay;
mod salvage;

pub use media::Media;
pub use salvage::SalvageBackend;

use media::{Boxed, FileMedia};
use overlay::Overlay;

/// A group's head.
const HEADS: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("heads");
/// Commits and moves: small, and read together. The key is the group, the kind's byte, the id.
const OBJECTS: TableDefinition<&[u8; 65], &[u8]> = TableDefinition::new("objects");
/// States: some KB each, apart, so that small values share pages with small ones.
const STATES: TableDefinition<&[u8; 65], &[u8]> = TableDefinition::new("states");

/// Changes that wait to be written before a caller waits to hand in its own.
const QUEUE: usize = 1024;
/// The most bytes of values in one transaction of several changes.
const TOGETHER: usize = 16 << 20;

/// How a store's file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedbOptions {
    /// Memory for pages, in bytes.
    pub cache_bytes: usize,
    /// Whether other processes may read the file while one writes. A commit takes two fsyncs then, where it takes one; every process
    /// must open the file the same way.
    pub shared: bool,
    /// After a kill, a file up to this length is read whole when it is opened, about a second a GB. For a longer one each commit takes
    /// a second fsync, and writes down which pages are free, so that it opens at once whatever happened.
    pub read_whole: u64,
}

impl Default for RedbOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            shared: false,
            read_whole: 64 << 20,
        }
    }
}

impl RedbOptions {
    fn builder(&self) -> Builder {
        let mut builder = Builder::new();
        builder.set_cache_size(self.cache_bytes);
        if self.shared {
            builder.set_concurrency_mode(ConcurrencyMode::SingleWriter);
        }
        builder
    }
}

/// The database while it is open.
enum Open {
    Writing(Database),
    Reading(ReadOnlyDatabase),
    /// Why it could not be opened again after a failure.
    Failed(String),
    Closed,
}

impl Open {
    fn begin(&self, place: &str) -> Result<ReadTransaction, Error> {
        let begun = match self {
            Self::Writing(database) => database.begin_read(),
            Self::Reading(database) => database.begin_read(),
            Self::Failed(reason) => return Err(unavailable(place, reason)),
            Self::Closed => return Err(unavailable(place, "it is closed")),
        };
        begun.map_err(|error| wrong(place, "reading", error))
    }
}

struct Shared {
    media: Box<dyn Media>,
    options: RedbOptions,
    place: String,
    read_only: bool,
    database: RwLock<Open>,
    /// For a reader beside a writer: which file it reads.
    identity: Mutex<Option<(u64, u64)>>,
}

enum Job {
    Apply(Batch, SyncSender<Result<Applied, Error>>),
    Compact(SyncSender<Result<Compacted, Error>>),
    Check(SyncSender<Result<Vec<(String, String)>, Error>>),
    Reopen(SyncSender<Result<(), Error>>),
}

/// A store in one file.
pub struct RedbBackend {
    shared: Arc<Shared>,
    jobs: Mutex<Option<SyncSender<Job>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for RedbBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedbBackend")
            .field("place", &self.shared.place)
            .field("read_only", &self.shared.read_only)
            .finish_non_exhaustive()
    }
}

impl RedbBackend {
    /// Opens the file at `path` for writing, or makes it.
    ///
    /// # Errors
    /// [`Error::Locked`] when another process has it open; [`Error::NotAStore`] and [`Error::Damaged`] for other files.
    pub fn open(path: &Path, options: RedbOptions) -> Result<Self, Error> {
        Self::open_media(Box::new(FileMedia::new(path, false)), options)
    }

    /// Opens the file at `path` for reading: beside other readers, and, if every process opens it as `shared`, beside a writer.
    ///
    /// # Errors
    /// As for [`RedbBackend::open`]; [`Error::NotFound`] when there is no file; [`Error::Unavailable`] when its last writer was killed
    /// and nobody has opened it for writing since.
    pub fn open_read_only(path: &Path, options: RedbOptions) -> Result<Self, Error> {
        if let Err(error) = std::fs::metadata(path) {
            return Err(Error::file(path, "opening it", error));
        }
        let media = FileMedia::new(path, true);
        let shared = Shared {
            place: media.place(),
            identity: Mutex::new(media.identity()),
            media: Box::new(media),
            options,
            read_only: true,
            database: RwLock::new(Open::Closed),
        };
        *shared.database.write() = shared.open_reading()?;
        Ok(Self {
            shared: Arc::new(shared),
            jobs: Mutex::new(None),
            writer: Mutex::new(None),
        })
    }

    /// Opens a store on a media of the caller's.
    ///
    /// # Errors
    /// As for [`RedbBackend::open`].
    pub fn open_media(media: Box<dyn Media>, options: RedbOptions) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            place: media.place(),
            media,
            options,
            read_only: false,
            database: RwLock::new(Open::Closed),
            identity: Mutex::new(None),
        });
        *shared.database.write() = Open::Writing(shared.open_writing()?);
        let (jobs, queue) = sync_channel(QUEUE);
        let writer = Writer {
            shared: shared.clone(),
            unsettled: false,
        };
        let thread = std::thread::Builder::new()
            .name("deltamem-store".into())
            .spawn(move || writer.work(&queue))
            .map_err(|source| Error::Io {
                place: shared.place.clone(),
                doing: "starting the writer's thread",
                source,
            })?;
        Ok(Self {
            shared,
            jobs: Mutex::new(Some(jobs)),
            writer: Mutex::new(Some(thread)),
        })
    }

    /// Hands a job to the writer and waits for what comes of it.
    fn ask<T>(&self, job: impl FnOnce(SyncSender<Result<T, Error>>) -> Job) -> Result<T, Error> {
        let place = &self.shared.place;
        if self.shared.read_only {
            return Err(Error::ReadOnly { place: place.clone() });
        }
        let closed = || unavailable(place, "it is closed");
        let jobs = self.jobs.lock().clone().ok_or_else(closed)?;
        let (reply, answer) = sync_channel(1);
        jobs.send(job(reply)).map_err(|_| closed())?;
        drop(jobs);
        answer.recv().map_err(|_| closed())?
    }

    fn reading<T>(&self, work: impl Fn(&ReadTransaction) -> Result<T, Error>) -> Result<T, Error> {
        let shared = &self.shared;
        if shared.read_only {
            shared.follow()?;
        }
        let once = || {
            let open = shared.database.read();
            guarded(&shared.place, || work(&open.begin(&shared.place)?))
        };
        let failed = matches!(*shared.database.read(), Open::Failed(_));
        if failed && !shared.read_only {
            self.ask(Job::Reopen)?;
        }
        once()
    }
}

impl Shared {
    fn open_writing(&self) -> Result<Database, Error> {
        let storage = self
            .media
            .open()
            .map_err(|source| failed(&self.place, "opening it", source))?;
        let database = guarded(&self.place, || {
            self.options
                .builder()
                .create_with_backend(Boxed::for_writing(storage))
                .map_err(|error| wrong(&self.place, "opening it", error))
        })?;
        // A file of another program's that redb can read is not ours to write into.
        guarded(&self.place, || {
            let begun = database
                .begin_read()
                .map_err(|error| wrong(&self.place, "opening it", error))?;
            check_tables(&self.place, &begun)
        })?;
        Ok(database)
    }

    fn open_reading(&self) -> Result<Open, Error> {
        let storage = self
            .media
            .open()
            .map_err(|source| failed(&self.place, "opening it", source))?;
        guarded(&self.place, || {
            let database = self
                .options
                .builder()
                .open_read_only_with_backend(Boxed::for_reading(storage))
                .map_err(|error| wrong(&self.place, "opening it", error))?;
            let begun = database
                .begin_read()
                .map_err(|error| wrong(&self.place, "opening it", error))?;
            check_tables(&self.place, &begun)?;
            Ok(Open::Reading(database))
        })
    }

    /// For a reader: goes over to the file that took the place of the one it has open.
    fn follow(&self) -> Result<(), Error> {
        let mut known = self.identity.lock();
        let now = self.media.identity();
        if now.is_none() || now == *known || matches!(*self.database.read(), Open::Closed) {
            return Ok(());
        }
        let opened = self.open_reading()?;
        *self.database.write() = opened;
        *known = now;
        Ok(())
    }
}

fn check_tables(place: &str, begun: &ReadTransaction) -> Result<(), Error> {
    let tables = begun
        .list_tables()
        .map_err(|error| wrong(place, "opening it", error))?;
    for table in tables {
        let name = redb::TableHandle::name(&table).to_owned();
        if !["heads", "objects", "states"].contains(&name.as_str()) {
            return Err(Error::NotAStore {
                place: place.to_owned(),
                what: format!("it is a redb database with a table {name:?}"),
            });
        }
    }
    Ok(())
}

/// Runs `work`, which calls redb, and takes a panic of redb's for damage.
pub(crate) fn guarded<T>(place: &str, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let words = panic
            .downcast_ref::<&str>()
            .map(|words| (*words).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        let first = words.lines().next().unwrap_or_default();
        Err(Error::damaged(
            place,
            format!(
                "its pages do not fit together ({})",
                crate::error::shortened(first)
            ),
        ))
    })
}

fn unavailable(place: &str, reason: &str) -> Error {
    Error::Unavailable {
        place: place.to_owned(),
        reason: reason.to_owned(),
    }
}

fn failed(place: &str, doing: &'static str, source: std::io::Error) -> Error {
    wrong(place, doing, redb::Error::Io(source))
}

/// A store's error for one of redb's.
pub(crate) fn wrong(place: &str, doing: &'static str, error: impl Into<redb::Error>) -> Error {
    let not_ours = |what: String| Error::NotAStore {
        place: place.to_owned(),
        what,
    };
    match error.into() {
        redb::Error::Io(source) => match source.kind() {
            std::io::ErrorKind::StorageFull
            | std::io::ErrorKind::QuotaExceeded
            | std::io::ErrorKind::FileTooLarge => Error::Full {
                place: place.to_owned(),
                reason: source.to_string(),
            },
            std::io::ErrorKind::InvalidData => {
                not_ours("its first bytes are not those of a redb database".into())
            }
            std::io::ErrorKind::UnexpectedEof => Error::damaged(
                place,
                format!("it ends before its content does, while {doing}; it was cut"),
            ),
            std::io::ErrorKind::IsADirectory => not_ours("it is a directory".into()),
            _ => Error::Io {
                place: place.to_owned(),
                doing,
                source,
            },
        },
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => Error::Locked {
            place: place.to_owned(),
        },
        redb::Error::UpgradeRequired(version) => not_ours(format!(
            "it is a redb database of file format {version}, expected 3"
        )),
        redb::Error::TableTypeMismatch { table, .. } | redb::Error::TableIsMultimap(table) => {
            not_ours(format!("its table {table:?} has other types"))
        }
        redb::Error::RepairAborted => unavailable(
            place,
            "its last writer was killed, and a reader must not repair it: open it for writing once",
        ),
        redb::Error::PreviousIo => unavailable(place, "an earlier write failed"),
        redb::Error::DatabaseClosed => unavailable(place, "it is closed"),
        redb::Error::Corrupted(what) => {
            Error::damaged(place, format!("its pages do not fit together ({what})"))
        }
        other => Error::damaged(place, format!("redb said, while {doing}: {other}")),
    }
}

fn object_key(group: Group, key: Key) -> [u8; 65] {
    let mut out = [0; 65];
    out[..32].copy_from_slice(&group.0);
    out[32] = key.kind as u8;
    out[33..].copy_from_slice(&key.id);
    out
}

fn key_of(bytes: &[u8; 65], kind: Kind) -> Key {
    let mut id = [0; 32];
    id.copy_from_slice(&bytes[33..]);
    Key { kind, id }
}

fn table_of(kind: Kind) -> TableDefinition<'static, &'static [u8; 65], &'static [u8]> {
    match kind {
        Kind::State => STATES,
        Kind::Commit | Kind::Log => OBJECTS,
    }
}

/// A table for reading; `None`: nothing was ever written to it.
fn table<K: redb::Key + 'static>(
    place: &str,
    begun: &ReadTransaction,
    definition: TableDefinition<'_, K, &'static [u8]>,
) -> Result<Option<redb::ReadOnlyTable<K, &'static [u8]>>, Error> {
    match begun.open_table(definition) {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(wrong(place, "reading", error)),
    }
}

impl Backend for RedbBackend {
    fn place(&self) -> String {
        self.shared.place.clone()
    }

    fn read(&self, group: Group, keys: &[Key]) -> Result<Read, Error> {
        let place = &self.shared.place;
        self.reading(|begun| {
            let reading = |error| wrong(place, "reading", redb::Error::from(error));
            let head = match table(place, begun, HEADS)? {
                None => None,
                Some(heads) => heads
                    .get(&group.0)
                    .map_err(reading)?
                    .map(|head| head.value().to_vec()),
            };
            if keys.is_empty() {
                return Ok(Read {
                    head,
                    values: Vec::new(),
                });
            }
            let (objects, states) = (table(place, begun, OBJECTS)?, table(place, begun, STATES)?);
            let mut values = Vec::with_capacity(keys.len());
            for key in keys {
                let table = if key.kind == Kind::State {
                    &states
                } else {
                    &objects
                };
                let value = match table {
                    None => None,
                    Some(table) => table.get(&object_key(group, *key)).map_err(reading)?,
                };
                values.push(value.map(|value| value.value().to_vec()));
            }
            Ok(Read { head, values })
        })
    }

    fn apply(&self, batch: Batch) -> Result<Applied, Error> {
        self.ask(|reply| Job::Apply(batch, reply))
    }

    fn list(
        &self,
        group: Group,
        kind: Kind,
        from: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<(Key, Vec<u8>)>, Error> {
        let place = &self.shared.place;
        self.reading(|begun| {
            let Some(table) = table(place, begun, table_of(kind))? else {
                return Ok(Page {
                    items: Vec::new(),
                    next: None,
                });
            };
            let reading = |error| wrong(place, "reading", redb::Error::from(error));
            let start = object_key(
                group,
                Key {
                    kind,
                    id: last(from).unwrap_or([0; 32]),
                },
            );
            let end = object_key(group, Key { kind, id: [0xFF; 32] });
            let mut items = Vec::new();
            for entry in table.range::<&[u8; 65]>(&start..=&end).map_err(reading)? {
                let (key, value) = entry.map_err(reading)?;
                let key = key_of(key.value(), kind);
                if Some(key.id) != last(from) {
                    items.push((key, value.value().to_vec()));
                }
                if items.len() >= limit.max(1) {
                    break;
                }
            }
            Ok(Page::of_ordered(items, limit.max(1), |(key, _)| key.id))
        })
    }

    fn groups(&self, from: Option<&Cursor>, limit: usize) -> Result<Page<(Group, Vec<u8>)>, Error> {
        let place = &self.shared.place;
        self.reading(|begun| {
            let Some(heads) = table(place, begun, HEADS)? else {
                return Ok(Page {
                    items: Vec::new(),
                    next: None,
                });
            };
            let reading = |error| wrong(place, "reading", redb::Error::from(error));
            let start = last(from).unwrap_or(Group::STORE.0);
            let mut items = Vec::new();
            for entry in heads.range::<&[u8; 32]>(&start..).map_err(reading)? {
                let (group, head) = entry.map_err(reading)?;
                let group = Group(*group.value());
                if group.0 != start && group != Group::STORE {
                    items.push((group, head.value().to_vec()));
                }
                if items.len() >= limit.max(1) {
                    break;
                }
            }
            Ok(Page::of_ordered(items, limit.max(1), |(group, _)| group.0))
        })
    }

    fn compact(&self) -> Result<Compacted, Error> {
        self.ask(Job::Compact)
    }

    fn check(&self) -> Result<Vec<(String, String)>, Error> {
        if self.shared.read_only {
            let found = self.reading(|begun| headless(&self.shared.place, begun));
            return found.or_else(|error| as_finding(&self.shared.place, error));
        }
        self.ask(Job::Check)
    }

    fn size(&self) -> Result<u64, Error> {
        self.shared
            .media
            .size()
            .map_err(|source| failed(&self.shared.place, "asking for its length", source))
    }

    fn close(&self) -> Result<(), Error> {
        drop(self.jobs.lock().take());
        let thread = self.writer.lock().take();
        if let Some(thread) = thread {
            // The writer ends when its queue does; a panic of its own was answered already.
            let _ = thread.join();
        }
        let open = std::mem::replace(&mut *self.shared.database.write(), Open::Closed);
        guarded(&self.shared.place, || match open {
            Open::Writing(database) => database
                .close()
                .map_err(|error| wrong(&self.shared.place, "closing it", error)),
            Open::Reading(database) => database
                .close()
                .map_err(|error| wrong(&self.shared.place, "closing it", error)),
            Open::Failed(_) | Open::Closed => Ok(()),
        })
    }
}

impl Drop for RedbBackend {
    fn drop(&mut self) {
        // Nobody is left to hear of it; an unclean end is repaired at the next open.
        let _ = self.close();
    }
}

fn as_finding(place: &str, error: Error) -> Result<Vec<(String, String)>, Error> {
    match error {
        Error::Damaged { what, .. } => Ok(vec![(place.to_owned(), what)]),
        other => Err(other),
    }
}

/// Values whose group has no head.
fn headless(place: &str, begun: &ReadTransaction) -> Result<Vec<(String, String)>, Error> {
    let reading = |error| wrong(place, "reading", redb::Error::from(error));
    let mut found = Vec::new();
    let heads = table(place, begun, HEADS)?;
    for definition in [OBJECTS, STATES] {
        let Some(objects) = table(place, begun, definition)? else {
            continue;
        };
        let mut start = [0; 65];
        loop {
            // One look for each group: past all of its keys.
            let first = objects.range::<&[u8; 65]>(&start..).map_err(reading)?.next();
            let Some(entry) = first else {
                break;
            };
            let (key, _) = entry.map_err(reading)?;
            let mut group = [0; 32];
            group.copy_from_slice(&key.value()[..32]);
            let head = match &heads {
                None => None,
                Some(heads) => heads.get(&group).map_err(reading)?,
            };
            if head.is_none() {
                found.push((
                    format!("group {} of {place}", Group(group).to_hex()),
                    "it has values and no head".into(),
                ));
            }
            start[..32].copy_from_slice(&group);
            start[32..].fill(0xFF);
        }
    }
    Ok(found)
}

/// The same error for one more caller.
fn once_more(error: &Error) -> Error {
    match error {
        Error::Full { place, reason } => Error::Full {
            place: place.clone(),
            reason: reason.clone(),
        },
        Error::Io { place, doing, source } => Error::Io {
            place: place.clone(),
            doing,
            source: std::io::Error::new(source.kind(), source.to_string()),
        },
        Error::Unavailable { place, reason } => unavailable(place, reason),
        other => unavailable("the store", &other.to_string()),
    }
}

/// The thread that writes.
struct Writer {
    shared: Arc<Shared>,
    /// The last promotion may not survive a power cut yet: nothing is acknowledged before it does.
    unsettled: bool,
}

impl Writer {
    fn work(mut self, queue: &Receiver<Job>) {
        let mut waiting = None;
        while let Some(job) = waiting.take().or_else(|| queue.recv().ok()) {
            // A caller that is gone needs no answer.
            match job {
                Job::Compact(reply) => drop(reply.send(self.compact())),
                Job::Check(reply) => drop(reply.send(self.check())),
                Job::Reopen(reply) => drop(reply.send(self.ready())),
                Job::Apply(batch, reply) => {
                    let mut bytes = weight(&batch);
                    let (mut batches, mut replies) = (vec![batch], vec![reply]);
                    while bytes < TOGETHER && batches.len() < QUEUE {
                        match queue.try_recv() {
                            Ok(Job::Apply(batch, reply)) => {
                                bytes += weight(&batch);
                                batches.push(batch);
                                replies.push(reply);
                            }
                            Ok(other) => {
                                waiting = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.write(batches, &replies);
                }
            }
        }
    }

    /// Makes several changes in one transaction, and answers each.
    fn write(&mut self, batches: Vec<Batch>, replies: &[SyncSender<Result<Applied, Error>>]) {
        match self.try_write(&batches) {
            Ok(answers) => {
                for (reply, answer) in replies.iter().zip(answers) {
                    let _ = reply.send(Ok(answer));
                }
            }
            Err(Error::Damaged { place, what }) => {
                self.recover();
                if let [reply] = replies {
                    let _ = reply.send(Err(Error::Damaged { place, what }));
                    return;
                }
                // One group's damage must not fail the others: each by itself.
                for (batch, reply) in batches.into_iter().zip(replies) {
                    let answer = self.write_alone(&batch);
                    let _ = reply.send(answer);
                }
            }
            Err(error) => {
                self.recover();
                for reply in replies {
                    let _ = reply.send(Err(once_more(&error)));
                }
            }
        }
    }

    fn write_alone(&mut self, batch: &Batch) -> Result<Applied, Error> {
        match self.try_write(std::slice::from_ref(batch)) {
            Ok(mut answers) => match answers.pop() {
                // The transaction before, whose end was not known, holds it: heads never repeat.
                Some(Applied::Refused { found: Some(found) })
                    if batch.head == HeadChange::Put(found.clone()) =>
                {
                    Ok(Applied::Done)
                }
                Some(Applied::Refused { found: None }) if batch.head == HeadChange::Remove => {
                    Ok(Applied::Done)
                }
                Some(answer) => Ok(answer),
                None => Err(unavailable(&self.shared.place, "a change had no answer")),
            },
            Err(error) => {
                self.recover();
                Err(error)
            }
        }
    }

    fn try_write(&mut self, batches: &[Batch]) -> Result<Vec<Applied>, Error> {
        self.ready()?;
        let shared = self.shared.clone();
        let place = &shared.place;
        let open = shared.database.read();
        let Open::Writing(database) = &*open else {
            return Err(unavailable(place, "it is closed"));
        };
        guarded(place, || {
            let mut begun = database
                .begin_write()
                .map_err(|error| wrong(place, "beginning to write", error))?;
            begun
                .set_durability(Durability::Immediate)
                .map_err(|error| wrong(place, "beginning to write", error))?;
            let length = shared
                .media
                .size()
                .map_err(|source| failed(place, "asking for its length", source))?;
            begun.set_quick_repair(length > shared.options.read_whole);
            let answers = batches
                .iter()
                .map(|batch| make(place, &begun, batch))
                .collect::<Result<Vec<_>, _>>()?;
            if answers.contains(&Applied::Done) {
                begun
                    .commit()
                    .map_err(|error| wrong(place, "committing", error))?;
            } else {
                begun
                    .abort()
                    .map_err(|error| wrong(place, "ending a change", error))?;
            }
            Ok(answers)
        })
    }

    /// Sees to it that the database is open, and that what was renamed stays so.
    fn ready(&mut self) -> Result<(), Error> {
        let shared = &self.shared;
        if matches!(*shared.database.read(), Open::Failed(_)) {
            let opened = shared.open_writing()?;
            *shared.database.write() = Open::Writing(opened);
        }
        if self.unsettled {
            shared
                .media
                .settle()
                .map_err(|source| failed(&shared.place, "syncing its directory", source))?;
            self.unsettled = false;
        }
        Ok(())
    }

    /// After a failed write: closes the database, which redb asks for, and opens it again as the file has it.
    fn recover(&mut self) {
        let shared = &self.shared;
        let mut database = shared.database.write();
        if let Open::Writing(old) = std::mem::replace(&mut *database, Open::Closed) {
            let _ = guarded(&shared.place, || {
                drop(old);
                Ok(())
            });
        }
        *database = match shared.open_writing() {
            Ok(opened) => Open::Writing(opened),
            Err(error) => Open::Failed(format!(
                "after a failed write it could not be opened again: {error}"
            )),
        };
    }

    /// Writes everything that there is into a new file, and puts that in the place of the old one. Bytes of what was deleted are in
    /// no page of it.
    fn compact(&mut self) -> Result<Compacted, Error> {
        self.ready()?;
        let shared = self.shared.clone();
        let media = &*shared.media;
        let place = &shared.place;
        let size = |doing| media.size().map_err(|source| failed(place, doing, source));
        let before = size("asking for its length")?;
        let copied = self.copy();
        let new = match copied {
            Ok(new) => new,
            Err(error) => {
                media.discard_side();
                return Err(error);
            }
        };
        if let Err(source) = media.promote() {
            let _ = guarded(place, || {
                drop(new);
                Ok(())
            });
            media.discard_side();
            return Err(failed(place, "putting the new file in its place", source));
        }
        self.unsettled = true;
        let old = std::mem::replace(&mut *shared.database.write(), Open::Writing(new));
        let _ = guarded(place, || {
            drop(old);
            Ok(())
        });
        self.ready()?;
        Ok(Compacted {
            before,
            after: size("asking for its length")?,
        })
    }

    fn copy(&self) -> Result<Database, Error> {
        const DOING: &str = "writing it anew";
        let shared = &self.shared;
        let place = &shared.place;
        let side = shared
            .media
            .open_side()
            .map_err(|source| failed(place, DOING, source))?;
        let open = shared.database.read();
        guarded(place, || {
            let from = open.begin(place)?;
            let mut new = shared
                .options
                .builder()
                .create_with_backend(Boxed::for_writing(side))
                .map_err(|error| wrong(place, DOING, error))?;
            copy_table(place, &from, &new, HEADS)?;
            copy_table(place, &from, &new, OBJECTS)?;
            copy_table(place, &from, &new, STATES)?;
            new.compact().map_err(|error| wrong(place, DOING, error))?;
            Ok(new)
        })
    }

    /// Opens the file once more, over an overlay, reading every page and its checksum; the file is not changed and readers do not wait.
    fn check(&mut self) -> Result<Vec<(String, String)>, Error> {
        self.ready()?;
        let shared = &self.shared;
        let place = &shared.place;
        let checked = guarded(place, || {
            let view = shared
                .media
                .view()
                .map_err(|source| failed(place, "reading", source))?;
            let overlay = Overlay::new(view).map_err(|source| failed(place, "reading", source))?;
            let copy = Builder::new()
                .set_cache_size(shared.options.cache_bytes)
                .set_check_integrity_on_open(true)
                .create_with_backend(overlay)
                .map_err(|error| wrong(place, "checking its pages", error))?;
            let begun = copy
                .begin_read()
                .map_err(|error| wrong(place, "checking its pages", error))?;
            let mut found = headless(place, &begun)?;
            // A damaged last transaction makes redb fall back on the one before, without a word.
            let live = shared.database.read().begin(place)?;
            if heads(place, &begun)? != heads(place, &live)? {
                found.push((
                    place.clone(),
                    "the pages of its last transaction do not have their checksums".into(),
                ));
            }
            Ok(found)
        });
        checked.or_else(|error| as_finding(place, error))
    }
}

fn heads(place: &str, begun: &ReadTransaction) -> Result<blake3::Hash, Error> {
    let reading = |error| wrong(place, "reading", redb::Error::from(error));
    let mut hasher = blake3::Hasher::new();
    if let Some(heads) = table(place, begun, HEADS)? {
        for entry in heads.iter().map_err(reading)? {
            let (group, head) = entry.map_err(reading)?;
            hasher
                .update(group.value())
                .update(blake3::hash(head.value()).as_bytes());
        }
    }
    Ok(hasher.finalize())
}

/// Copies a table in the order of its keys, some MB a transaction; the last one is synced.
fn copy_table<K: redb::Key + 'static>(
    place: &str,
    from: &ReadTransaction,
    to: &Database,
    definition: TableDefinition<'_, K, &'static [u8]>,
) -> Result<(), Error> {
    const DOING: &str = "writing it anew";
    let reading = |error| wrong(place, DOING, redb::Error::from(error));
    let Some(source) = table(place, from, definition)? else {
        return Ok(());
    };
    let mut entries = source.iter().map_err(reading)?;
    let mut more = true;
    while more {
        let begun = to.begin_write().map_err(|error| wrong(place, DOING, error))?;
        {
            let mut target = begun
                .open_table(definition)
                .map_err(|error| wrong(place, DOING, error))?;
            let mut bytes = 0;
            while bytes < TOGETHER {
                let Some(entry) = entries.next() else {
                    more = false;
                    break;
                };
                let (key, value) = entry.map_err(reading)?;
                bytes += value.value().len();
                target.insert(key.value(), value.value()).map_err(reading)?;
            }
        }
        begun.commit().map_err(|error| wrong(place, DOING, error))?;
    }
    Ok(())
}

fn weight(batch: &Batch) -> usize {
    batch.puts.iter().map(|(_, value)| value.len()).sum()
}

/// Makes one change in a transaction, if its group's head is the expected one there.
fn make(place: &str, begun: &WriteTransaction, batch: &Batch) -> Result<Applied, Error> {
    let writing = |error| wrong(place, "writing", redb::Error::from(error));
    let opening = |error| wrong(place, "writing", redb::Error::from(error));
    let group = batch.group;
    {
        let mut heads = begun.open_table(HEADS).map_err(opening)?;
        let found = heads
            .get(&group.0)
            .map_err(writing)?
            .map(|head| head.value().to_vec());
        if found != batch.expected {
            return Ok(Applied::Refused { found });
        }
        match &batch.head {
            HeadChange::Keep => {}
            HeadChange::Put(head) => {
                heads.insert(&group.0, head.as_slice()).map_err(writing)?;
            }
            HeadChange::Remove => {
                heads.remove(&group.0).map_err(writing)?;
            }
        }
    }
    for (definition, states) in [(OBJECTS, false), (STATES, true)] {
        let ours = |key: &Key| (key.kind == Kind::State) == states;
        let clear = batch.clear || batch.head == HeadChange::Remove;
        let any = batch.deletes.iter().any(ours) || batch.puts.iter().any(|(key, _)| ours(key));
        if !clear && !any {
            continue;
        }
        let mut table = begun.open_table(definition).map_err(opening)?;
        if clear {
            let (mut start, mut end) = ([0; 65], [0xFF; 65]);
            start[..32].copy_from_slice(&group.0);
            end[..32].copy_from_slice(&group.0);
            table
                .retain_in::<&[u8; 65], _>(&start..=&end, |_, _| false)
                .map_err(writing)?;
        }
        for key in batch.deletes.iter().filter(|key| ours(key)) {
            table.remove(&object_key(group, *key)).map_err(writing)?;
        }
        for (key, value) in batch.puts.iter().filter(|(key, _)| ours(key)) {
            table
                .insert(&object_key(group, *key), value.as_slice())
                .map_err(writing)?;
        }
    }
    Ok(Applied::Done)
}
