//! Looking after a store: what it holds, garbage, damage, and saving what is whole.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use deltamem_core::{Fingerprint, Snapshot};

use crate::backend::{Compacted, Group, Key, Kind};
use crate::commit::{Commit, CommitId, StateId};
use crate::error::Error;
use crate::history::History;
use crate::record::{Limits, MAX_REFS, Move, Record, RefKind, Usage};
use crate::seal::Domain;
use crate::store::{Edit, Opened, Store, Target};
use crate::transfer::Whole;

/// What a store holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Where it is.
    pub place: String,
    /// Memories that have not expired.
    pub memories: u64,
    /// Memories that have expired and wait for a gc.
    pub expired: u64,
    /// Commits of all memories.
    pub commits: u64,
    /// Bytes of commits and states, as the memories count them.
    pub bytes: u64,
    /// Bytes that the place takes.
    pub size: u64,
    /// Whether it has a key.
    pub encrypted: bool,
}

/// What a gc may take away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GcOptions {
    /// Moves in the reflog older than this go, and with them the commits that only they name. 90 days by default, as Git has it; 0:
    /// only what branches and tags reach stays.
    pub reflog_ms: u64,
    /// Whether the bytes of what is gone leave the file: it is written anew. Commits wait meanwhile, reads do not.
    pub compact: bool,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self {
            reflog_ms: 90 * 24 * 60 * 60 * 1000,
            compact: true,
        }
    }
}

/// What a gc took away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GcReport {
    /// Memories that had expired.
    pub memories: u64,
    /// Commits that nothing named.
    pub commits: u64,
    /// States that no commit used.
    pub states: u64,
    /// Moves older than asked for.
    pub moves: u64,
    /// Bytes of the place before and after; `None` without compaction.
    pub compacted: Option<Compacted>,
}

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Damage {
    /// The memory; `None`: unknown, or no single one.
    pub memory: Option<String>,
    /// Which object, where.
    pub place: String,
    /// What was found and what was expected.
    pub what: String,
}

/// What a store's inspection found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Memories looked at.
    pub memories: u64,
    /// Commits whose id and parents were checked.
    pub commits: u64,
    /// States whose hash and numbers were checked.
    pub states: u64,
    /// Moves in reflogs.
    pub moves: u64,
    /// Commits and states that nothing names: no damage, a gc removes them.
    pub unreachable: u64,
    /// What is damaged; empty: the store is clean.
    pub damages: Vec<Damage>,
}

/// What a repair saved.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RepairReport {
    /// Memories saved.
    pub memories: u64,
    /// Commits saved.
    pub commits: u64,
    /// What was lost, moved back or renamed.
    pub losses: Vec<Damage>,
}

/// Everything in one group, as far as it opens.
#[derive(Default)]
struct Found {
    history: History,
    states: HashMap<StateId, (u64, Option<(Fingerprint, u64)>)>,
    moves: BTreeMap<u64, Move>,
    sizes: HashMap<Key, u64>,
    damages: Vec<Damage>,
}

impl Store {
    /// What the store holds.
    ///
    /// # Errors
    /// What the backend says; [`Error::Damaged`] for a head that does not open.
    pub fn stats(&self) -> Result<Stats, Error> {
        let now = self.now();
        let mut stats = Stats {
            place: self.backend.place(),
            memories: 0,
            expired: 0,
            commits: 0,
            bytes: 0,
            size: self.backend.size()?,
            encrypted: self.encrypted(),
        };
        let mut seen = HashSet::new();
        self.each_group(|group, head| {
            let opened = self.decode_uncached(group, head)?;
            if !seen.insert(group) {
                return Ok(());
            }
            if opened.record.expired(now) {
                stats.expired += 1;
            } else {
                stats.memories += 1;
            }
            stats.commits += opened.record.usage.commits;
            stats.bytes += opened.record.usage.bytes;
            Ok(())
        })?;
        Ok(stats)
    }

