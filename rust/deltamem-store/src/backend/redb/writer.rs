//! Who writes: one at a time, into the journal, and from it into the tree.

use std::collections::HashMap;
use std::sync::Arc;

use redb::{
    Builder, Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition,
};

use super::journal::{self, Contents, Journal, Mark};
use super::media::Boxed;
use super::overlay::Overlay;
use super::pending::Pending;
use super::tree::{self, HEADS, JOURNAL, JOURNAL_KEY, OBJECTS, STATES, table};
use super::{Open, Shared, TOGETHER, failed, guarded, unavailable, weight, wrong};
use crate::backend::{Applied, Batch, Compacted, Group, HeadChange};
use crate::error::Error;
use crate::seal::random;

pub(super) struct Writer {
    shared: Arc<Shared>,
    /// What the tree says of its journal; `None`: it never had one.
    mark: Option<Mark>,
    /// The number of the last frame that was written, or given up.
    last: u64,
    /// The journal, once the first change was made.
    journal: Option<Journal>,
    /// Writing a frame failed, and what of it is on the disk is not known: its number is given up, and the journal begins anew.
    torn: bool,
    /// The last promotion may not survive a power cut yet: nothing is acknowledged before it does.
    unsettled: bool,
}

impl Writer {
    /// Opens the database of `shared`, and takes what its journal holds into `shared.pending`.
    pub(super) fn open(shared: Arc<Shared>) -> Result<Self, Error> {
        let database = shared.open_writing()?;
        *shared.database.write() = Open::Writing(database);
        let mark = shared.mark()?;
        let mut writer = Self {
            last: mark.map_or(0, |mark| mark.applied),
            mark,
            journal: None,
            torn: false,
            unsettled: false,
            shared,
        };
        writer.take_over()?;
        Ok(writer)
    }

    fn take_over(&mut self) -> Result<(), Error> {
        let Some((file, contents)) = self.shared.left(self.mark)? else {
            return Ok(());
        };
        let shared = self.shared.clone();
        let failed = |source| failed(&shared.place, "taking over its journal", source);
        let Contents { batches, last, end } = contents;
        let journal = Journal::new(file, end).map_err(failed)?;
        if !batches.is_empty() {
            journal.sync().map_err(failed)?;
        }
        self.last = last;
        self.journal = Some(journal);
        let mut pending = shared.pending.write();
        pending.extend(batches);
        drop(pending);
        if !shared.journalled() {
            self.fold()?;
        }
        Ok(())
    }

    /// Makes several changes with one fsync, and answers each.
    pub(super) fn write(&mut self, batches: Vec<Batch>) -> Vec<Result<Applied, Error>> {
        if let Err(error) = self.ready() {
            return batches.iter().map(|_| Err(once_more(&error))).collect();
        }
        let mut heads: HashMap<Group, Option<Vec<u8>>> = HashMap::new();
        let mut accepted = Vec::new();
        let mut decide = |batch: Batch| {
            let found = match heads.get(&batch.group) {
                Some(found) => found.clone(),
                None => self.shared.head(batch.group)?,
            };
            if found != batch.expected {
                return Ok(Applied::Refused { found });
            }
            let head = match &batch.head {
                HeadChange::Keep => found,
                HeadChange::Put(head) => Some(head.clone()),
                HeadChange::Remove => None,
            };
            heads.insert(batch.group, head);
            accepted.push(batch);
            Ok(Applied::Done)
        };
        // What is damaged fails alone.
        let answers: Vec<_> = batches.into_iter().map(&mut decide).collect();
        if accepted.is_empty() {
            return answers;
        }
        match self.keep(accepted) {
            Ok(()) => answers,
            Err(error) => {
                let each = answers.into_iter();
                each.map(|answer| answer.and_then(|_| Err(once_more(&error))))
                    .collect()
            }
        }
    }

    /// Makes changes durable: in the journal, or in the tree where there is none or they are too long for it.
    fn keep(&mut self, batches: Vec<Batch>) -> Result<(), Error> {
        let shared = self.shared.clone();
        let limit = shared.options.journal_bytes;
        let bytes: usize = batches.iter().map(weight).sum();
        if !shared.journalled() || bytes as u64 > limit {
            self.checkpoint(true)?;
            let mut changes = Pending::default();
            changes.extend(batches);
            return self.bring_in(&changes, self.mark);
        }
        self.begin_journal()?;
        let id = self.mark.map_or([0; 16], |mark| mark.id);
        let room = self.journal.as_mut().map(Journal::room).unwrap_or_default();
        let frame = journal::frame(room, &id, self.last + 1, &batches);
        let full = |journal: &Journal| journal.end() > 0 && journal.end() + frame.len() as u64 > limit;
        if self.journal.as_ref().is_some_and(full) {
            self.checkpoint(true)?;
        }
        let Some(journal) = &mut self.journal else {
            return Err(unavailable(&shared.place, "it has no journal"));
        };
        if let Err(source) = journal.append(frame) {
            self.torn = true;
            return Err(failed(&shared.place, "writing its journal", source));
        }
        self.last += 1;
        let mut pending = shared.pending.write();
        pending.extend(batches);
        Ok(())
    }

