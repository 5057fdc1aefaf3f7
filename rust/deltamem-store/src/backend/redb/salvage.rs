//! What can still be read of a damaged file: opened over an overlay, so that it stays as it is, with whatever redb accepts of it, and
//! read from both ends of each range up to the damage; where the tree itself is damaged, the rest is searched for page by page. What of the
//! journal can be read is taken too. For [`Store::repair`](crate::Store::repair) only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use redb::backends::FileBackend;
use redb::{Builder, Database, ReadOnlyDatabase, ReadTransaction, ReadableDatabase, StorageBackend};

use super::carve::{self, Carved, Pieces};
use super::media::{FileMedia, Media};
use super::overlay::Overlay;
use super::pending::{Found, Pending};
use super::tree::{self, HEADS, table};
use super::{guarded, journal, wrong};
use crate::backend::{Applied, Backend, Batch, Compacted, Cursor, Group, Key, Kind, Page, Read};
use crate::error::{Error, place_of};

/// redb's magic number, with which a file begins.
const MAGIC: [u8; 9] = *b"redb\x1A\x0A\xA9\x0D\x0A";
/// The byte that says which of two commit slots is the newer one (bit 0), and whether the last writer was killed (bit 1).
const GOD_BYTE: u64 = 9;

enum Opened {
    Whole(Database),
    Parts(ReadOnlyDatabase),
    /// Nothing of the tree can be read.
    Nothing,
}

type Findings = Arc<Mutex<BTreeMap<String, String>>>;

/// A damaged file, for reading.
pub struct SalvageBackend {
    place: String,
    database: Opened,
    /// A group may have several: what was searched for may be older.
    heads: BTreeMap<Group, Vec<Vec<u8>>>,
    /// What was searched for, and where it is read; `None` where the tree is whole.
    carved: Option<(Carved, Overlay)>,
    /// What the journal says.
    journal: Pending,
    findings: Findings,
    /// Keeps writers away.
    _lock: FileBackend,
}

