//! A snapshot: one memory and what a session needs to go on with it, immutable, and its bytes. It knows the safetensors form and
//! trusts none of the bytes that it is given; it reads and writes no files, and runs no model.
//!
//! The bytes are a safetensors file: a little-endian u64 (the header's length), a JSON header, then the tensor `memory`, float32
//! [layers, heads, r, r], S[i, j] with i the value row and j the key column. `__metadata__` holds exactly these strings:
//!
//! | key | value |
//! |---|---|
//! | `format` | `deltamem-snapshot` |
//! | `format_version` | `1` |
//! | `fingerprint` | 64 hex digits: the model that this memory belongs to |
//! | `tokens_seen`, `turns` | decimal u64 |
//! | `sampler_seed` | 64 hex digits: the `ChaCha8` key |
//! | `sampler_position` | decimal, below 2^68: 32-bit words of the stream used so far |
//! | `digest` | 64 hex digits: BLAKE3 of the following |
//!
//! The digest covers, for each other key in ascending order, the key's length (u64, little-endian), the key, the value's length, the
//! value; then the four sizes of the shape (u64, little-endian); then the tensor's bytes. Equal snapshots have equal bytes.

use std::collections::{BTreeMap, HashMap};
use std::str::FromStr;
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::geometry::{Geometry, GeometryError, MAX_BYTES};

const FORMAT: &str = "deltamem-snapshot";
const FORMAT_VERSION: u64 = 1;
const TENSOR: &str = "memory";
const HEADER_AT: usize = 8;
/// A snapshot's header takes some 600 bytes; nothing longer is parsed.
const MAX_HEADER: usize = 16 * 1024;
const KEYS: [&str; 8] = [
    "digest",
    "fingerprint",
    "format",
    "format_version",
    "sampler_position",
    "sampler_seed",
    "tokens_seen",
    "turns",
];

/// Which model a memory belongs to: 32 bytes, written as 64 lower-case hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

/// A text that is no fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is no fingerprint, expected 64 lower-case hex digits")]
pub struct FingerprintError {
    /// The text, shortened.
    pub found: String,
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        from_hex(text).map(Self).ok_or_else(|| FingerprintError {
            found: shortened(text),
        })
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Where a sampler's random stream stands: the key of `ChaCha8` and the number of 32-bit words already used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SamplerState {
    /// The stream's key.
    pub seed: [u8; 32],
    /// Words used, below [`SamplerState::POSITIONS`].
    pub position: u128,
}

impl SamplerState {
    /// Words in one stream: 2^68.
    pub const POSITIONS: u128 = 1 << 68;
}

/// One memory with everything that its session needs to go on. Immutable; cloning is cheap.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    geometry: Geometry,
    fingerprint: Fingerprint,
    memory: Arc<[f32]>,
    tokens_seen: u64,
    turns: u64,
    sampler: SamplerState,
}

