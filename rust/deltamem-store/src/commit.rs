//! A commit: what it says, its canonical bytes, and the id that is their BLAKE3. Nothing of a commit can change without its id
//! changing; it names its state by the state's hash, so neither can the state.

use std::fmt;
use std::str::FromStr;

use deltamem_core::Fingerprint;
use serde_json::Value;

use crate::codec::{self, Reader, Writer};
use crate::error::{Error, shortened};
use crate::name::MAX_REF_NAME;

/// The longest message, in bytes of UTF-8.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The longest `meta`, in bytes of its canonical JSON.
pub const MAX_META: usize = 16 * 1024;

const ENCODING: u8 = 1;
const COMMIT_CONTEXT: &str = "deltamem_rt store: commit 1";
const STATE_CONTEXT: &str = "deltamem_rt store: state 1";

/// A commit's id: 32 bytes, written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CommitId(pub [u8; 32]);

/// A state's id: BLAKE3 of the snapshot's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StateId(pub [u8; 32]);

macro_rules! shown_as_hex {
    ($($id:ty),*) => { $(
        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
            }
        }
        impl fmt::Debug for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($id), &blake3::Hash::from_bytes(self.0).to_hex()[..12])
            }
        }
    )* };
}
shown_as_hex!(CommitId, StateId);

impl FromStr for CommitId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fingerprint: Result<Fingerprint, _> = text.parse();
        fingerprint.map(|found| Self(found.0)).map_err(|_| Error::Name {
            what: "commit's id",
            found: shortened(text),
            problem: "is no id".into(),
            expected: "64 lower-case hex digits",
        })
    }
}

impl StateId {
    /// The id of a state with these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::derive_key(STATE_CONTEXT, bytes))
    }
}

/// What a model's fingerprint is made of, each a BLAKE3: kept in a commit so that an error can name what differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// The backbone's weights.
    pub backbone: Fingerprint,
    /// The adapter's tensors.
    pub adapter: Fingerprint,
    /// The memory and backbone sections of the bundle.
    pub config: Fingerprint,
    /// Tokenizer and chat template; `None` without a tokenizer.
    pub tokenizer: Option<Fingerprint>,
}

impl Parts {
    /// Which parts of the two models differ.
    pub fn differing(&self, other: &Self) -> Vec<&'static str> {
        [
            ("backbone", self.backbone != other.backbone),
            ("adapter", self.adapter != other.adapter),
            ("tokenizer", self.tokenizer != other.tokenizer),
            ("config", self.config != other.config),
        ]
        .into_iter()
        .filter_map(|(name, differs)| differs.then_some(name))
        .collect()
    }
}

/// One commit of one memory. Immutable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// BLAKE3 of everything below.
    pub id: CommitId,
    /// None for the first commit, two for a merge (the branch's own head first).
    pub parents: Vec<CommitId>,
    /// 1 for a commit without parents, else one more than its parents' greatest: an ancestor's is always smaller.
    pub generation: u64,
    /// The branch that it was made on.
    pub branch: String,
    /// Which state it holds.
    pub state: StateId,
    /// The length of the state's bytes.
    pub state_bytes: u64,
    /// The model that the state belongs to.
    pub fingerprint: Fingerprint,
    /// What the fingerprint is made of, where the committer knew it.
    pub parts: Option<Parts>,
    /// Tokens read since the memory was empty.
    pub tokens_seen: u64,
    /// When it was made: milliseconds since 1970, by the committer's clock.
    pub time_ms: u64,
    /// The committer's words.
    pub message: String,
    /// The committer's data: a JSON object in canonical form.
    pub meta: String,
}

impl Commit {
    /// The id that the content has.
    pub(crate) fn id_of(encoded: &[u8]) -> CommitId {
        CommitId(blake3::derive_key(COMMIT_CONTEXT, encoded))
    }

    /// The canonical bytes: equal contents give equal bytes, other contents other ones.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u8(ENCODING).u64(self.parents.len() as u64);
        for parent in &self.parents {
            out.raw(&parent.0);
        }
        out.u64(self.generation)
            .text(&self.branch)
            .raw(&self.state.0)
            .u64(self.state_bytes)
            .raw(&self.fingerprint.0);
        match &self.parts {
            None => {
                out.u8(0);
            }
            Some(parts) => {
                out.u8(1)
                    .raw(&parts.backbone.0)
                    .raw(&parts.adapter.0)
                    .raw(&parts.config.0)
                    .maybe_id(parts.tokenizer.as_ref().map(|part| &part.0));
            }
        }
        out.u64(self.tokens_seen)
            .u64(self.time_ms)
            .text(&self.message)
            .text(&self.meta);
        out.0
    }

    /// The commit that canonical bytes hold.
    pub(crate) fn decode(bytes: &[u8]) -> codec::Result<Self> {
        let mut from = Reader::new(bytes);
        match from.u8("encoding")? {
            ENCODING => {}
            other => return Err(format!("a commit of encoding {other}, expected {ENCODING}")),
        }
        let count = from.count(32, "parents")?;
        if count > 2 {
            return Err(format!("{count} parents, at most 2 are allowed"));
        }
        let mut parents = Vec::with_capacity(count);
        for _ in 0..count {
            parents.push(CommitId(from.array("a parent")?));
        }
        let generation = from.u64("generation")?;
        let branch = from.text(MAX_REF_NAME, "branch")?;
        let state = StateId(from.array("state")?);
        let state_bytes = from.u64("state's length")?;
        let fingerprint = Fingerprint(from.array("fingerprint")?);
        let parts = match from.u8("parts")? {
            0 => None,
            1 => Some(Parts {
                backbone: Fingerprint(from.array("backbone")?),
                adapter: Fingerprint(from.array("adapter")?),
                config: Fingerprint(from.array("config")?),
                tokenizer: from.maybe_id("tokenizer")?.map(Fingerprint),
            }),
            other => return Err(format!("parts have the flag {other}, expected 0 or 1")),
        };
        let commit = Self {
            id: Self::id_of(bytes),
            parents,
            generation,
            branch,
            state,
            state_bytes,
            fingerprint,
            parts,
            tokens_seen: from.u64("tokens_seen")?,
            time_ms: from.u64("time")?,
            message: from.text(MAX_MESSAGE, "message")?,
            meta: from.text(MAX_META, "meta")?,
        };
        from.end()?;
        Ok(commit)
    }
}