impl std::fmt::Debug for SalvageBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SalvageBackend")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl SalvageBackend {
    /// Opens the file at `path` without changing it, as much of it as can be read.
    ///
    /// # Errors
    /// [`Error::Locked`] when a process has it open; [`Error::NotAStore`] when it is no redb database.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let place = place_of(path);
        let fail = |error| Error::file(path, "opening it", error);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(fail)?;
        let lock = FileBackend::new(file).map_err(|error| wrong(&place, "opening it", error))?;
        let held = lock.try_lock_range(std::ops::Bound::Unbounded, std::ops::Bound::Unbounded);
        if !matches!(held, Ok(true)) {
            return Err(Error::Locked { place });
        }
        let file = FileBackend::new(File::open(path).map_err(fail)?)
            .map_err(|error| wrong(&place, "opening it", error))?;
        let overlay = Overlay::new(Box::new(file)).map_err(fail)?;
        let findings = Findings::default();
        let database = open_any(&place, &overlay, &findings)?;
        let mut found = Self {
            place,
            database,
            heads: BTreeMap::new(),
            carved: None,
            journal: Pending::default(),
            findings,
            _lock: lock,
        };
        let heads = found.all_heads()?;
        found.heads = heads
            .into_iter()
            .map(|(group, head)| (group, vec![head]))
            .collect();
        if !matches!(found.database, Opened::Whole(_)) || !found.findings.lock().is_empty() {
            found.search(overlay).map_err(fail)?;
        }
        found.take_journal(path)?;
        Ok(found)
    }

    /// Adds what the journal says, as much of it as can be read.
    fn take_journal(&mut self, path: &Path) -> Result<(), Error> {
        let fail = |error| Error::file(path, "reading its journal", error);
        let begun = self.begin();
        let mark = begun.and_then(|begun| guarded(&self.place, || tree::mark(&self.place, &begun)));
        let mark = match mark {
            Ok(mark) => mark,
            Err(error) => {
                self.note(format!("the journal's mark in {}", self.place), error)?;
                None
            }
        };
        let Some(file) = FileMedia::new(path, true).journal(false).map_err(fail)? else {
            if mark.is_some_and(|mark| mark.open) {
                let what = "it is missing, and it had the last changes".to_owned();
                self.findings
                    .lock()
                    .insert(format!("the journal of {}", self.place), what);
            }
            return Ok(());
        };
        let frames = journal::search(&*file, mark.map(|mark| mark.id)).map_err(fail)?;
        // Where the tree does not say how much of it has been brought in, all that is there is looked at.
        let mut last = mark.map(|mark| mark.applied);
        for (number, batches) in frames {
            if last.is_some_and(|last| number <= last) {
                continue;
            }
            if last.is_some_and(|last| number > last + 1) {
                let what = format!("what comes before change {number} cannot be read");
                self.findings
                    .lock()
                    .insert(format!("the journal of {}", self.place), what);
            }
            last = Some(number);
            self.journal.extend(batches);
        }
        for (group, head) in self.journal.heads() {
            match head {
                // The newest that opens counts.
                Some(head) => self.heads.entry(group).or_default().insert(0, head.to_vec()),
                None if mark.is_some() => drop(self.heads.remove(&group)),
                None => {}
            }
        }
        Ok(())
    }

    /// Adds the heads that no tree leads to.
    fn search(&mut self, file: Overlay) -> std::io::Result<()> {
        let carved = Carved::search(&file)?;
        for (group, places) in &carved.heads {
            if self.heads.contains_key(group) {
                continue;
            }
            if *group != Group::STORE {
                let what =
                    "it was found by searching the file: it may have been deleted, or be older than it was"
                        .to_owned();
                self.findings
                    .lock()
                    .insert(format!("group {} of {}", group.to_hex(), self.place), what);
            }
            let heads = places.iter().map(|place| carve::bytes(&file, *place));
            self.heads.insert(*group, heads.collect::<std::io::Result<_>>()?);
        }
        self.carved = Some((carved, file));
        Ok(())
    }

    fn note(&self, place: String, error: Error) -> Result<(), Error> {
        match error {
            Error::Damaged { what, .. } => {
                self.findings.lock().insert(place, what);
                Ok(())
            }
            // The file cannot be read there, or redb gave up on it; the search goes on elsewhere.
            Error::Io { .. } | Error::Unavailable { .. } | Error::NotAStore { .. } => {
                self.findings.lock().insert(place, error.to_string());
                Ok(())
            }
            other => Err(other),
        }
    }

    fn begin(&self) -> Result<ReadTransaction, Error> {
        guarded(&self.place, || {
            let begun = match &self.database {
                Opened::Whole(database) => database.begin_read(),
                Opened::Parts(database) => database.begin_read(),
                Opened::Nothing => return Err(Error::damaged(&*self.place, "its tree cannot be read")),
            };
            begun.map_err(|error| wrong(&self.place, "reading", error))
        })
    }

    /// Every head that can be read: the table in 256 parts by the first byte, each from its front and from its end up to the damage.
    fn all_heads(&self) -> Result<BTreeMap<Group, Vec<u8>>, Error> {
        let mut heads = BTreeMap::new();
        for first in 0..=u8::MAX {
            for backwards in [false, true] {
                let mut read = || {
                    guarded(&self.place, || {
                        let begun = self.begin()?;
                        let reading = |error| wrong(&self.place, "reading", redb::Error::from(error));
                        let Some(table) = table(&self.place, &begun, HEADS)? else {
                            return Ok(());
                        };
                        let (mut start, mut end) = ([0; 32], [0xFF; 32]);
                        (start[0], end[0]) = (first, first);
                        let mut range = table.range::<&[u8; 32]>(&start..=&end).map_err(reading)?;
                        while let Some(entry) = if backwards {
                            range.next_back()
                        } else {
                            range.next()
                        } {
                            let (group, head) = entry.map_err(reading)?;
                            heads.insert(Group(*group.value()), head.value().to_vec());
                        }
                        Ok(())
                    })
                };
                if let Err(error) = read() {
                    self.note(format!("heads {first:02x}... of {}", self.place), error)?;
                }
            }
        }
        Ok(heads)
    }
}

