//! `Geometry`: the shape of a memory.

use pyo3::prelude::*;

/// The shape of a memory: ``layers`` x ``heads`` matrices of ``rank`` x ``rank`` float32 numbers.
#[pyclass(frozen, eq, hash, module = "deltamem_rt")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Geometry {
    layers: usize,
    heads: usize,
    rank: usize,
}

impl From<deltamem_core::Geometry> for Geometry {
    fn from(geometry: deltamem_core::Geometry) -> Self {
        let [layers, heads, rank, _] = geometry.shape();
        Self { layers, heads, rank }
    }
}

#[pymethods]
impl Geometry {
    /// Layers that carry memory.
    #[getter]
    fn layers(&self) -> usize {
        self.layers
    }

    /// State heads in each of them.
    #[getter]
    fn heads(&self) -> usize {
        self.heads
    }

    /// The rank r: each head's state is r x r.
    #[getter]
    fn rank(&self) -> usize {
        self.rank
    }

    /// (layers, heads, rank, rank), the shape of ``Session.memory``.
    #[getter]
    fn shape(&self) -> (usize, usize, usize, usize) {
        (self.layers, self.heads, self.rank, self.rank)
    }

    /// Bytes of one memory.
    #[getter]
    fn bytes(&self) -> usize {
        self.layers * self.heads * self.rank * self.rank * size_of::<f32>()
    }

    pub(crate) fn __repr__(&self) -> String {
        format!(
            "Geometry(layers={}, heads={}, rank={}, bytes={})",
            self.layers,
            self.heads,
            self.rank,
            self.bytes()
        )
    }
}
