//! `Session`: the class that an application holds one of a user.

use std::sync::Arc;

use deltamem_engine::sampling::SamplingOptions;
use deltamem_engine::text::Message;
use deltamem_engine::{FeedOptions, GenerationOptions, Spans};
use numpy::{PyArray1, PyArray2, PyArray4, PyArrayMethods};
use parking_lot::{Mutex, MutexGuard};
use pyo3::exceptions::{PyMemoryError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::errors::{detached, named, to_python};
use crate::generation::Generation;
use crate::geometry::Geometry;
use crate::snapshot::{Snapshot, view};
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
    inner: Mutex<Option<deltamem_engine::Session>>,
}

/// Exclusive use of an open session.
pub(crate) struct Open<'a>(MutexGuard<'a, Option<deltamem_engine::Session>>, &'a Session);

impl Open<'_> {
    /// The engine's session.
    pub(crate) fn get(&mut self) -> PyResult<&mut deltamem_engine::Session> {
        let label = self.1.label();
        self.0.as_mut().ok_or_else(|| {
            named(
                "SessionError",
                format!("{label} is closed; open a new one with model.session()"),
            )
        })
    }
}

impl Session {
    pub(crate) fn new(model: Arc<deltamem_engine::Model>, name: Option<String>) -> Self {
        Self {
            name,
            inner: Mutex::new(Some(deltamem_engine::Session::new(Arc::clone(&model)))),
            model,
        }
    }

    fn label(&self) -> String {
        self.name.as_ref().map_or_else(
            || "the session".to_owned(),
            |name| format!("the session {name:?}"),
        )
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
    /// tokens : str, sequence of int, or ndarray of int32 or int64 with shape [T]
    ///     What to read. A contiguous int32 array is used where it lies. Text at the start of a turn gets the special tokens that the
    ///     tokenizer puts at a start.
    /// write : bool
    ///     Whether these tokens may write the memory; False only reads it.
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
        let session = open.get()?;
        let spans = crate::tokens::spans(spans.as_ref())?;
        let (ids, spans) = crate::tokens::tokens(&tokens, spans, write, session)?;
        let ids = ids.as_slice()?;
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
    /// system : str, optional
    ///     A system message put before it, in this turn only.
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
        system: Option<String>,
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
        let (ids, spans) = session
            .model
            .encode_chat(&messages, spans, write)
            .map_err(to_python)?;
        begin(&slf, open, ids, &spans, options)
    }

    /// End the turn: drop the KV cache, keep the memory.
    fn end_turn(&self, py: Python<'_>) -> PyResult<()> {
        self.with(|session| detached(py, |interrupt| session.end_turn(interrupt)))
    }

    /// The memory: float32 [layers, heads, r, r], read-only, without a copy.
    ///
    /// S[i, j] of a layer and head: i is the value's row, j the key's column; a read is S q. The array is a moment's state: it never
    /// changes, whatever the session does next, and may outlive it.
    #[getter]
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray4<f32>>> {
        self.with(|session| view(py, session.memory(), session.geometry()))
    }

    /// An immutable copy of what the session needs to go on elsewhere: memory, counters, sampler. A few KB; no KV cache.
    fn snapshot(&self, py: Python<'_>) -> PyResult<Snapshot> {
        self.with(|session| {
            detached(py, |interrupt| session.snapshot(interrupt)).map(|inner| Snapshot { inner })
        })
    }

    /// Take up a snapshot. Behind an end of turn the session goes on bit for bit as the one that it was taken from.
    ///
    /// Raises
    /// ------
    /// FingerprintError
    ///     The snapshot was written by another model. The session is as it was.
    fn restore(&self, snapshot: PyRef<'_, Snapshot>) -> PyResult<()> {
        self.with(|session| session.restore(&snapshot.inner).map_err(to_python))
    }

    /// Empty the memory and drop the turn.
    fn reset(&self) -> PyResult<()> {
        self.with(|session| {
            session.reset();
            Ok(())
        })
    }

    /// Close the session and free its memory. What ``memory`` or ``snapshot`` gave stays valid. Closing twice does nothing.
    fn close(&self) -> PyResult<()> {
        let mut open = self.open()?;
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

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close()
    }

    fn __repr__(&self) -> String {
        let name = self
            .name
            .as_ref()
            .map_or_else(String::new, |name| format!("{name:?}, "));
        match self.inner.try_lock().as_deref() {
            None => format!("Session({name}in use)"),
            Some(None) => format!("Session({name}closed)"),
            Some(Some(session)) => {
                format!(
                    "Session({name}tokens_seen={}, position={})",
                    session.tokens_seen(),
                    session.position()
                )
            }
        }
    }
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
    let session = open.get()?;
    let inner = detached(slf.py(), |interrupt| {
        deltamem_engine::Generation::new(session, prompt, spans, options, interrupt)
    })?;
    Ok(Generation::new(slf.clone().unbind(), inner))
}
