//! A bundle on disk: its manifest, typed, and the proof that the files are the ones that the exporter wrote (docs/bundle.md is the
//! contract). It trusts nothing it reads: sizes come before reading, digests before use. It knows nothing of what runs the graph.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use deltamem_core::health::Bounds;
use deltamem_core::{Fingerprint, Gates, Geometry, UpdateMode};
use serde::{Deserialize, Deserializer, Serialize};

/// The manifest's file name.
pub const MANIFEST: &str = "deltamem.json";
/// The only format version that this runtime reads.
pub const FORMAT_VERSION: u64 = 1;

const FORMAT: &str = "deltamem-bundle";
/// A manifest takes a few KB; nothing longer is read.
const MAX_MANIFEST: u64 = 16 << 20;
/// No size in a manifest may be larger, so that products of a few of them cannot overflow.
const MAX_SIZE: usize = 1 << 24;
/// Extra states that a turn may carry, and how many sizes the shape of one may have.
const MAX_STATES: usize = 4096;
const MAX_STATE_RANK: usize = 6;

/// How much of a bundle is checked before any of it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// Every byte of every file, by BLAKE3.
    #[default]
    Full,
    /// Every byte of the manifest; that the other files are there and have the right size. For starting large bundles that were
    /// checked in full before.
    Sizes,
}

/// `deltamem.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `deltamem-bundle`.
    pub format: String,
    /// The version of the format, 1.
    pub format_version: u64,
    /// BLAKE3 of the manifest's bytes with these 64 characters replaced by 0.
    pub digest: String,
    /// The bundle's name, for people.
    pub name: String,
    /// Which memories the bundle may load: BLAKE3 of the parts.
    pub fingerprint: Fingerprint,
    /// What the fingerprint is made of.
    pub fingerprint_parts: FingerprintParts,
    /// The frozen model.
    pub backbone: Backbone,
    /// The memory and its rule.
    pub memory: Memory,
    /// The first graph: the processor's if there is one. [`Bundle::on`] puts another in its place.
    pub graph: Graph,
    /// The graphs for further devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub graphs: Vec<Graph>,
    /// The precision that the backbone was exported in for `graph`: `fp32`, `fp16`, `bf16`, `int8` or `int4`.
    pub precision: String,
    /// Special tokens.
    pub tokens: SpecialTokens,
    /// Files for text; `None` for a bundle of token ids only.
    #[serde(default)]
    pub text: Option<TextFiles>,
    /// Every other file of the bundle.
    pub files: BTreeMap<String, FileEntry>,
    /// What the exporter compared the graph with; `None` when it did not.
    #[serde(default)]
    pub check: Option<Check>,
    /// What healthy memories of this bundle look like; `None` when nothing was calibrated.
    #[serde(default)]
    pub health: Option<Health>,
    /// Names and versions of the programs that made the bundle.
    #[serde(default)]
    pub made_by: BTreeMap<String, String>,
}

/// What a fingerprint is made of, each a BLAKE3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FingerprintParts {
    /// The backbone's weights.
    pub backbone: Fingerprint,
    /// The adapter's tensors.
    pub adapter: Fingerprint,
    /// The memory and backbone sections.
    pub config: Fingerprint,
    /// Tokenizer and chat template; `None` (in the file: null or "none") without a tokenizer.
    #[serde(default, deserialize_with = "fingerprint_or_none")]
    pub tokenizer: Option<Fingerprint>,
}

/// The frozen model's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Backbone {
    /// Its class, such as `Qwen3ForCausalLM`.
    pub architecture: String,
    /// Its family, such as `qwen3`.
    pub model_type: String,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of one attention head.
    pub head_dim: usize,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// The most tokens in one turn.
    pub context_length: usize,
}