    /// Makes the journal's file, if there is none yet, and has the tree say that it is there.
    fn begin_journal(&mut self) -> Result<(), Error> {
        if self.journal.is_some() && self.mark.is_some_and(|mark| mark.open) {
            return Ok(());
        }
        let shared = self.shared.clone();
        if self.journal.is_none() {
            let begun = shared.media.journal(true).and_then(|file| {
                let file = file.ok_or_else(|| std::io::Error::other("it was not made"))?;
                Journal::new(file, 0)
            });
            self.journal = Some(begun.map_err(|source| failed(&shared.place, "making its journal", source))?);
        }
        let mark = match self.mark {
            Some(mark) => Mark { open: true, ..mark },
            None => Mark {
                id: random()?,
                applied: self.last,
                open: true,
            },
        };
        // The file comes first: a tree that says so and has none beside it has lost changes.
        self.bring_in(&Pending::default(), Some(mark))
    }

    /// Brings all that the journal says into the tree, and begins it anew. `open`: more will come into it.
    fn checkpoint(&mut self, open: bool) -> Result<(), Error> {
        let shared = self.shared.clone();
        let Some(mark) = self.mark else {
            return Ok(());
        };
        let pending = shared.pending.read();
        let open = open && mark.open;
        if pending.is_empty() && !self.torn && mark.open == open {
            return Ok(());
        }
        let last = self.last + u64::from(self.torn);
        let mark = Mark {
            applied: last,
            open,
            ..mark
        };
        self.bring_in(&pending, Some(mark))?;
        drop(pending);
        *shared.pending.write() = Pending::default();
        self.last = last;
        self.torn = false;
        if let Some(journal) = &mut self.journal {
            journal.begin_anew();
        }
        Ok(())
    }

    /// Brings all that the journal says into the tree, and removes it.
    fn fold(&mut self) -> Result<(), Error> {
        self.checkpoint(false)?;
        if self.journal.take().is_some() {
            let removed = self.shared.media.discard_journal();
            removed.map_err(|source| failed(&self.shared.place, "removing its journal", source))?;
        }
        Ok(())
    }