    /// Takes away expired memories, old moves, and what nothing names any more; then, if asked to, makes the bytes of everything that is
    /// gone leave the file.
    ///
    /// # Errors
    /// What the backend says. A memory that is damaged is refused with [`Error::Damaged`]: repair comes first.
    pub fn gc(&self, options: &GcOptions) -> Result<GcReport, Error> {
        let mut report = GcReport::default();
        let now = self.now();
        let mut groups = BTreeMap::new();
        self.each_group(|group, head| {
            let opened = self.decode_uncached(group, head)?;
            groups.insert(group, (opened.record.name.clone(), opened.record.expired(now)));
            Ok(())
        })?;
        for (name, expired) in groups.into_values() {
            if expired {
                report.memories += u64::from(self.remove_expired(&name)?);
            } else {
                match self.collect(
                    &name,
                    now.saturating_sub(options.reflog_ms),
                    options.reflog_ms == 0,
                ) {
                    Ok((commits, states, moves)) => {
                        report.commits += commits;
                        report.states += states;
                        report.moves += moves;
                    }
                    // Deleted, or expired, since the names were read.
                    Err(Error::NotFound { what: "memory", .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if options.compact {
            report.compacted = Some(self.backend.compact()?);
        }
        Ok(report)
    }

    /// Removes one memory if it has expired; whether it had.
    fn remove_expired(&self, name: &str) -> Result<bool, Error> {
        let group = self.vault.group(name);
        let Some(head) = self.backend.read(group, &[])?.head else {
            return Ok(false);
        };
        let opened = self.decode_uncached(group, head)?;
        if !opened.record.expired(self.now()) {
            return Ok(false);
        }
        let applied = self.backend.apply(crate::backend::Batch {
            group,
            expected: Some(opened.raw),
            clear: false,
            head: crate::backend::HeadChange::Remove,
            deletes: Vec::new(),
            puts: Vec::new(),
        })?;
        Ok(applied == crate::backend::Applied::Done)
    }

    /// Takes away what one memory need not keep; commits, states and moves taken.
    fn collect(&self, name: &str, before_ms: u64, all: bool) -> Result<(u64, u64, u64), Error> {
        self.changing_existing(name, |opened| {
            let found = self.look(opened, false)?;
            if let Some(damage) = found.damages.into_iter().next() {
                return Err(Error::damaged(damage.place, damage.what));
            }
            let mut edit = Edit::of(opened, self.now());
            let old = |entry: &Move| all || entry.time_ms < before_ms;
            let record = &mut edit.record;
            let current: HashSet<u64> = record.refs.values().map(|entry| entry.log).collect();
            let mut roots: BTreeSet<CommitId> = record.refs.values().map(|entry| entry.target).collect();
            let mut moves = 0;
            let mut oldest = record.moves;
            for entry in found.moves.values() {
                if old(entry) && !current.contains(&entry.number) {
                    edit.deletes
                        .push(edit.domain.key(Kind::Log, &crate::record::move_id(entry.number)));
                    moves += 1;
                    continue;
                }
                oldest = oldest.min(entry.number);
                // The last move of a ref is kept for its number; the commit that it left goes with the old ones.
                if !old(entry) {
                    roots.extend(entry.old.into_iter().chain(entry.new));
                }
            }
            record.oldest_move = oldest;
            let reached = found.history.ancestors(roots);
            let used: HashSet<StateId> = reached.iter().map(|id| found.history.0[id].state).collect();
            let mut usage = Usage {
                commits: reached.len() as u64,
                bytes: found.sizes.values().sum(),
            };
            let mut drop = |edit: &mut Edit, kind, id: &[u8; 32]| {
                let key = edit.domain.key(kind, id);
                usage.bytes -= found.sizes.get(&key).copied().unwrap_or(0);
                edit.deletes.push(key);
            };
            let (mut commits, mut states) = (0, 0);
            for id in found.history.0.keys().filter(|id| !reached.contains(id)) {
                drop(&mut edit, Kind::Commit, &id.0);
                edit.record.shallow.remove(id);
                commits += 1;
            }
            for id in found.states.keys().filter(|id| !used.contains(id)) {
                drop(&mut edit, Kind::State, &id.0);
                states += 1;
            }
            edit.nothing = edit.deletes.is_empty() && edit.record.usage == usage;
            edit.record.usage = usage;
            // Looking after a memory is no use of it: its time to live goes on.
            edit.now = opened.record.touched_ms;
            Ok((edit, (commits, states, moves)))
        })
    }

    /// Reads everything in a group. With `strict`, states are read as snapshots too.
    fn look(&self, opened: &Opened, strict: bool) -> Result<Found, Error> {
        let mut found = Found::default();
        let name = Some(opened.record.name.clone());
        let mut damages = Vec::new();
        let mut note = |error: Error| match error {
            Error::Damaged { place, what } => {
                damages.push(Damage {
                    memory: name.clone(),
                    place,
                    what,
                });
                Ok(())
            }
            other => Err(other),
        };
        self.each_value(opened.group, Kind::Commit, |key, value| {
            found.sizes.insert(key, value.len() as u64);
            match self.open_commit(opened, key, &value) {
                Ok(commit) => {
                    found.history.0.insert(commit.id, commit);
                }
                Err(error) => note(error)?,
            }
            Ok(())
        })?;
        self.each_value(opened.group, Kind::State, |key, value| {
            found.sizes.insert(key, value.len() as u64);
            match self.look_at_state(opened, key, &value, strict) {
                Ok((id, length, says)) => {
                    found.states.insert(id, (length, says));
                }
                Err(error) => note(error)?,
            }
            Ok(())
        })?;
        self.each_value(opened.group, Kind::Log, |key, value| {
            let entry = self.open_value(opened, key, &value).and_then(|bytes| {
                let place = || {
                    format!(
                        "{key:?} of {}",
                        self.place(opened.group, Some(&opened.record.name))
                    )
                };
                let entry = Move::decode(&bytes).map_err(|what| Error::damaged(place(), what))?;
                if opened
                    .domain
                    .key(Kind::Log, &crate::record::move_id(entry.number))
                    == key
                {
                    Ok(entry)
                } else {
                    Err(Error::damaged(place(), format!("it holds move {}", entry.number)))
                }
            });
            match entry {
                Ok(entry) => {
                    found.moves.insert(entry.number, entry);
                }
                Err(error) => note(error)?,
            }
            Ok(())
        })?;
        found.damages = damages;
        Ok(found)
    }

    #[allow(clippy::type_complexity)] // the entry of a map that is read once, beside it
    fn look_at_state(
        &self,
        opened: &Opened,
        key: Key,
        value: &[u8],
        strict: bool,
    ) -> Result<(StateId, u64, Option<(Fingerprint, u64)>), Error> {
        let bytes = self.open_value(opened, key, value)?;
        let place = || {
            format!(
                "{key:?} of {}",
                self.place(opened.group, Some(&opened.record.name))
            )
        };
        let id = StateId::of(&bytes);
        if opened.domain.key(Kind::State, &id.0) != key {
            return Err(Error::damaged(place(), format!("it holds the state {id}")));
        }
        let says = if strict {
            let snapshot =
                Snapshot::from_bytes(&bytes).map_err(|error| Error::damaged(place(), error.to_string()))?;
            Some((snapshot.fingerprint(), snapshot.tokens_seen()))
        } else {
            None
        };
        Ok((id, bytes.len() as u64, says))
    }

    /// Looks at everything: pages and checksums of the backend, each head, each commit's id and parents, each state's hash and numbers,
    /// each branch, tag and move. Changes nothing. Work goes on meanwhile.
    ///
    /// # Errors
    /// What the backend says. Damage is no error here: it stands in the report.
    pub fn verify(&self) -> Result<VerifyReport, Error> {
        let mut report = VerifyReport::default();
        for (place, what) in self.backend.check()? {
            report.damages.push(Damage {
                memory: None,
                place,
                what,
            });
        }
        let mut groups = BTreeSet::new();
        if let Err(error) = self.each_group(|group, _| {
            groups.insert(group);
            Ok(())
        }) {
            report.damages.push(damage_of(None, error)?);
        }
        for group in groups {
            self.verify_group(group, &mut report)?;
        }
        report.damages.sort_unstable();
        report.damages.dedup();
        Ok(report)
    }

    fn verify_group(&self, group: Group, report: &mut VerifyReport) -> Result<(), Error> {
        const TRIES: usize = 5;
        for attempt in 1..=TRIES {
            let head = match self.backend.read(group, &[]) {
                Ok(read) => read.head,
                Err(error) => {
                    report.damages.push(damage_of(None, error)?);
                    return Ok(());
                }
            };
            let Some(raw) = head else {
                return Ok(());
            };
            let opened = match self.decode_uncached(group, raw) {
                Ok(opened) => opened,
                Err(error) => {
                    report.damages.push(damage_of(None, error)?);
                    return Ok(());
                }
            };
            let name = Some(opened.record.name.clone());
            let found = match self.look(&opened, true) {
                Ok(found) => found,
                Err(error) => {
                    report.damages.push(damage_of(name, error)?);
                    return Ok(());
                }
            };
            let (damages, unreachable) = self.judge(&opened, &found);
            let moved = || Ok::<_, Error>(self.backend.read(group, &[])?.head.as_ref() != Some(&opened.raw));
            if !damages.is_empty() && attempt < TRIES && moved()? {
                continue;
            }
            report.memories += 1;
            report.commits += found.history.0.len() as u64;
            report.states += found.states.len() as u64;
            report.moves += found.moves.len() as u64;
            report.unreachable += unreachable;
            report.damages.extend(damages);
            return Ok(());
        }
        Ok(())
    }

    /// Whether what a group holds fits together; the damage, and how many objects nothing names.
    fn judge(&self, opened: &Opened, found: &Found) -> (Vec<Damage>, u64) {
        let record = &opened.record;
        let mut damages = found.damages.clone();
        let mut note = |object: String, what: String| {
            damages.push(Damage {
                memory: Some(record.name.clone()),
                place: format!("{object} of {}", self.place(opened.group, Some(&record.name))),
                what,
            });
        };
        for commit in found.history.0.values() {
            let mut generation = 1;
            for parent in &commit.parents {
                match found.history.0.get(parent) {
                    Some(parent) => generation = generation.max(parent.generation + 1),
                    None if record.shallow.contains(&commit.id) => generation = commit.generation,
                    None => {
                        note(
                            format!("commit {}", commit.id),
                            format!("its parent {parent} is missing"),
                        );
                        generation = commit.generation;
                    }
                }
            }
            if generation != commit.generation {
                note(
                    format!("commit {}", commit.id),
                    format!("it has generation {}, expected {generation}", commit.generation),
                );
            }
            match found.states.get(&commit.state) {
                None => note(
                    format!("commit {}", commit.id),
                    format!("its state {} is missing", commit.state),
                ),
                Some((length, says)) => {
                    let expected = Some((commit.fingerprint, commit.tokens_seen));
                    if *length != commit.state_bytes || says.is_some() && *says != expected {
                        note(
                            format!("commit {}", commit.id),
                            format!(
                                "its state {} is of another length, model or number of tokens",
                                commit.state
                            ),
                        );
                    }
                }
            }
        }
        for ((kind, name), entry) in &record.refs {
            let object = format!("the {} {name:?}", kind.word());
            match found.history.0.get(&entry.target) {
                None => note(object, format!("its commit {} is missing", entry.target)),
                Some(commit) if (commit.state, commit.generation) != (entry.state, entry.generation) => {
                    note(object, format!("it does not fit its commit {}", entry.target));
                }
                Some(_) => {}
            }
            match found.moves.get(&entry.log) {
                Some(last) if last.new == Some(entry.target) => {}
                _ => note(
                    format!("the {} {name:?}", kind.word()),
                    format!("its last move {} is missing or leads elsewhere", entry.log),
                ),
            }
        }
        if record.branch(&record.head).is_none() {
            note("HEAD".into(), format!("its branch {:?} is missing", record.head));
        }
        let roots = record.refs.values().map(|entry| entry.target);
        let moved = found
            .moves
            .values()
            .flat_map(|entry| entry.old.into_iter().chain(entry.new));
        let reached = found.history.ancestors(roots.chain(moved));
        let used: HashSet<StateId> = reached.iter().map(|id| found.history.0[id].state).collect();
        let commits = found.history.0.len() - reached.len();
        let states = found.states.keys().filter(|id| !used.contains(id)).count();
        (damages, (commits + states) as u64)
    }

    /// Saves what is whole into another store, which should be empty; this one stays as it is. A commit is whole when its own bytes and
    /// its state are. A branch or tag whose commit is not goes back to the nearest whole one. A memory whose head is lost is
    /// saved as `recovered-` and its group, with a branch for each newest commit; in a store with a key it is lost, since its key was
    /// in the head.
    ///
    /// # Errors
    /// What either backend says, damage of this one excepted; [`Error::Exists`] when `into` has a memory of the same name.
    pub fn repair(&self, into: &Store) -> Result<RepairReport, Error> {
        let mut report = RepairReport::default();
        for (place, what) in self.backend.check()? {
            report.losses.push(Damage {
                memory: None,
                place,
                what,
            });
        }
        // A damaged file may give several heads of one group, of which the newest that opens counts.
        let mut groups: BTreeMap<Group, Vec<Vec<u8>>> = BTreeMap::new();
        if let Err(error) = self.each_group(|group, head| {
            groups.entry(group).or_default().push(head);
            Ok(())
        }) {
            report.losses.push(damage_of(None, error)?);
        }
        for (group, heads) in groups {
            let version = |head: &Vec<u8>| {
                let opened = self.decode_uncached(group, head.clone());
                opened.map_or(0, |opened| opened.record.version)
            };
            if let Some(head) = heads.into_iter().max_by_key(version) {
                self.repair_group(group, head, into, &mut report)?;
            }
        }
        // What was found on the way.
        for (place, what) in self.backend.check()? {
            let damage = Damage {
                memory: None,
                place,
                what,
            };
            if !report.losses.contains(&damage) {
                report.losses.push(damage);
            }
        }
        Ok(report)
    }

    fn repair_group(
        &self,
        group: Group,
        head: Vec<u8>,
        into: &Store,
        report: &mut RepairReport,
    ) -> Result<(), Error> {
        let opened = match self.decode_uncached(group, head.clone()) {
            Ok(opened) => opened,
            Err(error) => {
                report.losses.push(damage_of(None, error)?);
                if self.encrypted() {
                    return Ok(());
                }
                Opened {
                    group,
                    raw: head,
                    domain: Domain::Plain,
                    record: Record::unnamed(format!("recovered-{}", group.to_hex()), self.now()),
                }
            }
        };
        let name = opened.record.name.clone();
        let mut losses = Losses {
            memory: name.clone(),
            found: &mut report.losses,
        };
        let mut left = self.gather_whole(&opened, &mut losses)?;
        let mut edit = Edit::empty(opened.record.clone());
        edit.now = self.now();
        if !restore_refs(&mut edit, &opened.record, &left, &mut losses) {
            losses.note(self.place(group, Some(&name)), "no branch of it is whole");
            return Ok(());
        }
        let roots = edit.record.refs.values().map(|entry| entry.target);
        let former = left
            .moves
            .values()
            .flat_map(|entry| entry.old.into_iter().chain(entry.new));
        let history = &left.history;
        let reached = history.ancestors(roots.chain(former));
        let used: HashSet<StateId> = reached.iter().map(|id| history.0[id].state).collect();
        left.states.retain(|id, _| used.contains(id));
        let cut = |id: &&CommitId| {
            let mut parents = history.0[id].parents.iter();
            parents.any(|parent| !history.0.contains_key(parent))
        };
        edit.record.shallow = reached.iter().filter(cut).copied().collect();
        let moves = left.moves.into_values().chain(edit.moves);
        let whole = Whole {
            record: edit.record,
            commits: reached.iter().map(|id| (*id, history.0[id].encode())).collect(),
            states: left.states,
            moves: moves.map(|entry| (entry.number, entry.encode())).collect(),
        };
        report.memories += 1;
        report.commits += whole.commits.len() as u64;
        into.plant(&name, &whole, "repair")
    }

    /// Every commit that is whole, with its state, and every move that can be read.
    fn gather_whole(&self, opened: &Opened, losses: &mut Losses<'_>) -> Result<Left, Error> {
        let mut left = Left::default();
        for kind in Kind::ALL {
            let listed = self.each_value(opened.group, kind, |key, value| {
                let opening = match kind {
                    Kind::Commit => self.open_commit(opened, key, &value).map(|commit| {
                        left.readable.0.insert(commit.id, commit);
                    }),
                    Kind::State => self
                        .look_at_state(opened, key, &value, true)
                        .and_then(|(id, _, _)| {
                            left.states.insert(id, self.open_value(opened, key, &value)?);
                            Ok(())
                        }),
                    Kind::Log => self.open_value(opened, key, &value).map(|bytes| {
                        if let Ok(entry) = Move::decode(&bytes) {
                            left.moves.insert(entry.number, entry);
                        }
                    }),
                };
                losses.or_pass_on(opening)
            });
            losses.or_pass_on(listed)?;
        }
        for commit in left.readable.0.values() {
            if left.states.contains_key(&commit.state) {
                left.history.0.insert(commit.id, commit.clone());
            } else {
                let what = format!("its state {} is lost", commit.state);
                losses.note(format!("commit {}", commit.id), what);
            }
        }
        Ok(left)
    }
}

/// What is left of a damaged memory.
#[derive(Default)]
struct Left {
    /// Whole commits.
    history: History,
    /// Commits that can be read, though their state may be lost.
    readable: History,
    states: BTreeMap<StateId, Vec<u8>>,
    moves: BTreeMap<u64, Move>,
}

/// What is lost of one memory.
struct Losses<'a> {
    memory: String,
    found: &'a mut Vec<Damage>,
}

impl Losses<'_> {
    fn note(&mut self, place: impl Into<String>, what: impl Into<String>) {
        self.found.push(Damage {
            memory: Some(self.memory.clone()),
            place: place.into(),
            what: what.into(),
        });
    }

    /// Damage is noted, another error passed on.
    fn or_pass_on(&mut self, result: Result<(), Error>) -> Result<(), Error> {
        match result {
            Err(Error::Damaged { place, what }) => {
                self.note(place, what);
                Ok(())
            }
            other => other,
        }
    }
}

/// Points each ref at its commit, or the nearest whole one; without any, a branch at each newest commit. Whether there is a branch.
fn restore_refs(edit: &mut Edit, was: &Record, left: &Left, losses: &mut Losses<'_>) -> bool {
    let history = &left.history;
    edit.record.refs.clear();
    let after = left.moves.keys().last().map_or(0, |last| last + 1);
    edit.record.moves = edit.record.moves.max(after);
    for ((kind, name), entry) in &was.refs {
        let object = format!("the {} {name:?}", kind.word());
        let Some(commit) = nearest_whole(left, entry.target, entry.log) else {
            losses.note(object, "no commit of it is whole");
            continue;
        };
        if commit.id != entry.target {
            let what = format!("commit {} is lost, it goes back to {}", entry.target, commit.id);
            losses.note(object, what);
        }
        edit.move_ref(*kind, name, Some(Target::from(commit)), "repair");
    }
    if edit.record.refs.is_empty() {
        let parents: HashSet<&CommitId> = history.0.values().flat_map(|commit| &commit.parents).collect();
        let tips = history.0.values().filter(|commit| !parents.contains(&commit.id));
        let mut tips: Vec<&Commit> = tips.collect();
        tips.sort_unstable_by_key(|commit| {
            (std::cmp::Reverse((commit.generation, commit.time_ms)), commit.id)
        });
        for commit in tips.into_iter().take(MAX_REFS) {
            let recovered = format!("recovered-{}", &commit.id.to_string()[..12]);
            edit.move_ref(RefKind::Branch, &recovered, Some(Target::from(commit)), "repair");
        }
    }
    if edit.record.branch(&edit.record.head).is_some() {
        return true;
    }
    let branch = edit.record.refs.keys().find(|(kind, _)| *kind == RefKind::Branch);
    let Some((_, branch)) = branch.cloned() else {
        return false;
    };
    edit.record.head = branch;
    true
}

/// The commit that a ref named, or the nearest before it that is whole: along readable parents first, then along the reflog.
/// Of a lost merge's sides, that of the branch it was made on (its first parent) comes first.
fn nearest_whole(left: &Left, target: CommitId, log: u64) -> Option<&Commit> {
    let mut next = Some(log);
    let mut start = Some(target);
    let mut seen = HashSet::new();
    while let Some(id) = start {
        let mut queue = VecDeque::from([id]);
        while let Some(id) = queue.pop_front() {
            if let Some(found) = left.history.0.get(&id) {
                return Some(found);
            }
            if let Some(commit) = left.readable.0.get(&id).filter(|_| seen.insert(id)) {
                queue.extend(&commit.parents);
            }
        }
        let last = next.and_then(|number| left.moves.get(&number));
        start = last.and_then(|last| last.old);
        next = last.and_then(|last| last.previous);
    }
    None
}

fn damage_of(memory: Option<String>, error: Error) -> Result<Damage, Error> {
    match error {
        Error::Damaged { place, what } => Ok(Damage { memory, place, what }),
        other => Err(other),
    }
}

impl Record {
    /// The record of a memory whose own is lost.
    fn unnamed(name: String, now: u64) -> Self {
        Self {
            name,
            instance: [0; 16],
            version: 0,
            created_ms: now,
            touched_ms: now,
            ttl_ms: None,
            limits: Limits::default(),
            usage: Usage::default(),
            head: String::new(),
            refs: BTreeMap::new(),
            moves: 0,
            oldest_move: 0,
            shallow: BTreeSet::new(),
        }
    }
}

impl Edit {
    /// An edit that only moves refs of a record outside a store.
    pub(crate) fn empty(record: Record) -> Self {
        Self {
            group: Group::STORE,
            domain: Domain::Plain,
            now: record.touched_ms,
            record,
            puts: Vec::new(),
            deletes: Vec::new(),
            moves: Vec::new(),
            remove: false,
            nothing: false,
        }
    }
}
