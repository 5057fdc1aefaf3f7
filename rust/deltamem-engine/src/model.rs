//! A loaded bundle: its graph in ONNX Runtime, its tokenizer, and the room that sessions share. It runs one chunk of one session at a
//! time, in the order of asking; it keeps nothing of a session between chunks, so sessions cannot see each other through it.

use std::ffi::CString;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use deltamem_core::{Fingerprint, Geometry};
use ort::session::{Session as OnnxSession, builder::GraphOptimizationLevel};
use ort::value::{TensorElementType, ValueType};
use parking_lot::FairMutex;

use crate::bundle::{Bundle, Manifest, Verify};
use crate::call::{Call, Tensor};
use crate::error::{EngineError, Result};
use crate::kv::{KvCache, KvLayout};
use crate::runtime::Runtime;
use crate::text::{ChatTemplate, Text};

/// Tokens that one run takes at most. Longer chunks gain little (docs/log.md); a Ctrl-C and other sessions wait for one chunk.
pub const CHUNK_TOKENS: usize = 256;

/// Finished KV caches that are kept, wiped, for the next turns.
const POOLED_CACHES: usize = 4;

/// The largest cache that is kept, in tokens; a longer turn's goes back to the system.
const POOLED_TOKENS: usize = 1024;

/// Where the graph runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Device {
    /// The best that this runtime and the installed ONNX Runtime can do.
    #[default]
    Auto,
    /// The processor.
    Cpu,
}

/// How a bundle is loaded.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Where the graph runs.
    pub device: Device,
    /// Threads for one run; 0 takes the number of cores.
    pub threads: usize,
    /// How much of the bundle is checked before ONNX Runtime sees it.
    pub verify: Verify,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            threads: 0,
            verify: Verify::Full,
        }
    }
}

/// A loaded bundle. Shared by all its sessions.
#[derive(Debug)]
pub struct Model {
    runtime: &'static Runtime,
    bundle: Bundle,
    options: LoadOptions,
    geometry: Geometry,
    fingerprint: Fingerprint,
    text: Option<Text>,
    template: Option<ChatTemplate>,
    names: Names,
    kv_layout: KvLayout,
    kv_type: TensorElementType,
    graph: FairMutex<Graph>,
    measured: OnceLock<FairMutex<Graph>>,
    opening_measured: Mutex<()>,
    idle_caches: Mutex<Vec<KvCache>>,
}

/// One graph in ONNX Runtime, and the small inputs of a run that are the same for every session.
#[derive(Debug)]
struct Graph {
    session: OnnxSession,
    ones: Vec<i64>,
    positions: Vec<i64>,
    rows: Vec<i64>,
    write: Vec<f32>,
}

/// Which rows of logits a run is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// Every token's.
    All,
    /// The last token's.
    Last,
}

/// One chunk of one session: what it reads and where the results go.
pub(crate) struct Chunk<'a> {
    /// Token ids, checked: at least one, at most [`CHUNK_TOKENS`].
    pub(crate) tokens: &'a [i32],
    /// Whether these tokens may write the memory.
    pub(crate) write: bool,
    /// Which logits are wanted.
    pub(crate) rows: Rows,
    /// The state before, float32 [layers, heads, r, r].
    pub(crate) past_memory: &'a [f32],
    /// Where the state after goes.
    pub(crate) present_memory: &'a mut [f32],
    /// The turn's cache, with room for the tokens.
    pub(crate) kv: &'a mut KvCache,
    /// Where the logits go, float32 [rows, vocab].
    pub(crate) logits: &'a mut [f32],
    /// Where the corrections' energies go, float32 [tokens, layers, delta heads, 2]; asking for them takes the measured graph.
    pub(crate) energy: Option<&'a mut [f32]>,
}

#[derive(Debug)]
struct Names {
    input_ids: CString,
    attention_mask: CString,
    position_ids: CString,
    write_mask: CString,
    logits_rows: CString,
    past_memory: CString,
    logits: CString,
    present_memory: CString,
    delta_energy: CString,
    /// (past, present) in the order of the cache's buffers.
    kv: Vec<(CString, CString)>,
}

impl Names {
    fn new(manifest: &Manifest) -> Self {
        // None of these names can hold a NUL byte, so the empty default is never taken.
        let name = |text: &str| CString::new(text).unwrap_or_default();
        let kv = manifest
            .graph
            .kv_layers
            .iter()
            .flat_map(|layer| ["key", "value"].map(|part| (layer, part)))
            .map(|(layer, part)| {
                (
                    name(&format!("past_key_values.{layer}.{part}")),
                    name(&format!("present.{layer}.{part}")),
                )
            })
            .collect();
        Self {
            input_ids: name("input_ids"),
            attention_mask: name("attention_mask"),
            position_ids: name("position_ids"),
            write_mask: name("write_mask"),
            logits_rows: name("logits_rows"),
            past_memory: name("past_memory"),
            logits: name("logits"),
            present_memory: name("present_memory"),
            delta_energy: name("delta_energy"),
            kv,
        }
    }
}

