//! A backend on a Redis or Valkey server, for a fleet of workers. It knows keys, scripts and connections; what a head or a value means
//! it does not know.
//!
//! # What stands on the server
//!
//! ```text
//! PREFIX{<group, 64 hex digits>}     one hash per group; the group is the hash tag, so that it lies in one slot
//!   h                                the head
//!   c<32 bytes> s<32 bytes> l<32 bytes>   values: the kind's letter, then the id as raw bytes
//! ```
//!
//! The group of 64 zeros is the store's own. `PREFIX` is `deltamem:` unless the address says `?prefix=`; stores with different prefixes
//! share a server. Redis 4 is the oldest that will do (tested with 7.0); no key ever gets a time to live.
//!
//! # One change, one round trip
//!
//! A change is one script (`EVALSHA`, and `EVAL` once more where the server does not know it yet): it compares the head and makes the whole
//! change, and the server runs nothing beside it. A read is one `HMGET`, so it is of one moment. Listings are `HSCAN` and `SCAN`, never
//! `KEYS`; listing groups takes a second trip for the heads. Where the connection breaks and the answer is lost, the guard tells what
//! came of the change: the head is read again, and
//!
//! * the new head is there, with the values: it was made;
//! * the old head is there and the connection broke: the same change is sent once more. It cannot be made twice, since after the first
//!   time the head is not the expected one and no head comes back. When it is refused then, the outcome stays unknown;
//! * otherwise, and after every timeout: [`Error::Unavailable`], outcome unknown. It is there whole, or not at all.
//!
//! Two writers that put the very same head and values cannot be told apart, so each may hear that it was the one.
//!
//! # The address
//!
//! `redis://[user:password@]host[:port][/database]`, `rediss://` for TLS; `valkey://` and `valkeys://` are the same. Parameters:
//!
//! | parameter | default | what it is |
//! |---|---|---|
//! | `prefix` | `deltamem:` | what every key begins with |
//! | `timeout_ms` | 5000 | how long one call may take, from waiting for a connection to the last answer |
//! | `pool` | 16 | connections at most |
//! | `wait` | 0 | replicas that must have a change before it is acknowledged (`WAIT`, in the same round trip) |
//! | `ca` | the system's | a PEM file with the authorities to trust |
//! | `cert`, `key` | none | PEM files of a client's certificate |
//!
//! A change whose answer is lost takes up to two timeouts more: one for the head, one for the repetition. Looking up the host's name is
//! the system's, and has the system's own limits.
//!
//! # What an acknowledged change is worth
//!
//! As much as the server's own settings, no more. [`RedisBackend::durability`] says what they are.
//!
//! | server | an acknowledged change survives |
//! |---|---|
//! | `appendonly yes`, `appendfsync always` | the death of the process and of the machine, as on a local disk |
//! | `appendonly yes`, `appendfsync everysec` (the server's default) | the process, but of a machine that dies its last second or two is lost |
//! | no append-only file | neither: what came since the last snapshot is lost |
//! | `?wait=N` | also the loss of the primary, if a replica that has it is promoted; a failover may still choose another one |
//!
//! A server that evicts (`maxmemory-policy allkeys-*`) would drop memories without a word and is refused. With `noeviction` a full server
//! answers [`Error::Full`]: nothing of the change is made, while changes that only remove go on.
//!
//! What is removed leaves the server's memory at once and the append-only file with [`Backend::compact`], which asks for its rewriting.
//! Snapshots, replicas' files and backups are the operator's.

mod address;
mod failure;
mod pool;

use std::fmt;
use std::time::{Duration, Instant};

use redis::{Cmd, Script, Value};

use self::address::Address;
use self::failure::{Failure, Fate};
use self::pool::{Lease, Pool};
use super::{Applied, Backend, Batch, Compacted, Cursor, Group, HeadChange, Key, Kind, Page, Read};
use crate::error::Error;

/// The field of a group's head.
const HEAD: &[u8] = b"h";

