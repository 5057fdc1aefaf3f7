//! One run of a graph: named tensors over memory that the caller owns, the host's or a device's, in and out, without a copy. Outside this file a
//! run is safe Rust. It knows nothing of what the tensors mean.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::mpsc;
use std::thread::JoinHandle;

use ort::AsPointer;
use ort::session::{RunOptions, Session};
use ort::sys;
use ort::value::TensorElementType;

use crate::device::{DeviceBuffer, WORD};
use crate::error::{EngineError, Result};

/// A Rust number that ONNX Runtime has a type for.
pub(crate) trait Element: Copy {
    /// ONNX Runtime's name of the type.
    const TYPE: TensorElementType;
}

impl Element for f32 {
    const TYPE: TensorElementType = TensorElementType::Float32;
}
impl Element for i32 {
    const TYPE: TensorElementType = TensorElementType::Int32;
}
impl Element for i64 {
    const TYPE: TensorElementType = TensorElementType::Int64;
}

/// A tensor over borrowed memory. The borrow lives as long as the tensor does.
pub(crate) struct Tensor<'a> {
    value: NonNull<sys::OrtValue>,
    /// Where it lies, to be compared and never followed.
    address: usize,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Tensor<'a> {
    /// A tensor that a run reads.
    pub(crate) fn input<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        // ONNX Runtime takes a mutable pointer for inputs and outputs alike, and does not write through inputs: `Call` binds a
        // tensor made here as an input only.
        Self::over(
            data.as_ptr().cast_mut().cast(),
            size_of_val(data),
            size_of::<T>(),
            shape,
            T::TYPE,
            cpu_memory()?.0.as_ptr(),
        )
    }

    /// A tensor that a run writes.
    pub(crate) fn output<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        Self::over(
            data.as_mut_ptr().cast(),
            size_of_val(data),
            size_of::<T>(),
            shape,
            T::TYPE,
            cpu_memory()?.0.as_ptr(),
        )
    }

    /// A tensor of any element type over bytes that are aligned for it, which a run may read and write.
    pub(crate) fn bytes(
        data: &'a mut [u8],
        shape: &[usize],
        element: TensorElementType,
        element_bytes: usize,
    ) -> Result<Self> {
        Self::over(
            data.as_mut_ptr().cast(),
            data.len(),
            element_bytes,
            shape,
            element,
            cpu_memory()?.0.as_ptr(),
        )
    }

    /// A tensor of any element type over `bytes` bytes of a device's buffer from `start` on. Whoever has it written by a run is the only one
    /// who knows of those bytes, or holds the buffer exclusively.
    pub(crate) fn device(
        buffer: &'a DeviceBuffer,
        start: usize,
        bytes: usize,
        shape: &[usize],
        element: TensorElementType,
        element_bytes: usize,
    ) -> Result<Self> {
        if start.checked_add(bytes).is_none_or(|end| end > buffer.len()) {
            return Err(EngineError::Onnx {
                doing: "describing a tensor",
                message: format!(
                    "{bytes} bytes from {start} on are not in a buffer of {}",
                    buffer.len()
                ),
            });
        }
        Self::over(
            buffer.address().as_ptr().wrapping_add(start).cast(),
            bytes,
            element_bytes,
            shape,
            element,
            buffer.memory().info().ptr(),
        )
    }

    /// The same in int32, for what is moved and not looked at.
    pub(crate) fn words(buffer: &'a DeviceBuffer, start: usize, shape: &[usize]) -> Result<Self> {
        let words = shape
            .iter()
            .try_fold(WORD, |product, &dim| product.checked_mul(dim));
        Self::device(
            buffer,
            start,
            words.unwrap_or(usize::MAX),
            shape,
            TensorElementType::Int32,
            WORD,
        )
    }

    #[allow(unsafe_code)]
    fn over(
        data: *mut c_void,
        bytes: usize,
        element_bytes: usize,
        shape: &[usize],
        ty: TensorElementType,
        memory: *const sys::OrtMemoryInfo,
    ) -> Result<Self> {
        let expected = shape
            .iter()
            .try_fold(element_bytes, |product, &dim| product.checked_mul(dim));
        if expected != Some(bytes) {
            return Err(EngineError::Onnx {
                doing: "describing a tensor",
                message: format!(
                    "shape {shape:?} of {element_bytes}-byte numbers does not fill {bytes} bytes"
                ),
            });
        }
        let mut dims = [0_i64; 8];
        for (dim, &size) in dims.iter_mut().zip(shape) {
            *dim = i64::try_from(size).unwrap_or(i64::MAX);
        }
        let mut value = std::ptr::null_mut();
        // SAFETY: `data` is valid for `bytes` bytes of the memory described for as long as the borrow in `Self` lives, the shape was just
        // checked to fill exactly that many, `dims` holds `shape.len()` ≤ 8 numbers, and the memory info is the process's own for CPU memory
        // or that of the buffer's allocator, which the buffer keeps.
        let status = unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                memory,
                data,
                bytes,
                dims.as_ptr(),
                shape.len().min(dims.len()),
                ty.into(),
                &raw mut value,
            )
        };
        check(status, "describing a tensor")?;
        match NonNull::new(value) {
            Some(value) => Ok(Self {
                value,
                address: data.addr(),
                memory: PhantomData,
            }),
            None => Err(EngineError::Onnx {
                doing: "describing a tensor",
                message: "no value came back".into(),
            }),
        }
    }
}

