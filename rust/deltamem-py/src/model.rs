//! `Model`: a loaded bundle.

use std::path::PathBuf;
use std::sync::Arc;

use deltamem_engine::bundle::Verify;
use deltamem_engine::{Device, GraphChoice, LoadOptions, RunStats, Runtime, Spans};
use deltamem_store::Parts;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::{detached, store_to_python, to_python};
use crate::geometry::Geometry;
use crate::health::OnDrift;
use crate::keeping::Kept;
use crate::session::{Opening, Session};
use crate::store::Store;

/// A loaded bundle: a frozen language model with its δ-mem networks. Shared by any number of sessions and threads.
///
/// Make one with ``Model.load``; it needs ONNX Runtime (the extras ``[cpu]`` or ``[cuda]``) and neither PyTorch nor transformers.
///
/// Examples
/// --------
/// >>> model = deltamem_rt.Model.load(deltamem_rt.default_bundle())    # doctest: +SKIP
/// >>> with model.session() as session:                                # doctest: +SKIP
/// ...     print("".join(session.chat("My dog is called Bruno.")))
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct Model {
    pub(crate) inner: Arc<deltamem_engine::Model>,
}

#[pymethods]
impl Model {
    /// Load a bundle from a directory.
    ///
    /// Parameters
    /// ----------
    /// path : str or os.PathLike
    ///     A bundle: a directory with ``deltamem.json``, made by ``deltamem-export bundle``.
    /// device : {"auto", "cpu", "cuda", "cuda:1", ...}
    ///     Where the graph runs; the number is that of a card among those that CUDA shows this process, 0 if left out. "auto" takes the first
    ///     card if the bundle has a graph for CUDA, the installed ONNX Runtime has CUDA and a card answers, else the CPU; a card that should
    ///     have worked and failed is logged as a warning (``deltamem_rt``). ``model.device`` and ``model.placement`` say what it took and why.
    /// threads : int, optional
    ///     Threads for one run. By default one a core.
    /// max_batch : int
    ///     The most sessions whose tokens are read in one step when many threads or tasks make replies at once; 1 runs them one after another.
    ///     A step of several gives each what it gives alone, up to the rounding of sums.
    /// verify : bool
    ///     Compare every file with its digest before ONNX Runtime sees it. False compares sizes only, for very large bundles that were
    ///     checked before.
    /// graph : {"auto", "portable", "fused", "blocks"}
    ///     Which of the bundle's graphs runs, all from the same weights. "fused" has one node for each memory layer; "blocks", of bundles in
    ///     int4 and int8 and for the CPU, has this runtime's own products besides, which round as ONNX Runtime's do and are several times as
    ///     fast. "auto" takes the last of them that the bundle has and the device is fit for; on a card whose fused graph cannot be had (its
    ///     kernels are compiled there, which takes NVIDIA's NVRTC) it takes the portable one and logs a warning (``deltamem_rt``).
    ///     ``model.graph`` says which it is, ``model.unfused`` why it is not the fused one.
    /// tf32 : bool
    ///     Whether a card may round the factors of float32 products to TF32 (10 bits of 23): faster for fp32 bundles, and off the CPU's results
    ///     by about 1e-3. Of no effect on the CPU.
    /// cuda_graphs : bool
    ///     Whether a card captures steps of one token as CUDA graphs and replays them, which saves launching their kernels one by one. A step is
    ///     padded to its KV cache's capacity for it, and one of several sessions to a power of two of them, at most twice as many; keys and
    ///     values of ``max_batch`` sessions have room from the start. Of no effect where "auto" takes the CPU; ``model.uncaptured`` says why
    ///     steps are not captured.
    ///
    /// Raises
    /// ------
    /// ValueError
    ///     An option that is none of those above, or ``cuda_graphs=True`` with ``device="cpu"``.
    /// FileNotFoundError
    ///     No bundle at ``path``.
    /// BundleError
    ///     The bundle is damaged, was edited, is of a newer format, or contradicts itself; or it has no such ``graph``.
    /// OnnxRuntimeNotFoundError
    ///     Neither ``onnxruntime`` nor ``onnxruntime-gpu`` is installed; the message names both commands.
    /// DeviceError
    ///     The card, its driver or ONNX Runtime's CUDA is not there or fails, or the card has no memory left; the message says what to do.
    #[staticmethod]
    #[pyo3(signature = (path, *, device="auto", threads=None, max_batch=16, verify=true, graph="auto", tf32=false, cuda_graphs=false))]
    fn load(
        py: Python<'_>,
        path: PathBuf,
        device: &str,
        threads: Option<usize>,
        max_batch: usize,
        verify: bool,
        graph: &str,
        tf32: bool,
        cuda_graphs: bool,
    ) -> PyResult<Self> {
        let onnxruntime = py.import("deltamem_rt._onnxruntime")?;
        let device = match device {
            "auto" => Device::Auto,
            "cpu" => Device::Cpu,
            "cuda" => Device::Cuda(0),
            // For tests; nobody else gains anything by it.
            "_device_on_cpu" => Device::CpuAsDevice,
            other => match other.strip_prefix("cuda:").and_then(|id| id.parse().ok()) {
                Some(id) => Device::Cuda(id),
                None => {
                    return Err(PyValueError::new_err(format!(
                        "device is {other:?}, expected 'auto', 'cpu' or 'cuda', or 'cuda:1' for the second card"
                    )));
                }
            },
        };
        let graph = match graph {
            "auto" => GraphChoice::Auto,
            "portable" => GraphChoice::Portable,
            "fused" => GraphChoice::Fused,
            "blocks" => GraphChoice::Blocks,
            other => {
                return Err(PyValueError::new_err(format!(
                    "graph is {other:?}, expected 'auto', 'portable', 'fused' or 'blocks'"
                )));
            }
        };
        if threads == Some(0) {
            return Err(PyValueError::new_err(
                "threads is 0, expected at least 1, or None for one a core",
            ));
        }
        if max_batch == 0 {
            return Err(PyValueError::new_err(
                "max_batch is 0, expected at least 1 (sessions one after another)",
            ));
        }
        let library: PathBuf = onnxruntime
            .getattr("find_library")?
            .call0()?
            .getattr("path")?
            .extract()?;
        let cuda = match device {
            Device::Cuda(_) => true,
            Device::Auto => onnxruntime
                .getattr("may_use_cuda")?
                .call1((&library, &path))?
                .extract()?,
            _ => false,
        };
        if cuda {
            onnxruntime.getattr("open_cuda_libraries")?.call1((&library,))?;
        }
        let options = LoadOptions {
            device,
            threads: threads.unwrap_or(0),
            verify: if verify { Verify::Full } else { Verify::Sizes },
            max_batch,
            graph,
            tf32,
            cuda_graphs,
        };
        let inner = py.detach(|| {
            let runtime = Runtime::open(&library)?;
            deltamem_engine::Model::load(runtime, &path, options)
        });
        let inner = inner.map_err(to_python)?;
        if let Some(failed) = inner.fallback() {
            py.import("logging")?
                .call_method1("getLogger", ("deltamem_rt",))?
                .call_method1(
                    "warning",
                    ("device='auto' runs on the CPU, because CUDA failed: %s", failed),
                )?;
        }
        if let Some(failed) = inner.unfused_by_failure() {
            py.import("logging")?
                .call_method1("getLogger", ("deltamem_rt",))?
                .call_method1(
                    "warning",
                    (
                        "graph='auto' runs the portable graph, which launches some thirty kernels more a layer, because the fused one failed: %s",
                        failed,
                    ),
                )?;
        }
        Ok(Self { inner })
    }