/// Why bytes or values are no snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The bytes are not a whole safetensors file.
    #[error(
        "the snapshot's {found} bytes are no safetensors file ({reason}); they were cut or changed, take another copy"
    )]
    Container {
        /// Bytes found.
        found: usize,
        /// What the safetensors form misses.
        reason: String,
    },
    /// A length in the bytes is over its limit.
    #[error(
        "the snapshot's {what} takes {found} bytes, at most {max} are allowed; this is no snapshot of a memory, or it is damaged"
    )]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Bytes found.
        found: u64,
        /// Bytes allowed.
        max: usize,
    },
    /// A safetensors file of another kind.
    #[error(
        "this is no snapshot: `format` is {found}, expected \"{FORMAT}\"; snapshots are made by Session.snapshot()"
    )]
    NotASnapshot {
        /// The format found, or `missing`.
        found: String,
    },
    /// A snapshot of a later version.
    #[error(
        "the snapshot has format_version {found}, this runtime reads {FORMAT_VERSION}; update deltamem-rt"
    )]
    NewerVersion {
        /// The version found.
        found: u64,
    },
    /// A metadata entry is missing, unknown, or not what it must be.
    #[error(
        "the snapshot's metadata `{key}` is {found}, expected {expected}; the snapshot was changed, take another copy"
    )]
    Metadata {
        /// The entry's key, shortened.
        key: String,
        /// What stands there, shortened.
        found: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// The tensors are not the one of a memory.
    #[error(
        "the snapshot's {what}: found {found}, expected {expected}; the snapshot was changed, take another copy"
    )]
    Tensor {
        /// What differs.
        what: &'static str,
        /// What was found, shortened.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// The memory's shape is out of range.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A number of the memory is NaN or infinite.
    #[error(
        "the memory's number {index} is {value}, expected finite numbers only; go back to an earlier snapshot"
    )]
    NotFinite {
        /// Index into the row-major memory.
        index: usize,
        /// `NaN`, `inf` or `-inf`.
        value: String,
    },
    /// The content is not the one that the digest was made of.
    #[error(
        "the snapshot's digest is {found}, its content has {expected}; it was changed after it was written, take another copy"
    )]
    Digest {
        /// The digest that is written.
        found: String,
        /// The digest of the content.
        expected: String,
    },
}

impl Snapshot {
    /// A snapshot of `memory`, float32 [layers, heads, r, r].
    ///
    /// # Errors
    /// [`SnapshotError::Tensor`] when the memory does not have the geometry's size, [`SnapshotError::NotFinite`] when it holds NaN or
    /// infinite numbers, [`SnapshotError::Metadata`] when the sampler's position is beyond its stream.
    pub fn new(
        geometry: Geometry,
        fingerprint: Fingerprint,
        memory: Arc<[f32]>,
        tokens_seen: u64,
        turns: u64,
        sampler: SamplerState,
    ) -> Result<Self, SnapshotError> {
        if memory.len() != geometry.elements() {
            return Err(SnapshotError::Tensor {
                what: "memory",
                found: format!("{} numbers", memory.len()),
                expected: format!("{} for {geometry}", geometry.elements()),
            });
        }
        if let Some(index) = memory.iter().position(|value| !value.is_finite()) {
            return Err(SnapshotError::NotFinite {
                index,
                value: memory[index].to_string(),
            });
        }
        if sampler.position >= SamplerState::POSITIONS {
            return Err(SnapshotError::Metadata {
                key: "sampler_position".into(),
                found: sampler.position.to_string(),
                expected: "a decimal number below 2^68",
            });
        }
        Ok(Self {
            geometry,
            fingerprint,
            memory,
            tokens_seen,
            turns,
            sampler,
        })
    }

    /// The memory's geometry.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The model that the memory belongs to.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The memory, float32 [layers, heads, r, r], row-major.
    pub fn memory(&self) -> &Arc<[f32]> {
        &self.memory
    }

    /// Tokens read since the memory was empty.
    pub fn tokens_seen(&self) -> u64 {
        self.tokens_seen
    }

    /// Turns ended since the memory was empty.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// Where the session's sampler stands.
    pub fn sampler(&self) -> SamplerState {
        self.sampler
    }