/// The memory's shape and rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// The layers that carry a memory, ascending.
    pub layers: Vec<usize>,
    /// State heads in each.
    pub heads: usize,
    /// Rank of each state.
    pub rank: usize,
    /// alpha of alpha / r.
    pub alpha: f64,
    /// How β and λ become gates.
    pub update_mode: UpdateMode,
    /// Whether λ = 1 − β.
    pub couple_lambda: bool,
    /// Gates per row or per head.
    pub gates: Gates,
    /// Whether q and k are l2(tanh(W h)), per head, or W h as it is.
    pub normalize_qk: bool,
    /// The projections that are corrected, in the order q k v o.
    pub delta_heads: Vec<DeltaHead>,
    /// What one write covers.
    pub write_granularity: WriteGranularity,
}

/// A projection of the attention that the memory corrects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeltaHead {
    /// The query projection.
    Q,
    /// The key projection.
    K,
    /// The value projection.
    V,
    /// The output projection.
    O,
}

/// What one write into the memory covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum WriteGranularity {
    /// Each token writes.
    Token,
    /// The mean over a message writes.
    Message,
    /// The mean over a sentence writes.
    Sentence,
}

impl Memory {
    /// The gates that each token has: β, and λ where it is not 1 − β.
    pub fn gate_kinds(&self) -> usize {
        if self.couple_lambda || self.update_mode == UpdateMode::NoLambda {
            1
        } else {
            2
        }
    }

    /// The numbers of one of them: one a head, or one a row.
    pub fn gate_width(&self) -> usize {
        match self.gates {
            Gates::Head => self.heads,
            Gates::Row => self.heads * self.rank,
        }
    }
}

impl WriteGranularity {
    /// The word for it: `token`, `message` or `sentence`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Message => "message",
            Self::Sentence => "sentence",
        }
    }
}

/// A device that a graph can be for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GraphDevice {
    /// The processor.
    Cpu,
    /// A GPU by CUDA.
    Cuda,
}

impl GraphDevice {
    /// The word for it: `cpu` or `cuda`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

impl std::fmt::Display for GraphDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A graph's files and its KV cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools)] // the file has them
pub struct Graph {
    /// What it was exported for; [`Manifest::device`] knows what a missing one means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<GraphDevice>,
    /// The precision of its backbone, in a further graph; that of the first stands in the manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// What the exporter compared it with, in a further graph; that of the first stands in the manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<Check>,
    /// Why it was not compared, or what of it could not be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_checked: Option<String>,
    /// Every file that it needs; several graphs may share one. Empty in older bundles.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// The type of its logits, `float32`.
    #[serde(default)]
    pub logits_dtype: ElementType,
    /// The graph.
    pub file: String,
    /// The same graph with the input `strength` and the outputs `delta_energy`, `queries` and `gates`.
    #[serde(default)]
    pub measured_file: Option<String>,
    /// The same graph with one node of this runtime's own for each memory layer, for the graph's own device; `None`: this bundle has none.
    #[serde(default)]
    pub fused_file: Option<String>,
    /// Why it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_fused: Option<String>,
    /// The fused graph, or the portable one where there is no fused one, with this runtime's own products of weights in blocks of 4 or 8
    /// bits; `None`: this bundle has none.
    #[serde(default)]
    pub blocks_file: Option<String>,
    /// The layers with a KV cache, ascending.
    pub kv_layers: Vec<usize>,
    /// The cache's element type.
    pub kv_dtype: ElementType,
    /// Whether one buffer may be bound as past and as present. Otherwise they are two, of exactly the tokens that there are.
    pub shared_kv: bool,
    /// Whether the graph wants `position_ids`.
    pub position_ids: bool,
    /// What else a layer carries inside a turn.
    #[serde(default)]
    pub states: Vec<TurnState>,
    /// W, the numbers that one layer gathers for a span; `None` where each token writes.
    #[serde(default)]
    pub span_width: Option<usize>,
    /// Whether the measured graph has the input `strength`.
    #[serde(default)]
    pub strength: bool,
    /// Whether the measured graph has the output `gates`.
    #[serde(default)]
    pub gates: bool,
}

/// A type of numbers in the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ElementType {
    /// 32-bit floats.
    #[default]
    Float32,
    /// 16-bit floats (IEEE).
    Float16,
    /// 16-bit floats with the exponent of 32-bit ones.
    Bfloat16,
    /// 8-bit integers.
    Int8,
}