impl Model {
    /// Loads the bundle at `path`.
    ///
    /// # Errors
    /// A [`BundleError`](crate::bundle::BundleError) when the bundle is missing, damaged or inconsistent; [`EngineError::Graph`] when its
    /// graph is not the one that the manifest describes; [`EngineError::Onnx`] when ONNX Runtime refuses it.
    pub fn load(runtime: &'static Runtime, path: &Path, options: LoadOptions) -> Result<Arc<Self>> {
        let bundle = Bundle::open(path, options.verify)?;
        let manifest = bundle.manifest();
        if !manifest.graph.shared_kv {
            return Err(EngineError::Unsupported(
                "deltamem.json: graph.shared_kv is false; this runtime needs a graph whose attention appends to its cache in place \
                 (export the bundle again with GroupQueryAttention)"
                    .into(),
            ));
        }
        let kv_type = match manifest.graph.kv_dtype.as_str() {
            "float32" => TensorElementType::Float32,
            "float16" => TensorElementType::Float16,
            "bfloat16" => TensorElementType::Bfloat16,
            other => {
                return Err(EngineError::Unsupported(format!(
                    "deltamem.json: graph.kv_dtype is {other:?}; this runtime knows float32, float16 and bfloat16"
                )));
            }
        };
        let kv_layout = KvLayout {
            buffers: manifest.graph.kv_layers.len() * 2,
            heads: manifest.backbone.num_kv_heads,
            head_dim: manifest.backbone.head_dim,
            element_bytes: if kv_type == TensorElementType::Float32 {
                4
            } else {
                2
            },
            context: manifest.backbone.context_length,
        };
        let geometry = bundle.geometry();
        let fingerprint = bundle.fingerprint();
        let names = Names::new(manifest);
        let text = Text::load(bundle.dir(), manifest)?;
        let template = ChatTemplate::load(bundle.dir(), manifest)?;
        let graph = Graph::open(runtime, &bundle, &options, &names, kv_type, false)?;
        Ok(Arc::new(Self {
            runtime,
            geometry,
            fingerprint,
            text,
            template,
            names,
            kv_layout,
            kv_type,
            graph: FairMutex::new(graph),
            measured: OnceLock::new(),
            opening_measured: Mutex::new(()),
            idle_caches: Mutex::new(Vec::new()),
            bundle,
            options,
        }))
    }

    /// The memory's geometry.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Which memories this model may load.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The bundle's manifest.
    pub fn manifest(&self) -> &Manifest {
        self.bundle.manifest()
    }

    /// The bundle's manifest as it was loaded, as JSON.
    pub fn manifest_json(&self) -> Result<String> {
        serde_json::to_string(self.manifest())
            .map_err(|error| EngineError::Unsupported(format!("deltamem.json cannot be shown: {error}")))
    }

    /// The bundle's directory.
    pub fn path(&self) -> &Path {
        self.bundle.dir()
    }