    /// The snapshot in safetensors form, as the module describes it. Equal snapshots give equal bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let data: Vec<u8> = self.memory.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut metadata = BTreeMap::from([
            ("format", FORMAT.to_owned()),
            ("format_version", FORMAT_VERSION.to_string()),
            ("fingerprint", self.fingerprint.to_string()),
            ("tokens_seen", self.tokens_seen.to_string()),
            ("turns", self.turns.to_string()),
            ("sampler_seed", to_hex(&self.sampler.seed)),
            ("sampler_position", self.sampler.position.to_string()),
        ]);
        let digest = digest(
            metadata.iter().map(|(key, value)| (*key, value.as_str())),
            self.geometry,
            &data,
        );
        metadata.insert("digest", digest);

        // Every string in the header is plain ASCII without quotes or backslashes, so none needs escaping.
        let metadata: Vec<String> = metadata
            .iter()
            .map(|(key, value)| format!("\"{key}\":\"{value}\""))
            .collect();
        let [layers, heads, rank, _] = self.geometry.shape();
        let mut header = format!(
            "{{\"__metadata__\":{{{}}},\"{TENSOR}\":{{\"dtype\":\"F32\",\"shape\":[{layers},{heads},{rank},{rank}],\"data_offsets\":[0,{}]}}}}",
            metadata.join(","),
            data.len()
        );
        // The tensor begins at a multiple of 8, as safetensors asks.
        while header.len() % 8 != 0 {
            header.push(' ');
        }
        let mut bytes = Vec::with_capacity(HEADER_AT + header.len() + data.len());
        bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&data);
        bytes
    }

    /// The snapshot that `bytes` hold. Everything is checked before a snapshot exists: lengths before anything is parsed, the
    /// metadata, the one tensor's name, type, shape and limits, the digest, and that every number is finite.
    ///
    /// # Errors
    /// [`SnapshotError`] says what was found, what was expected and what to do.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SnapshotError> {
        check_lengths(bytes)?;
        let container = |error: &dyn std::fmt::Display| SnapshotError::Container {
            found: bytes.len(),
            reason: shortened(&error.to_string()),
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| container(&error))?;
        let file = SafeTensors::deserialize(bytes).map_err(|error| container(&error))?;
        let empty = HashMap::new();
        let metadata = Metadata(header.metadata().as_ref().unwrap_or(&empty));
        metadata.check_format()?;

        let tensor = match file.tensor(TENSOR) {
            Ok(tensor) if file.len() == 1 => tensor,
            _ => {
                let mut names: Vec<String> = file
                    .names()
                    .into_iter()
                    .map(|name| format!("{:?}", shortened(name)))
                    .collect();
                names.sort_unstable();
                return Err(SnapshotError::Tensor {
                    what: "tensors",
                    found: shortened(&names.join(", ")),
                    expected: format!("one, {TENSOR:?}"),
                });
            }
        };
        if tensor.dtype() != Dtype::F32 {
            return Err(SnapshotError::Tensor {
                what: "memory's type",
                found: format!("{:?}", tensor.dtype()),
                expected: "F32".into(),
            });
        }
        let geometry = match *tensor.shape() {
            [layers, heads, rows, columns] if rows == columns => Geometry::new(layers, heads, rows)?,
            ref shape => {
                return Err(SnapshotError::Tensor {
                    what: "memory's shape",
                    found: shortened(&format!("{shape:?}")),
                    expected: "[layers, heads, rank, rank]".into(),
                });
            }
        };

        let expected = digest(metadata.without_digest(), geometry, tensor.data());
        let found = metadata.get("digest", "64 lower-case hex digits")?;
        if found != expected {
            return Err(SnapshotError::Digest {
                found: shortened(found),
                expected,
            });
        }
        let memory = tensor
            .data()
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        Self::new(
            geometry,
            Fingerprint(metadata.hex("fingerprint")?),
            memory.collect(),
            metadata.number("tokens_seen")?,
            metadata.number("turns")?,
            SamplerState {
                seed: metadata.hex("sampler_seed")?,
                position: metadata.number("sampler_position")?,
            },
        )
    }
}

