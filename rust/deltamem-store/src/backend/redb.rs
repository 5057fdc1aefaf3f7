//! The embedded backend: one file, by redb, and a journal beside it while it is open for writing. Of the callers that want to write, one
//! takes every change that waits, and writes them into the journal; each returns after the fsync that holds its change. From time to time
//! all that the journal says is brought into redb's tree. Readers see the tree and the journal over it, and wait for nobody.
//!
//! ```text
//! commit ──> queue ──> journal: one write, one fsync ──> pending ──(8 MiB, close, compaction)──> tree, one transaction
//! read   <──────────────────────────────────────────── pending over tree
//! ```
//!
//! redb promises no more than an error *or a panic* for a file that was changed behind its back, unless every open reads the whole file
//! (`Builder::set_check_integrity_on_open`). So each call into it stands in [`guarded`], which turns a panic into [`Error::Damaged`]; what
//! it returns is checked again by the store, value by value.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use redb::{
    Builder, ConcurrencyMode, Database, ReadOnlyDatabase, ReadTransaction, ReadableDatabase, StorageBackend,
};

use super::memory::last;
use super::{Applied, Backend, Batch, Compacted, Cursor, Group, Key, Kind, Page, Read};
use crate::error::Error;

mod carve;
mod journal;
mod media;
mod overlay;
mod pending;
mod queue;
mod salvage;
mod tree;
mod writer;

pub use media::Media;
pub use salvage::SalvageBackend;

use journal::{Contents, Mark, Trouble};
use media::{Boxed, FileMedia};
use pending::{Found, Pending, merged};
use queue::Queue;
use writer::Writer;

/// Why a reader may not read.
const KILLED: &str = "its last writer was killed, and a reader must not repair it: open it for writing once";

/// The most bytes of values in one transaction, or one frame of the journal, of several changes.
const TOGETHER: usize = 16 << 20;

/// How a store's file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedbOptions {
    /// Memory for pages, in bytes.
    pub cache_bytes: usize,
    /// Whether other processes may read the file while one writes. There is no journal then, and a commit takes two fsyncs; every
    /// process must open the file the same way.
    pub shared: bool,
    /// How long the journal gets before it is brought into the tree, and the most memory that its changes take. 0: there is none, and a
    /// commit takes two fsyncs.
    pub journal_bytes: u64,
}

impl Default for RedbOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            shared: false,
            journal_bytes: 8 << 20,
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

    fn close(self, place: &str) -> Result<(), Error> {
        guarded(place, || match self {
            Self::Writing(database) => database
                .close()
                .map_err(|error| wrong(place, "closing it", error)),
            Self::Reading(database) => database
                .close()
                .map_err(|error| wrong(place, "closing it", error)),
            Self::Failed(_) | Self::Closed => Ok(()),
        })
    }
}

/// A journal that is there, and what it holds.
type Left = (Box<dyn StorageBackend>, Contents);

struct Shared {
    media: Box<dyn Media>,
    options: RedbOptions,
    place: String,
    read_only: bool,
    database: RwLock<Open>,
    /// What is in the journal and not in the tree.
    pending: RwLock<Pending>,
    /// For a reader beside a writer: which file it reads.
    identity: Mutex<Option<(u64, u64)>>,
}

/// A store in one file.
pub struct RedbBackend {
    shared: Arc<Shared>,
    queue: Queue<Batch, Result<Applied, Error>>,
    /// Whoever is at work on the queue has it. `None`: the file is open for reading.
    writer: Option<Mutex<Writer>>,
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
    /// [`Error::Locked`] when another process has it open; [`Error::NotAStore`] and [`Error::Damaged`] for other files, and when its
    /// journal is missing; [`Error::Unavailable`] when another file's journal lies beside it.
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
        let shared = Shared::new(Box::new(media), options, true);
        *shared.database.write() = shared.open_reading()?;
        if let Some((_, contents)) = shared.left(shared.mark()?)?
            && !contents.batches.is_empty()
        {
            if shared.options.shared {
                // A writer may come and bring them into the tree, and newer ones after them.
                return Err(unavailable(&shared.place, KILLED));
            }
            shared.pending.write().extend(contents.batches);
        }
        Ok(Self {
            shared: Arc::new(shared),
            queue: Queue::default(),
            writer: None,
        })
    }

    /// Opens a store on a media of the caller's.
    ///
    /// # Errors
    /// As for [`RedbBackend::open`].
    pub fn open_media(media: Box<dyn Media>, options: RedbOptions) -> Result<Self, Error> {
        let shared = Arc::new(Shared::new(media, options, false));
        Ok(Self {
            writer: Some(Mutex::new(Writer::open(shared.clone())?)),
            queue: Queue::default(),
            shared,
        })
    }

    /// Has the writer do something while nobody writes.
    fn alone<T>(&self, work: impl FnOnce(&mut Writer) -> Result<T, Error>) -> Result<T, Error> {
        match &self.writer {
            Some(writer) => self.queue.alone(|| work(&mut writer.lock())),
            None => Err(Error::ReadOnly {
                place: self.shared.place.clone(),
            }),
        }
    }

    /// What `look` sees of the changes in the journal, and the tree under them at the same moment.
    fn view<S>(&self, look: impl FnOnce(&Pending) -> S) -> Result<(S, ReadTransaction), Error> {
        let shared = &self.shared;
        if shared.read_only {
            shared.follow()?;
        } else if matches!(*shared.database.read(), Open::Failed(_)) {
            self.alone(Writer::ready)?;
        }
        shared.view(look)
    }
}

