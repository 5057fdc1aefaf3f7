//! `Session`: the class that an application holds one of a user.

use std::sync::Arc;

use deltamem_core::edits::blame::Attribution;
use deltamem_engine::sampling::SamplingOptions;
use deltamem_engine::text::Message;
use deltamem_engine::{FeedOptions, GenerationOptions, Spans};
use deltamem_store::Commit;
use numpy::{PyArray1, PyArray2, PyArray4, PyArrayMethods};
use parking_lot::{Mutex, MutexGuard};
use pyo3::exceptions::{PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::dlpack::MemoryTensor;
use crate::errors::{detached, named, problem_to_python, store_to_python, to_python};
use crate::generation::Generation;
use crate::geometry::Geometry;
use crate::health::{self, OnDrift, Report, Watch};
use crate::history;
use crate::keeping::Kept;
use crate::model::Prefix;
use crate::records;
use crate::snapshot::{Snapshot, view};
use crate::store::{meta_text, warn_of};
use crate::tokens::{spans_of_text, tokens};

/// One user's memory over a shared model, and the turn that is going on.
///
/// Tokens that are fed or generated write the memory as they pass. Inside a turn the KV cache goes on from call to call; ``end_turn``
/// drops it and the memory stays, so the next turn costs the same after ten tokens of history or ten million. Every call happens
/// whole or leaves the session as it was (an error, Ctrl-C). One session serves one thread at a time: a second one gets
/// ``SessionError`` at once.
///
/// Examples
/// --------
/// >>> with model.session("ada") as session:                            # doctest: +SKIP
/// ...     for piece in session.chat("My dog is called Bruno."):
/// ...         print(piece, end="")
/// ...     print(session.chat("What is my dog called?").read())
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct Session {
    name: Option<String>,
    model: Arc<deltamem_engine::Model>,
    inner: Mutex<Option<Slot>>,
}

/// What an open session holds.
pub(crate) struct Slot {
    engine: deltamem_engine::Session,
    /// Its place in a store, if it has one.
    kept: Option<Kept>,
    /// Who looks at the memory behind every end of a turn, if anybody does.
    watch: Option<Watch>,
    read_only: bool,
    /// What errors and warnings call it.
    label: String,
}

/// How a session is opened, beside its place in a store.
#[derive(Clone, Copy)]
pub(crate) struct Opening {
    pub(crate) read_only: bool,
    pub(crate) on_drift: Option<OnDrift>,
    pub(crate) strength: f32,
}

/// Exclusive use of an open session.
pub(crate) struct Open<'a>(MutexGuard<'a, Option<Slot>>, &'a Session);

impl Open<'_> {
    /// The engine's session.
    pub(crate) fn get(&mut self) -> PyResult<&mut deltamem_engine::Session> {
        self.slot().map(|slot| &mut slot.engine)
    }

    fn slot(&mut self) -> PyResult<&mut Slot> {
        let label = self.1.label();
        self.0.as_mut().ok_or_else(|| {
            named(
                "SessionError",
                format!("{label} is closed; open a new one with model.session()"),
            )
        })
    }
}

impl Slot {
    /// Brings an unfinished reply into order before a call that moves the session; a turn that ends by that is committed, if the session
    /// commits by itself.
    fn settle(&mut self, py: Python<'_>) -> PyResult<()> {
        let commits = self.kept.as_ref().is_some_and(|kept| kept.autocommit);
        if !(commits || self.watch.is_some()) || !self.engine.unsettled() {
            return Ok(());
        }
        self.ending(py, |engine, interrupt| engine.settle(interrupt))
    }

    /// What may end a turn in front of a commit that the caller makes: the watch looks at that turn, and it is not committed by itself. What
    /// is committed is the state behind this, which the watch may have taken back.
    fn ending_before_commit(
        &mut self,
        py: Python<'_>,
        work: impl FnOnce(
            &mut deltamem_engine::Session,
            &mut dyn FnMut() -> bool,
        ) -> Result<(), deltamem_engine::EngineError>
        + Send,
    ) -> PyResult<deltamem_core::Snapshot> {
        let turns = self.engine.turns();
        let engine = &mut self.engine;
        detached(py, |interrupt| work(engine, interrupt))?;
        if self.engine.turns() > turns {
            self.look(py)?;
        }
        let engine = &mut self.engine;
        detached(py, |interrupt| engine.snapshot(interrupt))
    }

    /// The session as it is, behind what an unfinished reply left.
    fn snapshot(&mut self, py: Python<'_>) -> PyResult<deltamem_core::Snapshot> {
        // First, so that a watch that takes a turn back does it before the snapshot is taken.
        self.settle(py)?;
        self.ending(py, |engine, interrupt| engine.snapshot(interrupt))
    }

    /// Has the watch look at the turn that has just ended, and tells what it did. The session is between turns.
    fn look(&mut self, py: Python<'_>) -> PyResult<()> {
        let Some(watch) = &mut self.watch else {
            return Ok(());
        };
        let (engine, kept) = (&mut self.engine, self.kept.as_mut());
        let said = py
            .detach(|| watch.look(engine, kept))
            .map_err(problem_to_python)?;
        match said {
            Some(said) => health::warn(py, &self.label, &said),
            None => Ok(()),
        }
    }

    /// The session has taken up another state.
    fn begin(&mut self) -> PyResult<()> {
        match &mut self.watch {
            Some(watch) => watch
                .begin(&mut self.engine, self.kept.as_ref())
                .map_err(to_python),
            None => Ok(()),
        }
    }

    /// Runs engine work that may end a turn, and commits one that did.
    pub(crate) fn ending<T: Send>(
        &mut self,
        py: Python<'_>,
        work: impl FnOnce(
            &mut deltamem_engine::Session,
            &mut dyn FnMut() -> bool,
        ) -> Result<T, deltamem_engine::EngineError>
        + Send,
    ) -> PyResult<T> {
        let turns = self.engine.turns();
        let engine = &mut self.engine;
        let result = detached(py, |interrupt| work(engine, interrupt));
        // A turn may have ended before the work failed.
        if self.engine.turns() > turns
            && let Err(error) = self.autocommit(py).and_then(|()| self.look(py))
        {
            return Err(match result {
                Ok(_) => error,
                Err(first) => {
                    error.set_cause(py, Some(first));
                    error
                }
            });
        }
        result
    }

