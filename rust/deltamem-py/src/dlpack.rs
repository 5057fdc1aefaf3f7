//! `MemoryTensor`: a session's state where it lies, for libraries that read DLPack. The structures are those of DLPack 1.0's header.

use std::ffi::{CStr, c_void};

use deltamem_core::Geometry;
use deltamem_engine::memory::{MemoryView, State};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::errors::to_python;

/// The name of a capsule that nobody has taken yet.
const VERSIONED: &CStr = c"dltensor_versioned";

/// DLPack's numbers for devices, for the type of the numbers, and for what a reader may not do.
const CPU: i32 = 1;
const CUDA: i32 = 2;
const FLOAT: u8 = 2;
const READ_ONLY: u64 = 1;
const COPIED: u64 = 2;

#[repr(C)]
struct Device {
    kind: i32,
    id: i32,
}

#[repr(C)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Version {
    major: u32,
    minor: u32,
}

#[repr(C)]
struct Managed {
    version: Version,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
    flags: u64,
    tensor: Tensor,
}

/// What one reader holds: the state, and the numbers that the tensor points to.
struct Lent {
    managed: Managed,
    shape: [i64; 4],
    strides: [i64; 4],
    _state: State,
}

/// A session's state where it lies, for ``from_dlpack`` of NumPy, PyTorch, CuPy or JAX: float32 [layers, heads, r, r], read-only, without a
/// copy. Made by ``Session.memory_dlpack()``. It is a moment's state: it never changes, whatever the session does next, and may outlive it.
#[pyclass(frozen, module = "deltamem_rt")]
pub(crate) struct MemoryTensor {
    state: State,
    geometry: Geometry,
}

impl MemoryTensor {
    pub(crate) fn new(state: State, geometry: Geometry) -> Self {
        Self { state, geometry }
    }

    fn device(&self) -> (i32, i32) {
        match &self.state {
            State::Device(state) => state.card().map_or((CPU, 0), |card| (CUDA, card)),
            State::Host(_) => (CPU, 0),
        }
    }
}

#[pymethods]
impl MemoryTensor {
    /// A capsule with the state.
    ///
    /// Parameters
    /// ----------
    /// stream : int, optional
    ///     Not needed: the runs that wrote the state are over.
    /// max_version : tuple of int
    ///     The newest DLPack that the reader takes, at least (1, 0): older ones have no word for read-only.
    /// dl_device : tuple of int, optional
    ///     Where it is wanted: where it is, or (1, 0), the CPU, to which it is copied.
    /// copy : bool, optional
    ///     True: a copy on the CPU; False: no copy, or an error.
    ///
    /// Raises
    /// ------
    /// BufferError
    ///     A reader of an older DLPack, or another device.
    /// DeviceError
    ///     The card failed while the state was copied.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let _ = stream;
        if max_version.is_none_or(|(major, _)| major < 1) {
            return Err(PyBufferError::new_err(
                "a reader of a DLPack before 1.0 would not see that the memory is read-only; use a newer version of it, or session.memory",
            ));
        }
        let here = self.device();
        let wanted = dl_device.unwrap_or(here);
        let (state, device, flags) = if wanted == here && copy != Some(true) {
            (self.state.clone(), here, READ_ONLY)
        } else if wanted == (CPU, 0) && copy != Some(false) {
            (State::Host(self.on_host(py, copy)?), (CPU, 0), READ_ONLY | COPIED)
        } else {
            return Err(PyBufferError::new_err(format!(
                "the memory is on DLPack device {here:?}, wanted on {wanted:?} with copy={copy:?}; take it where it is, or on the CPU, (1, 0)"
            )));
        };
        capsule(py, state, device, flags, self.geometry)
    }

    /// Where the state lies: (1, 0) for the CPU, (2, n) for card n.
    fn __dlpack_device__(&self) -> (i32, i32) {
        self.device()
    }

    fn __repr__(&self) -> String {
        let (kind, id) = self.device();
        let place = if kind == CUDA {
            format!("cuda:{id}")
        } else {
            "cpu".into()
        };
        format!(
            "MemoryTensor(shape={:?}, device='{place}')",
            self.geometry.shape()
        )
    }
}

impl MemoryTensor {
    /// The state on the host, in memory of its own if a copy is wanted.
    fn on_host(&self, py: Python<'_>, copy: Option<bool>) -> PyResult<MemoryView> {
        let view = py.detach(|| self.state.host()).map_err(to_python)?;
        Ok(if copy == Some(true) { view[..].into() } else { view })
    }
}

/// The state in a capsule, which keeps it until its reader lets go of it.
#[allow(unsafe_code)]
fn capsule(
    py: Python<'_>,
    state: State,
    (kind, id): (i32, i32),
    flags: u64,
    geometry: Geometry,
) -> PyResult<Bound<'_, PyAny>> {
    let shape = geometry
        .shape()
        .map(|size| i64::try_from(size).unwrap_or(i64::MAX));
    let [_, b, c, d] = shape;
    let data = match &state {
        State::Host(view) => view.as_ptr().cast_mut().cast(),
        State::Device(state) => state.address(),
    };
    let mut lent = Box::new(Lent {
        managed: Managed {
            version: Version { major: 1, minor: 0 },
            context: std::ptr::null_mut(),
            deleter: Some(delete),
            flags,
            tensor: Tensor {
                data,
                device: Device { kind, id },
                ndim: 4,
                dtype: DataType {
                    code: FLOAT,
                    bits: 32,
                    lanes: 1,
                },
                shape: std::ptr::null_mut(),
                strides: std::ptr::null_mut(),
                byte_offset: 0,
            },
        },
        shape,
        strides: [b * c * d, c * d, d, 1],
        _state: state,
    });
    lent.managed.tensor.shape = lent.shape.as_mut_ptr();
    lent.managed.tensor.strides = lent.strides.as_mut_ptr();
    let lent = Box::into_raw(lent);
    // SAFETY: `lent` is a live box whose address does not change; the structure that the capsule points to lies in it. The box is freed by
    // `delete`, which is called once: by the reader that renames the capsule, or by the capsule's destructor when nobody did.
    unsafe {
        (*lent).managed.context = lent.cast();
        let capsule = ffi::PyCapsule_New(
            (&raw mut (*lent).managed).cast(),
            VERSIONED.as_ptr(),
            Some(untaken),
        );
        if capsule.is_null() {
            drop(Box::from_raw(lent));
            return Err(PyErr::fetch(py));
        }
        Ok(Bound::from_owned_ptr(py, capsule))
    }
}

/// Frees what a reader held. It may be called on any thread, with or without Python's lock: nothing here needs it.
#[allow(unsafe_code)]
unsafe extern "C" fn delete(managed: *mut Managed) {
    // SAFETY: DLPack's readers pass the pointer that they were given, once; its context is the box that `capsule` let go of.
    unsafe {
        if !managed.is_null() {
            drop(Box::from_raw((*managed).context.cast::<Lent>()));
        }
    }
}

/// A capsule dies: if nobody has taken what is in it, that is freed.
#[allow(unsafe_code)]
unsafe extern "C" fn untaken(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with the capsule, holding its lock; one that a reader took has another name, and is not valid under this.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast());
        }
    }
}