    /// Open a session: one user's memory, empty at first.
    ///
    /// Sessions are independent of each other; many threads may each use one of their own over the same model.
    ///
    /// Parameters
    /// ----------
    /// name : str, optional
    ///     A name for logs and errors; with a store, the memory's name there.
    /// store : Store, optional
    ///     Where the memory is kept. The session starts with the state of ``branch``, or empty if there is no such memory yet.
    /// branch : str
    ///     The branch to start from and to commit on.
    /// autocommit : bool
    ///     Commit at every end of a turn, with ``meta={"turn": n}``: at ``end_turn()``, at the end of a chat's reply, at the session's next
    ///     call after a reply that was broken off, and at ``close()``. If that commit fails its error is raised there; the session keeps
    ///     the turn and the next commit holds it.
    ///
    /// read_only : bool
    ///     Read the memory and never write it, whatever a call's ``write`` says; bit for bit the same before and after. States may be taken up
    ///     (``restore``, ``checkout``, ``reset``); what would change the store raises ``SessionError``.
    /// on_drift : {"warn", "freeze", "rollback"}, optional
    ///     Look at the memory at every end of a turn and act when it is not healthy (``Session.health``, docs/health.md), with a
    ///     ``DriftWarning``: nothing else; writes off from then on; back to the last healthy state, with a store by a rollback of the branch
    ///     that ``rollback("main@{1}")`` takes back.
    /// strength : float
    ///     What the memory's corrections are multiplied by when it is read: 0 reads nothing, 1 is as trained. Other strengths run the bundle's
    ///     measured graph, which holds the weights in memory a second time.
    ///
    /// Raises
    /// ------
    /// FingerprintError
    ///     The memory was written under another model; ``differs`` says which of backbone, adapter, tokenizer, config.
    /// NotFoundError
    ///     The memory has no such branch.
    /// ValueError
    ///     A store without a name, ``autocommit`` without a store; ``read_only`` with ``autocommit`` or ``on_drift``; a strength below 0.
    /// BundleError
    ///     A strength other than 1 for a bundle whose graph has no input for it.
    #[pyo3(signature = (name=None, *, store=None, branch="main", autocommit=false, read_only=false, on_drift=None, strength=1.0))]
    fn session(
        &self,
        py: Python<'_>,
        name: Option<String>,
        store: Option<PyRef<'_, Store>>,
        branch: &str,
        autocommit: bool,
        read_only: bool,
        on_drift: Option<&str>,
        strength: f32,
    ) -> PyResult<Session> {
        let opening = Opening {
            read_only,
            on_drift: OnDrift::parse(on_drift)?,
            strength,
        };
        if read_only && (autocommit || on_drift.is_some()) {
            return Err(PyValueError::new_err(
                "read_only=True with autocommit or on_drift: a memory that is only read has nothing to commit and cannot drift; leave \
                 one of them out",
            ));
        }
        let Some(store) = store else {
            if autocommit {
                return Err(PyValueError::new_err(
                    "autocommit=True without a store; pass store=deltamem_rt.Store(path)",
                ));
            }
            return Session::new(Arc::clone(&self.inner), name, None, opening);
        };
        let Some(name) = name else {
            return Err(PyValueError::new_err(
                "a session with a store needs a name: the memory's, such as the user's id",
            ));
        };
        let made_of = &self.inner.manifest().fingerprint_parts;
        let parts = Parts {
            backbone: made_of.backbone,
            adapter: made_of.adapter,
            config: made_of.config,
            tokenizer: made_of.tokenizer,
        };
        let model = deltamem_store::Model {
            fingerprint: self.inner.fingerprint(),
            parts: Some(parts),
        };
        let (kept, memory) = (Arc::clone(&store.inner), name.clone());
        let kept = py
            .detach(|| Kept::open(kept, memory, branch.to_owned(), autocommit, parts, model))
            .map_err(store_to_python)?;
        Session::new(Arc::clone(&self.inner), Some(name), Some(kept), opening)
    }

