//! A store: memories by name over a backend. Here stand opening, the header, and the two ways of working with a memory: reading it as it
//! is at one moment, and changing it by a compare-and-swap of its record. What is read and changed stands in the modules beside.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::backend::memory::MemoryBackend;
use crate::backend::{Applied, Backend, Batch, Group, HeadChange, Key, Kind};
use crate::commit::{Commit, CommitId, StateId};
use crate::error::Error;
use crate::name::check_memory;
use crate::record::{Limits, Move, Record, RefEntry, RefKind, Usage, move_id};
use crate::schema;
use crate::seal::{Domain, Place, StoreKey, Vault, random};

/// Milliseconds since 1970.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Attempts at one change while others change the same memory; each failed one means that another's went through.
const ATTEMPTS: usize = 1000;
/// Records kept decoded, so that a commit needs no read.
const CACHED: usize = 16 * 1024;
/// Values in one page of a listing.
pub(crate) const PAGE: usize = 500;

/// How a store is opened.
#[derive(Clone)]
pub struct Options {
    /// Encrypts everything; `None`: nothing is encrypted.
    pub key: Option<StoreKey>,
    /// What a new memory may keep.
    pub limits: Limits,
    /// How long a new memory lives without a change; `None`: for ever.
    pub ttl_ms: Option<u64>,
    /// Tells the time. Commits, the reflog and times to live go by it.
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key: None,
            limits: Limits::default(),
            ttl_ms: None,
            clock: Arc::new(|| {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            }),
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("key", &self.key)
            .field("limits", &self.limits)
            .field("ttl_ms", &self.ttl_ms)
            .finish_non_exhaustive()
    }
}

/// Memories by name, with their history. Shared by any number of threads.
pub struct Store {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) vault: Vault,
    pub(crate) options: Options,
    cache: Mutex<HashMap<Group, Arc<Opened>>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("backend", &self.backend)
            .finish_non_exhaustive()
    }
}

/// A memory as it is at one moment.
pub(crate) struct Opened {
    pub group: Group,
    /// The head's bytes, which a change expects to find.
    pub raw: Vec<u8>,
    pub domain: Domain,
    pub record: Record,
}

/// A change of a memory, to be made in one batch.
pub(crate) struct Edit {
    pub group: Group,
    pub domain: Domain,
    pub record: Record,
    pub puts: Vec<(Key, Vec<u8>)>,
    pub deletes: Vec<Key>,
    pub moves: Vec<Move>,
    pub remove: bool,
    /// There is nothing to change.
    pub nothing: bool,
    pub now: u64,
}

impl Edit {
    /// A change that begins with the memory as it is.
    pub(crate) fn of(opened: &Opened, now: u64) -> Self {
        Self::new(opened.group, opened.domain.clone(), opened.record.clone(), now)
    }

    fn new(group: Group, domain: Domain, record: Record, now: u64) -> Self {
        Self {
            group,
            domain,
            record,
            puts: Vec::new(),
            deletes: Vec::new(),
            moves: Vec::new(),
            remove: false,
            nothing: false,
            now,
        }
    }

    /// Seals an object and adds it; the bytes that it takes.
    pub(crate) fn put(&mut self, kind: Kind, id: &[u8; 32], plain: &[u8]) -> Result<u64, Error> {
        let key = self.domain.key(kind, id);
        let sealed = self.domain.close(Place::Value(self.group, key), plain)?;
        let bytes = sealed.len() as u64;
        self.puts.push((key, sealed));
        Ok(bytes)
    }

    /// Moves a branch or a tag, and writes it down.
    pub(crate) fn move_ref(&mut self, kind: RefKind, name: &str, to: Option<Target>, why: &str) {
        let at = (kind, name.to_owned());
        let before = self.record.refs.get(&at).copied();
        let number = self.record.moves;
        self.record.moves += 1;
        self.moves.push(Move {
            number,
            kind,
            name: name.to_owned(),
            old: before.map(|entry| entry.target),
            new: to.map(|to| to.id),
            time_ms: self.now,
            why: why.to_owned(),
            previous: before.map(|entry| entry.log),
        });
        match to {
            None => {
                self.record.refs.remove(&at);
            }
            Some(to) => {
                let entry = RefEntry {
                    target: to.id,
                    state: to.state,
                    generation: to.generation,
                    log: number,
                };
                self.record.refs.insert(at, entry);
            }
        }
    }
}