/// The database as redb repairs it; else as it stands, with the newer or the older of the last two transactions.
fn open_any(place: &str, overlay: &Overlay, findings: &Findings) -> Result<Opened, Error> {
    let again = || {
        overlay
            .again()
            .map_err(|error| wrong(place, "reading", redb::Error::Io(error)))
    };
    let mut header = [0; 64];
    let length = overlay
        .len()
        .map_err(|error| wrong(place, "reading", redb::Error::Io(error)))?;
    if length < 512 || overlay.read(0, &mut header).is_err() || header[..9] != MAGIC {
        return Err(Error::NotAStore {
            place: place.to_owned(),
            what: "its first bytes are not those of a redb database".into(),
        });
    }
    let whole = guarded(place, || {
        Builder::new()
            .set_check_integrity_on_open(true)
            .create_with_backend(again()?)
            .map_err(|error| wrong(place, "opening it", error))
    });
    let damage = match whole {
        Ok(database) => return Ok(Opened::Whole(database)),
        Err(Error::Damaged { what, .. }) => what,
        Err(other) => return Err(other),
    };
    findings.lock().insert(place.to_owned(), damage);
    let god = header[usize::try_from(GOD_BYTE).unwrap_or_default()] & !0b1010;
    for newest in [god, god ^ 1] {
        let opened = guarded(place, || {
            let over = again()?;
            let io = |error| wrong(place, "reading", redb::Error::Io(error));
            over.write(GOD_BYTE, &[newest]).map_err(io)?;
            over.set_len(length.max(layout(&header))).map_err(io)?;
            let mut builder = Builder::new();
            // A shared reader loads no allocator state, which is what a killed writer leaves damaged.
            builder.set_concurrency_mode(redb::ConcurrencyMode::SingleWriter);
            let database = builder
                .open_read_only_with_backend(Lockless(over))
                .map_err(|error| wrong(place, "opening it", error))?;
            let begun = database
                .begin_read()
                .map_err(|error| wrong(place, "opening it", error))?;
            table(place, &begun, HEADS)?;
            Ok(database)
        });
        match opened {
            Ok(database) => return Ok(Opened::Parts(database)),
            Err(Error::Damaged { .. } | Error::NotAStore { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(Opened::Nothing)
}

/// The length that the header's layout asks for; 0 when that makes no sense.
pub(super) fn layout(header: &[u8; 64]) -> u64 {
    let number = |at: usize| {
        u64::from(u32::from_le_bytes([
            header[at],
            header[at + 1],
            header[at + 2],
            header[at + 3],
        ]))
    };
    let (page, region_header, region_max, full, trailing) =
        (number(12), number(16), number(20), number(24), number(28));
    let last = if trailing == 0 {
        0
    } else {
        region_header + trailing
    };
    let pages = (region_header + region_max)
        .checked_mul(full)
        .and_then(|pages| pages.checked_add(last + 1));
    match pages.and_then(|pages| pages.checked_mul(page)) {
        Some(length) if page == 4096 && length < 1 << 46 => length,
        _ => 0,
    }
}

/// An overlay whose locks are always free, since the file itself is locked already, and with zeros behind its end: redb refuses all
/// further reads after one that failed, and a page of zeros is one damaged page.
#[derive(Debug)]
struct Lockless(Overlay);

impl StorageBackend for Lockless {
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        match self.0.read(offset, out) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                out.fill(0);
                Ok(())
            }
            done => done,
        }
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.0.write(offset, data)
    }

    fn try_lock_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> Result<bool, redb::BackendError> {
        Ok(true)
    }

    fn try_lock_shared_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> Result<bool, redb::BackendError> {
        Ok(true)
    }

    fn lock_range(&self, _: std::ops::Bound<u64>, _: std::ops::Bound<u64>) -> Result<(), redb::BackendError> {
        Ok(())
    }

    fn lock_shared_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> Result<(), redb::BackendError> {
        Ok(())
    }

    fn unlock_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> Result<(), redb::BackendError> {
        Ok(())
    }

    fn query_lock_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> Result<bool, redb::BackendError> {
        Ok(false)
    }
}

impl Backend for SalvageBackend {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn read(&self, group: Group, keys: &[Key]) -> Result<Read, Error> {
        let values = keys
            .iter()
            .map(|key| {
                if let Found::Value(value) = self.journal.value(group, *key) {
                    return Ok(Some(value.to_vec()));
                }
                guarded(&self.place, || {
                    let begun = self.begin()?;
                    tree::Values::new(&self.place, &begun).get(group, *key)
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Read {
            head: self.heads.get(&group).and_then(|heads| heads.first().cloned()),
            values,
        })
    }

    fn apply(&self, _: Batch) -> Result<Applied, Error> {
        Err(Error::ReadOnly {
            place: self.place.clone(),
        })
    }

    /// Everything that can be read, in one page; a key once for each value that was found for it.
    fn list(
        &self,
        group: Group,
        kind: Kind,
        _: Option<&Cursor>,
        _: usize,
    ) -> Result<Page<(Key, Vec<u8>)>, Error> {
        let mut items = BTreeSet::new();
        for (id, value) in self.journal.of(group, kind).0 {
            items.extend(value.map(|value| (Key { kind, id }, value.to_vec())));
        }
        let mut pieces = Pieces::default();
        if let Some((carved, file)) = &self.carved {
            // The search found every leaf that there is, those of a readable tree too.
            for (key, part, place) in carved.of(group, kind) {
                let bytes = carve::bytes(file, place);
                let bytes = bytes.map_err(|error| wrong(&self.place, "reading", redb::Error::Io(error)))?;
                pieces.add(key, part, bytes);
            }
        } else {
            for backwards in [false, true] {
                let mut read = || {
                    guarded(&self.place, || {
                        let begun = self.begin()?;
                        let mut each = |key: &[u8], value: &[u8]| {
                            if let Some((key, part)) = tree::read_key(key) {
                                pieces.add(key, part, value.to_vec());
                            }
                        };
                        tree::entries(&self.place, &begun, (group, kind), backwards, &mut each)
                    })
                };
                if let Err(error) = read() {
                    let place = format!("{kind:?}s of group {} of {}", group.to_hex(), self.place);
                    self.note(place, error)?;
                }
            }
        }
        items.extend(pieces.whole());
        Ok(Page {
            items: items.into_iter().collect(),
            next: None,
        })
    }

    fn groups(&self, _: Option<&Cursor>, _: usize) -> Result<Page<(Group, Vec<u8>)>, Error> {
        let groups = self.heads.iter().filter(|(group, _)| **group != Group::STORE);
        let each = groups.flat_map(|(group, heads)| heads.iter().map(|head| (*group, head.clone())));
        Ok(Page {
            items: each.collect(),
            next: None,
        })
    }

    fn compact(&self) -> Result<Compacted, Error> {
        Err(Error::ReadOnly {
            place: self.place.clone(),
        })
    }

    /// What was found damaged so far.
    fn check(&self) -> Result<Vec<(String, String)>, Error> {
        Ok(self.findings.lock().clone().into_iter().collect())
    }

    fn size(&self) -> Result<u64, Error> {
        match std::fs::metadata(&self.place) {
            Ok(found) => Ok(found.len()),
            Err(error) => Err(Error::file(
                Path::new(&self.place),
                "asking for its length",
                error,
            )),
        }
    }

    fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}