impl ElementType {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Int8 => 1,
        }
    }
}

/// What a layer carries inside a turn beside keys and values, such as the tail of a convolution. Zeros at the start of a turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TurnState {
    /// The graph's input.
    pub input: String,
    /// The graph's output, the next call's input.
    pub output: String,
    /// Its numbers: `float32`, `float16` or `bfloat16`.
    pub dtype: ElementType,
    /// Its shape, without the batch in front.
    pub shape: Vec<usize>,
}

/// Special tokens by id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    /// Begins a text.
    #[serde(default)]
    pub bos: Option<i32>,
    /// Each of them ends a reply.
    pub eos: Vec<i32>,
    /// Fills a batch.
    #[serde(default)]
    pub pad: Option<i32>,
}

/// Files and strings for text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextFiles {
    /// The tokenizer's file.
    pub tokenizer: String,
    /// The chat template's file.
    #[serde(default)]
    pub chat_template: Option<String>,
    /// What templates see as `bos_token`.
    #[serde(default)]
    pub bos_token: Option<String>,
    /// What templates see as `eos_token`.
    #[serde(default)]
    pub eos_token: Option<String>,
}

/// One file of the bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its size.
    pub bytes: u64,
    /// Its content.
    pub blake3: Fingerprint,
}

/// What healthy memories look like: learnt from conversations that the exporter played through the bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// What was played.
    pub stream: CalibrationStream,
    /// The bounds are the largest figures seen, times this.
    pub margin: f64,
    /// At which quantiles `figures` stand.
    pub quantiles: Vec<f64>,
    /// What was seen, for people: a figure's name to its quantiles for each place.
    pub figures: BTreeMap<String, serde_json::Value>,
    /// What healthy memories stay under.
    pub bounds: Bounds,
}

/// What a bundle was calibrated on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationStream {
    /// In words.
    pub description: String,
    /// Conversations, each begun with an empty memory.
    pub conversations: u64,
    /// Turns in all of them.
    pub turns: u64,
    /// Those that were left out, because a reply had run into its limit in them or shortly before.
    #[serde(default)]
    pub left_out: u64,
    /// Tokens in all of them.
    pub tokens: u64,
}

/// What the exporter compared the graph with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// The reference and its version.
    pub against: String,
    /// Tokens compared.
    pub tokens: u64,
    /// The largest difference in the logits.
    pub max_abs_diff: f64,
    /// The mean difference.
    #[serde(default)]
    pub mean_abs_diff: Option<f64>,
    /// The largest that was allowed.
    pub tolerance: f64,
    /// What was compared.
    #[serde(default)]
    pub method: CheckMethod,
}

/// What the exporter compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CheckMethod {
    /// The logits of the whole model.
    #[default]
    Whole,
    /// Layer by layer on sampled inputs.
    Layers,
}

/// Why a directory cannot be used as a bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// Nothing lies at the path.
    #[error("{}: no such bundle; a bundle is a directory that holds {MANIFEST}, made by `deltamem-export bundle`", path.display())]
    NotFound {
        /// The path asked for.
        path: PathBuf,
    },
    /// Something else lies at the path.
    #[error("{} is no bundle: {why}; a bundle is a directory that holds {MANIFEST}, made by `deltamem-export bundle`", path.display())]
    NotABundle {
        /// The path asked for.
        path: PathBuf,
        /// What it is instead.
        why: String,
    },
    /// A bundle of another version of the format.
    #[error(
        "{MANIFEST}: format_version is {found}, this runtime reads {FORMAT_VERSION}; {}",
        if *found > FORMAT_VERSION { "update deltamem-rt" } else { "export the bundle again" }
    )]
    UnsupportedVersion {
        /// The version found.
        found: u64,
    },
    /// A file is missing or not the one that the exporter wrote.
    #[error(
        "{file}: found {found}, expected {expected}; the bundle is incomplete or was changed, copy or export it again"
    )]
    Damaged {
        /// The file's name in the bundle.
        file: String,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// The bundle has no graph for a device.
    #[error(
        "{MANIFEST}: the bundle's graphs are for {}, not for {device}; add one with `deltamem-export bundle --backbone DIR --adapter DIR \
         --device {device}{} --into {}`",
        found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and "),
        if *device == GraphDevice::Cuda { " --precision fp16" } else { "" },
        path.display()
    )]
    NoGraph {
        /// The bundle's directory.
        path: PathBuf,
        /// The device asked for.
        device: GraphDevice,
        /// The devices that it has graphs for.
        found: Vec<GraphDevice>,
    },
    /// The manifest is whole, but says what cannot be.
    #[error("{MANIFEST}: {field} is {found}, expected {expected}; export the bundle again")]
    Inconsistent {
        /// The entry, with its path in the manifest.
        field: String,
        /// What stands there.
        found: String,
        /// What could stand there.
        expected: String,
    },
    /// The system could not read a file.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: std::io::Error,
    },
}

