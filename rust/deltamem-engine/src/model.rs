//! A loaded bundle: its graph in ONNX Runtime, its tokenizer, and the room that sessions share. What is run for them, and when, stands in
//! [`crate::running`] and [`crate::schedule`].

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use deltamem_core::{Fingerprint, Geometry};

use crate::buffer::Home;
use crate::bundle::{Bundle, GraphDevice, Manifest, Verify};
use crate::device::mover::Disturbance;
use crate::device::provider::{NoCuda, Provider, expect_cuda, no_card};
use crate::device::{DeviceMemory, WORD};
use crate::error::{EngineError, Result};
use crate::graph::{Graph, Names};
use crate::kv::KvLayout;
use crate::operator::{prepare, product_instructions};
use crate::pool::KvPool;
use crate::running::{Counters, Row, Works};
use crate::runtime::Runtime;
use crate::schedule::{Schedule, Seat};
use crate::slots::Slots;
use crate::text::{ChatTemplate, Text};
use crate::turn::{TurnCache, TurnKv};

/// Tokens that one run takes at most. Longer chunks gain little (docs/log.md); a Ctrl-C and other sessions wait for one chunk.
pub const CHUNK_TOKENS: usize = 256;

/// The same while replies of other sessions are being made, which wait for it between two of their tokens.
const CHUNK_TOKENS_BESIDE_OTHERS: usize = 64;

/// The most sessions in one step, if nothing else is asked for.
pub const MAX_BATCH: usize = 16;

/// What a bundle for CUDA alone meets on a processor.
const BF16_ON_CPU: &str = "deltamem.json: precision is bf16, which ONNX Runtime's CPU cannot compute; export the bundle again with --precision \
                           fp16, fp32 or int4, or run this one on CUDA";

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
    /// The card of that number, of those that CUDA shows this process.
    Cuda(u16),
    /// The processor, with buffers as if it were a card: for tests of what happens on one.
    #[doc(hidden)]
    CpuAsDevice,
}

/// Which of a bundle's graphs runs. They share their weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum GraphChoice {
    /// The one with the most of this runtime's own nodes that the bundle has and the device is fit for.
    #[default]
    Auto,
    /// The one of standard operators.
    Portable,
    /// The one with one node for each memory layer, which computes the same.
    Fused,
    /// That with this runtime's own products of weights in blocks besides, for processors that have instructions for it. It rounds as the
    /// others do, and sums in another order.
    Blocks,
}