    /// ONNX Runtime, as this process opened it.
    pub fn runtime(&self) -> &'static Runtime {
        self.runtime
    }

    /// The size of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.manifest().backbone.vocab_size
    }

    /// The most tokens that a turn may hold.
    pub fn context_length(&self) -> usize {
        self.kv_layout.context
    }

    /// Threads that one run uses; 0 means one a core.
    pub fn threads(&self) -> usize {
        self.options.threads
    }

    /// The tokenizer, or the error that says that this bundle takes token ids only.
    pub fn text(&self) -> Result<&Text> {
        self.text.as_ref().ok_or_else(|| {
            EngineError::Session(format!(
                "the bundle {} has no tokenizer, so it takes token ids only; pass a list or an int32 array of ids, or export the \
                 bundle again from a backbone folder that holds tokenizer.json",
                self.path().display()
            ))
        })
    }

    /// The chat template, or the error that says that there is none.
    pub fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            EngineError::Session(format!(
                "the bundle {} has no chat template; use generate() with a prompt of your own, or add chat_template.jinja to the \
                 backbone folder and export again",
                self.path().display()
            ))
        })
    }

    /// Checks token ids against the vocabulary.
    pub fn check_tokens(&self, tokens: &[i32]) -> Result<()> {
        let vocab = self.vocab();
        match tokens
            .iter()
            .position(|&id| usize::try_from(id).map_or(true, |id| id >= vocab))
        {
            None => Ok(()),
            Some(index) => Err(EngineError::TokenOutOfRange {
                id: i64::from(tokens[index]),
                index,
                vocab,
            }),
        }
    }

    /// An empty cache for a turn: a wiped one of an earlier turn, or a new one.
    pub(crate) fn lend_cache(&self) -> Result<KvCache> {
        let idle = self
            .idle_caches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        idle.map_or_else(|| KvCache::new(self.kv_layout), Ok)
    }

    /// Takes a turn's cache back.
    pub(crate) fn return_cache(&self, mut cache: KvCache) {
        if cache.capacity() > POOLED_TOKENS {
            return;
        }
        cache.wipe();
        let mut idle = self.idle_caches.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < POOLED_CACHES {
            idle.push(cache);
        }
    }

    /// Numbers in `delta_energy` for one token.
    pub(crate) fn energy_per_token(&self) -> usize {
        let memory = &self.manifest().memory;
        memory.layers.len() * memory.delta_heads.len() * 2
    }

    /// Runs one chunk. On an error nothing but the chunk's own output buffers was touched.
    pub(crate) fn run(&self, chunk: Chunk<'_>) -> Result<()> {
        if chunk.energy.is_some() {
            self.measured()?.lock().run(self, chunk)
        } else {
            self.graph.lock().run(self, chunk)
        }
    }

    /// The measured graph, opened when it is first asked for.
    fn measured(&self) -> Result<&FairMutex<Graph>> {
        let _one_at_a_time = self
            .opening_measured
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(graph) = self.measured.get() {
            return Ok(graph);
        }
        let graph = Graph::open(
            self.runtime,
            &self.bundle,
            &self.options,
            &self.names,
            self.kv_type,
            true,
        )?;
        Ok(self.measured.get_or_init(|| FairMutex::new(graph)))
    }
}

impl Graph {
    fn open(
        runtime: &'static Runtime,
        bundle: &Bundle,
        options: &LoadOptions,
        names: &Names,
        kv_type: TensorElementType,
        measured: bool,
    ) -> Result<Self> {
        let graph = &bundle.manifest().graph;
        let file = if measured {
            graph.measured_file.as_deref().ok_or_else(|| {
                EngineError::Unsupported(
                    "this bundle has no measured graph, so the corrections' size cannot be measured; export it again".into(),
                )
            })?
        } else {
            &graph.file
        };
        let mut builder = OnnxSession::builder(runtime.environment())
            .map_err(EngineError::onnx("preparing a session"))?
            .with_optimization_level(GraphOptimizationLevel::All)
            .map_err(EngineError::onnx("preparing a session"))?
            .with_log_level(ort::logging::LogLevel::Error)
            .map_err(EngineError::onnx("preparing a session"))?
            // An idle model uses no processor time.
            .with_intra_op_spinning(false)
            .map_err(EngineError::onnx("preparing a session"))?;
        if options.threads > 0 {
            builder = builder
                .with_intra_threads(options.threads)
                .map_err(EngineError::onnx("setting the number of threads"))?;
        }
        let session = builder
            .commit_from_file(bundle.path(file))
            .map_err(EngineError::onnx("loading the graph"))?;
        check_graph(&session, bundle.manifest(), names, kv_type, measured, file)?;
        Ok(Self {
            session,
            ones: Vec::new(),
            positions: Vec::new(),
            rows: Vec::new(),
            write: Vec::new(),
        })
    }

