//! What a caller may pass as tokens and as their spans: text, a list of ids, a NumPy array, or another library's by DLPack. A contiguous int32
//! array is used where it lies.

use std::borrow::Cow;

use deltamem_engine::{EngineError, Session, Spans};
use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyString};

use crate::errors::to_python;

/// Token ids, owned or borrowed from NumPy.
pub(crate) enum Tokens<'py> {
    Owned(Vec<i32>),
    Borrowed(PyReadonlyArray1<'py, i32>),
}

impl Tokens<'_> {
    /// The ids.
    pub(crate) fn as_slice(&self) -> PyResult<&[i32]> {
        match self {
            Self::Owned(ids) => Ok(ids),
            Self::Borrowed(array) => array
                .as_slice()
                .map_err(|_| PyValueError::new_err("the array of ids is not contiguous")),
        }
    }

    /// The ids, copied if they are NumPy's.
    pub(crate) fn into_vec(self) -> PyResult<Vec<i32>> {
        match self {
            Self::Owned(ids) => Ok(ids),
            Self::Borrowed(_) => self.as_slice().map(<[i32]>::to_vec),
        }
    }
}

/// Reads `value` as tokens of the session's model, and what they write. Text at the start of a turn gets the special tokens that its
/// tokenizer puts there.
pub(crate) fn tokens<'py>(
    value: &Bound<'py, PyAny>,
    spans: Spans<'static>,
    write: bool,
    session: &Session,
) -> PyResult<(Tokens<'py>, Spans<'static>)> {
    if let Ok(text) = value.cast::<PyString>() {
        let at_start = session.at_start();
        let (ids, spans) = session
            .model()
            .encode_text(text.to_str()?, at_start, spans, write)
            .map_err(to_python)?;
        return Ok((Tokens::Owned(ids), spans));
    }
    let vocab = session.model().vocab();
    let out_of_range = |id, index| to_python(EngineError::TokenOutOfRange { id, index, vocab });
    let ids = integers(value, "text, a list of token ids", "a token id", &out_of_range)?;
    Ok((ids, spans))
}

/// Reads `value` as the spans of a call.
pub(crate) fn spans(value: Option<&Bound<'_, PyAny>>) -> PyResult<Spans<'static>> {
    let Some(value) = value else {
        return Ok(Spans::Unsaid);
    };
    if let Ok(word) = value.cast::<PyString>() {
        return match word.to_str()? {
            "token" => Ok(Spans::Token),
            other => Err(PyValueError::new_err(format!(
                "spans is {other:?}, expected \"token\" (each token writes by itself), span ids, or None"
            ))),
        };
    }
    let out_of_range = |id: i64, index: usize| {
        PyValueError::new_err(format!(
            "spans[{index}] is {id}, expected ids from 0 to {}, or -1 for a token that is not written",
            i32::MAX
        ))
    };
    integers(value, "\"token\", a list of span ids", "a span id", &out_of_range)
        .and_then(Tokens::into_vec)
        .map(|ids| Spans::Ids(Cow::Owned(ids)))
        .map_err(|error| in_spans(value.py(), error))
}

/// The word for `spans` from a caller who may only say "token" or nothing.
pub(crate) fn spans_of_text(value: Option<&str>) -> PyResult<Spans<'static>> {
    match value {
        None => Ok(Spans::Unsaid),
        Some("token") => Ok(Spans::Token),
        Some(other) => Err(PyValueError::new_err(format!(
            "spans is {other:?}, expected \"token\" (each token writes by itself) or None (the bundle's own granularity)"
        ))),
    }
}

/// The same error, saying that it is about `spans`.
fn in_spans(py: Python<'_>, error: PyErr) -> PyErr {
    let message = error.value(py).to_string();
    if message.starts_with("spans") {
        return error;
    }
    PyErr::from_type(error.get_type(py), format!("spans: {message}"))
}