/// One of a bundle's graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chosen<'a> {
    Portable(&'a str),
    Fused(&'a str),
    Blocks(&'a str),
}

impl<'a> Chosen<'a> {
    pub(crate) fn file(self) -> &'a str {
        match self {
            Self::Portable(file) | Self::Fused(file) | Self::Blocks(file) => file,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Portable(_) => "portable",
            Self::Fused(_) => "fused",
            Self::Blocks(_) => "blocks",
        }
    }
}

impl GraphChoice {
    /// Which graph it is of this bundle's first one, on this device.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] for a graph that the bundle does not have or the device is not fit for.
    pub(crate) fn of(self, manifest: &Manifest, on: GraphDevice) -> Result<Chosen<'_>> {
        let graph = &manifest.graph;
        // A graph in fp16 may have been exported for the other device: its operators are on both, this runtime's own are not.
        let own = |file: &'_ Option<String>| manifest.device(graph) == on && file.is_some();
        let portable = Chosen::Portable(&graph.file);
        let fused = graph
            .fused_file
            .as_deref()
            .filter(|_| own(&graph.fused_file))
            .map(Chosen::Fused);
        let blocks = graph
            .blocks_file
            .as_deref()
            .filter(|_| own(&graph.blocks_file))
            .map(Chosen::Blocks);
        let fit = product_instructions().is_some();
        let missing = |field, what| {
            EngineError::Unsupported(format!(
                "deltamem.json: graph.{field} is null, so this bundle has no {what}; load it with graph=\"auto\", or add one with \
                 `deltamem-export fuse BUNDLE`, which says where that cannot be done"
            ))
        };
        match self {
            Self::Portable => Ok(portable),
            Self::Auto => Ok(blocks.filter(|_| fit).or(fused).unwrap_or(portable)),
            Self::Fused => fused.ok_or_else(|| match self.unfused(manifest, on) {
                Some(why) if manifest.device(graph) != on => {
                    EngineError::Unsupported(format!("graph=\"fused\": {why}; leave graph out there"))
                }
                _ => missing("fused_file", "fused graph"),
            }),
            Self::Blocks if on == GraphDevice::Cuda => Err(EngineError::Unsupported(
                "graph=\"blocks\": its products run on the processor only; leave graph out on a card".into(),
            )),
            Self::Blocks if !fit => Err(EngineError::Unsupported(
                "graph=\"blocks\": this processor has none of the instructions that its products take (AVX2 and FMA at least); load it with \
                 graph=\"auto\""
                    .into(),
            )),
            Self::Blocks => blocks.ok_or_else(|| missing("blocks_file", "graph with products in blocks")),
        }
    }

    /// Why the layers' memories are many nodes each, if they are.
    fn unfused(self, manifest: &Manifest, on: GraphDevice) -> Option<String> {
        if self == Self::Portable {
            return Some("graph=\"portable\" was asked for".into());
        }
        let graph = &manifest.graph;
        let device = manifest.device(graph);
        if device != on {
            let add = if on == GraphDevice::Cuda {
                "; add a graph for CUDA with `deltamem-export bundle --device cuda --precision fp16 --into BUNDLE`"
            } else {
                ""
            };
            Some(format!(
                "the bundle's graph was exported for {device} and serves {on} as well, where it has no fused one{add}"
            ))
        } else if graph.fused_file.is_none() {
            let why = graph.not_fused.as_deref();
            Some(why.map_or_else(
                || "the bundle has no fused graph; `deltamem-export fuse BUNDLE` adds one".to_owned(),
                |why| {
                    format!(
                        "the bundle has no fused graph: {why} (`deltamem-export fuse BUNDLE` looks again)"
                    )
                },
            ))
        } else {
            None
        }
    }
}

/// Why a model's memories are many nodes a layer.
#[derive(Debug, Clone)]
struct Unfused {
    why: String,
    /// Whether something failed that should have worked.
    failed: bool,
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
    /// The most sessions whose tokens are read in one step; 1 runs them one after another.
    pub max_batch: usize,
    /// Which of the bundle's graphs runs.
    pub graph: GraphChoice,
    /// Whether float32 products on a card may be rounded to TF32, which is faster and loses 10 of 23 bits.
    pub tf32: bool,
    /// Whether a card captures steps of one token as CUDA graphs and replays them.
    pub cuda_graphs: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            threads: 0,
            verify: Verify::Full,
            max_batch: MAX_BATCH,
            graph: GraphChoice::Auto,
            tf32: false,
            cuda_graphs: false,
        }
    }
}

/// Where a model runs, and why there.
#[derive(Debug, Clone)]
struct Placed {
    why: String,
    /// Whether something failed that should have worked.
    failed: bool,
}

/// A loaded bundle. Shared by all its sessions.
#[derive(Debug)]
pub struct Model {
    runtime: &'static Runtime,
    bundle: Bundle,
    options: LoadOptions,
    placed: Placed,
    /// The device's memory, where the graph runs on one: states, keys and values stay there.
    home: Home,
    geometry: Geometry,
    fingerprint: Fingerprint,
    text: Option<Text>,
    template: Option<ChatTemplate>,
    names: Names,
    kv_layout: KvLayout,
    pub(crate) schedule: Schedule<Row>,
    /// Used by whoever runs.
    pub(crate) works: parking_lot::Mutex<Works>,
    /// Where turns have their keys and values.
    pub(crate) slots: Slots,
    measured: OnceLock<Mutex<Graph>>,
    opening_measured: Mutex<()>,
    /// Caches of turns that had buffers of their own.
    idle_caches: Mutex<Vec<TurnCache>>,
    /// Why sessions run one after another, if they do.
    pub(crate) unbatched: OnceLock<String>,
    /// Why steps are not captured, if they are not.
    uncaptured: OnceLock<String>,
    unfused: Option<Unfused>,
    /// Whether turns have slots in the pool.
    pooled: bool,
    pub(crate) counters: Counters,
}