/// Makes one batch. Arguments: 1 whether a head is expected, 2 the head expected, 3 `keep`, `put` or `remove`, 4 the new head, 5 whether to
/// clear, 6 how many deletes, then the deletes, then field and value of each put. A full server refuses a script's first write and none
/// after it: so the first one is a put where there are puts, and a removal where the batch only removes.
const APPLY: &str = r"
local key = KEYS[1]
local head = redis.call('HGET', key, 'h')
if ARGV[1] == '1' then
  if head ~= ARGV[2] then return {0, head} end
elseif head then
  return {0, head}
end
if ARGV[3] == 'remove' then
  redis.call('UNLINK', key)
  return {1}
end
if ARGV[5] == '1' then redis.call('UNLINK', key) end
local puts = 7 + tonumber(ARGV[6])
local function remove()
  for i = 7, puts - 1, 1000 do
    redis.call('HDEL', key, unpack(ARGV, i, math.min(i + 999, puts - 1)))
  end
end
if puts > #ARGV then remove() end
if ARGV[3] == 'put' then redis.call('HSET', key, 'h', ARGV[4]) end
for i = puts, #ARGV, 1000 do
  redis.call('HSET', key, unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
if puts <= #ARGV then remove() end
return {1}
";

/// One page of a check: the next cursor, whether there is a head, and the fields that are no value of ours.
const CHECK: &str = r"
local page = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', 1000)
local odd = {}
for i = 1, #page[2], 2 do
  local field = page[2][i]
  if field ~= 'h' and not (#field == 33 and string.find('csl', string.sub(field, 1, 1), 1, true)) then
    odd[#odd + 1] = field
  end
end
local headless = redis.call('EXISTS', KEYS[1]) - redis.call('HEXISTS', KEYS[1], 'h')
return {page[1], headless, odd}
";

/// Rests before a call is tried again. As many as there are, so often it is tried again.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(100)];

/// How long a compaction waits for the append-only file; after that the server goes on with it alone.
const REWRITING: Duration = Duration::from_mins(1);

/// Groups as hashes on a server.
pub struct RedisBackend {
    pool: Pool,
    apply: Script,
}

impl fmt::Debug for RedisBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisBackend({})", self.place())
    }
}

/// What a lost change turned out to be.
#[derive(PartialEq)]
enum Standing {
    Made,
    Untouched,
    Unclear,
}

impl RedisBackend {
    /// Connects to the server of an address (see the [module](self)).
    ///
    /// # Errors
    /// [`Error::Server`] for an address, user or password that is wrong and for a server that evicts; [`Error::Unavailable`] when it does
    /// not answer in time.
    pub fn open(address: &str) -> Result<Self, Error> {
        let backend = Self {
            pool: Pool::new(Address::parse(address)?),
            apply: Script::new(APPLY),
        };
        match backend.evicts()? {
            None => Ok(backend),
            Some(problem) => Err(Error::Server {
                place: backend.place(),
                problem,
            }),
        }
    }

    /// What the server does with an acknowledged change, in words; see the table in the [module](self).
    pub fn durability(&self) -> Result<String, Error> {
        let info = self.info("persistence")?;
        let files = if field(&info, "aof_enabled") == Some("1") {
            let mut asked = Cmd::new();
            asked.arg("CONFIG").arg("GET").arg("appendfsync");
            match self.ask(asked)? {
                Value::Array(pair) => match pair.get(1) {
                    Some(Value::BulkString(when)) => {
                        format!("append-only file, fsync {}", String::from_utf8_lossy(when))
                    }
                    _ => "append-only file".to_owned(),
                },
                _ => "append-only file, fsync not told to this user".to_owned(),
            }
        } else {
            "no append-only file: what came since the last snapshot is lost with the process".to_owned()
        };
        Ok(match self.pool.address.replicas {
            0 => files,
            replicas => format!("{files}; acknowledged by {replicas} replicas"),
        })
    }

    fn key(&self, group: Group) -> String {
        format!("{}{{{}}}", self.pool.address.prefix, group.to_hex())
    }

    /// The group of a key, `None` for a key that is no group's.
    fn group(&self, key: &[u8]) -> Option<Group> {
        let hex = key
            .strip_prefix(self.pool.address.prefix.as_bytes())?
            .strip_prefix(b"{")?
            .strip_suffix(b"}")?;
        let group = Group(*blake3::Hash::from_hex(hex).ok()?.as_bytes());
        (group.to_hex().as_bytes() == hex).then_some(group)
    }

    /// Runs `once` on a connection, again where its failure allows that.
    fn attempt<T>(
        &self,
        again: &[Fate],
        mut once: impl FnMut(&mut Lease<'_>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + self.pool.address.timeout;
        let mut pauses = PAUSES.iter();
        loop {
            let failure = match self.pool.lease(deadline).and_then(|mut lease| once(&mut lease)) {
                Ok(done) => return Ok(done),
                Err(failure) => failure,
            };
            match pauses.next() {
                Some(pause) if again.contains(&failure.fate) && Instant::now() + *pause < deadline => {
                    std::thread::sleep(*pause);
                }
                _ => return Err(failure),
            }
        }
    }

    /// The same for what changes nothing, and so may be repeated.
    fn look<T>(&self, once: impl FnMut(&mut Lease<'_>) -> Result<T, Failure>) -> Result<T, Error> {
        self.attempt(&[Fate::Early, Fate::Lost], once)
            .map_err(|failure| *failure.error)
    }

    /// The answer to one command, errors of the server among them.
    fn ask(&self, command: Cmd) -> Result<Value, Error> {
        let commands = [command];
        self.look(|lease| lease.exchange(&commands)?.pop().ok_or_else(|| self.odd("it")))
    }

    fn odd(&self, command: &str) -> Failure {
        Failure::odd(&self.pool.address.place, command)
    }

    /// An answer that is no error.
    fn good(&self, answer: Value) -> Result<Value, Failure> {
        match answer {
            Value::ServerError(error) => Err(Failure::of_server(&self.pool.address.place, &error)),
            answer => Ok(answer),
        }
    }

    fn array(&self, command: &str, answer: Value) -> Result<Vec<Value>, Failure> {
        match self.good(answer)? {
            Value::Array(items) => Ok(items),
            _ => Err(self.odd(command)),
        }
    }

    fn bytes(&self, command: &str, answer: Value) -> Result<Option<Vec<u8>>, Failure> {
        match self.good(answer)? {
            Value::BulkString(bytes) => Ok(Some(bytes)),
            Value::Nil => Ok(None),
            _ => Err(self.odd(command)),
        }
    }

    /// The next cursor and the items of a scan's answer.
    fn scanned(&self, command: &str, answer: Value) -> Result<(u64, Vec<Value>), Failure> {
        let parts: [Value; 2] = self
            .array(command, answer)?
            .try_into()
            .map_err(|_| self.odd(command))?;
        let [cursor, items] = parts;
        let cursor = self
            .bytes(command, cursor)?
            .and_then(|digits| String::from_utf8(digits).ok()?.parse().ok())
            .ok_or_else(|| self.odd(command))?;
        Ok((cursor, self.array(command, items)?))
    }

    /// A part of `INFO`; nothing where the user may not ask.
    fn info(&self, section: &str) -> Result<String, Error> {
        let mut command = Cmd::new();
        command.arg("INFO").arg(section);
        Ok(match self.ask(command)? {
            Value::BulkString(text) => String::from_utf8_lossy(&text).into_owned(),
            // Whatever else is wrong shows itself with the first read.
            _ => String::new(),
        })
    }

    /// What is wrong with a server that drops keys when it is full.
    fn evicts(&self) -> Result<Option<String>, Error> {
        let info = self.info("memory")?;
        Ok(
            match (field(&info, "maxmemory"), field(&info, "maxmemory_policy")) {
                (Some(limit), Some(policy)) if limit != "0" && policy.starts_with("allkeys") => {
                    Some(format!(
                        "the server drops keys when it is full (maxmemory {limit}, maxmemory-policy {policy}), so it would lose memories without \
                 a word; set maxmemory-policy to noeviction, or use a server that is no cache"
                    ))
                }
                _ => None,
            },
        )
    }

    /// Sends a change.
    fn send(&self, lease: &mut Lease<'_>, batch: &Batch) -> Result<Applied, Failure> {
        let address = &self.pool.address;
        // With replicas to wait for, a script that is not known would cost that wait once more: it is sent whole.
        let mut answers = if address.replicas > 0 {
            self.run(lease, "EVAL", APPLY, batch)?
        } else {
            self.run(lease, "EVALSHA", self.apply.get_hash(), batch)?
        };
        if matches!(answers.first(), Some(Value::ServerError(error)) if error.code() == "NOSCRIPT") {
            answers = self.run(lease, "EVAL", APPLY, batch)?;
        }
        let mut answers = answers.into_iter();
        let mut parts = self
            .array("EVALSHA", answers.next().unwrap_or_default())?
            .into_iter();
        match parts.next() {
            Some(Value::Int(1)) => {}
            Some(Value::Int(0)) => {
                let found = self.bytes("EVALSHA", parts.next().unwrap_or_default())?;
                return Ok(Applied::Refused { found });
            }
            _ => return Err(self.odd("EVALSHA")),
        }
        if address.replicas > 0 {
            let have = match answers.next() {
                Some(Value::Int(have)) => u32::try_from(have).unwrap_or(0),
                _ => return Err(self.odd("WAIT")),
            };
            if have < address.replicas {
                let reason = format!(
                    "the change is made on the primary, but {have} of {} replicas confirmed it within {:?}",
                    address.replicas,
                    address.timeout / 2
                );
                return Err(Failure::unavailable(&address.place, Fate::Weak, reason));
            }
        }
        Ok(Applied::Done)
    }

    /// Runs the script, and waits for replicas in the same round trip.
    fn run(
        &self,
        lease: &mut Lease<'_>,
        command: &str,
        script: &str,
        batch: &Batch,
    ) -> Result<Vec<Value>, Failure> {
        let mut change = Cmd::new();
        change.arg(command).arg(script).arg(1).arg(self.key(batch.group));
        change
            .arg(u8::from(batch.expected.is_some()))
            .arg(batch.expected.as_deref().unwrap_or_default());
        match &batch.head {
            HeadChange::Keep => change.arg("keep").arg(""),
            HeadChange::Put(head) => change.arg("put").arg(head.as_slice()),
            HeadChange::Remove => change.arg("remove").arg(""),
        };
        change.arg(u8::from(batch.clear)).arg(batch.deletes.len());
        for key in &batch.deletes {
            change.arg(&value_field(key)[..]);
        }
        for (key, value) in &batch.puts {
            change.arg(&value_field(key)[..]).arg(value.as_slice());
        }
        let mut commands = vec![change];
        let address = &self.pool.address;
        if address.replicas > 0 {
            let mut wait = Cmd::new();
            let limit = u64::try_from(address.timeout.as_millis() / 2).unwrap_or(u64::MAX);
            wait.arg("WAIT").arg(address.replicas).arg(limit);
            commands.push(wait);
        }
        lease.exchange(&commands)
    }

    /// What a change whose answer was lost came to.
    fn standing(&self, batch: &Batch) -> Result<Standing, Error> {
        let keys: Vec<Key> = batch
            .puts
            .iter()
            .map(|(key, _)| *key)
            .chain(batch.deletes.iter().copied())
            .collect();
        let read = self.read(batch.group, &keys)?;
        let head = match &batch.head {
            HeadChange::Put(head) => Some(head),
            HeadChange::Keep => batch.expected.as_ref(),
            HeadChange::Remove => None,
        };
        let values = batch
            .puts
            .iter()
            .map(|(_, value)| Some(value))
            .chain(batch.deletes.iter().map(|_| None));
        let made = read.head.as_ref() == head
            && (batch.head == HeadChange::Remove || values.eq(read.values.iter().map(Option::as_ref)));
        Ok(if made {
            Standing::Made
        } else if read.head == batch.expected {
            Standing::Untouched
        } else {
            Standing::Unclear
        })
    }

    /// Finds out what came of a change whose answer was lost, and repeats it where that is safe.
    fn settle(&self, batch: &Batch, failure: Failure) -> Result<Applied, Error> {
        // No replica is known to have what is found now.
        let sure = self.pool.address.replicas == 0;
        match self.standing(batch) {
            Ok(Standing::Made) if sure => return Ok(Applied::Done),
            // A change that keeps the head could be made a second time, over what others made in between.
            Ok(Standing::Untouched) if failure.fate == Fate::Lost && batch.head != HeadChange::Keep => {}
            _ => return Err(*failure.error),
        }
        match self.attempt(&[Fate::Early], |lease| self.send(lease, batch)) {
            Ok(Applied::Done) => Ok(Applied::Done),
            // The lost one was made late, or somebody else came first: which of the two is not known.
            Ok(Applied::Refused { .. })
            | Err(Failure {
                fate: Fate::Lost | Fate::Silent,
                ..
            }) => match self.standing(batch) {
                Ok(Standing::Made) if sure => Ok(Applied::Done),
                _ => Err(*failure.error),
            },
            Err(failure) => Err(*failure.error),
        }
    }

    /// Where a scan starts on a connection: a cursor of an earlier generation may be another server's, so the scan begins again.
    fn start(from: Option<&Cursor>, lease: &Lease<'_>) -> u64 {
        let part = |at: usize| {
            from.and_then(|cursor| cursor.0.get(at..at + 8))
                .and_then(|bytes| bytes.try_into().ok())
                .map(u64::from_le_bytes)
        };
        match (part(0), part(8)) {
            (Some(generation), Some(cursor)) if generation == lease.generation => cursor,
            _ => 0,
        }
    }

    fn next(cursor: u64, lease: &Lease<'_>) -> Option<Cursor> {
        (cursor != 0).then(|| Cursor([lease.generation.to_le_bytes(), cursor.to_le_bytes()].concat()))
    }

    /// One page of the keys under the prefix.
    fn keys(
        &self,
        lease: &mut Lease<'_>,
        from: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<Vec<u8>>, Failure> {
        let mut scan = Cmd::new();
        scan.arg("SCAN")
            .arg(Self::start(from, lease))
            .arg("MATCH")
            .arg(format!("{}{{*", pattern(&self.pool.address.prefix)))
            .arg("COUNT")
            .arg(limit.clamp(1, 1000));
        let answer = lease.exchange(&[scan])?.pop().unwrap_or_default();
        let (cursor, found) = self.scanned("SCAN", answer)?;
        let items = found
            .into_iter()
            .map(|key| self.bytes("SCAN", key)?.ok_or_else(|| self.odd("SCAN")))
            .collect::<Result<_, _>>()?;
        Ok(Page {
            items,
            next: Self::next(cursor, lease),
        })
    }

    /// Looks through one group's fields; the cursor to go on with, and what is wrong in this page.
    fn checked(&self, key: &[u8], answer: Value) -> Result<(u64, Vec<(String, String)>), Failure> {
        let place = format!("key {}", key.escape_ascii());
        let answer = match answer {
            Value::ServerError(error)
                if error.code() == "WRONGTYPE"
                    || error.details().is_some_and(|text| text.contains("WRONGTYPE")) =>
            {
                return Ok((0, vec![(place, "it holds no hash, so no store wrote it".into())]));
            }
            answer => answer,
        };
        let parts: [Value; 3] = self
            .array("EVAL", answer)?
            .try_into()
            .map_err(|_| self.odd("EVAL"))?;
        let [cursor, headless, odd] = parts;
        let cursor = self
            .bytes("EVAL", cursor)?
            .and_then(|digits| String::from_utf8(digits).ok()?.parse().ok())
            .ok_or_else(|| self.odd("EVAL"))?;
        let mut findings = Vec::new();
        if cursor == 0 && matches!(headless, Value::Int(1)) {
            findings.push((
                place.clone(),
                "it has values but no head, so no memory leads to them".to_owned(),
            ));
        }
        for name in self.array("EVAL", odd)? {
            if let Value::BulkString(name) = name {
                findings.push((
                    place.clone(),
                    format!("its field {} is neither a head nor a value", name.escape_ascii()),
                ));
            }
        }
        Ok((cursor, findings))
    }
}

impl Backend for RedisBackend {
    fn place(&self) -> String {
        self.pool.address.place.clone()
    }

    fn read(&self, group: Group, keys: &[Key]) -> Result<Read, Error> {
        let mut command = Cmd::new();
        command.arg("HMGET").arg(self.key(group)).arg(HEAD);
        for key in keys {
            command.arg(&value_field(key)[..]);
        }
        let commands = [command];
        self.look(|lease| {
            let answer = lease.exchange(&commands)?.pop().unwrap_or_default();
            let mut values = self
                .array("HMGET", answer)?
                .into_iter()
                .map(|value| self.bytes("HMGET", value))
                .collect::<Result<Vec<_>, _>>()?;
            if values.len() != keys.len() + 1 {
                return Err(self.odd("HMGET"));
            }
            let head = values.remove(0);
            Ok(Read { head, values })
        })
    }

    fn apply(&self, batch: Batch) -> Result<Applied, Error> {
        match self.attempt(&[Fate::Early], |lease| self.send(lease, &batch)) {
            Ok(applied) => Ok(applied),
            Err(failure) if matches!(failure.fate, Fate::Lost | Fate::Silent) => self.settle(&batch, failure),
            Err(failure) => Err(*failure.error),
        }
    }

    fn list(
        &self,
        group: Group,
        kind: Kind,
        from: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<(Key, Vec<u8>)>, Error> {
        self.look(|lease| {
            let mut scan = Cmd::new();
            scan.arg("HSCAN")
                .arg(self.key(group))
                .arg(Self::start(from, lease))
                .arg("MATCH")
                .arg(&[kind as u8, b'*'][..])
                .arg("COUNT")
                .arg(limit.clamp(1, 1000));
            let answer = lease.exchange(&[scan])?.pop().unwrap_or_default();
            let (cursor, found) = self.scanned("HSCAN", answer)?;
            let mut items = Vec::with_capacity(found.len() / 2);
            let mut found = found.into_iter();
            while let (Some(name), Some(value)) = (found.next(), found.next()) {
                let (Some(name), Some(value)) = (self.bytes("HSCAN", name)?, self.bytes("HSCAN", value)?)
                else {
                    return Err(self.odd("HSCAN"));
                };
                // Anything else with this letter is left for the check to report.
                if let Some(id) = name.get(1..).and_then(|id| id.try_into().ok()) {
                    items.push((Key { kind, id }, value));
                }
            }
            Ok(Page {
                items,
                next: Self::next(cursor, lease),
            })
        })
    }

    fn groups(&self, from: Option<&Cursor>, limit: usize) -> Result<Page<(Group, Vec<u8>)>, Error> {
        self.look(|lease| {
            let page = self.keys(lease, from, limit)?;
            let groups: Vec<Group> = page
                .items
                .iter()
                .filter_map(|key| self.group(key))
                .filter(|group| *group != Group::STORE)
                .collect();
            let heads: Vec<Cmd> = groups
                .iter()
                .map(|group| {
                    let mut command = Cmd::new();
                    command.arg("HGET").arg(self.key(*group)).arg(HEAD);
                    command
                })
                .collect();
            let mut items = Vec::with_capacity(groups.len());
            if !heads.is_empty() {
                for (group, head) in groups.into_iter().zip(lease.exchange(&heads)?) {
                    // A group may have gone between the two.
                    if let Some(head) = self.bytes("HGET", head)? {
                        items.push((group, head));
                    }
                }
            }
            Ok(Page {
                items,
                next: page.next,
            })
        })
    }

    /// The bytes are those of [`Backend::size`], which removed values have left already. What changes is the allocator's share and the
    /// append-only file, if the user may have it rewritten; it is waited for, a minute at most. The server unlinks the old file some
    /// milliseconds later, by a thread of its own.
    fn compact(&self) -> Result<Compacted, Error> {
        let before = self.size()?;
        let mut purge = Cmd::new();
        purge.arg("MEMORY").arg("PURGE");
        self.ask(purge)?;
        if field(&self.info("persistence")?, "aof_enabled") == Some("1") {
            let deadline = Instant::now() + REWRITING;
            let mut asked = false;
            while Instant::now() < deadline {
                let info = self.info("persistence")?;
                let under_way = ["aof_rewrite_in_progress", "aof_rewrite_scheduled"]
                    .iter()
                    .any(|name| field(&info, name) == Some("1"));
                if !under_way {
                    // One that somebody else began may have seen what is removed by now, so it does not count.
                    if asked {
                        break;
                    }
                    let mut rewrite = Cmd::new();
                    rewrite.arg("BGREWRITEAOF");
                    asked = match self.ask(rewrite)? {
                        Value::ServerError(error) => {
                            !error.details().is_some_and(|text| text.contains("in progress"))
                        }
                        _ => true,
                    };
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(Compacted {
            before,
            after: self.size()?,
        })
    }

    fn check(&self) -> Result<Vec<(String, String)>, Error> {
        let mut findings = Vec::new();
        if let Some(problem) = self.evicts()? {
            findings.push(("the server".to_owned(), problem));
        }
        let mut from = None;
        loop {
            let page = self.look(|lease| self.keys(lease, from.as_ref(), 100))?;
            for key in page.items {
                if self.group(&key).is_none() {
                    let place = format!("key {}", key.escape_ascii());
                    findings.push((place, "its name is no group's, so no store wrote it".to_owned()));
                    continue;
                }
                let mut cursor = 0;
                loop {
                    let mut command = Cmd::new();
                    command.arg("EVAL").arg(CHECK).arg(1).arg(&key[..]).arg(cursor);
                    let answer = self.ask(command)?;
                    let (next, found) = self.checked(&key, answer).map_err(|failure| *failure.error)?;
                    findings.extend(found);
                    cursor = next;
                    if cursor == 0 {
                        break;
                    }
                }
            }
            from = page.next;
            if from.is_none() {
                // A scan may give a key twice.
                findings.sort_unstable();
                findings.dedup();
                return Ok(findings);
            }
        }
    }

    /// Bytes of the server's memory that the groups take, by its own count.
    fn size(&self) -> Result<u64, Error> {
        let mut sizes = std::collections::HashMap::new();
        let mut from = None;
        loop {
            let page = self.look(|lease| {
                let page = self.keys(lease, from.as_ref(), 100)?;
                let commands: Vec<Cmd> = page
                    .items
                    .iter()
                    .map(|key| {
                        let mut command = Cmd::new();
                        command
                            .arg("MEMORY")
                            .arg("USAGE")
                            .arg(&key[..])
                            .arg("SAMPLES")
                            .arg(0);
                        command
                    })
                    .collect();
                let mut items = Vec::with_capacity(commands.len());
                if !commands.is_empty() {
                    for (key, size) in page.items.into_iter().zip(lease.exchange(&commands)?) {
                        match self.good(size)? {
                            Value::Int(size) => items.push((key, u64::try_from(size).unwrap_or(0))),
                            Value::Nil => {}
                            _ => return Err(self.odd("MEMORY USAGE")),
                        }
                    }
                }
                Ok(Page {
                    items,
                    next: page.next,
                })
            })?;
            sizes.extend(page.items);
            from = page.next;
            if from.is_none() {
                return Ok(sizes.values().sum());
            }
        }
    }

    fn close(&self) -> Result<(), Error> {
        self.pool.close();
        Ok(())
    }
}

/// A value's field.
fn value_field(key: &Key) -> [u8; 33] {
    let mut field = [0; 33];
    field[0] = key.kind as u8;
    field[1..].copy_from_slice(&key.id);
    field
}

/// A value of `INFO`.
fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// A text as a pattern that matches only itself.
fn pattern(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '*' | '?' | '[' | ']' | '\\' | '^' | '-') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}