/// A list or array of int32 numbers. `accepted` and `one` name what is expected, `out_of_range` makes the error for a larger number.
fn integers<'py>(
    value: &Bound<'py, PyAny>,
    accepted: &str,
    one: &str,
    out_of_range: &dyn Fn(i64, usize) -> PyErr,
) -> PyResult<Tokens<'py>> {
    if let Ok(array) = value.cast::<PyUntypedArray>() {
        return array_ids(array, out_of_range);
    }
    if value.hasattr("__dlpack__")? && value.hasattr("__dlpack_device__")? {
        let array = by_dlpack(value)?;
        return array_ids(array.cast::<PyUntypedArray>()?, out_of_range);
    }
    let Ok(items) = value.try_iter() else {
        return Err(PyTypeError::new_err(format!(
            "found {}, expected {accepted}, or an array of int32 or int64 with shape [T] (NumPy's, or another's by DLPack)",
            value.get_type().name()?
        )));
    };
    let mut ids = Vec::new();
    for (index, item) in items.enumerate() {
        let item = item?;
        if item.is_instance_of::<PyBool>() {
            return Err(PyTypeError::new_err(format!(
                "found a bool at index {index}, expected {one} (int)"
            )));
        }
        let id: i64 = match item.call_method0("__index__") {
            Ok(number) => number.extract().unwrap_or(i64::MAX),
            Err(_) => {
                return Err(PyTypeError::new_err(format!(
                    "found {} at index {index}, expected {one} (int)",
                    item.get_type().name()?
                )));
            }
        };
        ids.push(i32::try_from(id).map_err(|_| out_of_range(id, index))?);
    }
    Ok(Tokens::Owned(ids))
}

/// Another library's array, as NumPy reads it: where it lies, or copied to the CPU from where NumPy cannot look.
fn by_dlpack<'py>(value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = value.py();
    let numpy = py.import("numpy")?;
    let said = |error: PyErr| {
        PyTypeError::new_err(format!(
            "found {}, which NumPy cannot take by DLPack ({error}); pass ids on the CPU (tensor.cpu()), int32 or int64 with shape [T]",
            value
                .get_type()
                .name()
                .map_or_else(|_| "an object".into(), |name| name.to_string())
        ))
    };
    let at_once = numpy.call_method1("from_dlpack", (value,));
    at_once
        .or_else(|_| {
            let arguments = PyDict::new(py);
            arguments.set_item("device", "cpu")?;
            numpy.call_method("from_dlpack", (value,), Some(&arguments))
        })
        .or_else(|error| {
            // Libraries whose DLPack does not copy between devices have a word of their own for it.
            match value.call_method0("cpu") {
                Ok(copied) => numpy.call_method1("from_dlpack", (copied,)),
                Err(_) => Err(error),
            }
        })
        .map_err(said)
}

fn array_ids<'py>(
    array: &Bound<'py, PyUntypedArray>,
    out_of_range: &dyn Fn(i64, usize) -> PyErr,
) -> PyResult<Tokens<'py>> {
    if array.ndim() != 1 {
        return Err(PyValueError::new_err(format!(
            "found an array of shape {:?}, expected shape [T]",
            array.shape()
        )));
    }
    if let Ok(ids) = array.cast::<PyArrayDyn<i32>>() {
        let ids = ids.to_owned().cast_into::<numpy::PyArray1<i32>>()?;
        let borrowed = ids
            .try_readonly()
            .map_err(|e| PyValueError::new_err(e.to_string()))?;
        return Ok(if borrowed.as_slice().is_ok() {
            Tokens::Borrowed(borrowed)
        } else {
            Tokens::Owned(borrowed.as_array().to_vec())
        });
    }
    if let Ok(ids) = array.cast::<numpy::PyArray1<i64>>() {
        let ids = ids
            .try_readonly()
            .map_err(|e| PyValueError::new_err(e.to_string()))?;
        let ids = ids
            .as_array()
            .iter()
            .enumerate()
            .map(|(i, &id)| i32::try_from(id).map_err(|_| out_of_range(id, i)))
            .collect::<PyResult<_>>()?;
        return Ok(Tokens::Owned(ids));
    }
    Err(PyTypeError::new_err(format!(
        "found an array of {}, expected int32 or int64",
        array.dtype()
    )))
}