/// A bundle whose manifest was read and whose files were checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
    manifest: Manifest,
    geometry: Geometry,
}

impl Bundle {
    /// Reads the manifest in the directory `path` and checks the bundle against it.
    ///
    /// # Errors
    /// [`BundleError`] says what was found, what was expected and what to do.
    pub fn open(path: &Path, verify: Verify) -> Result<Self, BundleError> {
        let dir = directory(path)?;
        let bytes = read_manifest(path, &dir)?;
        let manifest = parse_manifest(path, &bytes)?;
        let geometry = check_consistency(&manifest)?;
        for (name, entry) in &manifest.files {
            check_file(&dir, name, *entry, verify)?;
        }
        Ok(Self {
            dir,
            manifest,
            geometry,
        })
    }

    /// The bundle with the graph for `device` in the place of the first one: `manifest().graph`, `.precision` and `.check` are that graph's,
    /// and the graph that stood there is among `manifest().graphs`. The fingerprint is the bundle's, so memories go from one to the other.
    ///
    /// # Errors
    /// [`BundleError::NoGraph`] for a device that the bundle has no graph for.
    pub fn on(mut self, device: GraphDevice) -> Result<Self, BundleError> {
        if self.manifest.put_first(device) {
            Ok(self)
        } else {
            Err(BundleError::NoGraph {
                found: self.manifest.devices(),
                path: self.dir,
                device,
            })
        }
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The bundle's directory, absolute.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file `name` of the bundle lies.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The memory's geometry.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Which memories the bundle may load.
    pub fn fingerprint(&self) -> Fingerprint {
        self.manifest.fingerprint
    }
}

impl Manifest {
    /// The precision that runs on both devices: its operators exist for both.
    const ON_BOTH: &'static str = "fp16";

    /// What a graph of this bundle was exported for: what it says, or what older exporters meant, who did not.
    pub fn device(&self, graph: &Graph) -> GraphDevice {
        graph.device.unwrap_or(match self.precision_of(graph) {
            "bf16" => GraphDevice::Cuda,
            _ => GraphDevice::Cpu,
        })
    }

    /// The precision of a graph of this bundle.
    pub fn precision_of<'a>(&'a self, graph: &'a Graph) -> &'a str {
        graph.precision.as_deref().unwrap_or(&self.precision)
    }

    /// The graph for a device: its own, or one that runs on both.
    pub fn graph_on(&self, device: GraphDevice) -> Option<&Graph> {
        let mut all = std::iter::once(&self.graph).chain(&self.graphs);
        let own = all.clone().find(|graph| self.device(graph) == device);
        own.or_else(|| all.find(|graph| self.precision_of(graph) == Self::ON_BOTH))
    }

    /// The devices that the bundle has a graph for.
    pub fn devices(&self) -> Vec<GraphDevice> {
        let all = [GraphDevice::Cpu, GraphDevice::Cuda];
        all.into_iter()
            .filter(|&device| self.graph_on(device).is_some())
            .collect()
    }