/// Checks every length that the bytes claim, before anything is parsed or allocated.
fn check_lengths(bytes: &[u8]) -> Result<(), SnapshotError> {
    let max = HEADER_AT + MAX_HEADER + MAX_BYTES;
    if bytes.len() > max {
        return Err(SnapshotError::TooLong {
            what: "content",
            found: bytes.len() as u64,
            max,
        });
    }
    let Some((length, rest)) = bytes.split_first_chunk::<HEADER_AT>() else {
        return Err(SnapshotError::Container {
            found: bytes.len(),
            reason: format!("it must begin with the {HEADER_AT} bytes of the header's length"),
        });
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER as u64 {
        return Err(SnapshotError::TooLong {
            what: "header",
            found: length,
            max: MAX_HEADER,
        });
    }
    if length > rest.len() as u64 {
        return Err(SnapshotError::Container {
            found: bytes.len(),
            reason: format!("the header takes {length} bytes, {} are there", rest.len()),
        });
    }
    Ok(())
}

/// A snapshot's `__metadata__`, not trusted.
struct Metadata<'a>(&'a HashMap<String, String>);

impl Metadata<'_> {
    /// Checks format and version before anything else is looked at, then that there is no key too many.
    fn check_format(&self) -> Result<(), SnapshotError> {
        match self.0.get("format").map(String::as_str) {
            Some(FORMAT) => {}
            Some(other) => {
                return Err(SnapshotError::NotASnapshot {
                    found: format!("{:?}", shortened(other)),
                });
            }
            None => {
                return Err(SnapshotError::NotASnapshot {
                    found: "missing".into(),
                });
            }
        }
        let version: u64 = self.number("format_version")?;
        if version > FORMAT_VERSION {
            return Err(SnapshotError::NewerVersion { found: version });
        }
        if version < FORMAT_VERSION {
            return Err(SnapshotError::Metadata {
                key: "format_version".into(),
                found: version.to_string(),
                expected: "1",
            });
        }
        match self.0.keys().filter(|key| !KEYS.contains(&key.as_str())).min() {
            Some(key) => Err(SnapshotError::Metadata {
                key: shortened(key),
                found: "unknown to this format version".into(),
                expected: "no such entry",
            }),
            None => Ok(()),
        }
    }

    fn get(&self, key: &'static str, expected: &'static str) -> Result<&str, SnapshotError> {
        self.0
            .get(key)
            .map(String::as_str)
            .ok_or_else(|| SnapshotError::Metadata {
                key: key.into(),
                found: "missing".into(),
                expected,
            })
    }

    fn hex(&self, key: &'static str) -> Result<[u8; 32], SnapshotError> {
        let expected = "64 lower-case hex digits";
        let text = self.get(key, expected)?;
        from_hex(text).ok_or_else(|| SnapshotError::Metadata {
            key: key.into(),
            found: format!("{:?}", shortened(text)),
            expected,
        })
    }

    /// A number in the one form that [`Snapshot::to_bytes`] writes: no sign, no leading zero.
    fn number<N: FromStr + ToString>(&self, key: &'static str) -> Result<N, SnapshotError> {
        let expected = "a decimal number without sign or leading zeros";
        let text = self.get(key, expected)?;
        text.parse()
            .ok()
            .filter(|number: &N| number.to_string() == text)
            .ok_or_else(|| SnapshotError::Metadata {
                key: key.into(),
                found: format!("{:?}", shortened(text)),
                expected,
            })
    }

    /// Every entry but the digest, by ascending key.
    fn without_digest(&self) -> impl Iterator<Item = (&str, &str)> {
        let sorted: BTreeMap<&str, &str> = self
            .0
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        sorted.into_iter().filter(|(key, _)| *key != "digest")
    }
}

/// The digest of a snapshot's content, as the module describes it.
fn digest<'a>(metadata: impl Iterator<Item = (&'a str, &'a str)>, geometry: Geometry, data: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (key, value) in metadata {
        for text in [key, value] {
            hasher
                .update(&(text.len() as u64).to_le_bytes())
                .update(text.as_bytes());
        }
    }
    for size in geometry.shape() {
        hasher.update(&(size as u64).to_le_bytes());
    }
    hasher.update(data);
    hasher.finalize().to_hex().to_string()
}

fn to_hex(bytes: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*bytes).to_hex().to_string()
}