/// A commit as a ref keeps it.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub id: CommitId,
    pub state: StateId,
    pub generation: u64,
}

impl From<&Commit> for Target {
    fn from(commit: &Commit) -> Self {
        Self {
            id: commit.id,
            state: commit.state,
            generation: commit.generation,
        }
    }
}

impl Store {
    /// A store over `backend`. An empty one gets a header; from then on its key, or that it has none, is fixed.
    ///
    /// # Errors
    /// [`Error::Key`] when the key is missing, not needed or wrong; [`Error::Newer`], [`Error::NotAStore`] and [`Error::Damaged`] when
    /// the header is; and whatever the backend says.
    pub fn open(backend: Arc<dyn Backend>, options: Options) -> Result<Self, Error> {
        let vault = Vault::new(options.key.as_ref());
        schema::open(&*backend, &vault)?;
        Ok(Self {
            backend,
            vault,
            options,
            cache: Mutex::default(),
        })
    }

    /// [`Store::open`] for [`Store::repair`]: a header that is damaged or lost is passed over, and the key taken for the right one.
    ///
    /// # Errors
    /// As there, damage excepted.
    pub fn open_damaged(backend: Arc<dyn Backend>, options: Options) -> Result<Self, Error> {
        let vault = Vault::new(options.key.as_ref());
        match schema::open(&*backend, &vault) {
            Ok(()) | Err(Error::Damaged { .. } | Error::ReadOnly { .. } | Error::NotAStore { .. }) => {}
            Err(other) => return Err(other),
        }
        Ok(Self {
            backend,
            vault,
            options,
            cache: Mutex::default(),
        })
    }

    /// A store in the process's own memory, gone with it.
    ///
    /// # Errors
    /// Only when the system has no random numbers.
    pub fn in_memory(options: Options) -> Result<Self, Error> {
        Self::open(Arc::new(MemoryBackend::new()), options)
    }

    /// The backend.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Whether the store has a key.
    pub fn encrypted(&self) -> bool {
        self.vault.check().is_some()
    }

    /// Waits for what is under way and releases files and connections.
    ///
    /// # Errors
    /// What the backend says.
    pub fn close(&self) -> Result<(), Error> {
        self.backend.close()
    }

    pub(crate) fn now(&self) -> u64 {
        (self.options.clock)()
    }

    pub(crate) fn place(&self, group: Group, name: Option<&str>) -> String {
        match name {
            Some(name) => format!("memory {name:?} in {}", self.backend.place()),
            None => format!(
                "the memory in group {} of {}",
                group.to_hex(),
                self.backend.place()
            ),
        }
    }

    /// What a head says, its keys unlocked.
    pub(crate) fn decode_head(&self, group: Group, raw: Vec<u8>) -> Result<Arc<Opened>, Error> {
        if let Some(known) = self.cache.lock().get(&group)
            && known.raw == raw
        {
            return Ok(known.clone());
        }
        let opened = Arc::new(self.decode_uncached(group, raw)?);
        self.remember(&opened);
        Ok(opened)
    }

    /// The same for a head that is looked at once.
    pub(crate) fn decode_uncached(&self, group: Group, raw: Vec<u8>) -> Result<Opened, Error> {
        let damaged = |what: String| Error::damaged(format!("the head of {}", self.place(group, None)), what);
        let (domain, plain) = self.vault.open_head(group, &raw).map_err(damaged)?;
        let record = Record::decode(&plain).map_err(damaged)?;
        if self.vault.group(&record.name) != group {
            return Err(damaged(format!(
                "it names memory {:?}, which belongs elsewhere",
                record.name
            )));
        }
        Ok(Opened {
            group,
            raw,
            domain,
            record,
        })
    }

    fn remember(&self, opened: &Arc<Opened>) {
        let mut cache = self.cache.lock();
        if cache.len() >= CACHED && !cache.contains_key(&opened.group) {
            cache.clear();
        }
        cache.insert(opened.group, opened.clone());
    }

    fn fresh(&self, group: Group) -> Result<Option<Arc<Opened>>, Error> {
        let head = self.backend.read(group, &[])?.head;
        if head.is_none() {
            self.cache.lock().remove(&group);
        }
        head.map(|raw| self.decode_head(group, raw)).transpose()
    }