impl Shared {
    fn new(media: Box<dyn Media>, options: RedbOptions, read_only: bool) -> Self {
        Self {
            place: media.place(),
            identity: Mutex::new(media.identity().filter(|_| read_only)),
            media,
            options,
            read_only,
            database: RwLock::new(Open::Closed),
            pending: RwLock::default(),
        }
    }

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

    /// Whether changes go into a journal.
    fn journalled(&self) -> bool {
        !self.options.shared && self.options.journal_bytes > 0
    }

    /// What the tree says of its journal.
    fn mark(&self) -> Result<Option<Mark>, Error> {
        let place = &self.place;
        guarded(place, || {
            let begun = self.database.read().begin(place)?;
            tree::mark(place, &begun)
        })
    }

    /// The journal that is there, and what it holds.
    fn left(&self, mark: Option<Mark>) -> Result<Option<Left>, Error> {
        const DOING: &str = "reading its journal";
        let file = self.media.journal(false);
        let Some(file) = file.map_err(|source| failed(&self.place, DOING, source))? else {
            return match mark {
                Some(mark) if mark.open => Err(Error::damaged(
                    &*self.place,
                    "its journal, which has its last changes, is missing: put the file with the ending .journal back beside it, or \
                     save what is in this file alone by a repair",
                )),
                _ => Ok(None),
            };
        };
        match journal::read(&*file, mark) {
            Ok(contents) => Ok(Some((file, contents))),
            Err(trouble) => Err(self.of_journal(trouble)),
        }
    }

    fn of_journal(&self, trouble: Trouble) -> Error {
        match trouble {
            Trouble::Io(source) => failed(&self.place, "reading its journal", source),
            Trouble::Damaged(what) => Error::damaged(&*self.place, format!("its journal is damaged: {what}")),
            Trouble::Foreign(what) => unavailable(
                &self.place,
                &format!(
                    "the journal beside it (the ending is .journal) {what}; put the file back that it belongs to, or move it away"
                ),
            ),
        }
    }

    fn size(&self, doing: &'static str) -> Result<u64, Error> {
        self.media
            .size()
            .map_err(|source| failed(&self.place, doing, source))
    }

    fn view<S>(&self, look: impl FnOnce(&Pending) -> S) -> Result<(S, ReadTransaction), Error> {
        let pending = self.pending.read();
        let open = self.database.read();
        let begun = guarded(&self.place, || open.begin(&self.place))?;
        Ok((look(&pending), begun))
    }

    /// Whether the file is shorter than its header says, which a reader does not notice where only free pages are missing.
    fn cut(&self) -> Result<Option<String>, Error> {
        let reading = |source| failed(&self.place, "reading", source);
        let file = self.media.view().map_err(reading)?;
        let mut header = [0; 64];
        file.read(0, &mut header).map_err(reading)?;
        let (length, wanted) = (file.len().map_err(reading)?, salvage::layout(&header));
        Ok((length < wanted)
            .then(|| format!("it has {length} bytes, and its header says {wanted}: it was cut")))
    }

    /// A group's head as it is now.
    fn head(&self, group: Group) -> Result<Option<Vec<u8>>, Error> {
        let (found, begun) = self.view(|pending| pending.head(group))?;
        guarded(&self.place, || tree::head(&self.place, &begun, group, found))
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
        if !tree::TABLES.contains(&name.as_str()) {
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
        redb::Error::RepairAborted => unavailable(place, KILLED),
        redb::Error::PreviousIo => unavailable(place, "an earlier write failed"),
        redb::Error::DatabaseClosed => unavailable(place, "it is closed"),
        redb::Error::Corrupted(what) => {
            Error::damaged(place, format!("its pages do not fit together ({what})"))
        }
        other => Error::damaged(place, format!("redb said, while {doing}: {other}")),
    }
}

impl Backend for RedbBackend {
    fn place(&self) -> String {
        self.shared.place.clone()
    }