    /// Commits, if the session does so by itself. The session is between turns, so its snapshot moves nothing.
    fn autocommit(&mut self, py: Python<'_>) -> PyResult<()> {
        match &mut self.kept {
            Some(kept) if kept.autocommit => {
                let engine = &mut self.engine;
                let snapshot = detached(py, |interrupt| engine.snapshot(interrupt))?;
                py.detach(|| kept.commit_turn(snapshot))
                    .map_err(problem_to_python)
            }
            _ => Ok(()),
        }
    }

    /// The session's place in a store.
    fn kept(&mut self, label: &str) -> PyResult<&mut Kept> {
        self.kept.as_mut().ok_or_else(|| {
            named(
                "SessionError",
                format!("{label} has no store, so it has no commits; open it with model.session(name, store=store)"),
            )
        })
    }

    /// Whether the session holds what its head does not.
    fn dirty(&self) -> PyResult<bool> {
        let engine = &self.engine;
        match &self.kept {
            _ if self.read_only => Ok(false),
            _ if engine.unsettled() => Ok(true),
            Some(kept) => {
                let memory = engine.memory().map_err(to_python)?;
                Ok(kept.differs(&memory, engine.tokens_seen(), engine.turns()))
            }
            None => Ok(false),
        }
    }

    /// The session's place in a store, for what changes something there.
    fn writing(&mut self, label: &str) -> PyResult<&mut Kept> {
        if self.read_only {
            return Err(named(
                "SessionError",
                format!(
                    "{label} is read-only, so nothing of its store is changed; open it without read_only=True"
                ),
            ));
        }
        self.kept(label)
    }

    /// Settles, and refuses to lose what is not committed.
    fn leave(&mut self, py: Python<'_>, label: &str, force: bool) -> PyResult<&mut Kept> {
        let kept = self.kept(label)?;
        if kept.in_doubt() {
            py.detach(|| kept.clear()).map_err(problem_to_python)?;
        }
        if !force {
            self.settle(py)?;
            if self.dirty()? {
                return Err(named(
                    "SessionError",
                    format!(
                        "{label} holds what is not committed; commit() it first, or give it up with force=True"
                    ),
                ));
            }
        }
        self.kept(label)
    }

    /// Takes up a commit's state and stands there.
    fn stand(&mut self, head: Option<(Commit, deltamem_core::Snapshot)>) -> PyResult<()> {
        match &head {
            Some((_, snapshot)) => self.engine.restore(snapshot).map_err(to_python)?,
            None => self.engine.reset(),
        }
        if let Some(kept) = &mut self.kept {
            kept.stand(head);
        }
        self.begin()
    }
}

impl Session {
    pub(crate) fn new(
        model: Arc<deltamem_engine::Model>,
        name: Option<String>,
        kept: Option<Kept>,
        opening: Opening,
    ) -> PyResult<Self> {
        let mut engine = deltamem_engine::Session::new(Arc::clone(&model));
        engine.set_strength(opening.strength).map_err(to_python)?;
        engine.set_writable(!opening.read_only);
        let mut slot = Slot {
            watch: opening
                .on_drift
                .map(|on_drift| Watch::new(on_drift, &engine))
                .transpose()
                .map_err(to_python)?,
            engine,
            kept,
            read_only: opening.read_only,
            label: label_of(name.as_deref()),
        };
        let head = slot.kept.as_mut().and_then(|kept| kept.head.take());
        if head.is_some() {
            slot.stand(head)?;
        } else {
            slot.begin()?;
        }
        Ok(Self {
            name,
            inner: Mutex::new(Some(slot)),
            model,
        })
    }

    /// Does `work` with the session and the name that errors call it.
    fn at<T>(&self, work: impl FnOnce(&mut Slot, &str) -> PyResult<T>) -> PyResult<T> {
        let mut open = self.open()?;
        work(open.slot()?, &self.label())
    }

    /// Whether the session is closed; an error when another thread has it.
    pub(crate) fn is_closed(&self) -> PyResult<bool> {
        Ok(self.open()?.0.is_none())
    }

    /// Engine work of a reply, which may end a turn.
    pub(crate) fn ending<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(
            &mut deltamem_engine::Session,
            &mut dyn FnMut() -> bool,
        ) -> Result<T, deltamem_engine::EngineError>
        + Send,
    ) -> PyResult<T> {
        let mut open = self.open()?;
        open.slot()?.ending(py, work)
    }

    fn label(&self) -> String {
        label_of(self.name.as_deref())
    }

    /// Takes the session for one call, or says that another thread has it.
    pub(crate) fn open(&self) -> PyResult<Open<'_>> {
        self.inner.try_lock().map(|guard| Open(guard, self)).ok_or_else(|| {
            named(
                "SessionError",
                format!("{} is in use by another thread; use one session a thread, or wait for the other call to end", self.label()),
            )
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut deltamem_engine::Session) -> PyResult<T>) -> PyResult<T> {
        let mut open = self.open()?;
        work(open.get()?)
    }
}