    /// Which memories this model may load: 64 hexadecimal digits over backbone, adapter, configuration and tokenizer.
    #[getter]
    fn fingerprint(&self) -> String {
        self.inner.fingerprint().to_string()
    }

    /// The memory's geometry.
    #[getter]
    fn geometry(&self) -> Geometry {
        Geometry::from(self.inner.geometry())
    }

    /// The bundle's manifest (``deltamem.json``) as it was loaded, a new dict each time.
    #[getter]
    fn manifest<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let text = self.inner.manifest_json().map_err(to_python)?;
        py.import("json")?.call_method1("loads", (text,))
    }

    /// The bundle's directory.
    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path().to_path_buf()
    }

    /// The most tokens that one turn may hold. The memory has no such limit.
    #[getter]
    fn context_length(&self) -> usize {
        self.inner.context_length()
    }

    /// Where the graph runs: ``"cpu"``, or ``"cuda:0"`` with the card's number.
    #[getter]
    fn device(&self) -> String {
        self.inner.device()
    }

    /// Why it runs there, in words.
    #[getter]
    fn placement(&self) -> &str {
        self.inner.placement()
    }

    /// Threads that one run uses; None is one a core.
    #[getter]
    fn threads(&self) -> Option<usize> {
        Some(self.inner.threads()).filter(|&threads| threads > 0)
    }

    /// The most sessions whose tokens are read in one step; 1 where they run one after another.
    #[getter]
    fn max_batch(&self) -> usize {
        self.inner.max_batch()
    }

    /// Why sessions run one after another; None where they step together.
    #[getter]
    fn unbatched(&self) -> Option<String> {
        self.inner.unbatched().map(str::to_owned)
    }

    /// Why steps are not captured as CUDA graphs; None where they are.
    #[getter]
    fn uncaptured(&self) -> Option<String> {
        self.inner.uncaptured().map(str::to_owned)
    }

    /// Why each layer's memory is many nodes of the graph; None where it is one.
    #[getter]
    fn unfused(&self) -> Option<String> {
        self.inner.unfused().map(str::to_owned)
    }

    /// How many runs the model has made since it was loaded.
    #[getter]
    fn stats(&self) -> ModelStats {
        ModelStats(self.inner.run_stats())
    }

    // For tests of what happens beside the runs where the processor plays the device; elsewhere it does nothing.
    #[pyo3(signature = (*, hold=false, delay=0.0, fail_beside=0, fail_moves=0, poison=false))]
    fn _disturb(&self, hold: bool, delay: f64, fail_beside: u32, fail_moves: u32, poison: bool) {
        self.inner.disturb(deltamem_engine::Disturbance {
            hold,
            delay: std::time::Duration::try_from_secs_f64(delay).unwrap_or_default(),
            fail_beside,
            fail_moves,
            poison,
        });
    }

    /// Read once what many turns begin with, such as a system prompt.
    ///
    /// It is read with an empty memory and writes nothing, so it is the same for every session, and a turn that begins with it
    /// (``session.begin(prefix)``, ``session.chat(message, system=prefix)``) copies its keys and values instead of reading it: bit for bit what
    /// reading it with an empty memory would leave. The session's memory is read from behind it on.
    ///
    /// Parameters
    /// ----------
    /// tokens : str, sequence of int, or ndarray of int32 or int64 with shape [T], optional
    ///     What to read, as it is.
    /// system : str, optional
    ///     Or a system message, in the bundle's chat template.
    ///
    /// Raises
    /// ------
    /// ValueError
    ///     Both or neither are given, nothing is in it, or the template does not put a system message first.
    /// ContextLengthError
    ///     It is longer than the model's context.
    /// SessionError
    ///     Text for a bundle without a tokenizer, a system message for one without a chat template.
    #[pyo3(signature = (tokens=None, *, system=None))]
    fn prefix(
        &self,
        py: Python<'_>,
        tokens: Option<Bound<'_, PyAny>>,
        system: Option<String>,
    ) -> PyResult<Prefix> {
        let ids = match (tokens, &system) {
            (Some(tokens), None) => {
                let blank = deltamem_engine::Session::new(Arc::clone(&self.inner));
                crate::tokens::tokens(&tokens, Spans::Token, false, &blank)?
                    .0
                    .into_vec()?
            }
            (None, Some(system)) => self.inner.encode_system(system).map_err(to_python)?,
            _ => {
                return Err(PyValueError::new_err(
                    "prefix() takes either tokens (text or ids) or system (a message for the chat template)",
                ));
            }
        };
        let model = Arc::clone(&self.inner);
        let inner = detached(py, |interrupt| {
            deltamem_engine::Prefix::new(model, ids, interrupt)
        })?;
        Ok(Prefix {
            inner: Arc::new(inner),
            system,
        })
    }

    /// Which of the bundle's graphs runs: ``"blocks"``, ``"fused"`` or ``"portable"``. What is measured (``Session.health``, strengths other than 1) runs
    /// on a portable one.
    #[getter]
    fn graph(&self) -> &'static str {
        self.inner.graph()
    }

    /// Text to token ids, without special tokens of the tokenizer's own; those written in the text are recognised.
    ///
    /// Raises
    /// ------
    /// SessionError
    ///     The bundle has no tokenizer.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<i32>> {
        py.detach(|| Ok(self.inner.text()?.encode(text, false)?))
            .map_err(to_python)
    }

    /// Token ids to text; special tokens are left out.
    ///
    /// Raises
    /// ------
    /// SessionError
    ///     The bundle has no tokenizer.
    /// ValueError
    ///     An id is outside the vocabulary.
    fn decode(&self, py: Python<'_>, ids: Vec<i32>) -> PyResult<String> {
        py.detach(|| {
            self.inner.check_tokens(&ids)?;
            Ok(self.inner.text()?.decode(&ids, true)?)
        })
        .map_err(to_python)
    }

    fn __repr__(&self) -> String {
        let manifest = self.inner.manifest();
        format!(
            "Model('{}', precision='{}', geometry={}, fingerprint='{}...')",
            manifest.name,
            manifest.precision,
            self.geometry().__repr__(),
            &self.fingerprint()[..12]
        )
    }
}

