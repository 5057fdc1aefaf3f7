//! One memory layer on an NVIDIA card, as kernels of its own: two launches for a step of one token, three for a prompt. The engine registers
//! it with ONNX Runtime's CUDA provider as the one node that stands in the place of the graft's thirty.
//!
//! The kernels (`kernels.cu`) are compiled for the card that is there when a model is loaded, by NVIDIA's compiler library NVRTC, kept on disk,
//! and held against the rule of [`deltamem_core`] on that card before they are used. It knows no ONNX Runtime and no model, and opens the
//! driver's library and NVRTC when a [`Machine`] is asked for, never before. Its twin on the processor is `deltamem-kernel`.

mod cache;
mod check;
mod compiler;
mod driver;
mod error;
mod kernels;
mod layer;
mod machine;

pub use cache::Cache;
pub use compiler::Compiler;
pub use driver::{Buffer, Device, Driver, Plain};
pub use error::CudaError;
pub use kernels::{Element, Kernels, SOURCE, Sizes};
pub use layer::{Address, Call, Correction, Layer, Rows, Target, Values};
pub use machine::{Machine, Options};

/// The result of what a card and its libraries do.
pub type Result<T> = std::result::Result<T, CudaError>;