#[pymethods]
impl Session {
    /// Read text or token ids.
    ///
    /// Parameters
    /// ----------
    /// tokens : str, sequence of int, or array of int32 or int64 with shape [T]
    ///     What to read. An array is NumPy's, or any other library's by DLPack; a contiguous int32 array on the CPU is used where it lies. Text at the start of a turn gets the special tokens that the
    ///     tokenizer puts at a start.
    /// write : bool
    ///     Whether these tokens may write the memory; False only reads it. In a session that is read-only or frozen none writes.
    /// logits : bool
    ///     Whether to return the logits of every token.
    /// spans : "token", or sequence of int or ndarray of int32 or int64 with shape [T], optional
    ///     For a bundle that writes one mean a message or sentence: the id of the span that each token belongs to, never falling, and -1
    ///     for tokens that are not written. All tokens of the call read the memory from before it; then each span is written once, in
    ///     the order of the ids. ``"token"`` writes each token by itself, on purpose. Text needs none: it is one message, or is cut into
    ///     sentences, as the bundle says.
    ///
    /// Returns
    /// -------
    /// None or ndarray of float32 with shape [T, vocab]
    ///
    /// Raises
    /// ------
    /// ValueError
    ///     A token id outside the vocabulary, an array of another shape; spans that fall, are too few or too many, or are below -1; spans
    ///     with text, or for a bundle that writes per token; none for the token ids of a bundle that writes spans.
    /// TypeError
    ///     Something that is neither text nor ids, spans that are no integers.
    /// ContextLengthError
    ///     The turn would be longer than the model's context; raised before anything is read.
    /// SessionError
    ///     The session is closed or in use by another thread, or text was given to a bundle without a tokenizer.
    #[pyo3(signature = (tokens, write=true, logits=false, spans=None))]
    fn feed<'py>(
        &self,
        py: Python<'py>,
        tokens: Bound<'py, PyAny>,
        write: bool,
        logits: bool,
        spans: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyArray2<f32>>>> {
        let mut open = self.open()?;
        let slot = open.slot()?;
        let spans = crate::tokens::spans(spans.as_ref())?;
        let (ids, spans) = crate::tokens::tokens(&tokens, spans, write, &slot.engine)?;
        let ids = ids.as_slice()?;
        slot.settle(py)?;
        let session = &mut slot.engine;
        let vocab = self.model.vocab();
        let mut wanted = Vec::new();
        if logits {
            // Out-of-range calls are refused before anything as large as their logits is allocated.
            session.check_room(ids.len()).map_err(to_python)?;
            wanted.try_reserve_exact(ids.len() * vocab).map_err(|_| {
                PyMemoryError::new_err(format!("no memory for logits of shape [{}, {vocab}]", ids.len()))
            })?;
            wanted.resize(ids.len() * vocab, 0.0_f32);
        }
        detached(py, |interrupt| {
            let options = FeedOptions {
                write,
                spans,
                logits: logits.then_some(&mut wanted[..]),
                energy: None,
            };
            session.feed(ids, options, interrupt)
        })?;
        if !logits {
            return Ok(None);
        }
        let rows = wanted.len() / vocab.max(1);
        PyArray1::from_vec(py, wanted).reshape([rows, vocab]).map(Some)
    }