    /// Does `work` with the memory as it is at one moment; again, if the memory changed so that what was read does not fit together.
    pub(crate) fn reading<T>(
        &self,
        name: &str,
        work: impl Fn(&Opened) -> Result<T, Error>,
    ) -> Result<T, Error> {
        check_memory(name)?;
        let group = self.vault.group(name);
        let mut last = self.fresh(group)?;
        loop {
            let Some(opened) = last.filter(|opened| !opened.record.expired(self.now())) else {
                return Err(Error::no_memory(name));
            };
            match work(&opened) {
                Err(error @ (Error::Damaged { .. } | Error::NotFound { .. } | Error::Ref { .. })) => {
                    last = self.fresh(group)?;
                    if last.as_ref().is_some_and(|now| now.raw == opened.raw) {
                        return Err(error);
                    }
                }
                done => return done,
            }
        }
    }

    /// Changes a memory: `plan` is given the memory as it is (`None`: there is none), and what it plans is made if the memory is still
    /// so; else it plans again. The first plan may be made on a record that is out of date, which costs nothing but the attempt.
    pub(crate) fn changing<T>(
        &self,
        name: &str,
        mut plan: impl FnMut(Option<&Opened>) -> Result<(Edit, T), Error>,
    ) -> Result<T, Error> {
        check_memory(name)?;
        let group = self.vault.group(name);
        let cached = self.cache.lock().get(&group).cloned();
        let mut found = match cached {
            Some(opened) => Some(opened),
            None => self.fresh(group)?,
        };
        for _ in 0..ATTEMPTS {
            let alive = found
                .as_deref()
                .filter(|opened| !opened.record.expired(self.now()));
            let (edit, result) = match plan(alive) {
                Ok(planned) => planned,
                Err(error) => {
                    let now = self.fresh(group)?;
                    let raw = |opened: &Option<Arc<Opened>>| opened.as_ref().map(|opened| opened.raw.clone());
                    if raw(&now) == raw(&found) {
                        return Err(error);
                    }
                    found = now;
                    continue;
                }
            };
            if edit.nothing {
                return Ok(result);
            }
            let replaces = found.is_some() && alive.is_none();
            let (batch, opened) = Self::batch(edit, found.as_deref(), replaces)?;
            match self.backend.apply(batch) {
                Ok(Applied::Done) => {
                    match opened {
                        Some(opened) => self.remember(&Arc::new(opened)),
                        None => {
                            self.cache.lock().remove(&group);
                        }
                    }
                    return Ok(result);
                }
                Ok(Applied::Refused { found: raw }) => {
                    found = raw.map(|raw| self.decode_head(group, raw)).transpose()?;
                }
                Err(error) => {
                    self.cache.lock().remove(&group);
                    return Err(error);
                }
            }
        }
        Err(Error::Unavailable {
            place: self.place(group, Some(name)),
            reason: format!("it was changed by others {ATTEMPTS} times while one change waited"),
        })
    }

    fn batch(mut edit: Edit, found: Option<&Opened>, clear: bool) -> Result<(Batch, Option<Opened>), Error> {
        let expected = found.map(|opened| opened.raw.clone());
        if edit.remove {
            let batch = Batch {
                group: edit.group,
                expected,
                clear: false,
                head: HeadChange::Remove,
                deletes: Vec::new(),
                puts: Vec::new(),
            };
            return Ok((batch, None));
        }
        edit.record.version += 1;
        edit.record.touched_ms = edit.now;
        for entry in std::mem::take(&mut edit.moves) {
            edit.put(Kind::Log, &move_id(entry.number), &entry.encode())?;
        }
        let raw = edit
            .domain
            .close(Place::Head(edit.group), &edit.record.encode())?;
        // A state may be planned twice, by a merge for instance; equal keys have equal bytes.
        let puts: BTreeMap<Key, Vec<u8>> = edit.puts.into_iter().collect();
        let batch = Batch {
            group: edit.group,
            expected,
            clear,
            head: HeadChange::Put(raw.clone()),
            deletes: edit.deletes,
            puts: puts.into_iter().collect(),
        };
        let opened = Opened {
            group: edit.group,
            raw,
            domain: edit.domain,
            record: edit.record,
        };
        Ok((batch, Some(opened)))
    }

    /// The beginning of a memory that does not exist yet.
    pub(crate) fn new_memory(&self, name: &str, head: &str, now: u64) -> Result<Edit, Error> {
        let group = self.vault.group(name);
        let domain = self.vault.new_domain(group)?;
        let record = Record {
            name: name.to_owned(),
            instance: random()?,
            version: 0,
            created_ms: now,
            touched_ms: now,
            ttl_ms: self.options.ttl_ms,
            limits: self.options.limits,
            usage: Usage::default(),
            head: head.to_owned(),
            refs: BTreeMap::new(),
            moves: 0,
            oldest_move: 0,
            shallow: std::collections::BTreeSet::new(),
        };
        Ok(Edit::new(group, domain, record, now))
    }