impl Model {
    /// Loads the bundle at `path`.
    ///
    /// # Errors
    /// A [`BundleError`](crate::bundle::BundleError) when the bundle is missing, damaged or inconsistent, or has no graph for the device;
    /// [`EngineError::Graph`] when its graph is not the one that the manifest describes; [`EngineError::Unsupported`] for a precision that the
    /// device cannot compute; [`EngineError::Device`] for a device that is not there or fails; [`EngineError::Onnx`] when ONNX Runtime
    /// refuses it. With [`Device::Auto`] a card that fails is none of these where the bundle has a graph for the processor:
    /// [`Model::fallback`] says so.
    pub fn load(runtime: &'static Runtime, path: &Path, options: LoadOptions) -> Result<Arc<Self>> {
        let bundle = Bundle::open(path, options.verify)?;
        let asked = |device: &str| Placed {
            why: format!("device={device:?} was asked for"),
            failed: false,
        };
        match options.device {
            Device::Cpu if options.cuda_graphs => Err(EngineError::Value(
                "cuda_graphs=True with device='cpu', expected a card: a CUDA graph is captured on one; leave one of them out".into(),
            )),
            Device::Cpu => Self::on_cpu(runtime, bundle, options, asked("cpu")),
            Device::Cuda(id) => {
                expect_cuda(runtime).map_err(NoCuda::error)?;
                let bundle = bundle.on(GraphDevice::Cuda)?;
                let memory = cuda(runtime, id, options.tf32).map_err(NoCuda::error)?;
                let placed = asked(&memory.provider().to_string());
                Self::placed(runtime, bundle, options, placed, Some(memory))
            }
            Device::CpuAsDevice => {
                let memory = DeviceMemory::open(runtime, Provider::Host)?;
                Self::placed(runtime, bundle, options, asked("_device_on_cpu"), Some(memory))
            }
            Device::Auto => Self::anywhere(runtime, bundle, options),
        }
    }

    /// On the first card if the bundle has a graph for it and it answers, else on the processor.
    fn anywhere(runtime: &'static Runtime, bundle: Bundle, options: LoadOptions) -> Result<Arc<Self>> {
        let devices = bundle.manifest().devices();
        if !devices.contains(&GraphDevice::Cuda) {
            let placed = Placed {
                why: "the bundle has no graph for CUDA".into(),
                failed: false,
            };
            return Self::on_cpu(runtime, bundle, options, placed);
        }
        let also_cpu = devices.contains(&GraphDevice::Cpu);
        let precision = bundle.manifest().precision.clone();
        let dir = bundle.dir().to_path_buf();
        let found = match cuda(runtime, 0, options.tf32) {
            Ok(memory) => {
                let placed = Placed {
                    why: format!(
                        "the bundle has a graph for CUDA, and {} answers",
                        memory.provider()
                    ),
                    failed: false,
                };
                Self::placed(
                    runtime,
                    bundle.on(GraphDevice::Cuda)?,
                    options,
                    placed,
                    Some(memory),
                )
                .map_err(NoCuda::Failed)
            }
            Err(none) => Err(none),
        };
        let (error, failed) = match found {
            Ok(model) => return Ok(model),
            Err(NoCuda::Absent(error)) => (error, false),
            Err(NoCuda::Failed(error)) => (error, true),
        };
        if !also_cpu && !failed && precision == "bf16" {
            return Err(EngineError::Unsupported(format!("{BF16_ON_CPU}; {error}")));
        }
        if !also_cpu || !matches!(error, EngineError::Device(_) | EngineError::Onnx { .. }) {
            return Err(error);
        }
        // Its files were compared a moment ago.
        let bundle = Bundle::open(&dir, Verify::Sizes)?;
        let why = error.to_string();
        Self::on_cpu(runtime, bundle, options, Placed { why, failed })
    }

    fn on_cpu(
        runtime: &'static Runtime,
        bundle: Bundle,
        options: LoadOptions,
        placed: Placed,
    ) -> Result<Arc<Self>> {
        let manifest = bundle.manifest();
        if manifest.precision == "bf16" && manifest.graphs.is_empty() {
            return Err(EngineError::Unsupported(BF16_ON_CPU.into()));
        }
        Self::placed(runtime, bundle.on(GraphDevice::Cpu)?, options, placed, None)
    }