    /// Generate a reply, piece by piece.
    ///
    /// Nothing is computed before the first piece is asked for, and nothing after the last: to stop, stop asking (or ``close()``).
    /// A reply that was read to its end is in the memory; one that was broken off is there as far as it was given out, from the
    /// session's next call on.
    ///
    /// Parameters
    /// ----------
    /// prompt : str, sequence of int, or ndarray, optional
    ///     What to read first. Without one the turn goes on from where it is.
    /// max_new_tokens : int
    ///     The most tokens to sample, at least 1.
    /// temperature : float
    ///     0 takes the likeliest token; higher spreads.
    /// top_p, min_p : float
    ///     Keep the likeliest tokens that make up ``top_p`` of the probability; drop those under ``min_p`` times the likeliest one's.
    /// top_k : int
    ///     Keep the ``top_k`` likeliest tokens; 0 keeps all.
    /// repetition_penalty : float
    ///     Over 1 makes tokens of this turn less likely.
    /// seed : int, optional
    ///     The same seed gives the same text, on every machine. Without one the session's own stream goes on.
    /// stop : str or sequence of str
    ///     Texts that end the reply; they are not part of it and may span tokens.
    /// write : bool
    ///     Whether prompt and reply may write the memory. The tokens of a reply are written one by one, whatever the bundle.
    /// spans : "token", or sequence of int or ndarray of int32 or int64 with shape [T], optional
    ///     What the prompt writes, as for ``feed``.
    /// measure : bool
    ///     Measure the corrections against what they correct (``stats.delta_ratio``). Slower: it takes the bundle's measured graph.
    ///
    /// Returns
    /// -------
    /// Generation
    ///     An iterator, also an asynchronous one, of pieces of text in whole characters.
    ///
    /// Raises
    /// ------
    /// ValueError
    ///     An option out of range, a token id outside the vocabulary, spans that do not fit (see ``feed``).
    /// ContextLengthError
    ///     The prompt does not fit into what is left of the context.
    /// SessionError
    ///     There is nothing to go on from; the session is closed or in use by another thread.
    #[pyo3(signature = (prompt=None, *, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
                        seed=None, stop=None, write=true, measure=false, spans=None))]
    fn generate(
        slf: Bound<'_, Self>,
        prompt: Option<Bound<'_, PyAny>>,
        max_new_tokens: usize,
        temperature: f64,
        top_p: f64,
        top_k: usize,
        min_p: f64,
        repetition_penalty: f64,
        seed: Option<u64>,
        stop: Option<Bound<'_, PyAny>>,
        write: bool,
        measure: bool,
        spans: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Generation> {
        let sampling = SamplingOptions {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            seed,
        };
        let options = GenerationOptions {
            max_new_tokens,
            sampling,
            stop: stop_texts(stop)?,
            write,
            end_turn: false,
            measure,
            prefix: None,
        };
        let session = slf.get();
        let mut open = session.open()?;
        let spans = crate::tokens::spans(spans.as_ref())?;
        let (ids, spans) = match prompt {
            Some(prompt) => {
                let (ids, spans) = tokens(&prompt, spans, write, open.get()?)?;
                (ids.into_vec()?, spans)
            }
            None => (Vec::new(), spans),
        };
        begin(&slf, open, ids, &spans, options)
    }

    /// Say something and get a reply: the bundle's chat template, a reply, the end of the turn.
    ///
    /// The turn ends when the reply does, also when it is broken off (then at the session's next call). Takes the options of
    /// ``generate``. In a bundle that writes spans, the message writes one mean over all that it adds to the template, or one for each
    /// sentence of its content; a system message is not written.
    ///
    /// Parameters
    /// ----------
    /// message : str
    ///     The user's message.
    /// system : str or Prefix, optional
    ///     A system message put before it, in this turn only. A ``Prefix`` (``model.prefix(system=...)``) was read before, with an empty memory
    ///     and without writing, and is copied.
    /// spans : "token", optional
    ///     Writes each token of the rendered conversation by itself, whatever the bundle.
    ///
    /// Raises
    /// ------
    /// SessionError
    ///     The bundle has no chat template or no tokenizer.
    /// TextError
    ///     The template refused the message, or renders it so that it cannot be told which tokens are the message's.
    #[pyo3(signature = (message, *, system=None, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0,
                        repetition_penalty=1.0, seed=None, stop=None, write=true, measure=false, spans=None))]
    fn chat(
        slf: Bound<'_, Self>,
        message: String,
        system: Option<System<'_>>,
        max_new_tokens: usize,
        temperature: f64,
        top_p: f64,
        top_k: usize,
        min_p: f64,
        repetition_penalty: f64,
        seed: Option<u64>,
        stop: Option<Bound<'_, PyAny>>,
        write: bool,
        measure: bool,
        spans: Option<String>,
    ) -> PyResult<Generation> {
        let (system, prefix) = match system {
            None => (None, None),
            Some(System::Text(text)) => (Some(text), None),
            Some(System::Read(prefix)) => (Some(prefix.get().system.clone().ok_or_else(|| {
                PyValueError::new_err(
                    "system is a Prefix that was made of tokens; make it with model.prefix(system=...), or begin(prefix) and generate()",
                )
            })?), Some(Arc::clone(&prefix.get().inner))),
        };
        let sampling = SamplingOptions {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            seed,
        };
        let options = GenerationOptions {
            max_new_tokens,
            sampling,
            stop: stop_texts(stop)?,
            write,
            end_turn: true,
            measure,
            prefix,
        };
        let session = slf.get();
        let open = session.open()?;
        let mut messages = Vec::new();
        if let Some(system) = system {
            messages.push(Message {
                role: "system".into(),
                content: system,
            });
        }
        messages.push(Message {
            role: "user".into(),
            content: message,
        });
        let spans = spans_of_text(spans.as_deref())?;
        let (mut ids, mut spans) = session
            .model
            .encode_chat(&messages, spans, write)
            .map_err(to_python)?;
        if let Some(prefix) = &options.prefix {
            let read = prefix.tokens().len();
            if !ids.starts_with(prefix.tokens()) {
                return Err(named(
                    "TextError",
                    "in front of this message the chat template writes the system message with other tokens than alone; pass system= as text"
                        .to_owned(),
                ));
            }
            ids.drain(..read);
            if let Spans::Ids(ids) = &mut spans {
                ids.to_mut().drain(..read);
            }
        }
        begin(&slf, open, ids, &spans, options)
    }

    /// Begin a turn with what ``Model.prefix`` has read: its keys and values are copied, the memory stays as it is.
    ///
    /// What follows reads this session's memory; the prefix itself was read with an empty one and writes nothing. Its tokens count for
    /// ``position``, not for ``tokens_seen``.
    ///
    /// Raises
    /// ------
    /// SessionError
    ///     In the middle of a turn.
    /// ValueError
    ///     The prefix was read by another model.
    fn begin(&self, py: Python<'_>, prefix: PyRef<'_, Prefix>) -> PyResult<()> {
        self.at(|slot, _| {
            slot.settle(py)?;
            let engine = &mut slot.engine;
            let prefix = Arc::clone(&prefix.inner);
            detached(py, |interrupt| engine.begin(&prefix, interrupt))
        })
    }

    /// End the turn: drop the KV cache, keep the memory.
    fn end_turn(&self, py: Python<'_>) -> PyResult<()> {
        self.at(|slot, _| {
            slot.settle(py)?;
            slot.ending(py, |engine, interrupt| engine.end_turn(interrupt))
        })
    }

    /// The memory: float32 [layers, heads, r, r], read-only, without a copy; on CUDA it is copied from the card, once for each state.
    ///
    /// S[i, j] of a layer and head: i is the value's row, j the key's column; a read is S q. The array is a moment's state: it never
    /// changes, whatever the session does next, and may outlive it. ``memory_dlpack`` gives the state where it lies.
    ///
    /// Raises
    /// ------
    /// DeviceError
    ///     The card failed, and with it what was on it since the last commit or snapshot.
    /// NotFiniteError
    ///     On CUDA: the state holds NaN or infinite numbers. (On the CPU the call that made them raises.)
    #[getter]
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray4<f32>>> {
        self.with(|session| {
            let memory = py.detach(|| session.memory()).map_err(to_python)?;
            view(py, memory, session.geometry())
        })
    }

    /// The memory where it lies, for DLPack: ``torch.from_dlpack(session.memory_dlpack())``, as NumPy, CuPy and JAX read it too.
    ///
    /// float32 [layers, heads, r, r] on the CPU, or on the card that the model runs on; never a copy of it. Like ``memory`` it is a moment's
    /// state that nobody writes any more: it is read-only, does not change with the session, and lives as long as a reader holds it.
    ///
    /// Raises
    /// ------
    /// DeviceError
    ///     A state that was restored cannot be put on the card.
    fn memory_dlpack(&self, py: Python<'_>) -> PyResult<MemoryTensor> {
        self.with(|session| {
            let state = py.detach(|| session.state()).map_err(to_python)?;
            Ok(MemoryTensor::new(state, session.geometry()))
        })
    }

    /// An immutable copy of what the session needs to go on elsewhere: memory, counters, sampler. A few KB; no KV cache.
    fn snapshot(&self, py: Python<'_>) -> PyResult<Snapshot> {
        self.at(|slot, _| slot.snapshot(py).map(|inner| Snapshot { inner }))
    }

    /// Take up a snapshot. Behind an end of turn the session goes on bit for bit as the one that it was taken from.
    ///
    /// Raises
    /// ------
    /// FingerprintError
    ///     The snapshot was written by another model. The session is as it was.
    fn restore(&self, snapshot: PyRef<'_, Snapshot>) -> PyResult<()> {
        self.at(|slot, _| {
            slot.engine.restore(&snapshot.inner).map_err(to_python)?;
            slot.begin()
        })
    }

    /// Empty the memory and drop the turn.
    fn reset(&self) -> PyResult<()> {
        self.at(|slot, _| {
            slot.engine.reset();
            slot.begin()
        })
    }

    /// What the memory looks like, and whether healthy memories of this bundle look like that (docs/health.md). The session stays as it is.
    ///
    /// The verdict holds the figures against the bounds that the bundle learnt at export; a bundle that learnt none says only whether the
    /// numbers can be used. A watched session (``on_drift``) also knows how far the last turn moved the state.
    ///
    /// Parameters
    /// ----------
    /// measure : bool
    ///     Also read the last tokens of the session (at most 256, over turns) once more without writing, for the size of the corrections and
    ///     the gates. It takes the bundle's measured graph, which is loaded at the first call and holds the weights in memory a second time;
    ///     without one, or before the first token, these are None.
    #[pyo3(signature = (*, measure=true))]
    fn health<'py>(&self, py: Python<'py>, measure: bool) -> PyResult<Bound<'py, PyAny>> {
        self.at(|slot, _| {
            let engine = &slot.engine;
            let measured = if measure {
                detached(py, |interrupt| engine.measure(interrupt))?
            } else {
                None
            };
            let (watch, head) = (
                slot.watch.as_ref(),
                slot.kept.as_ref().and_then(|kept| kept.head.as_ref()),
            );
            let report = py
                .detach(|| Report::of(engine, watch, head, measured))
                .map_err(to_python)?;
            report.to_python(py, engine, watch)
        })
    }

    /// Put writes on again after ``on_drift="freeze"``, and take the memory as it is for a start: what is healthy, or how far a turn moves it,
    /// is asked from here on. Does nothing to a session that is not frozen.
    fn unfreeze(&self) -> PyResult<()> {
        self.at(|slot, _| {
            if slot.watch.as_ref().is_some_and(|watch| watch.frozen) {
                slot.begin()?;
            }
            Ok(())
        })
    }

    /// Whether writes are off because the memory drifted (``on_drift="freeze"``).
    #[getter]
    fn frozen(&self) -> PyResult<bool> {
        self.at(|slot, _| Ok(slot.watch.as_ref().is_some_and(|watch| watch.frozen)))
    }

    /// What is done when the memory drifts: "warn", "freeze", "rollback", or None.
    #[getter]
    fn on_drift(&self) -> PyResult<Option<&'static str>> {
        self.at(|slot, _| Ok(slot.watch.as_ref().map(|watch| watch.on_drift.word())))
    }

    /// Whether the session reads its memory and never writes it.
    #[getter]
    fn read_only(&self) -> PyResult<bool> {
        self.at(|slot, _| Ok(slot.read_only))
    }

    /// What the memory's corrections are multiplied by: 0 reads nothing, 1 is as trained. It holds for tokens read from now on; may be set.
    #[getter]
    fn strength(&self) -> PyResult<f32> {
        self.with(|session| Ok(session.strength()))
    }

    #[setter]
    fn set_strength(&self, strength: f32) -> PyResult<()> {
        self.with(|session| session.set_strength(strength).map_err(to_python))
    }

    /// Close the session and free its memory. What ``memory`` or ``snapshot`` gave stays valid. Closing twice does nothing.
    ///
    /// A session that commits by itself ends its turn and commits what is not committed yet. If that fails, the error is raised and the
    /// session stays open, so that nothing is lost: ``merge()`` or ``commit()``, then close it again; ``close(discard=True)`` gives
    /// it up.
    #[pyo3(signature = (*, discard=false))]
    fn close(&self, py: Python<'_>, discard: bool) -> PyResult<()> {
        let mut open = self.open()?;
        if let Some(slot) = open.0.as_mut()
            && !discard
            && slot.kept.as_ref().is_some_and(|kept| kept.autocommit)
        {
            slot.ending(py, |engine, interrupt| engine.end_turn(interrupt))?;
            if slot.dirty()? {
                slot.autocommit(py)?;
            }
        }
        open.0.take();
        Ok(())
    }

    /// Whether the session is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.inner.try_lock().is_some_and(|guard| guard.is_none())
    }

    /// The session's name, or None.
    #[getter]
    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The memory's geometry.
    #[getter]
    fn geometry(&self) -> Geometry {
        Geometry::from(self.model.geometry())
    }

    /// Tokens read since the memory was empty, over all turns and restarts.
    #[getter]
    fn tokens_seen(&self) -> PyResult<u64> {
        self.with(|session| Ok(session.tokens_seen()))
    }

    /// Turns ended since the memory was empty.
    #[getter]
    fn turns(&self) -> PyResult<u64> {
        self.with(|session| Ok(session.turns()))
    }

    /// Tokens in the present turn's KV cache; 0 between turns.
    #[getter]
    fn position(&self) -> PyResult<usize> {
        self.with(|session| Ok(session.position()))
    }

    /// Bytes of the present turn's KV cache; 0 between turns.
    #[getter]
    fn cache_bytes(&self) -> PyResult<usize> {
        self.with(|session| Ok(session.cache_bytes()))
    }

    /// The commit that the session stands on, or None before the first one and without a store.
    #[getter]
    fn head<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.at(|slot, _| {
            let head = slot.kept.as_ref().and_then(|kept| kept.head.as_ref());
            head.map(|(commit, _)| records::commit(py, commit)).transpose()
        })
    }

    /// The branch that the session commits on; None without a store, and on a commit that was checked out by itself.
    #[getter]
    fn branch_name(&self) -> PyResult<Option<String>> {
        self.at(|slot, _| Ok(slot.kept.as_ref().and_then(|kept| kept.branch.clone())))
    }

    /// Whether the session holds something that ``head`` does not. Always False without a store.
    #[getter]
    fn dirty(&self) -> PyResult<bool> {
        self.at(|slot, _| Ok(slot.kept.is_some() && slot.dirty()?))
    }

    /// Whether every end of a turn commits.
    #[getter]
    fn autocommit(&self) -> PyResult<bool> {
        self.at(|slot, _| Ok(slot.kept.as_ref().is_some_and(|kept| kept.autocommit)))
    }

    /// Commit the session's state on its branch; the first commit makes the memory. It returns when the commit is durable.
    ///
    /// A turn may go on afterwards; a chat's reply that was broken off ends its turn first. A commit of an unchanged state is a commit
    /// as well.
    ///
    /// Parameters
    /// ----------
    /// message : str
    ///     Your words, at most 64 KiB.
    /// meta : dict, optional
    ///     Your data: a JSON object, at most 16 KiB.
    ///
    /// Raises
    /// ------
    /// ConflictError
    ///     Another worker moved the branch; ``expected`` and ``found`` are the two heads. The session is as it was: ``merge()`` brings both
    ///     together and commits.
    /// QuotaError
    ///     The memory may keep no more.
    /// StoreFullError, StoreIOError, UnavailableError
    ///     The store failed. The session is as it was; the next commit holds what this one would have.
    #[pyo3(signature = (message="", meta=None))]
    fn commit<'py>(
        &self,
        py: Python<'py>,
        message: &str,
        meta: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let meta = meta_text(meta)?;
        self.at(|slot, label| {
            slot.writing(label)?.on().map_err(problem_to_python)?;
            let snapshot = slot.ending_before_commit(py, |engine, interrupt| engine.settle(interrupt))?;
            let kept = slot.kept(label)?;
            let commit = py
                .detach(|| kept.commit(snapshot, message, meta.as_deref()))
                .map_err(problem_to_python)?;
            if let (Some(watch), Some(kept)) = (&mut slot.watch, &slot.kept) {
                watch.committed(kept);
            }
            records::commit(py, &commit)
        })
    }

    /// The last ``n`` commits that ``ref`` reaches, children before parents. None before the first commit.
    ///
    /// A ref is ``HEAD`` (where the session stands), a branch, a tag, or at least 4 digits that an id begins with; behind it ``~n``, ``^``,
    /// ``^2``, or ``@{n}`` for where a branch was n moves ago.
    ///
    /// Raises
    /// ------
    /// NotFoundError, RefError
    ///     The text names no commit of this memory.
    #[pyo3(signature = (n=20, r#ref="HEAD"))]
    fn log<'py>(&self, py: Python<'py>, n: usize, r#ref: &str) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.at(|slot, label| {
            let kept = slot.kept(label)?;
            if kept.head.is_none() && r#ref == "HEAD" {
                return Ok(Vec::new());
            }
            let found = py
                .detach(|| {
                    let id = kept.resolve(r#ref)?.to_string();
                    Ok(kept.store.log(&kept.name, &[&id], n)?)
                })
                .map_err(problem_to_python)?;
            records::commits(py, &found)
        })
    }

    /// The commit that ``ref`` means.
    #[pyo3(signature = (r#ref="HEAD"))]
    fn show<'py>(&self, py: Python<'py>, r#ref: &str) -> PyResult<Bound<'py, PyAny>> {
        self.at(|slot, label| {
            let kept = slot.kept(label)?;
            let found = py
                .detach(|| kept.memory().commit(kept.resolve(r#ref)?))
                .map_err(problem_to_python)?;
            records::commit(py, &found)
        })
    }

    /// What changed from commit ``a`` to commit ``b``. ``a=None`` is the empty memory, ``b=None`` the session as it is now.
    ///
    /// Parameters
    /// ----------
    /// directions : int
    ///     How many of the directions that moved most are wanted of each head.
    #[pyo3(signature = (a=Some("HEAD~1"), b=Some("HEAD"), *, directions=3), text_signature = "($self, a='HEAD~1', b='HEAD', *, directions=3)")]
    fn diff<'py>(
        &self,
        py: Python<'py>,
        a: Option<&str>,
        b: Option<&str>,
        directions: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.at(|slot, label| {
            slot.kept(label)?;
            let now = match b {
                Some(_) => None,
                None => Some(slot.snapshot(py)?),
            };
            let kept = slot.kept(label)?;
            let (before, after, diff) = py
                .detach(|| {
                    let before = a.map(|a| kept.load(kept.resolve(a)?)).transpose()?;
                    let (after, state) = match (b, now) {
                        (Some(b), _) => {
                            let (commit, state) = kept.load(kept.resolve(b)?)?;
                            (Some(commit), state)
                        }
                        (None, Some(now)) => (None, now),
                        (None, None) => {
                            return Err(history::Problem::Refused("there is no state to compare".into()));
                        }
                    };
                    let diff = history::diff(before.as_ref().map(|(_, state)| state), &state, directions)?;
                    Ok((before, after, diff))
                })
                .map_err(problem_to_python)?;
            records::diff(
                py,
                before.as_ref().map(|(commit, _)| commit),
                after.as_ref(),
                &diff,
            )
        })
    }

    /// Make a branch where the session stands and switch to it, as Git's ``switch -c``. What is not committed comes along.
    ///
    /// Raises
    /// ------
    /// ExistsError
    ///     There is a branch or a tag of that name; ``checkout`` goes to it.
    fn branch(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.at(|slot, label| {
            let kept = slot.writing(label)?;
            py.detach(|| kept.clear()).map_err(problem_to_python)?;
            // Before the first commit there is nothing to point at: the first commit will be on that branch.
            if let Some(head) = kept.head_id() {
                py.detach(|| kept.store.branch(&kept.name, name, &head.to_string()))
                    .map_err(store_to_python)?;
            }
            kept.branch = Some(name.to_owned());
            Ok(())
        })
    }

    /// Go to a branch, or to any other commit. The session takes its state bit for bit and begins a new turn.
    ///
    /// On a branch the session commits there from now on. On a commit by itself it can look and talk, but commits only after
    /// ``branch(name)``.
    ///
    /// Parameters
    /// ----------
    /// force : bool
    ///     Give up what is not committed.
    ///
    /// Raises
    /// ------
    /// SessionError
    ///     The session holds what is not committed.
    /// NotFoundError, RefError, FingerprintError
    ///     The text names no commit of this memory; the commit is another model's. The session is as it was.
    #[pyo3(signature = (r#ref, *, force=false))]
    fn checkout<'py>(&self, py: Python<'py>, r#ref: &str, force: bool) -> PyResult<Bound<'py, PyAny>> {
        self.at(|slot, label| {
            let kept = slot.leave(py, label, force)?;
            let (branch, head) = py
                .detach(|| {
                    let branch = kept.store.head(&kept.name, r#ref)?;
                    let id = match branch {
                        Some(id) => id,
                        None => kept.resolve(r#ref)?,
                    };
                    // HEAD by itself gives up what is not committed and stays on the branch.
                    let on = match branch {
                        Some(_) => Some(r#ref.to_owned()),
                        None if r#ref == "HEAD" => kept.branch.clone(),
                        None => None,
                    };
                    Ok((on, kept.load(id)?))
                })
                .map_err(problem_to_python)?;
            kept.branch = branch;
            let commit = records::commit(py, &head.0)?;
            slot.stand(Some(head))?;
            Ok(commit)
        })
    }

    /// Name the commit that ``ref`` means.
    ///
    /// Raises
    /// ------
    /// ExistsError
    ///     There is a branch or a tag of that name.
    #[pyo3(signature = (name, r#ref="HEAD"))]
    fn tag<'py>(&self, py: Python<'py>, name: &str, r#ref: &str) -> PyResult<Bound<'py, PyAny>> {
        self.at(|slot, label| {
            let kept = slot.writing(label)?;
            let commit = py
                .detach(|| {
                    let id = kept.resolve(r#ref)?.to_string();
                    Ok(kept.store.tag(&kept.name, name, &id)?)
                })
                .map_err(problem_to_python)?;
            records::commit(py, &commit)
        })
    }

    /// Merge. The session then stands on the merged commit and begins a new turn.
    ///
    /// With a ref: what it names is merged into the session's branch, a fast-forward where the branch has nothing of its own, else
    /// base + (ours − base) + (theirs − base) with the common ancestor that Git would take.
    ///
    /// Without one: the session's branch was moved by another worker (``ConflictError``). What the session holds beyond its head is put on
    /// top of the branch's new head and committed, again and again while others commit first. Nothing of either is lost.
    ///
    /// Warns with ``MergeWarning`` where one side disturbs what the other's facts read by half or more.
    ///
    /// Parameters
    /// ----------
    /// message : str
    ///     The commit's, where there is one.
    /// force : bool
    ///     With a ref: give up what is not committed.
    ///
    /// Raises
    /// ------
    /// SessionError
    ///     With a ref: the session holds what is not committed.
    /// ConflictError
    ///     With a ref: the branch moved since the session took its state; ``merge()`` first. Without: the branch or the memory was deleted.
    #[pyo3(signature = (r#ref=None, message="", *, meta=None, force=false))]
    fn merge<'py>(
        &self,
        py: Python<'py>,
        r#ref: Option<&str>,
        message: &str,
        meta: Option<Bound<'py, PyAny>>,
        force: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let meta = meta_text(meta)?;
        self.at(|slot, label| {
            slot.writing(label)?;
            let merged = if let Some(text) = r#ref {
                let kept = slot.leave(py, label, force)?;
                py.detach(|| {
                    let theirs = kept.resolve(text)?;
                    let branch = kept.on()?;
                    kept.load(theirs)?;
                    let Some(head) = kept.head_id() else {
                        return Err(history::Problem::Refused(
                            "the session has no commit to merge into; check the other one out".into(),
                        ));
                    };
                    history::merge(
                        kept.memory(),
                        branch,
                        head,
                        theirs,
                        text,
                        message,
                        meta.as_deref(),
                    )
                })
            } else {
                slot.kept(label)?.on().map_err(problem_to_python)?;
                let now = slot.ending_before_commit(py, |engine, interrupt| engine.end_turn(interrupt))?;
                let kept = slot.kept(label)?;
                py.detach(|| kept.bring_up(&now, message, meta.as_deref()))
            };
            let merged = merged.map_err(problem_to_python)?;
            let result = records::merged(py, &merged)?;
            if merged.head.is_some() {
                slot.stand(merged.head.clone())?;
            }
            warn_of(py, &merged)?;
            Ok(result)
        })
    }

    /// Move the session's branch to the commit that ``ref`` means, and the session with it, bit for bit. The commits that the branch leaves
    /// stay in reach of the reflog: ``rollback("main@{1}")`` takes it back.
    ///
    /// Parameters
    /// ----------
    /// force : bool
    ///     Give up what is not committed.
    ///
    /// Raises
    /// ------
    /// ConflictError
    ///     Another worker moved the branch meanwhile.
    #[pyo3(signature = (r#ref, *, force=false))]
    fn rollback<'py>(&self, py: Python<'py>, r#ref: &str, force: bool) -> PyResult<Bound<'py, PyAny>> {
        self.at(|slot, label| {
            slot.writing(label)?;
            let kept = slot.leave(py, label, force)?;
            let head = py
                .detach(|| {
                    let to = kept.load(kept.resolve(r#ref)?)?;
                    let branch = kept.on()?;
                    kept.store
                        .rollback(&kept.name, branch, &to.0.id.to_string(), kept.head_id())?;
                    Ok(to)
                })
                .map_err(problem_to_python)?;
            let commit = records::commit(py, &head.0)?;
            slot.stand(Some(head))?;
            Ok(commit)
        })
    }

    /// Copy the memory, as far as it is committed, with all branches and tags to a new name, where it goes its own way. The session stays.
    ///
    /// Raises
    /// ------
    /// ExistsError
    ///     There is a memory of the new name.
    fn fork(&self, py: Python<'_>, new_name: &str) -> PyResult<()> {
        self.at(|slot, label| {
            let kept = slot.writing(label)?;
            py.detach(|| kept.store.fork(&kept.name, new_name, None))
                .map_err(store_to_python)
        })
    }

    /// Which commits the memory's read for ``text`` comes from: signed shares that add up to the read.
    ///
    /// In a bundle with a chat template, text is a message: the session makes the reply that it would give now, greedy and without
    /// writing, and what was read for both counts, since a fact is read where the reply needs it. Ask the question that the fact answers.
    /// The session stays as it is. What is not committed yet has a share of its own (``commit`` None).
    ///
    /// Parameters
    /// ----------
    /// text : str, sequence of int, or ndarray of int32 or int64 with shape [T]
    ///     What to ask. Token ids, and text in a bundle without a chat template, are read as they are, without a reply.
    /// n : int
    ///     Commits to go back; what older ones hold is ``rest``.
    /// attribution : {"difference", "surviving"}
    ///     ``"difference"`` asks who moved the read to where it is, and names the commit that told a fact best. ``"surviving"`` asks whose
    ///     writes are left in the read, from an estimate of what each commit left of the older ones.
    /// max_new_tokens : int
    ///     The most tokens of the reply; 0 asks the message alone.
    ///
    /// Raises
    /// ------
    /// ValueError
    ///     The memory reads nothing for this text (it is empty).
    /// BundleError
    ///     The bundle has no measured graph.
    #[pyo3(signature = (text, n=1000, *, attribution="difference", max_new_tokens=64))]
    fn blame<'py>(
        &self,
        py: Python<'py>,
        text: Bound<'py, PyAny>,
        n: usize,
        attribution: &str,
        max_new_tokens: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let how = match attribution {
            "difference" => Attribution::Difference,
            "surviving" => Attribution::Surviving,
            other => {
                return Err(PyValueError::new_err(format!(
                    "attribution is {other:?}, expected \"difference\" or \"surviving\""
                )));
            }
        };
        self.at(|slot, label| {
            slot.kept(label)?;
            let (mut ids, message) = self.asked(slot, &text)?;
            let now = slot.snapshot(py)?;
            let (changed, strength) = (slot.dirty()?, slot.engine.strength());
            let mut reply = None;
            let queries = detached(py, |interrupt| {
                let mut aside = deltamem_engine::Session::new(Arc::clone(&self.model));
                aside.restore(&now)?;
                aside.set_strength(strength)?;
                if message && max_new_tokens > 0 {
                    let made = reply_to(&mut aside, ids.clone(), max_new_tokens, interrupt)?;
                    ids.extend(made.token_ids());
                    reply = Some(made.text().to_owned());
                }
                aside.queries(&ids, interrupt)
            })?;
            let kept = slot.kept(label)?;
            let blamed = py
                .detach(|| history::blame(kept.memory(), kept.head_id(), &now, changed, &queries, how, n))
                .map_err(problem_to_python)?;
            records::blamed(py, ids.len(), reply.as_deref(), attribution, &blamed)
        })
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py, false)
    }

    fn __repr__(&self) -> String {
        let name = self
            .name
            .as_ref()
            .map_or_else(String::new, |name| format!("{name:?}, "));
        match self.inner.try_lock().as_deref() {
            None => format!("Session({name}in use)"),
            Some(None) => format!("Session({name}closed)"),
            Some(Some(Slot { engine, kept, .. })) => {
                let at = kept.as_ref().map_or_else(String::new, |kept| {
                    let head = kept.head_id().map_or_else(
                        || "no commit".to_owned(),
                        |head| head.to_string()[..12].to_owned(),
                    );
                    match &kept.branch {
                        Some(branch) => format!("{branch:?} at {head}, "),
                        None => format!("at {head}, "),
                    }
                });
                format!(
                    "Session({name}{at}tokens_seen={}, position={})",
                    engine.tokens_seen(),
                    engine.position()
                )
            }
        }
    }
}