    fn read(&self, group: Group, keys: &[Key]) -> Result<Read, Error> {
        let place = &self.shared.place;
        let look = |pending: &Pending| {
            let values = keys.iter().map(|key| pending.value(group, *key));
            (pending.head(group), values.collect::<Vec<_>>())
        };
        let ((head, values), begun) = self.view(look)?;
        guarded(place, || {
            let mut tree = tree::Values::new(place, &begun);
            let mut value = |(key, found): (&Key, Found)| match found {
                Found::Value(value) => Ok(Some(value.to_vec())),
                Found::Gone => Ok(None),
                Found::Below => tree.get(group, *key),
            };
            let values = keys.iter().zip(values).map(&mut value);
            Ok(Read {
                values: values.collect::<Result<_, _>>()?,
                head: tree::head(place, &begun, group, head)?,
            })
        })
    }

    fn apply(&self, batch: Batch) -> Result<Applied, Error> {
        let place = &self.shared.place;
        let Some(writer) = &self.writer else {
            return Err(Error::ReadOnly { place: place.clone() });
        };
        let answer = self
            .queue
            .submit(batch, weight, TOGETHER, |batches| writer.lock().write(batches));
        answer.unwrap_or_else(|| Err(unavailable(place, "a change had no answer")))
    }

    fn list(
        &self,
        group: Group,
        kind: Kind,
        from: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<(Key, Vec<u8>)>, Error> {
        let place = &self.shared.place;
        let ((mut said, cleared), begun) = self.view(|pending| pending.of(group, kind))?;
        guarded(place, || {
            let past = last(from);
            said.retain(|(id, _)| past.is_none_or(|past| *id > past));
            let below = if cleared {
                None
            } else {
                Some(tree::values(place, &begun, group, kind, past)?)
            };
            let items = merged(below.into_iter().flatten(), said, limit.max(1))?;
            let items = items.into_iter().map(|(id, value)| (Key { kind, id }, value));
            Ok(Page::of_ordered(items.collect(), limit.max(1), |(key, _)| key.id))
        })
    }

    fn groups(&self, from: Option<&Cursor>, limit: usize) -> Result<Page<(Group, Vec<u8>)>, Error> {
        let place = &self.shared.place;
        let past = last(from).unwrap_or(Group::STORE.0);
        let look = |pending: &Pending| {
            let heads = pending.heads().filter(|(group, _)| group.0 > past);
            heads.map(|(group, head)| (group.0, head.clone())).collect()
        };
        let (said, begun) = self.view(look)?;
        guarded(place, || {
            let below = tree::heads(place, &begun, past)?;
            let items = merged(below, said, limit.max(1))?;
            let items = items.into_iter().map(|(id, head)| (Group(id), head));
            Ok(Page::of_ordered(items.collect(), limit.max(1), |(group, _)| {
                group.0
            }))
        })
    }

    fn compact(&self) -> Result<Compacted, Error> {
        self.alone(Writer::compact)
    }

    fn check(&self) -> Result<Vec<(String, String)>, Error> {
        if self.shared.read_only {
            let place = &self.shared.place;
            let found = self.view(|_| ());
            let found = found.and_then(|((), begun)| guarded(place, || tree::headless(place, &begun)));
            let mut found = found.or_else(|error| as_finding(place, error))?;
            // A writer beside this may be making it shorter: what is so twice is so.
            if self.shared.cut()?.is_some()
                && let Some(cut) = self.shared.cut()?
            {
                found.push((place.clone(), cut));
            }
            return Ok(found);
        }
        self.alone(Writer::check)
    }

    fn size(&self) -> Result<u64, Error> {
        self.shared.size("asking for its length")
    }

    fn close(&self) -> Result<(), Error> {
        if self.writer.is_some() {
            return self.alone(Writer::close);
        }
        let open = std::mem::replace(&mut *self.shared.database.write(), Open::Closed);
        open.close(&self.shared.place)
    }
}

impl Drop for RedbBackend {
    fn drop(&mut self) {
        // Nobody is left to hear of it; what is in the journal is taken over at the next open.
        let _ = self.close();
    }
}

fn as_finding(place: &str, error: Error) -> Result<Vec<(String, String)>, Error> {
    match error {
        Error::Damaged { what, .. } => Ok(vec![(place.to_owned(), what)]),
        other => Err(other),
    }
}

fn weight(batch: &Batch) -> usize {
    batch.puts.iter().map(|(_, value)| value.len()).sum()
}
