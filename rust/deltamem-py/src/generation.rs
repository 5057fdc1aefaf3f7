//! `Generation`: a reply in the making, and its figures.

use parking_lot::{Mutex, MutexGuard};
use pyo3::prelude::*;

use crate::errors::named;
use crate::session::Session;

/// A reply in the making: an iterator of pieces of text, also an asynchronous one (``async for``).
///
/// Each piece holds whole characters: a character that is split over tokens waits for its last one. A bundle without a tokenizer gives
/// an empty piece a token; ``token_ids`` has them.
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct Generation {
    session: Py<Session>,
    inner: Mutex<deltamem_engine::Generation>,
}

impl Generation {
    pub(crate) fn new(session: Py<Session>, inner: deltamem_engine::Generation) -> Self {
        Self {
            session,
            inner: Mutex::new(inner),
        }
    }

    fn take(&self) -> PyResult<MutexGuard<'_, deltamem_engine::Generation>> {
        self.inner.try_lock().ok_or_else(|| {
            named(
                "SessionError",
                "another thread is making the next piece of this reply; wait for it".to_owned(),
            )
        })
    }

    fn advance(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let mut guard = self.take()?;
        let generation = &mut *guard;
        self.session
            .get()
            .ending(py, |session, interrupt| generation.next(session, interrupt))
    }
}

#[pymethods]
impl Generation {
    /// The text given out so far.
    #[getter]
    fn text(&self) -> PyResult<String> {
        Ok(self.take()?.text().to_owned())
    }

    /// The tokens sampled so far, without the one that ended the reply.
    #[getter]
    fn token_ids(&self) -> PyResult<Vec<i32>> {
        Ok(self.take()?.token_ids().to_vec())
    }

    /// What the reply took so far.
    #[getter]
    fn stats(&self) -> PyResult<GenerationStats> {
        Ok(GenerationStats(self.take()?.stats()))
    }

    /// Make the rest of the reply and return all of its text.
    fn read(&self, py: Python<'_>) -> PyResult<String> {
        while self.advance(py)?.is_some() {
            py.check_signals()?;
        }
        self.text()
    }

    /// End the reply here. What was given out is in the memory; a chat's turn ends. Closing twice does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let mut guard = self.take()?;
        let session = self.session.get();
        // A closed session has nothing left to bring into order.
        if session.is_closed()? {
            return Ok(());
        }
        let generation = &mut *guard;
        session.ending(py, |session, interrupt| generation.close(session, interrupt))
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<String>> {
        self.advance(py)
    }

    fn __aiter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __anext__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py()
            .import("deltamem_rt._aio")?
            .call_method1("next_piece", (slf,))
    }

    fn __repr__(&self) -> String {
        match self.inner.try_lock() {
            None => "Generation(in use)".to_owned(),
            Some(generation) => {
                let stats = generation.stats();
                let reason = stats
                    .finish_reason
                    .map_or("going on", deltamem_engine::FinishReason::as_str);
                format!("Generation({} tokens, {reason})", stats.tokens)
            }
        }
    }
}

/// What a reply took.
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct GenerationStats(deltamem_engine::GenerationStats);

#[pymethods]
impl GenerationStats {
    /// Tokens of the prompt.
    #[getter]
    fn prompt_tokens(&self) -> usize {
        self.0.prompt_tokens
    }

    /// Tokens sampled, the one that ended the reply included.
    #[getter]
    fn tokens(&self) -> usize {
        self.0.tokens
    }

    /// Seconds from the first request for a piece to the first sampled token; None before it.
    #[getter]
    fn time_to_first_token(&self) -> Option<f64> {
        self.0.time_to_first_token.map(|time| time.as_secs_f64())
    }

    /// Sampled tokens a second after the first one; None before the second one.
    #[getter]
    fn tokens_per_second(&self) -> Option<f64> {
        self.0.tokens_per_second()
    }

    /// Why the reply ended: "eos", "stop", "length", "context" or "closed"; None while it goes on.
    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.0.finish_reason.map(deltamem_engine::FinishReason::as_str)
    }

    /// The graph that it ran on: "blocks", "fused" or "portable" (``Model.load``); what is measured runs on a portable one.
    #[getter]
    fn graph(&self) -> &'static str {
        self.0.graph
    }

    /// |corrections| / |what they correct| (L2, over layers, heads and tokens), when asked with ``measure=True``; otherwise None.
    #[getter]
    fn delta_ratio(&self) -> Option<f64> {
        self.0.delta_ratio
    }

    fn __repr__(&self) -> String {
        fn shown(value: Option<f64>) -> String {
            value.map_or_else(|| "None".to_owned(), |value| format!("{value:.4}"))
        }
        format!(
            "GenerationStats(prompt_tokens={}, tokens={}, time_to_first_token={}, tokens_per_second={}, finish_reason={}, graph='{}', delta_ratio={})",
            self.0.prompt_tokens,
            self.0.tokens,
            shown(self.time_to_first_token()),
            shown(self.tokens_per_second()),
            self.finish_reason()
                .map_or_else(|| "None".to_owned(), |reason| format!("'{reason}'")),
            self.0.graph,
            shown(self.0.delta_ratio),
        )
    }
}