    /// Loads the bundle's first graph.
    fn placed(
        runtime: &'static Runtime,
        bundle: Bundle,
        mut options: LoadOptions,
        placed: Placed,
        home: Home,
    ) -> Result<Arc<Self>> {
        let manifest = bundle.manifest();
        let uncaptured = OnceLock::new();
        if let Some(why) = not_captured(manifest, &options, &home)? {
            options.cuda_graphs = false;
            uncaptured.get_or_init(|| why.to_owned());
        }
        let row = manifest.backbone.head_dim * manifest.graph.kv_dtype.bytes();
        if home.is_some() && manifest.graph.shared_kv && !row.is_multiple_of(WORD) {
            return Err(EngineError::Unsupported(format!(
                "a row of keys has {row} bytes, expected a multiple of {WORD} on a device; load this bundle with device='cpu'"
            )));
        }
        let kv_layout = KvLayout {
            buffers: manifest.graph.kv_layers.len() * 2,
            heads: manifest.backbone.num_kv_heads,
            head_dim: manifest.backbone.head_dim,
            element_bytes: manifest.graph.kv_dtype.bytes(),
            context: manifest.backbone.context_length,
            shared: manifest.graph.shared_kv,
        };
        let geometry = bundle.geometry();
        let fingerprint = bundle.fingerprint();
        let names = Names::new(manifest);
        let text = Text::load(bundle.dir(), manifest)?;
        let template = ChatTemplate::load(bundle.dir(), manifest)?;
        let (graph, unfused) = open_graph(runtime, &bundle, &mut options, &names, &home)?;
        let unbatched = OnceLock::new();
        if let Some(why) = one_after_another(manifest, &graph, options.max_batch) {
            unbatched.get_or_init(|| why.to_owned());
        }
        let pooled = unbatched.get().is_none();
        let most = if pooled { options.max_batch } else { 1 };
        let mut pool = KvPool::new(kv_layout, most, home.clone());
        pool.fix(graph.captures_steps());
        Ok(Arc::new(Self {
            runtime,
            geometry,
            fingerprint,
            text,
            template,
            names,
            kv_layout,
            schedule: Schedule::new(most),
            works: parking_lot::Mutex::new(Works::new(graph)),
            slots: Slots::new(pool, home.clone()),
            unbatched,
            uncaptured,
            unfused,
            pooled,
            counters: Counters::default(),
            measured: OnceLock::new(),
            opening_measured: Mutex::new(()),
            idle_caches: Mutex::new(Vec::new()),
            bundle,
            options,
            placed,
            home,
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

    /// Which graph runs: `blocks`, `fused` or `portable`. What is measured (`Session::health`, strengths other than 1) runs on a portable one.
    pub fn graph(&self) -> &'static str {
        self.options
            .graph
            .of(self.manifest(), runs_on(&self.home, self.manifest()))
            .map_or("portable", Chosen::name)
    }

    /// Why each layer's memory is many nodes; none where it is one.
    pub fn unfused(&self) -> Option<&str> {
        self.unfused.as_ref().map(|unfused| unfused.why.as_str())
    }

    /// What failed, where the fused graph should have run and the portable one does.
    pub fn unfused_by_failure(&self) -> Option<&str> {
        self.unfused
            .as_ref()
            .filter(|unfused| unfused.failed)
            .map(|unfused| unfused.why.as_str())
    }

    /// Where the graph runs: `cpu`, or `cuda:` and the card's number.
    pub fn device(&self) -> String {
        self.home
            .as_ref()
            .map_or_else(|| "cpu".to_owned(), |memory| memory.provider().to_string())
    }

    /// Why it runs there.
    pub fn placement(&self) -> &str {
        &self.placed.why
    }

    /// What failed, where the model should have run on a card and runs on the processor.
    pub fn fallback(&self) -> Option<&str> {
        self.placed.failed.then_some(self.placed.why.as_str())
    }

    /// The device's memory, where the graph runs on one.
    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// Has the moves beside the runs disturbed, where the processor plays the device; for tests.
    #[doc(hidden)]
    pub fn disturb(&self, what: Disturbance) {
        if let Some(memory) = self
            .home
            .as_ref()
            .filter(|memory| memory.provider().card().is_none())
        {
            memory.trial().set(what);
        }
    }

    /// Threads that one run uses; 0 means one a core.
    pub fn threads(&self) -> usize {
        self.options.threads
    }

    /// The most sessions whose tokens are read in one step; 1 where they run one after another.
    pub fn max_batch(&self) -> usize {
        if self.unbatched.get().is_some() {
            1
        } else {
            self.options.max_batch
        }
    }

    /// Why sessions run one after another, if they do.
    pub fn unbatched(&self) -> Option<&str> {
        self.unbatched.get().map(String::as_str)
    }

    /// Why steps are not captured as CUDA graphs, if they are not.
    pub fn uncaptured(&self) -> Option<&str> {
        self.uncaptured.get().map(String::as_str)
    }

    /// A step could not be captured.
    pub(crate) fn not_captured(&self, error: &EngineError) {
        self.uncaptured
            .get_or_init(|| format!("a step could not be captured as a CUDA graph: {error}"));
    }

    /// Whether turns have slots in the pool.
    pub(crate) fn pooled(&self) -> bool {
        self.pooled
    }

    /// Tokens that the next chunk of this seat's prompt may have.
    pub(crate) fn chunk_tokens(&self, seat: &Seat<Row>) -> usize {
        if self.schedule.others_stream(seat) {
            CHUNK_TOKENS_BESIDE_OTHERS
        } else {
            CHUNK_TOKENS
        }
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

    /// What a turn carries, empty: a slot in the pool, or buffers of its own.
    pub(crate) fn lend_cache(&self) -> Result<TurnCache> {
        if self.pooled() {
            Ok(TurnCache::pooled())
        } else {
            self.lend_own_cache()
        }
    }

    /// Empty buffers of a turn's own: wiped ones of an earlier turn, or new ones.
    pub(crate) fn lend_own_cache(&self) -> Result<TurnCache> {
        let idle = self
            .idle_caches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        idle.map_or_else(
            || TurnCache::new(self.kv_layout, &self.manifest().graph.states, &self.home),
            Ok,
        )
    }

    /// Takes a turn's buffers back. A slot is free at once; it is wiped now, by whoever runs when that run is done, or on a device beside the runs.
    pub(crate) fn return_cache(&self, mut cache: TurnCache) {
        match &mut cache.kv {
            TurnKv::Pooled(place) => {
                if let Some(key) = place.key.take() {
                    self.slots.give_back(key);
                }
            }
            TurnKv::Own(kv) => {
                if kv.capacity() > POOLED_TOKENS {
                    return;
                }
                if kv.wipe().is_err() {
                    return;
                }
                cache.states.wipe();
                let mut idle = self.idle_caches.lock().unwrap_or_else(PoisonError::into_inner);
                if idle.len() < POOLED_CACHES {
                    idle.push(cache);
                }
            }
        }
    }

    /// Numbers that one span gathers over all layers; 0 where each token writes.
    pub(crate) fn numbers_per_span(&self) -> usize {
        let manifest = self.manifest();
        manifest.memory.layers.len() * manifest.graph.span_width.unwrap_or(0)
    }

    /// Numbers in `delta_energy` for one token.
    pub(crate) fn energy_per_token(&self) -> usize {
        let memory = &self.manifest().memory;
        memory.layers.len() * memory.delta_heads.len() * 2
    }

    /// The graphs' names for their inputs and outputs.
    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    /// The measured graph, opened when it is first asked for.
    pub(crate) fn measured(&self) -> Result<&Mutex<Graph>> {
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
            &self.home,
            true,
        )?;
        Ok(self.measured.get_or_init(|| Mutex::new(graph)))
    }
}

/// Which device's kernels run a model's nodes.
pub(crate) fn runs_on(home: &Home, manifest: &Manifest) -> GraphDevice {
    match home.as_ref().map(|memory| memory.provider()) {
        None => GraphDevice::Cpu,
        Some(Provider::Cuda { .. }) => GraphDevice::Cuda,
        // The processor plays whichever the graph was exported for.
        Some(Provider::Host) => manifest.device(&manifest.graph),
    }
}

/// The graph that was asked for. On a card, where nothing else was asked for, the portable one takes the place of a fused one that cannot be had.
fn open_graph(
    runtime: &'static Runtime,
    bundle: &Bundle,
    options: &mut LoadOptions,
    names: &Names,
    home: &Home,
) -> Result<(Graph, Option<Unfused>)> {
    let manifest = bundle.manifest();
    let on = runs_on(home, manifest);
    let unfused = options.graph.unfused(manifest, on);
    let may_fall_back = options.graph == GraphChoice::Auto && on == GraphDevice::Cuda && unfused.is_none();
    let unfused = unfused.map(|why| Unfused { why, failed: false });
    let opened = options.graph.of(manifest, on).and_then(|chosen| {
        let _kernels = match (chosen, home) {
            (Chosen::Fused(_), Some(memory)) if on == GraphDevice::Cuda => {
                Some(prepare(memory.provider(), manifest)?)
            }
            _ => None,
        };
        Graph::open(runtime, bundle, options, names, home, false)
    });
    match opened {
        Ok(graph) => Ok((graph, unfused)),
        Err(error) if may_fall_back => {
            options.graph = GraphChoice::Portable;
            // What hinders this one too is the better error.
            let graph = Graph::open(runtime, bundle, options, names, home, false)?;
            let failed = Unfused {
                why: error.to_string(),
                failed: true,
            };
            Ok((graph, Some(failed)))
        }
        Err(error) => Err(error),
    }
}

/// The memory of a card that answers.
fn cuda(runtime: &'static Runtime, id: u16, tf32: bool) -> std::result::Result<Arc<DeviceMemory>, NoCuda> {
    expect_cuda(runtime)?;
    let provider = Provider::Cuda {
        id: i32::from(id),
        tf32,
    };
    DeviceMemory::open(runtime, provider).map_err(no_card)
}

/// Whether a card answers, in words; for `deltamem doctor`.
///
/// # Errors
/// [`EngineError::Device`] with what is missing and what to do.
pub fn examine_cuda(runtime: &'static Runtime) -> Result<String> {
    let memory = cuda(runtime, 0, false).map_err(NoCuda::error)?;
    Ok(format!("{} answers", memory.provider()))
}

/// Why no step is captured as a CUDA graph, if none is.
///
/// # Errors
/// [`EngineError::Unsupported`] where it was asked for and the bundle's graph cannot be captured.
fn not_captured(manifest: &Manifest, options: &LoadOptions, home: &Home) -> Result<Option<&'static str>> {
    let graph = &manifest.graph;
    if !options.cuda_graphs {
        return Ok(Some("cuda_graphs was not asked for"));
    }
    if home.is_none() {
        return Ok(Some("the graph runs on the CPU"));
    }
    let why = if !graph.shared_kv {
        "keeps past and present keys and values apart (graph.shared_kv is false), so that every step has other shapes"
    } else if !graph.states.is_empty() {
        "carries states inside a turn that lie on the host (graph.states)"
    } else if graph.span_width.is_some() {
        "writes spans, whose number differs from run to run (graph.span_width)"
    } else {
        return Ok(None);
    };
    Err(EngineError::Unsupported(format!(
        "cuda_graphs=True, but the bundle's graph {why}; leave cuda_graphs out"
    )))
}

/// Why the sessions of a bundle cannot step together, if they cannot.
fn one_after_another(manifest: &Manifest, graph: &Graph, max_batch: usize) -> Option<&'static str> {
    if max_batch <= 1 {
        Some("max_batch is 1")
    } else if !manifest.graph.shared_kv {
        Some("the bundle's graph keeps past and present keys and values apart (graph.shared_kv is false)")
    } else if !manifest.graph.states.is_empty() {
        Some("the bundle's graph carries more than keys and values inside a turn (graph.states)")
    } else if !graph.takes_batches() {
        Some("the bundle's graph has a fixed batch size")
    } else {
        None
    }
}