/// Checks a commit's message.
pub(crate) fn check_message(message: &str) -> Result<(), Error> {
    if message.len() <= MAX_MESSAGE {
        return Ok(());
    }
    Err(Error::Name {
        what: "message",
        found: shortened(message),
        problem: format!("has {} bytes", message.len()),
        expected: "at most 65536 bytes",
    })
}

/// A JSON object in canonical form: keys in ascending order of their bytes, no spaces, numbers and strings as `serde_json` writes
/// them. `None` is the empty object.
pub(crate) fn canonical_meta(meta: Option<&str>) -> Result<String, Error> {
    let refuse = |text: &str, problem: String| Error::Name {
        what: "meta",
        found: shortened(text),
        problem,
        expected: "a JSON object of at most 16384 bytes",
    };
    let Some(text) = meta else {
        return Ok("{}".into());
    };
    // Canonical text is never longer than what it was made of by more than escapes; the limit is checked again below.
    if text.len() > 4 * MAX_META {
        return Err(refuse(text, format!("has {} bytes", text.len())));
    }
    let value: Value =
        serde_json::from_str(text).map_err(|error| refuse(text, format!("is no JSON ({error})")))?;
    if !value.is_object() {
        return Err(refuse(text, "is no object".into()));
    }
    let mut canonical = String::new();
    write_canonical(&value, &mut canonical);
    if canonical.len() > MAX_META {
        return Err(refuse(text, format!("has {} bytes", canonical.len())));
    }
    Ok(canonical)
}

fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by_key(|(key, _)| *key);
            out.push('{');
            for (index, (key, value)) in entries.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_canonical(value, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                write_canonical(item, out);
            }
            out.push(']');
        }
        plain => out.push_str(&plain.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn example() -> Commit {
        let mut commit = Commit {
            id: CommitId([0; 32]),
            parents: vec![CommitId([1; 32]), CommitId([2; 32])],
            generation: 7,
            branch: "main".into(),
            state: StateId([3; 32]),
            state_bytes: 10_000,
            fingerprint: Fingerprint([4; 32]),
            parts: Some(Parts {
                backbone: Fingerprint([5; 32]),
                adapter: Fingerprint([6; 32]),
                config: Fingerprint([7; 32]),
                tokenizer: None,
            }),
            tokens_seen: 99,
            time_ms: 1_700_000_000_000,
            message: "Bruno is a dog".into(),
            meta: "{}".into(),
        };
        commit.id = Commit::id_of(&commit.encode());
        commit
    }

    #[test]
    fn a_commits_bytes_give_the_commit_back() {
        let commit = example();
        assert_eq!(Commit::decode(&commit.encode()).unwrap(), commit);
        // Changing this changes ids that people keep: raise the encoding's number instead.
        assert_eq!(commit.id.to_string()[..16], *"279fb91659e7d567");
    }

    #[test]
    fn no_part_changes_without_the_id() {
        let changes: [fn(&mut Commit); 13] = [
            |commit| commit.parents.truncate(1),
            |commit| commit.parents.swap(0, 1),
            |commit| commit.generation += 1,
            |commit| commit.branch.push('x'),
            |commit| commit.state.0[31] ^= 1,
            |commit| commit.state_bytes += 1,
            |commit| commit.fingerprint.0[0] ^= 1,
            |commit| commit.parts = None,
            |commit| commit.tokens_seen += 1,
            |commit| commit.time_ms += 1,
            |commit| commit.message.clear(),
            |commit| commit.meta = "{\"a\":1}".into(),
            |_| (),
        ];
        let ids: std::collections::BTreeSet<CommitId> = changes
            .iter()
            .map(|change| {
                let mut commit = example();
                change(&mut commit);
                Commit::id_of(&commit.encode())
            })
            .collect();
        assert_eq!(ids.len(), 13);
    }

    #[test]
    fn cut_and_lengthened_bytes_are_refused_with_words() {
        let bytes = example().encode();
        for end in 0..bytes.len() {
            assert!(!Commit::decode(&bytes[..end]).unwrap_err().is_empty());
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert_eq!(Commit::decode(&longer).unwrap_err(), "1 bytes follow its end");
    }

    #[test]
    fn meta_has_one_form() {
        let canonical = canonical_meta(Some(
            "{ \"b\": [1, 2.50, null], \"a\": {\"z\": \"é\\n\", \"y\": true} }",
        ))
        .unwrap();
        assert_eq!(
            canonical,
            "{\"a\":{\"y\":true,\"z\":\"é\\n\"},\"b\":[1,2.5,null]}"
        );
        assert_eq!(canonical_meta(Some(&canonical)).unwrap(), canonical);
        assert_eq!(canonical_meta(None).unwrap(), "{}");
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(MAX_META));
        let deep = format!("{{\"a\":{}}}", "[".repeat(2000));
        for bad in ["", "[]", "1", "{", "{\"a\":1e999}", &long, &deep] {
            assert!(canonical_meta(Some(bad)).is_err(), "{}", shortened(bad));
        }
    }
}