    fn run(&mut self, model: &Model, chunk: Chunk<'_>) -> Result<()> {
        let Chunk {
            tokens,
            write,
            rows,
            past_memory,
            present_memory,
            kv,
            logits,
            energy,
        } = chunk;
        let (count, past) = (tokens.len(), kv.len());
        let total = past + count;
        if self.ones.len() < total {
            self.ones.resize(total.next_power_of_two(), 1);
        }
        self.write.clear();
        self.write.resize(count, if write { 1.0 } else { 0.0 });
        self.rows.clear();
        let first_row = if rows == Rows::All { 0 } else { count - 1 };
        self.rows
            .extend((first_row..count).map(|row| i64::try_from(row).unwrap_or(i64::MAX)));

        let [layers, heads, rank, _] = model.geometry.shape();
        let memory_shape = [1, layers, heads, rank, rank];
        let kv_shape = kv.shape();
        let kv_bytes = model.kv_layout.element_bytes;
        let names = &model.names;
        let manifest = model.manifest();

        let input_ids = Tensor::input(tokens, &[1, count])?;
        let attention_mask = Tensor::input(&self.ones[..total], &[1, total])?;
        let write_mask = Tensor::input(&self.write, &[1, count])?;
        let logits_rows = Tensor::input(&self.rows, &[self.rows.len()])?;
        let past = Tensor::input(past_memory, &memory_shape)?;
        let mut present = Tensor::output(present_memory, &memory_shape)?;
        let mut wanted = Tensor::output(logits, &[self.rows.len(), model.vocab()])?;
        kv.note_writing(total);
        let mut caches = kv
            .buffers_mut()
            .map(|bytes| Tensor::bytes(bytes, &kv_shape, model.kv_type, kv_bytes))
            .collect::<Result<Vec<_>>>()?;
        let position_ids;
        let mut measured;

        let mut call = Call::default();
        call.input(&names.input_ids, &input_ids);
        call.input(&names.attention_mask, &attention_mask);
        if manifest.graph.position_ids {
            self.positions.clear();
            self.positions
                .extend((total - count..total).map(|at| i64::try_from(at).unwrap_or(i64::MAX)));
            position_ids = Tensor::input(&self.positions, &[1, count])?;
            call.input(&names.position_ids, &position_ids);
        }
        call.input(&names.write_mask, &write_mask);
        call.input(&names.logits_rows, &logits_rows);
        call.input(&names.past_memory, &past);
        call.output(&names.logits, &mut wanted);
        call.output(&names.present_memory, &mut present);
        for ((past, present), cache) in names.kv.iter().zip(&mut caches) {
            call.in_place(past, present, cache);
        }
        if let Some(energy) = energy {
            let memory = &manifest.memory;
            measured = Tensor::output(
                energy,
                &[1, count, memory.layers.len(), memory.delta_heads.len(), 2],
            )?;
            call.output(&names.delta_energy, &mut measured);
        }
        call.run(&mut self.session)
    }
}

/// Holds the graph's own inputs and outputs against what the manifest says they are.
fn check_graph(
    session: &OnnxSession,
    manifest: &Manifest,
    names: &Names,
    kv_type: TensorElementType,
    measured: bool,
    file: &str,
) -> Result<()> {
    let size = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let memory = &manifest.memory;
    let (backbone, any) = (&manifest.backbone, -1);
    let state = vec![
        any,
        size(memory.layers.len()),
        size(memory.heads),
        size(memory.rank),
        size(memory.rank),
    ];
    let cache = vec![any, size(backbone.num_kv_heads), any, size(backbone.head_dim)];

    let mut inputs = vec![
        (&names.input_ids, TensorElementType::Int32, vec![any, any]),
        (&names.attention_mask, TensorElementType::Int64, vec![any, any]),
        (&names.write_mask, TensorElementType::Float32, vec![any, any]),
        (&names.logits_rows, TensorElementType::Int64, vec![any]),
        (&names.past_memory, TensorElementType::Float32, state.clone()),
    ];
    if manifest.graph.position_ids {
        inputs.push((&names.position_ids, TensorElementType::Int64, vec![any, any]));
    }
    let mut outputs = vec![
        (
            &names.logits,
            TensorElementType::Float32,
            vec![any, size(backbone.vocab_size)],
        ),
        (&names.present_memory, TensorElementType::Float32, state),
    ];
    if measured {
        let delta = vec![
            any,
            any,
            size(memory.layers.len()),
            size(memory.delta_heads.len()),
            2,
        ];
        outputs.push((&names.delta_energy, TensorElementType::Float32, delta));
    }
    for (past, present) in &names.kv {
        inputs.push((past, kv_type, cache.clone()));
        outputs.push((present, kv_type, cache.clone()));
    }

    for (kind, expected, found) in [
        ("input", inputs, session.inputs()),
        ("output", outputs, session.outputs()),
    ] {
        let wrong = |what: String| EngineError::Graph {
            file: file.to_owned(),
            what,
        };
        if expected.len() != found.len() {
            let names: Vec<_> = found.iter().map(ort::value::Outlet::name).collect();
            return Err(wrong(format!(
                "found {} {kind}s ({}), expected {}",
                found.len(),
                names.join(", "),
                expected.len()
            )));
        }
        for (name, ty, shape) in expected {
            let name = name.to_string_lossy();
            let outlet = found
                .iter()
                .find(|outlet| outlet.name() == name)
                .ok_or_else(|| wrong(format!("the {kind} {name} is missing")))?;
            let ValueType::Tensor {
                ty: found_ty,
                shape: found_shape,
                ..
            } = outlet.dtype()
            else {
                return Err(wrong(format!("the {kind} {name} is no tensor")));
            };
            let fits = found_shape.len() == shape.len()
                && found_shape
                    .iter()
                    .zip(&shape)
                    .all(|(&found, &wanted)| found == wanted || found < 0 || wanted < 0);
            if *found_ty != ty || !fits {
                return Err(wrong(format!(
                    "the {kind} {name} is {found_ty} {:?}, expected {ty} {shape:?} (-1 is any size)",
                    &found_shape[..]
                )));
            }
        }
    }
    Ok(())
}