    /// Ends the work: nothing lies beside the file afterwards.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        if matches!(*self.shared.database.read(), Open::Closed) {
            return Ok(());
        }
        let folded = self.ready().and_then(|()| self.fold());
        let open = std::mem::replace(&mut *self.shared.database.write(), Open::Closed);
        open.close(&self.shared.place).and(folded)
    }

    /// Writes changes into the tree, in one transaction that is durable when this returns.
    fn bring_in(&mut self, changes: &Pending, mark: Option<Mark>) -> Result<(), Error> {
        let shared = self.shared.clone();
        let place = &shared.place;
        let made = {
            let open = shared.database.read();
            let Open::Writing(database) = &*open else {
                return Err(unavailable(place, "it is closed"));
            };
            guarded(place, || write_tree(place, database, changes, mark))
        };
        match made {
            Ok(()) => self.mark = mark,
            Err(_) => self.recover(),
        }
        made
    }

    /// Sees to it that the database is open, that what was renamed stays so, and that the journal's end is known.
    pub(super) fn ready(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
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
        if self.torn {
            self.checkpoint(true)?;
        }
        Ok(())
    }

    /// After a failed write: closes the database, which redb asks for, and opens it again as the file has it.
    fn recover(&mut self) {
        let shared = &self.shared;
        let mut database = shared.database.write();
        if let Open::Writing(old) = std::mem::replace(&mut *database, Open::Closed) {
            let_go(&shared.place, old);
        }
        *database = match shared.open_writing() {
            Ok(opened) => Open::Writing(opened),
            Err(error) => Open::Failed(format!(
                "after a failed write it could not be opened again: {error}"
            )),
        };
    }

    /// Writes everything that there is into a new file, and puts that in the place of the old one. Bytes of what was deleted are in
    /// no page of it, and the journal is gone.
    pub(super) fn compact(&mut self) -> Result<Compacted, Error> {
        self.ready()?;
        let shared = self.shared.clone();
        let media = &*shared.media;
        let place = &shared.place;
        let before = shared.size("asking for its length")?;
        self.fold()?;
        let copied = self.copy();
        let new = match copied {
            Ok(new) => new,
            Err(error) => {
                media.discard_side();
                return Err(error);
            }
        };
        if let Err(source) = media.promote() {
            let_go(place, new);
            media.discard_side();
            return Err(failed(place, "putting the new file in its place", source));
        }
        self.unsettled = true;
        let old = std::mem::replace(&mut *shared.database.write(), Open::Writing(new));
        let_go(place, old);
        self.ready()?;
        Ok(Compacted {
            before,
            after: shared.size("asking for its length")?,
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
            copy_table(place, &from, &new, JOURNAL)?;
            new.compact().map_err(|error| wrong(place, DOING, error))?;
            Ok(new)
        })
    }

    /// Opens the file once more, over an overlay, reading every page and its checksum; the file is not changed and readers do not wait.
    /// Reads the journal again too.
    pub(super) fn check(&mut self) -> Result<Vec<(String, String)>, Error> {
        self.ready()?;
        let shared = self.shared.clone();
        let place = &shared.place;
        let mut found = check_tree(&shared).or_else(|error| super::as_finding(place, error))?;
        if let (Some(journal), Some(mark)) = (&self.journal, self.mark) {
            let checked = journal.check(mark, self.last);
            let checked = checked.map_err(|trouble| shared.of_journal(trouble));
            if let Err(error) = checked {
                found.extend(super::as_finding(place, error)?);
            }
        }
        Ok(found)
    }
}

/// Lets go of a database that is not needed any more; whatever redb says of it then, even by a panic, concerns nobody.
fn let_go<T>(place: &str, database: T) {
    let _ = guarded(place, || {
        drop(database);
        Ok(())
    });
}

fn check_tree(shared: &Shared) -> Result<Vec<(String, String)>, Error> {
    let place = &shared.place;
    guarded(place, || {
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
        let mut found = tree::headless(place, &begun)?;
        // A damaged last transaction makes redb fall back on the one before, without a word.
        let live = shared.database.read().begin(place)?;
        if heads(place, &begun)? != heads(place, &live)? {
            found.push((
                place.clone(),
                "the pages of its last transaction do not have their checksums".into(),
            ));
        }
        Ok(found)
    })
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

/// One transaction. Which pages are free is written down with it, for a second fsync, so that a file whose writer was killed opens at once.
fn write_tree(place: &str, database: &Database, changes: &Pending, mark: Option<Mark>) -> Result<(), Error> {
    let beginning = |error| wrong(place, "beginning to write", error);
    let opening = |error| wrong(place, "writing", redb::Error::from(error));
    let writing = |error| wrong(place, "writing", redb::Error::from(error));
    let mut begun = database
        .begin_write()
        .map_err(|error| beginning(redb::Error::from(error)))?;
    begun
        .set_durability(Durability::Immediate)
        .map_err(|error| beginning(redb::Error::from(error)))?;
    begun.set_quick_repair(true);
    {
        let mut table = begun.open_table(HEADS).map_err(opening)?;
        for (group, head) in changes.heads() {
            match head {
                Some(head) => table.insert(&group.0, head.as_slice()).map_err(writing)?,
                None => table.remove(&group.0).map_err(writing)?,
            };
        }
    }
    {
        let mut objects = begun.open_table(OBJECTS).map_err(opening)?;
        let mut states = begun.open_table(STATES).map_err(opening)?;
        for group in changes.cleared() {
            tree::clear(place, &mut objects, &mut states, group)?;
        }
        for (group, key, value) in changes.values() {
            let value = value.as_ref().map(|value| value.as_slice());
            tree::put(place, &mut objects, &mut states, (group, key), value)?;
        }
    }
    if let Some(mark) = mark {
        let mut table = begun.open_table(JOURNAL).map_err(opening)?;
        table
            .insert(JOURNAL_KEY, mark.encode().as_slice())
            .map_err(writing)?;
    }
    begun.commit().map_err(|error| wrong(place, "committing", error))
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
        Error::Damaged { place, what } => Error::damaged(&**place, &**what),
        Error::Unavailable { place, reason } => unavailable(place, reason),
        other => unavailable("the store", &other.to_string()),
    }
}
