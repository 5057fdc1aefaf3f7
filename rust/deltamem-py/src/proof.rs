//! The Rust rule as a function of arrays, for the test that holds it against its twins in PyTorch and ONNX, and for whoever wants to
//! look at the recurrence itself.

use std::borrow::Cow;

use deltamem_core::{Gates, rule};
use numpy::{PyArray1, PyArray3, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Run δ-mem's recurrence over T tokens of one layer.
///
/// For each token: read = S q, then S becomes diag(keep) S - diag(erase) (S k) k' + diag(write) v k' (arXiv 2605.12357).
///
/// Parameters
/// ----------
/// q, k, v : ndarray of float32 with shape [T, heads, r]
/// keep, erase, write : ndarray of float32 with shape [T, heads, r] (a gate per row) or [T, heads, 1] (a gate per head)
/// state : ndarray of float32 with shape [heads, r, r]
///     S before the first token; it is not changed.
/// mask : ndarray of bool with shape [T], optional
///     Which tokens move the state; the others only read it.
///
/// Returns
/// -------
/// reads : ndarray of float32 with shape [T, heads, r]
/// state : ndarray of float32 with shape [heads, r, r]
///
/// Raises
/// ------
/// ValueError
///     Shapes that do not fit each other.
#[pyfunction]
#[pyo3(signature = (q, k, v, keep, erase, write, state, mask=None))]
#[allow(
    clippy::too_many_arguments,
    clippy::type_complexity,
    clippy::needless_pass_by_value
)]
pub(crate) fn scan<'py>(
    py: Python<'py>,
    q: PyReadonlyArray3<'py, f32>,
    k: PyReadonlyArray3<'py, f32>,
    v: PyReadonlyArray3<'py, f32>,
    keep: PyReadonlyArray3<'py, f32>,
    erase: PyReadonlyArray3<'py, f32>,
    write: PyReadonlyArray3<'py, f32>,
    state: PyReadonlyArray3<'py, f32>,
    mask: Option<PyReadonlyArray1<'py, bool>>,
) -> PyResult<(Bound<'py, PyArray3<f32>>, Bound<'py, PyArray3<f32>>)> {
    let [count, heads, rank] = [q.shape()[0], q.shape()[1], q.shape()[2]];
    let gates = if keep.shape()[2] == rank {
        Gates::Row
    } else {
        Gates::Head
    };
    let mask = mask.map_or_else(|| vec![true; count], |mask| mask.as_array().to_vec());
    let (q, k, v, keep, erase, write) = (
        flat(&q),
        flat(&k),
        flat(&v),
        flat(&keep),
        flat(&erase),
        flat(&write),
    );
    let tokens = rule::Tokens {
        q: &q,
        k: &k,
        v: &v,
        keep: &keep,
        erase: &erase,
        write: &write,
        mask: &mask,
    };
    let mut state = flat(&state).into_owned();
    let mut reads = vec![0.0; q.len()];
    deltamem_kernel::scan(heads, rank, gates, &tokens, &mut state, &mut reads)
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    Ok((
        PyArray1::from_vec(py, reads).reshape([count, heads, rank])?,
        PyArray1::from_vec(py, state).reshape([heads, rank, rank])?,
    ))
}

/// An array's numbers in order, copied only where they do not lie so.
fn flat<'a>(array: &'a PyReadonlyArray3<'_, f32>) -> Cow<'a, [f32]> {
    array
        .as_slice()
        .map_or_else(|_| array.as_array().iter().copied().collect(), Cow::Borrowed)
}
