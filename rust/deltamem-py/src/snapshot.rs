//! `Snapshot`: an immutable memory that can be kept as bytes.

use numpy::{PyArray4, PyArrayMethods, ndarray};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::snapshot_to_python;
use crate::geometry::Geometry;

/// A session's memory at one moment: immutable, a few KB, made by ``Session.snapshot()``.
///
/// It holds the state (float32 [layers, heads, r, r]), the tokens and turns seen, the sampler, and the fingerprint of the model that
/// wrote it. It does not hold a turn's KV cache: a session that is restored starts a new turn. ``to_bytes`` gives safetensors with
/// metadata; nothing here uses pickle.
///
/// Examples
/// --------
/// >>> data = session.snapshot().to_bytes()                            # doctest: +SKIP
/// >>> session.restore(deltamem_rt.Snapshot.from_bytes(data))           # doctest: +SKIP
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct Snapshot {
    pub(crate) inner: deltamem_core::Snapshot,
}

#[pymethods]
impl Snapshot {
    /// Read a snapshot from bytes. Everything is checked before anything is used: sizes, dtypes, shapes, finiteness, and a digest.
    ///
    /// Parameters
    /// ----------
    /// data : bytes
    ///     What ``to_bytes`` gave.
    ///
    /// Raises
    /// ------
    /// SnapshotError
    ///     The bytes are no snapshot, are damaged, or were written by a newer version.
    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        deltamem_core::Snapshot::from_bytes(data)
            .map(|inner| Self { inner })
            .map_err(|error| snapshot_to_python(&error))
    }

    /// The snapshot as safetensors bytes: the same snapshot gives the same bytes.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.to_bytes())
    }

    /// The fingerprint of the model that wrote it, 64 hexadecimal digits.
    #[getter]
    fn fingerprint(&self) -> String {
        self.inner.fingerprint().to_string()
    }

    /// Tokens read since the memory was empty.
    #[getter]
    fn tokens_seen(&self) -> u64 {
        self.inner.tokens_seen()
    }

    /// Turns ended since the memory was empty.
    #[getter]
    fn turns(&self) -> u64 {
        self.inner.turns()
    }

    /// The memory's geometry.
    #[getter]
    fn geometry(&self) -> Geometry {
        Geometry::from(self.inner.geometry())
    }

    /// The state, float32 [layers, heads, r, r]; read-only, without a copy.
    #[getter]
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray4<f32>>> {
        view(py, self.inner.memory().clone(), self.inner.geometry())
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.inner.to_bytes() == other.inner.to_bytes()
    }

    fn __repr__(&self) -> String {
        format!(
            "Snapshot(tokens_seen={}, turns={}, fingerprint='{}...')",
            self.inner.tokens_seen(),
            self.inner.turns(),
            &self.fingerprint()[..12]
        )
    }
}

/// Keeps a state's buffer alive for as long as NumPy looks at it.
#[pyclass(frozen)]
struct MemoryOwner {
    state: deltamem_engine::memory::MemoryView,
}

/// A read-only NumPy array over a state, without a copy. It holds the buffer, which therefore is never written again.
#[allow(unsafe_code)]
pub(crate) fn view(
    py: Python<'_>,
    state: deltamem_engine::memory::MemoryView,
    geometry: deltamem_core::Geometry,
) -> PyResult<Bound<'_, PyArray4<f32>>> {
    let owner = Bound::new(py, MemoryOwner { state })?;
    let shape = geometry.shape();
    let array = {
        let borrowed = ndarray::ArrayView4::from_shape(shape, &owner.get().state[..])
            .map_err(|error| crate::errors::named("SessionError", error.to_string()))?;
        // SAFETY: the view's memory belongs to `owner`, which the array keeps as its base object, is never moved, and is not
        // written while it is shared; NumPy may not write it either, as the flag below says and no base object contradicts.
        unsafe { PyArray4::borrow_from_array(&borrowed, owner.clone().into_any()) }
    };
    array.readwrite().make_nonwriteable();
    Ok(array)
}