/// What many turns begin with, read once by ``Model.prefix``: its keys and values, without a memory.
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct Prefix {
    pub(crate) inner: Arc<deltamem_engine::Prefix>,
    /// The system message that it is, if it is one.
    pub(crate) system: Option<String>,
}

#[pymethods]
impl Prefix {
    /// Its tokens.
    #[getter]
    fn token_ids(&self) -> Vec<i32> {
        self.inner.tokens().to_vec()
    }

    /// The system message that it holds; None for other tokens.
    #[getter]
    fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Bytes of its keys and values.
    #[getter]
    fn bytes(&self) -> usize {
        self.inner.bytes()
    }

    fn __len__(&self) -> usize {
        self.inner.tokens().len()
    }

    fn __repr__(&self) -> String {
        format!("Prefix({} tokens)", self.inner.tokens().len())
    }
}

/// How many runs a model has made since it was loaded, and of what.
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct ModelStats(RunStats);

#[pymethods]
impl ModelStats {
    /// Steps: runs with one token of every session in them.
    #[getter]
    fn steps(&self) -> u64 {
        self.0.steps
    }

    /// Tokens read in those steps; over ``steps`` it is how many sessions shared one on average.
    #[getter]
    fn step_tokens(&self) -> u64 {
        self.0.step_tokens
    }