impl Drop for Tensor<'_> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the value came from ONNX Runtime in `over` and is released once; it does not own the memory under it.
        unsafe { (ort::api().ReleaseValue)(self.value.as_ptr()) }
    }
}

/// What ONNX Runtime may make of a run on a card whose session captures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum As {
    /// A run like any other.
    Itself,
    /// One that is captured as a CUDA graph of this number, and replayed from then on.
    Captured(i32),
}

/// A thread on which all runs of a session are made, one after another.
#[derive(Debug)]
pub(crate) struct Worker {
    errands: Option<mpsc::Sender<Errand>>,
    thread: Option<JoinHandle<()>>,
}

/// One run for the worker.
#[derive(Debug)]
struct Errand {
    run: Raw,
    done: mpsc::SyncSender<Result<()>>,
}

/// A run as ONNX Runtime takes it.
#[derive(Debug)]
struct Raw {
    session: *mut sys::OrtSession,
    options: *const sys::OrtRunOptions,
    input_names: Vec<*const std::ffi::c_char>,
    inputs: Vec<*const sys::OrtValue>,
    output_names: Vec<*const std::ffi::c_char>,
    outputs: Vec<*mut sys::OrtValue>,
}

// SAFETY: whoever makes one waits for the worker's answer, or for the end of its thread, with all that is borrowed for it; names, values,
// options and the session may be used on any thread, one at a time.
#[allow(unsafe_code)]
unsafe impl Send for Raw {}

impl Raw {
    /// Runs. On an error the outputs hold anything; the caller must not use them.
    #[allow(unsafe_code)]
    fn run(&mut self) -> Result<()> {
        let before = self.outputs.clone();
        // SAFETY: every name and value outlives the run by the lifetime 't of the `Call` that it was made from, which is waited for; the arrays
        // have the lengths given, the session is borrowed exclusively there, so no second run is in flight, and a null run-options pointer
        // means the defaults.
        let status = unsafe {
            (ort::api().Run)(
                self.session,
                self.options,
                self.input_names.as_ptr(),
                self.inputs.as_ptr(),
                self.inputs.len(),
                self.output_names.as_ptr(),
                self.outputs.len(),
                self.outputs.as_mut_ptr(),
            )
        };
        check(status, "running the graph")?;
        if before != self.outputs {
            return Err(EngineError::Onnx {
                doing: "running the graph",
                message: "an output was not written where it was asked for".into(),
            });
        }
        Ok(())
    }
}

impl Worker {
    pub(crate) fn new() -> Result<Self> {
        let (errands, inbox) = mpsc::channel::<Errand>();
        let thread = std::thread::Builder::new()
            .name("deltamem-runs".into())
            .spawn(move || {
                for mut errand in inbox {
                    let outcome = errand.run.run();
                    // Whoever asked waits; one that is gone does not care.
                    let _ = errand.done.send(outcome);
                }
            })
            .map_err(|error| {
                EngineError::Session(format!("no thread can be had for the model's runs: {error}"))
            })?;
        Ok(Self {
            errands: Some(errands),
            thread: Some(thread),
        })
    }

    /// Has the thread make the run, and waits for it.
    fn run(&self, run: Raw) -> Result<()> {
        let gone = || {
            EngineError::Session(
                "the thread of the model's runs has ended; load the model again, and please report this"
                    .into(),
            )
        };
        let (done, outcome) = mpsc::sync_channel(1);
        let errands = self.errands.as_ref().ok_or_else(gone)?;
        errands.send(Errand { run, done }).map_err(|_| gone())?;
        // An error here means that the thread has dropped the errand, and runs nothing any more.
        outcome.recv().map_err(|_| gone())?
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.errands.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do; if it panicked, that was told to whoever asked.
            let _ = thread.join();
        }
    }
}