    /// Puts the graph for a device first, with what the manifest says of the first graph outside it; false: there is none.
    fn put_first(&mut self, device: GraphDevice) -> bool {
        let Some(wanted) = self.graph_on(device) else {
            return false;
        };
        if let Some(at) = self.graphs.iter().position(|graph| graph == wanted) {
            // Each graph says all of itself before they change places.
            self.graph.device = Some(self.device(&self.graph));
            let mut next = self.graphs[at].clone();
            next.device = Some(self.device(&next));
            let precision = next.precision.take();
            let precision = precision.unwrap_or_else(|| self.precision.clone());
            let mut first = std::mem::replace(&mut self.graph, next);
            first.precision = Some(std::mem::replace(&mut self.precision, precision));
            first.check = std::mem::replace(&mut self.check, self.graph.check.take());
            self.graphs[at] = first;
        }
        true
    }
}

impl FingerprintParts {
    /// The fingerprint that these parts make.
    pub fn fingerprint(&self) -> Fingerprint {
        let tokenizer = self
            .tokenizer
            .map_or_else(|| "none".to_owned(), |part| part.to_string());
        let joined = format!(
            "{}\n{}\n{}\n{tokenizer}",
            self.backbone, self.adapter, self.config
        );
        Fingerprint(*blake3::hash(joined.as_bytes()).as_bytes())
    }
}

fn fingerprint_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Fingerprint>, D::Error> {
    match Option::<String>::deserialize(deserializer)?.as_deref() {
        None | Some("none") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

fn directory(path: &Path) -> Result<PathBuf, BundleError> {
    match path.canonicalize() {
        Ok(dir) if dir.is_dir() => Ok(dir),
        Ok(_) => Err(BundleError::NotABundle {
            path: path.into(),
            why: "it is a file".into(),
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(BundleError::NotFound { path: path.into() })
        }
        Err(error) => Err(BundleError::Io {
            path: path.into(),
            error,
        }),
    }
}

fn read_manifest(path: &Path, dir: &Path) -> Result<Vec<u8>, BundleError> {
    let file_path = dir.join(MANIFEST);
    let io = |error| BundleError::Io {
        path: file_path.clone(),
        error,
    };
    let metadata = match file_path.metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(BundleError::NotABundle {
                path: path.into(),
                why: format!("it holds no {MANIFEST}"),
            });
        }
        Err(error) => return Err(io(error)),
    };
    if !metadata.is_file() {
        return Err(BundleError::NotABundle {
            path: path.into(),
            why: format!("its {MANIFEST} is not a plain file"),
        });
    }
    let too_long = |found: u64| BundleError::Damaged {
        file: MANIFEST.into(),
        found: format!("{found} bytes or more"),
        expected: format!("at most {MAX_MANIFEST}"),
    };
    if metadata.len() > MAX_MANIFEST {
        return Err(too_long(metadata.len()));
    }
    let mut bytes = Vec::new();
    // Bounded again: the file may have grown since its size was asked.
    File::open(&file_path)
        .map_err(io)?
        .take(MAX_MANIFEST + 1)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    if bytes.len() as u64 > MAX_MANIFEST {
        return Err(too_long(bytes.len() as u64));
    }
    Ok(bytes)
}

/// What every version of the format has, read before anything that a version may change.
#[derive(Deserialize)]
struct Heading {
    format: String,
    format_version: u64,
    #[serde(default)]
    digest: String,
}

fn parse_manifest(path: &Path, bytes: &[u8]) -> Result<Manifest, BundleError> {
    let heading: Heading = serde_json::from_slice(bytes).map_err(|error| BundleError::Damaged {
        file: MANIFEST.into(),
        found: format!("what is no manifest ({error})"),
        expected: "JSON with format and format_version".into(),
    })?;
    if heading.format != FORMAT {
        return Err(BundleError::NotABundle {
            path: path.into(),
            why: format!(
                "the format of its {MANIFEST} is {:.60?}, not {FORMAT:?}",
                heading.format
            ),
        });
    }
    if heading.format_version != FORMAT_VERSION {
        return Err(BundleError::UnsupportedVersion {
            found: heading.format_version,
        });
    }
    check_own_digest(bytes, &heading.digest)?;
    serde_json::from_slice(bytes).map_err(|error| BundleError::Inconsistent {
        field: format!("line {}, column {}", error.line(), error.column()),
        found: error.to_string(),
        expected: "what docs/bundle.md describes".into(),
    })
}

/// Compares the manifest's digest with the digest of its bytes, in which the 64 digits themselves count as zeros.
fn check_own_digest(bytes: &[u8], digest: &str) -> Result<(), BundleError> {
    let damaged = |found: String, expected: String| BundleError::Damaged {
        file: MANIFEST.into(),
        found,
        expected,
    };
    let Ok(found) = digest.parse::<Fingerprint>() else {
        return Err(damaged(
            format!("the digest {digest:.80?}"),
            "64 lower-case hex digits".into(),
        ));
    };
    let places: Vec<usize> = (0..bytes.len().saturating_sub(63))
        .filter(|&at| bytes[at..].starts_with(digest.as_bytes()))
        .collect();
    let [at] = places[..] else {
        return Err(damaged(
            format!("its digest {} times", places.len()),
            "it once".into(),
        ));
    };
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&bytes[..at])
        .update(&[b'0'; 64])
        .update(&bytes[at + 64..]);
    let expected = Fingerprint(*hasher.finalize().as_bytes());
    if found == expected {
        Ok(())
    } else {
        Err(damaged(
            format!("the digest {found}"),
            format!("{expected}, the digest of its content"),
        ))
    }
}

#[allow(clippy::needless_pass_by_value)] // most callers make the value for this call
fn inconsistent(field: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> BundleError {
    BundleError::Inconsistent {
        field: field.into(),
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

fn check_consistency(manifest: &Manifest) -> Result<Geometry, BundleError> {
    let made = manifest.fingerprint_parts.fingerprint();
    if manifest.fingerprint != made {
        return Err(inconsistent(
            "fingerprint",
            manifest.fingerprint,
            format!("{made}, which its parts make"),
        ));
    }
    check_backbone(&manifest.backbone)?;
    let geometry = check_memory(&manifest.memory, &manifest.backbone)?;
    check_graphs(manifest)?;
    check_tokens(manifest)?;
    check_names(manifest)?;
    if let Some(health) = &manifest.health {
        health
            .bounds
            .check(geometry, manifest.memory.delta_heads.len())
            .map_err(|(name, found, expected)| {
                inconsistent(&format!("health.bounds.{name}"), found, expected)
            })?;
    }
    Ok(geometry)
}

fn check_backbone(backbone: &Backbone) -> Result<(), BundleError> {
    for (field, found) in [
        ("backbone.hidden_size", backbone.hidden_size),
        ("backbone.num_layers", backbone.num_layers),
        ("backbone.num_attention_heads", backbone.num_attention_heads),
        ("backbone.num_kv_heads", backbone.num_kv_heads),
        ("backbone.head_dim", backbone.head_dim),
        ("backbone.vocab_size", backbone.vocab_size),
        ("backbone.context_length", backbone.context_length),
    ] {
        if found == 0 || found > MAX_SIZE {
            return Err(inconsistent(field, found, format!("1 to {MAX_SIZE}")));
        }
    }
    if !backbone.num_attention_heads.is_multiple_of(backbone.num_kv_heads) {
        return Err(inconsistent(
            "backbone.num_attention_heads",
            backbone.num_attention_heads,
            format!(
                "a multiple of the {} of backbone.num_kv_heads",
                backbone.num_kv_heads
            ),
        ));
    }
    Ok(())
}

fn check_memory(memory: &Memory, backbone: &Backbone) -> Result<Geometry, BundleError> {
    ascending("memory.layers", &memory.layers, backbone.num_layers)?;
    let geometry = Geometry::new(memory.layers.len(), memory.heads, memory.rank)
        .map_err(|error| inconsistent("memory", format!("{} layers", memory.layers.len()), error))?;
    if !memory.alpha.is_finite() {
        return Err(inconsistent("memory.alpha", memory.alpha, "a finite number"));
    }
    if memory.delta_heads.is_empty() || !memory.delta_heads.is_sorted_by(|a, b| a < b) {
        return Err(inconsistent(
            "memory.delta_heads",
            format!("{:?}", memory.delta_heads),
            "some of q, k, v, o, each once, in that order",
        ));
    }
    Ok(geometry)
}

/// A bundle's graphs, first to last, and what the manifest calls each.
fn graphs(manifest: &Manifest) -> impl Iterator<Item = (String, &Graph)> {
    let further = manifest.graphs.iter().enumerate();
    std::iter::once(("graph".to_owned(), &manifest.graph))
        .chain(further.map(|(at, graph)| (format!("graphs[{at}]"), graph)))
}

fn check_graphs(manifest: &Manifest) -> Result<(), BundleError> {
    let mut devices = std::collections::BTreeSet::new();
    for (at, graph) in graphs(manifest) {
        let device = manifest.device(graph);
        if !devices.insert(device) {
            return Err(inconsistent(
                &format!("{at}.device"),
                device,
                "a device that no other graph of the bundle is for",
            ));
        }
        if graph.logits_dtype != ElementType::Float32 {
            return Err(inconsistent(
                &format!("{at}.logits_dtype"),
                format!("{:?}", graph.logits_dtype).to_lowercase(),
                "float32",
            ));
        }
        ascending(
            &format!("{at}.kv_layers"),
            &graph.kv_layers,
            manifest.backbone.num_layers,
        )?;
        check_spans(manifest.memory.write_granularity, &at, graph)?;
        check_states(&at, &graph.states)?;
    }
    Ok(())
}

fn check_spans(granularity: WriteGranularity, at: &str, graph: &Graph) -> Result<(), BundleError> {
    let expected = match (granularity, graph.span_width) {
        (WriteGranularity::Token, Some(_)) => "null".to_owned(),
        (WriteGranularity::Token, None) | (_, Some(1..=MAX_SIZE)) => return Ok(()),
        (..) => format!("1 to {MAX_SIZE}"),
    };
    Err(inconsistent(
        &format!("{at}.span_width"),
        graph
            .span_width
            .map_or_else(|| "null".to_owned(), |width| width.to_string()),
        format!(
            "{expected}, since memory.write_granularity is {}",
            granularity.as_str()
        ),
    ))
}

fn check_states(at: &str, states: &[TurnState]) -> Result<(), BundleError> {
    if states.len() > MAX_STATES {
        return Err(inconsistent(
            &format!("{at}.states"),
            format!("{} states", states.len()),
            format!("at most {MAX_STATES}"),
        ));
    }
    let mut names = std::collections::BTreeSet::new();
    for (index, state) in states.iter().enumerate() {
        for (part, name) in [("input", &state.input), ("output", &state.output)] {
            if name.is_empty() || name.contains('\0') || !names.insert(name) {
                return Err(inconsistent(
                    &format!("{at}.states[{index}].{part}"),
                    format!("{name:.80?}"),
                    "a name of the graph that no other state has",
                ));
            }
        }
        if state.dtype == ElementType::Int8 {
            return Err(inconsistent(
                &format!("{at}.states[{index}].dtype"),
                "int8",
                "float32, float16 or bfloat16",
            ));
        }
        let numbers = state
            .shape
            .iter()
            .try_fold(1_usize, |product, &dim| product.checked_mul(dim));
        if state.shape.len() > MAX_STATE_RANK
            || numbers.is_none_or(|numbers| numbers == 0 || numbers > MAX_SIZE)
        {
            return Err(inconsistent(
                &format!("{at}.states[{index}].shape"),
                format!("{:.200}", format!("{:?}", state.shape)),
                format!("at most {MAX_STATE_RANK} sizes, 1 to {MAX_SIZE} numbers in all"),
            ));
        }
    }
    Ok(())
}

fn ascending(field: &str, layers: &[usize], num_layers: usize) -> Result<(), BundleError> {
    if layers.is_sorted_by(|a, b| a < b) && layers.last().is_none_or(|&last| last < num_layers) {
        return Ok(());
    }
    Err(inconsistent(
        field,
        format!("{:.200}", format!("{layers:?}")),
        format!("layers below {num_layers} (backbone.num_layers), each once, ascending"),
    ))
}

fn check_tokens(manifest: &Manifest) -> Result<(), BundleError> {
    let vocab = manifest.backbone.vocab_size;
    let tokens = &manifest.tokens;
    let all = tokens.eos.iter().map(|&id| ("tokens.eos", id));
    let all = all
        .chain(tokens.bos.map(|id| ("tokens.bos", id)))
        .chain(tokens.pad.map(|id| ("tokens.pad", id)));
    for (field, id) in all {
        if usize::try_from(id).map_or(true, |id| id >= vocab) {
            return Err(inconsistent(
                field,
                id,
                format!("0 to {} (backbone.vocab_size is {vocab})", vocab - 1),
            ));
        }
    }
    Ok(())
}

/// Checks that names are plain file names, and that every file that the manifest names is listed with a digest.
fn check_names(manifest: &Manifest) -> Result<(), BundleError> {
    for name in manifest.files.keys() {
        let mut parts = Path::new(name).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name.as_str());
        // On some systems these cut a name in pieces; no bundle needs them.
        if !plain || name.contains(['\\', '/', ':', '\0']) || name == MANIFEST {
            return Err(inconsistent(
                "files",
                format!("{name:.80?}"),
                "plain file names, without a directory",
            ));
        }
    }
    let text = manifest.text.as_ref();
    let mut named = vec![
        ("text.tokenizer".to_owned(), text.map(|text| &text.tokenizer)),
        (
            "text.chat_template".to_owned(),
            text.and_then(|text| text.chat_template.as_ref()),
        ),
    ];
    for (at, graph) in graphs(manifest) {
        named.push((format!("{at}.file"), Some(&graph.file)));
        named.push((format!("{at}.measured_file"), graph.measured_file.as_ref()));
        named.push((format!("{at}.fused_file"), graph.fused_file.as_ref()));
        named.push((format!("{at}.blocks_file"), graph.blocks_file.as_ref()));
        named.extend(graph.files.iter().map(|name| (format!("{at}.files"), Some(name))));
    }
    for (field, name) in named {
        if let Some(name) = name
            && !manifest.files.contains_key(name)
        {
            return Err(inconsistent(
                &field,
                format!("{name:.80?}"),
                "a file that `files` lists",
            ));
        }
    }
    Ok(())
}

fn check_file(dir: &Path, name: &str, entry: FileEntry, verify: Verify) -> Result<(), BundleError> {
    let path = dir.join(name);
    let damaged = |found: String, expected: String| BundleError::Damaged {
        file: name.into(),
        found,
        expected,
    };
    let io = |error| BundleError::Io {
        path: path.clone(),
        error,
    };
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(damaged("no such file".into(), format!("{} bytes", entry.bytes)));
        }
        Err(error) => return Err(io(error)),
    };
    if !real.starts_with(dir) {
        return Err(damaged(
            "a link that leads out of the bundle".into(),
            "a plain file".into(),
        ));
    }
    let metadata = real.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(damaged("no plain file".into(), "a plain file".into()));
    }
    if metadata.len() != entry.bytes {
        return Err(damaged(
            format!("{} bytes", metadata.len()),
            entry.bytes.to_string(),
        ));
    }
    if verify == Verify::Full {
        let found = digest(&real).map_err(io)?;
        if found != entry.blake3 {
            return Err(damaged(
                format!("content with BLAKE3 {found}"),
                entry.blake3.to_string(),
            ));
        }
    }
    Ok(())
}

/// A file's BLAKE3, read piece by piece: a file that shrinks meanwhile is an error here, where a mapped one would end the process.
fn digest(path: &Path) -> std::io::Result<Fingerprint> {
    const PIECE: usize = 4 << 20;
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(Fingerprint(*hasher.finalize().as_bytes())),
            count => hasher.update_rayon(&piece[..count]),
        };
    }
}

#[cfg(test)]
mod tests;