    /// Rows of those steps that stood for nobody: idle turns that lay between others.
    #[getter]
    fn idle_rows(&self) -> u64 {
        self.0.idle_rows
    }

    /// The most sessions in one step.
    #[getter]
    fn largest_step(&self) -> u64 {
        self.0.largest_step
    }

    /// Runs of one session by itself: chunks of prompts, and single tokens where sessions run one after another.
    #[getter]
    fn chunks(&self) -> u64 {
        self.0.chunks
    }

    /// Tokens whose logits stayed on the card, because the choice of the next one depends on a few of the largest: only those came down.
    /// 0 on the CPU, where nothing has to.
    #[getter]
    fn best_rows(&self) -> u64 {
        self.0.best_rows
    }

    /// Steps that were captured as CUDA graphs or replayed (``Model.load(..., cuda_graphs=True)``).
    #[getter]
    fn captured_steps(&self) -> u64 {
        self.0.captured_steps
    }

    /// CUDA graphs that were captured for them: one for each set of buffers and sizes that steps have used.
    #[getter]
    fn cuda_graphs(&self) -> u64 {
        self.0.cuda_graphs
    }

    fn __repr__(&self) -> String {
        format!(
            "ModelStats(steps={}, step_tokens={}, largest_step={}, idle_rows={}, chunks={}, best_rows={})",
            self.0.steps,
            self.0.step_tokens,
            self.0.largest_step,
            self.0.idle_rows,
            self.0.chunks,
            self.0.best_rows
        )
    }
}
