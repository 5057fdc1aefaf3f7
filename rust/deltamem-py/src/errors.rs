//! Errors of the engine and the store become Python exceptions here and nowhere else: the builtin one where Python has the word, otherwise a class of
//! `deltamem_rt.errors`.

use deltamem_core::SnapshotError;
use deltamem_engine::EngineError;
use deltamem_engine::bundle::BundleError;
use deltamem_engine::sampling::SamplingError;
use deltamem_store::{CommitId, Error as StoreError};
use pyo3::exceptions::{
    PyFileExistsError, PyFileNotFoundError, PyKeyboardInterrupt, PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};

use crate::history::Problem;

/// The exception for an engine's error.
pub(crate) fn to_python(error: EngineError) -> PyErr {
    let message = error.to_string();
    match error {
        EngineError::Bundle(BundleError::NotFound { .. }) => PyFileNotFoundError::new_err(message),
        EngineError::Bundle(_) | EngineError::Graph { .. } | EngineError::Unsupported(_) => {
            named("BundleError", message)
        }
        EngineError::Text(_) => named("TextError", message),
        EngineError::Sampling(SamplingError::NotANumber { .. } | SamplingError::NothingLeft)
        | EngineError::NotFinite(_) => named("NotFiniteError", message),
        EngineError::Sampling(_) | EngineError::TokenOutOfRange { .. } | EngineError::Value(_) => {
            PyValueError::new_err(message)
        }
        EngineError::Library(_) | EngineError::Onnx { .. } => named("OnnxRuntimeError", message),
        EngineError::Device(_) => named("DeviceError", message),
        EngineError::ContextLength { .. } => named("ContextLengthError", message),
        EngineError::Fingerprint { .. } => named("FingerprintError", message),
        EngineError::Interrupted => PyKeyboardInterrupt::new_err(message),
        EngineError::Session(_) => named("SessionError", message),
        _ => named("DeltaMemError", message),
    }
}

/// The exception for bytes that are no snapshot.
pub(crate) fn snapshot_to_python(error: &SnapshotError) -> PyErr {
    named("SnapshotError", error.to_string())
}

/// The exception for a store's error.
pub(crate) fn store_to_python(error: StoreError) -> PyErr {
    let message = error.to_string();
    let class = match &error {
        StoreError::NotFound { what: "file", .. } => return PyFileNotFoundError::new_err(message),
        StoreError::Exists { what: "file", .. } => return PyFileExistsError::new_err(message),
        StoreError::Name { .. } => return PyValueError::new_err(message),
        StoreError::Conflict {
            name,
            branch,
            expected,
            found,
        } => {
            let hex = |id: &Option<CommitId>| id.map(|id| id.to_string());
            return with_attributes("ConflictError", message, |error| {
                error.setattr("memory", name)?;
                error.setattr("branch", branch)?;
                error.setattr("expected", hex(expected))?;
                error.setattr("found", hex(found))
            });
        }
        StoreError::Fingerprint { differs, .. } => {
            return with_attributes("FingerprintError", message, |error| {
                error.setattr("differs", PyTuple::new(error.py(), differs)?)
            });
        }
        StoreError::NotFound { .. } => "NotFoundError",
        StoreError::Exists { .. } => "ExistsError",
        StoreError::Ref { .. } => "RefError",
        StoreError::Quota { .. } => "QuotaError",
        StoreError::Damaged { .. } => "DamagedError",
        StoreError::NotAStore { .. } | StoreError::Newer { .. } => "StoreFormatError",
        StoreError::Key { .. } => "StoreKeyError",
        StoreError::Locked { .. } => "StoreLockedError",
        StoreError::ReadOnly { .. } => "ReadOnlyError",
        StoreError::Full { .. } => "StoreFullError",
        StoreError::Io { .. } => "StoreIOError",
        StoreError::Unavailable { .. } => "UnavailableError",
        StoreError::Server { .. } => "ServerError",
        StoreError::Snapshot(_) => "SnapshotError",
        _ => "StoreError",
    };
    named(class, message)
}

/// The exception for what went wrong in a memory's history.
pub(crate) fn problem_to_python(problem: Problem) -> PyErr {
    match problem {
        Problem::Store(error) => store_to_python(error),
        Problem::State(_) | Problem::Merge(_) | Problem::Blame(_) | Problem::Redact(_) => {
            PyValueError::new_err(problem.to_string())
        }
        Problem::Refused(message) => named("RefError", message),
    }
}

fn with_attributes(
    class: &str,
    message: String,
    set: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<()>,
) -> PyErr {
    let error = named(class, message);
    Python::attach(|py| match set(error.value(py).as_any()) {
        Ok(()) => error,
        Err(other) => other,
    })
}

/// A class of `deltamem_rt.errors`, by name.
pub(crate) fn named(class: &str, message: String) -> PyErr {
    Python::attach(|py| {
        py.import("deltamem_rt.errors")
            .and_then(|module| module.getattr(class))
            .and_then(|class| class.cast_into::<PyType>().map_err(PyErr::from))
            .map_or_else(
                |_| PyRuntimeError::new_err(message.clone()),
                |class| PyErr::from_type(class, message.clone()),
            )
    })
}

/// Runs engine work without the GIL, and lets Ctrl-C through between chunks.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&mut dyn FnMut() -> bool) -> Result<T, EngineError> + Send,
) -> PyResult<T> {
    let (result, signal) = py.detach(|| {
        let mut signal = None;
        let mut interrupt = || {
            signal = Python::attach(|py| py.check_signals().err());
            signal.is_some()
        };
        let result = work(&mut interrupt);
        (result, signal)
    });
    match (result, signal) {
        (Err(EngineError::Interrupted), Some(signal)) => Err(signal),
        (result, _) => result.map_err(to_python),
    }
}