impl Session {
    /// The tokens that a blame asks, and whether they are a message that wants a reply.
    fn asked(&self, slot: &Slot, text: &Bound<'_, PyAny>) -> PyResult<(Vec<i32>, bool)> {
        if let Ok(words) = text.cast::<PyString>()
            && self
                .model
                .manifest()
                .text
                .as_ref()
                .is_some_and(|files| files.chat_template.is_some())
        {
            let message = Message {
                role: "user".into(),
                content: words.to_str()?.to_owned(),
            };
            let encoded = self.model.encode_chat(&[message], Spans::Token, false);
            return Ok((encoded.map_err(to_python)?.0, true));
        }
        let (ids, _) = tokens(text, Spans::Token, false, &slot.engine)?;
        Ok((ids.into_vec()?, false))
    }
}

/// A system message: its text, or what was read of it before.
#[derive(FromPyObject)]
enum System<'py> {
    Read(Bound<'py, Prefix>),
    Text(String),
}

/// What errors and warnings call a session.
fn label_of(name: Option<&str>) -> String {
    name.map_or_else(
        || "the session".to_owned(),
        |name| format!("the session {name:?}"),
    )
}

/// The likeliest reply to a rendered message, without writing.
fn reply_to(
    session: &mut deltamem_engine::Session,
    prompt: Vec<i32>,
    max_new_tokens: usize,
    interrupt: &mut dyn FnMut() -> bool,
) -> Result<deltamem_engine::Generation, deltamem_engine::EngineError> {
    let options = GenerationOptions {
        max_new_tokens,
        sampling: SamplingOptions::default(),
        stop: Vec::new(),
        write: false,
        end_turn: true,
        measure: false,
        prefix: None,
    };
    let mut made = deltamem_engine::Generation::new(session, prompt, &Spans::Unsaid, options, interrupt)?;
    while made.next(session, interrupt)?.is_some() {}
    Ok(made)
}

/// The stop texts: one, several, or none.
fn stop_texts(stop: Option<Bound<'_, PyAny>>) -> PyResult<Vec<String>> {
    let Some(stop) = stop else { return Ok(Vec::new()) };
    if let Ok(text) = stop.cast::<PyString>() {
        return Ok(vec![text.to_str()?.to_owned()]);
    }
    stop.extract::<Vec<String>>().map_err(|_| {
        let found = stop
            .get_type()
            .name()
            .map_or_else(|_| "something else".to_owned(), |name| name.to_string());
        PyTypeError::new_err(format!("stop is {found}, expected a text or a sequence of texts"))
    })
}

fn begin(
    slf: &Bound<'_, Session>,
    mut open: Open<'_>,
    prompt: Vec<i32>,
    spans: &Spans<'_>,
    options: GenerationOptions,
) -> PyResult<Generation> {
    let slot = open.slot()?;
    slot.settle(slf.py())?;
    let session = &mut slot.engine;
    let inner = detached(slf.py(), |interrupt| {
        deltamem_engine::Generation::new(session, prompt, spans, options, interrupt)
    })?;
    Ok(Generation::new(slf.clone().unbind(), inner))
}