/// The inputs and outputs of one run, by name.
#[derive(Default)]
pub(crate) struct Call<'t, 'a> {
    input_names: Vec<*const std::ffi::c_char>,
    inputs: Vec<*const sys::OrtValue>,
    output_names: Vec<*const std::ffi::c_char>,
    outputs: Vec<*mut sys::OrtValue>,
    addresses: Vec<usize>,
    tensors: PhantomData<(&'t Tensor<'a>, &'t CStr)>,
}

impl<'t, 'a> Call<'t, 'a> {
    /// Gives the tensor to the input `name`.
    pub(crate) fn input(&mut self, name: &'t CStr, tensor: &'t Tensor<'a>) {
        self.input_names.push(name.as_ptr());
        self.inputs.push(tensor.value.as_ptr());
        self.addresses.push(tensor.address);
    }

    /// Has the output `name` written into the tensor.
    pub(crate) fn output(&mut self, name: &'t CStr, tensor: &'t mut Tensor<'a>) {
        self.output_names.push(name.as_ptr());
        self.outputs.push(tensor.value.as_ptr());
        self.addresses.push(tensor.address);
    }

    /// Gives one tensor to the input `past` and to the output `present`: attention appends to it in place.
    pub(crate) fn in_place(&mut self, past: &'t CStr, present: &'t CStr, tensor: &'t mut Tensor<'a>) {
        self.input_names.push(past.as_ptr());
        self.inputs.push(tensor.value.as_ptr());
        self.output_names.push(present.as_ptr());
        self.outputs.push(tensor.value.as_ptr());
        self.addresses.push(tensor.address);
    }

    /// Where everything lies, in the order that it was given.
    pub(crate) fn addresses(&self) -> &[usize] {
        &self.addresses
    }

    /// Runs the graph. On an error the outputs hold anything; the caller must not use them.
    pub(crate) fn run(self, session: &mut Session) -> Result<()> {
        let mut run = Raw {
            session: session.ptr().cast_mut(),
            options: std::ptr::null(),
            input_names: self.input_names,
            inputs: self.inputs,
            output_names: self.output_names,
            outputs: self.outputs,
        };
        run.run()
    }

    /// The same on the worker's thread, for a session that captures. It leaves the call as it was, to be run again if that fails.
    pub(crate) fn run_as(&self, session: &mut Session, worker: &Worker, how: As) -> Result<()> {
        let id = match how {
            // ONNX Runtime's word for a run that is not captured.
            As::Itself => -1,
            As::Captured(id) => id,
        };
        let mut options = RunOptions::new().map_err(EngineError::onnx("preparing a run"))?;
        options
            .set("gpu_graph_id", id.to_string())
            .map_err(EngineError::onnx("preparing a run"))?;
        worker.run(Raw {
            session: session.ptr().cast_mut(),
            options: options.ptr(),
            input_names: self.input_names.clone(),
            inputs: self.inputs.clone(),
            output_names: self.output_names.clone(),
            outputs: self.outputs.clone(),
        })
    }
}

struct CpuMemory(NonNull<sys::OrtMemoryInfo>);

// SAFETY: a memory info is a constant description; ONNX Runtime only reads it.
#[allow(unsafe_code)]
unsafe impl Send for CpuMemory {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for CpuMemory {}

/// The description of plain CPU memory, made once and kept for the process.
#[allow(unsafe_code)]
fn cpu_memory() -> Result<&'static CpuMemory> {
    static CPU: std::sync::OnceLock<CpuMemory> = std::sync::OnceLock::new();
    if let Some(cpu) = CPU.get() {
        return Ok(cpu);
    }
    let mut info = std::ptr::null_mut();
    // SAFETY: the out-pointer is valid for the call. Two threads may each make one; the loser's few bytes stay for the process.
    let status = unsafe {
        (ort::api().CreateCpuMemoryInfo)(
            sys::OrtAllocatorType::OrtDeviceAllocator,
            sys::OrtMemType::OrtMemTypeDefault,
            &raw mut info,
        )
    };
    check(status, "describing CPU memory")?;
    let info = NonNull::new(info).ok_or_else(|| EngineError::Onnx {
        doing: "describing CPU memory",
        message: "nothing came back".into(),
    })?;
    Ok(CPU.get_or_init(|| CpuMemory(info)))
}

#[allow(unsafe_code)]
fn check(status: sys::OrtStatusPtr, doing: &'static str) -> Result<()> {
    // SAFETY: the status comes straight from a call of ONNX Runtime and is read and released once, here.
    unsafe { ort::Error::result_from_status(status) }.map_err(EngineError::onnx(doing))
}