    /// Objects of one kind by id; each that is there is opened, and its bytes are what was written.
    pub(crate) fn objects(
        &self,
        opened: &Opened,
        kind: Kind,
        ids: &[[u8; 32]],
    ) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let keys: Vec<Key> = ids.iter().map(|id| opened.domain.key(kind, id)).collect();
        let read = self.backend.read(opened.group, &keys)?;
        keys.iter()
            .zip(read.values)
            .map(|(key, value)| {
                value
                    .map(|value| self.open_value(opened, *key, &value))
                    .transpose()
            })
            .collect()
    }

    pub(crate) fn open_value(&self, opened: &Opened, key: Key, value: &[u8]) -> Result<Vec<u8>, Error> {
        opened
            .domain
            .open(Place::Value(opened.group, key), value)
            .map_err(|what| {
                Error::damaged(
                    format!(
                        "{key:?} of {}",
                        self.place(opened.group, Some(&opened.record.name))
                    ),
                    what,
                )
            })
    }

    /// The commit that these bytes hold, its id checked against `key`.
    pub(crate) fn open_commit(&self, opened: &Opened, key: Key, value: &[u8]) -> Result<Commit, Error> {
        let plain = self.open_value(opened, key, value)?;
        let damaged = |what| {
            Error::damaged(
                format!(
                    "{key:?} of {}",
                    self.place(opened.group, Some(&opened.record.name))
                ),
                what,
            )
        };
        let commit = Commit::decode(&plain).map_err(damaged)?;
        if opened.domain.key(Kind::Commit, &commit.id.0) != key {
            return Err(damaged(format!("it holds commit {}", commit.id)));
        }
        Ok(commit)
    }

    /// A commit; `None`: the memory does not hold it.
    pub(crate) fn find_commit(&self, opened: &Opened, id: CommitId) -> Result<Option<Commit>, Error> {
        let key = opened.domain.key(Kind::Commit, &id.0);
        let read = self.backend.read(opened.group, &[key])?;
        let value = read.values.into_iter().next().flatten();
        value
            .map(|value| self.open_commit(opened, key, &value))
            .transpose()
    }

    /// A commit that something names.
    pub(crate) fn commit_of(&self, opened: &Opened, id: CommitId) -> Result<Commit, Error> {
        self.find_commit(opened, id)?.ok_or_else(|| {
            Error::damaged(
                format!(
                    "commit {id} of {}",
                    self.place(opened.group, Some(&opened.record.name))
                ),
                "it is missing, though something names it",
            )
        })
    }

    /// The bytes of a state that a commit names, their hash checked.
    pub(crate) fn state_of(&self, opened: &Opened, id: StateId) -> Result<Vec<u8>, Error> {
        let place = || {
            format!(
                "state {id} of {}",
                self.place(opened.group, Some(&opened.record.name))
            )
        };
        let found = self
            .objects(opened, Kind::State, &[id.0])?
            .into_iter()
            .next()
            .flatten();
        let bytes =
            found.ok_or_else(|| Error::damaged(place(), "it is missing, though a commit names it"))?;
        if StateId::of(&bytes) != id {
            return Err(Error::damaged(
                place(),
                format!("its bytes have the hash {}", StateId::of(&bytes)),
            ));
        }
        Ok(bytes)
    }

    /// Every value of one kind, page by page.
    pub(crate) fn each_value(
        &self,
        group: Group,
        kind: Kind,
        mut work: impl FnMut(Key, Vec<u8>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut from = None;
        loop {
            let page = self.backend.list(group, kind, from.as_ref(), PAGE)?;
            for (key, value) in page.items {
                work(key, value)?;
            }
            match page.next {
                None => return Ok(()),
                next => from = next,
            }
        }
    }

    /// Every group with its head, page by page. A group may come twice.
    pub(crate) fn each_group(
        &self,
        mut work: impl FnMut(Group, Vec<u8>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut from = None;
        loop {
            let page = self.backend.groups(from.as_ref(), PAGE)?;
            for (group, head) in page.items {
                work(group, head)?;
            }
            match page.next {
                None => return Ok(()),
                next => from = next,
            }
        }
    }
}
