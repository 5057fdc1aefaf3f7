//! A loaded bundle: its graph in ONNX Runtime, its tokenizer, and the room that sessions share. It runs one chunk of one session at a
//! time, in the order of asking; it keeps nothing of a session between chunks, so sessions cannot see each other through it.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use deltamem_core::{Fingerprint, Geometry};
use parking_lot::FairMutex;

use crate::bundle::{Bundle, Manifest, Verify};
use crate::error::{EngineError, Result};
use crate::graph::{Chunk, Graph, Names};
use crate::kv::KvLayout;
use crate::runtime::Runtime;
use crate::text::{ChatTemplate, Text};
use crate::turn::TurnCache;

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

/// Which of a bundle's two graphs runs. They share their weights and compute the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum GraphChoice {
    /// The fused one if the bundle has it, else the portable one.
    #[default]
    Auto,
    /// The one of standard operators.
    Portable,
    /// The one with one node for each memory layer, which runs on the processor only.
    Fused,
}

impl GraphChoice {
    /// Whether it is the fused graph for this bundle.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] for a fused graph that the bundle does not have.
    pub(crate) fn fused(self, manifest: &Manifest) -> Result<bool> {
        match (self, &manifest.graph.fused_file) {
            (Self::Portable, _) | (Self::Auto, None) => Ok(false),
            (_, Some(_)) => Ok(true),
            (Self::Fused, None) => Err(EngineError::Unsupported(
                "deltamem.json: graph.fused_file is null, so this bundle has no fused graph; load it with graph=\"auto\", or add one with \
                 `deltamem-export fuse BUNDLE`, which says where that cannot be done"
                    .into(),
            )),
        }
    }
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
    /// Which of the bundle's graphs runs.
    pub graph: GraphChoice,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            threads: 0,
            verify: Verify::Full,
            graph: GraphChoice::Auto,
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
    graph: FairMutex<Graph>,
    measured: OnceLock<FairMutex<Graph>>,
    opening_measured: Mutex<()>,
    idle_caches: Mutex<Vec<TurnCache>>,
}

impl Model {
    /// Loads the bundle at `path`.
    ///
    /// # Errors
    /// A [`BundleError`](crate::bundle::BundleError) when the bundle is missing, damaged or inconsistent; [`EngineError::Graph`] when its
    /// graph is not the one that the manifest describes; [`EngineError::Unsupported`] for a precision that the device cannot compute;
    /// [`EngineError::Onnx`] when ONNX Runtime refuses it.
    pub fn load(runtime: &'static Runtime, path: &Path, options: LoadOptions) -> Result<Arc<Self>> {
        let bundle = Bundle::open(path, options.verify)?;
        let manifest = bundle.manifest();
        if manifest.precision == "bf16" {
            return Err(EngineError::Unsupported(
                "deltamem.json: precision is bf16, which ONNX Runtime's CPU cannot compute; export the bundle again with --precision \
                 fp16, fp32 or int4, or run this one on CUDA"
                    .into(),
            ));
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
        let graph = Graph::open(runtime, &bundle, &options, &names, false)?;
        Ok(Arc::new(Self {
            runtime,
            geometry,
            fingerprint,
            text,
            template,
            names,
            kv_layout,
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

    /// Which graph runs: `fused` or `portable`. What is measured (`Session::health`, strengths other than 1) runs on a portable one.
    pub fn graph(&self) -> &'static str {
        match self.options.graph.fused(self.manifest()) {
            Ok(true) => "fused",
            _ => "portable",
        }
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

    /// Empty buffers for a turn: wiped ones of an earlier turn, or new ones.
    pub(crate) fn lend_cache(&self) -> Result<TurnCache> {
        let idle = self
            .idle_caches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        idle.map_or_else(
            || TurnCache::new(self.kv_layout, &self.manifest().graph.states),
            Ok,
        )
    }

    /// Takes a turn's buffers back.
    pub(crate) fn return_cache(&self, mut cache: TurnCache) {
        if cache.kv.capacity() > POOLED_TOKENS {
            return;
        }
        cache.wipe();
        let mut idle = self.idle_caches.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < POOLED_CACHES {
            idle.push(cache);
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

    /// Runs one chunk. On an error nothing but the chunk's own output buffers was touched.
    pub(crate) fn run(&self, chunk: Chunk<'_>) -> Result<()> {
        if chunk.measured() {
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
        let graph = Graph::open(self.runtime, &self.bundle, &self.options, &self.names, true)?;
        Ok(self.measured.get_or_init(|| FairMutex::new(graph)))
    }
}