/// The bytes of 64 lower-case hex digits. Only that form is taken, so that one value has one text.
fn from_hex(text: &str) -> Option<[u8; 32]> {
    let hash = blake3::Hash::from_hex(text).ok()?;
    (hash.to_hex().as_str() == text).then(|| *hash.as_bytes())
}

/// A text from outside, short enough for a message.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 120;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn snapshot() -> impl Strategy<Value = Snapshot> {
        let sizes = (1..=3_usize, 1..=3_usize, 1..=9_usize);
        let sampler = (any::<[u8; 32]>(), 0..SamplerState::POSITIONS);
        (sizes, any::<[u8; 32]>(), any::<u64>(), any::<u64>(), sampler).prop_flat_map(
            |((layers, heads, rank), fingerprint, tokens_seen, turns, (seed, position))| {
                let geometry = Geometry::new(layers, heads, rank).unwrap();
                let finite = any::<f32>().prop_map(|value| if value.is_finite() { value } else { 0.0 });
                prop::collection::vec(finite, geometry.elements()).prop_map(move |memory| {
                    let sampler = SamplerState { seed, position };
                    Snapshot::new(
                        geometry,
                        Fingerprint(fingerprint),
                        memory.into(),
                        tokens_seen,
                        turns,
                        sampler,
                    )
                    .unwrap()
                })
            },
        )
    }

    fn example() -> Snapshot {
        let geometry = Geometry::new(2, 1, 4).unwrap();
        let memory = (0..geometry.elements()).map(|i| i as f32 / 7.0 - 2.0).collect();
        let sampler = SamplerState {
            seed: [7; 32],
            position: 12,
        };
        Snapshot::new(geometry, Fingerprint([0xAB; 32]), memory, 1234, 5, sampler).unwrap()
    }

    /// The bytes of a safetensors file with this metadata and one tensor, well formed as such.
    fn file(metadata: &[(&str, &str)], name: &str, dtype: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let metadata: Vec<String> = metadata
            .iter()
            .map(|(key, value)| format!("{key:?}:{value:?}"))
            .collect();
        let header = format!(
            "{{\"__metadata__\":{{{}}},{name:?}:{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[0,{}]}}}}",
            metadata.join(","),
            data.len()
        );
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    /// The metadata of [`example`] with one entry replaced (or added), and the digest made anew.
    fn with(key: &str, value: Option<&str>, shape: [usize; 4], data: &[u8]) -> Vec<u8> {
        let bytes = example().to_bytes();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let mut metadata: BTreeMap<String, String> = header.metadata().clone().unwrap().into_iter().collect();
        metadata.remove("digest");
        metadata.remove(key);
        metadata.extend(value.map(|value| (key.to_owned(), value.to_owned())));
        let geometry = Geometry::new(shape[0], shape[1], shape[2]).unwrap_or(Geometry::new(1, 1, 1).unwrap());
        let made = digest(
            metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())),
            geometry,
            data,
        );
        if key != "digest" {
            metadata.insert("digest".into(), made);
        }
        let entries: Vec<(&str, &str)> = metadata
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        file(&entries, TENSOR, "F32", &format!("{shape:?}"), data)
    }

    fn data() -> Vec<u8> {
        example()
            .memory()
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    fn error(bytes: &[u8]) -> SnapshotError {
        Snapshot::from_bytes(bytes).unwrap_err()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn a_snapshot_survives_its_bytes(snapshot in snapshot()) {
            let bytes = snapshot.to_bytes();
            let read = Snapshot::from_bytes(&bytes).unwrap();
            prop_assert_eq!(read.to_bytes(), bytes);
            prop_assert_eq!(read, snapshot);
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Snapshot::from_bytes(&bytes).is_err());
        }
    }

    /// Bytes that mean something to a header.
    const TELLING: &[u8] = b"\0\xFF\"}]{[,:0192e-+ ";

    #[test]
    fn ten_thousand_mutated_snapshots_are_errors_or_the_original() {
        let original = example();
        let bytes = original.to_bytes();
        let mut state = 0x243F_6A88_85A3_08D3_u64;
        let mut below = |limit: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % limit as u64).unwrap()
        };
        let mut unchanged = 0;
        for _ in 0..10_000 {
            let mut mutant = bytes.clone();
            for _ in 0..=below(3) {
                let at = below(mutant.len().max(1)).min(mutant.len().saturating_sub(1));
                match below(8) {
                    0..=3 if !mutant.is_empty() => mutant[at] ^= 1 << below(8),
                    4 if !mutant.is_empty() => {
                        mutant[at] = TELLING[below(TELLING.len())];
                    }
                    5 => mutant.truncate(at),
                    6 => mutant.insert(at, u8::try_from(below(256)).unwrap()),
                    _ if !mutant.is_empty() => {
                        let end = (at + 1 + below(16)).min(mutant.len());
                        mutant.drain(at..end);
                    }
                    _ => {}
                }
            }
            match Snapshot::from_bytes(&mutant) {
                Ok(read) => {
                    assert_eq!(read, original);
                    unchanged += 1;
                }
                Err(error) => assert!(!error.to_string().is_empty() && error.to_string().len() < 1000),
            }
        }
        assert!(
            unchanged < 1000,
            "{unchanged} mutants were taken for the original"
        );
    }

    #[test]
    fn equal_snapshots_have_equal_bytes_and_this_form() {
        let bytes = example().to_bytes();
        assert_eq!(bytes, example().to_bytes());
        // Changing this changes files that people keep: raise the format version instead.
        assert_eq!(blake3::hash(&bytes).to_hex()[..16], *"865cad2daac64db7");
        assert_eq!(bytes.len() % 8, 0);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.names(), ["memory"]);
        assert_eq!(file.tensor("memory").unwrap().shape(), [2, 1, 4, 4]);
    }

    #[test]
    fn other_files_and_later_versions_are_named() {
        let shape = [2, 1, 4, 4];
        let other = error(&with("format", Some("pt"), shape, &data()));
        assert_eq!(
            other,
            SnapshotError::NotASnapshot {
                found: "\"pt\"".into()
            }
        );
        assert_eq!(
            error(&file(&[], "x", "F32", "[1]", &[0; 4])),
            SnapshotError::NotASnapshot {
                found: "missing".into()
            }
        );
        let newer = error(&with("format_version", Some("2"), shape, &data()));
        assert_eq!(newer, SnapshotError::NewerVersion { found: 2 });
        assert!(newer.to_string().contains("update deltamem-rt"), "{newer}");
    }

    #[test]
    fn metadata_must_be_complete_and_in_one_form() {
        let shape = [2, 1, 4, 4];
        for (key, value) in [
            ("format_version", Some("0")),
            ("format_version", None),
            ("fingerprint", None),
            ("fingerprint", Some("ab")),
            ("tokens_seen", None),
            ("tokens_seen", Some("-1")),
            ("tokens_seen", Some("+1")),
            ("tokens_seen", Some("007")),
            ("turns", Some("18446744073709551616")),
            (
                "sampler_seed",
                Some("ABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABAB"),
            ),
            ("sampler_position", Some("295147905179352825856")),
            ("digest", None),
            ("colour", Some("blue")),
        ] {
            let error = error(&with(key, value, shape, &data()));
            assert!(
                matches!(&error, SnapshotError::Metadata { key: named, .. } if named == key),
                "{key} {value:?}: {error}"
            );
        }
        let wrong = "0".repeat(64);
        assert!(matches!(
            error(&with("digest", Some(&wrong), shape, &data())),
            SnapshotError::Digest { .. }
        ));
    }

    #[test]
    fn the_tensor_must_be_a_memory() {
        // The same bytes under another shape are another memory.
        let mut bytes = with("turns", Some("5"), [2, 1, 4, 4], &data());
        let at = bytes
            .windows(9)
            .position(|window| window == b"[2, 1, 4,")
            .unwrap();
        bytes[at + 1] = b'1';
        bytes[at + 4] = b'2';
        assert!(matches!(error(&bytes), SnapshotError::Digest { .. }));

        assert!(matches!(
            error(&with("turns", Some("5"), [0, 1, 4, 4], &[])),
            SnapshotError::Geometry(_)
        ));
        assert!(matches!(
            error(&with("turns", Some("5"), [8, 2, 2, 1], &data())),
            SnapshotError::Tensor {
                what: "memory's shape",
                ..
            }
        ));
        let metadata = [("format", FORMAT), ("format_version", "1")];
        let half = file(&metadata, TENSOR, "F16", "[1,1,1,1]", &[0; 2]);
        assert!(matches!(
            error(&half),
            SnapshotError::Tensor {
                what: "memory's type",
                ..
            }
        ));
        let flat = file(&metadata, TENSOR, "F32", "[32]", &data());
        assert!(matches!(
            error(&flat),
            SnapshotError::Container { .. }
                | SnapshotError::Tensor {
                    what: "memory's shape",
                    ..
                }
        ));
        let other = file(&metadata, "memories", "F32", "[1,1,1,1]", &[0; 4]);
        assert!(matches!(
            error(&other),
            SnapshotError::Tensor { what: "tensors", .. }
        ));
    }

    #[test]
    fn numbers_must_be_finite() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut data = data();
            data[20..24].copy_from_slice(&bad.to_le_bytes());
            let error = error(&with("turns", Some("5"), [2, 1, 4, 4], &data));
            assert!(
                matches!(error, SnapshotError::NotFinite { index: 5, .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn lengths_are_checked_before_anything_is_parsed() {
        assert!(matches!(error(&[]), SnapshotError::Container { found: 0, .. }));
        assert!(matches!(
            error(&u64::MAX.to_le_bytes()),
            SnapshotError::TooLong {
                what: "header",
                found: u64::MAX,
                ..
            }
        ));
        assert!(matches!(
            error(&100_u64.to_le_bytes()),
            SnapshotError::Container { .. }
        ));
    }

    #[test]
    fn only_values_that_belong_together_make_a_snapshot() {
        let geometry = Geometry::new(1, 1, 2).unwrap();
        let sampler = SamplerState {
            seed: [0; 32],
            position: 0,
        };
        let make = |memory: &[f32], sampler| {
            Snapshot::new(geometry, Fingerprint([0; 32]), memory.into(), 0, 0, sampler)
        };
        assert!(make(&[0.0; 4], sampler).is_ok());
        assert!(matches!(
            make(&[0.0; 3], sampler),
            Err(SnapshotError::Tensor { .. })
        ));
        assert!(matches!(
            make(&[0.0, f32::NAN, 0.0, 0.0], sampler),
            Err(SnapshotError::NotFinite { index: 1, .. })
        ));
        let beyond = SamplerState {
            position: SamplerState::POSITIONS,
            ..sampler
        };
        assert!(matches!(
            make(&[0.0; 4], beyond),
            Err(SnapshotError::Metadata { .. })
        ));
    }

    #[test]
    fn a_fingerprint_has_one_text() {
        let fingerprint = Fingerprint([0x0F; 32]);
        let text = fingerprint.to_string();
        assert_eq!(text.len(), 64);
        assert_eq!(text.parse::<Fingerprint>().unwrap(), fingerprint);
        assert_eq!(
            serde_json::from_str::<Fingerprint>(&serde_json::to_string(&fingerprint).unwrap()).unwrap(),
            fingerprint
        );
        for bad in [
            "",
            "0f",
            &text.to_uppercase(),
            &text[1..],
            &format!("{text}0"),
            &"g".repeat(64),
        ] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
