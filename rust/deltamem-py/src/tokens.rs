//! What a caller may pass as tokens: text, a list of ids, or a NumPy array. A contiguous int32 array is used where it lies.

use deltamem_engine::{EngineError, Session};
use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyString};

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

/// Reads `value` as tokens of the session's model. Text at the start of a turn gets the special tokens that its tokenizer puts there.
pub(crate) fn tokens<'py>(value: &Bound<'py, PyAny>, session: &Session) -> PyResult<Tokens<'py>> {
    if let Ok(text) = value.cast::<PyString>() {
        let text = text.to_str()?;
        let encoder = session.model().text().map_err(to_python)?;
        return encoder
            .encode(text, session.position() == 0)
            .map(Tokens::Owned)
            .map_err(|e| to_python(e.into()));
    }
    let vocab = session.model().vocab();
    if let Ok(array) = value.cast::<PyUntypedArray>() {
        return array_ids(array, vocab);
    }
    let Ok(items) = value.try_iter() else {
        return Err(PyTypeError::new_err(format!(
            "found {}, expected text, a list of token ids, or a NumPy array of int32 or int64 with shape [T]",
            value.get_type().name()?
        )));
    };
    let mut ids = Vec::new();
    for (index, item) in items.enumerate() {
        let item = item?;
        if item.is_instance_of::<PyBool>() {
            return Err(PyTypeError::new_err(format!(
                "found a bool at index {index}, expected a token id (int)"
            )));
        }
        let id: i64 = match item.call_method0("__index__") {
            Ok(number) => number.extract().unwrap_or(i64::MAX),
            Err(_) => {
                return Err(PyTypeError::new_err(format!(
                    "found {} at index {index}, expected a token id (int)",
                    item.get_type().name()?
                )));
            }
        };
        ids.push(id32(id, index, vocab)?);
    }
    Ok(Tokens::Owned(ids))
}

fn array_ids<'py>(array: &Bound<'py, PyUntypedArray>, vocab: usize) -> PyResult<Tokens<'py>> {
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
            .map(|(i, &id)| id32(id, i, vocab))
            .collect::<PyResult<_>>()?;
        return Ok(Tokens::Owned(ids));
    }
    Err(PyTypeError::new_err(format!(
        "found an array of {}, expected int32 or int64",
        array.dtype()
    )))
}

fn id32(id: i64, index: usize, vocab: usize) -> PyResult<i32> {
    i32::try_from(id).map_err(|_| to_python(EngineError::TokenOutOfRange { id, index, vocab }))
}
