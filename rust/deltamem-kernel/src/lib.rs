//! One memory layer, fast: everything that a decoder's layer does for its memory, in one pass over plain f32 slices. The engine registers
//! it with ONNX Runtime as the one node that stands in the place of the graft's thirty.
//!
//! The rule itself is `deltamem_core`'s; what is here is its products, eight numbers at a time, compiled once for each set of
//! instructions and chosen at run time. It knows no ONNX Runtime, no threads of its own, no model. Its twin, written to be read, is
//! `deltamem_core::networks`; tests hold the two together.

mod activation;
mod aligned;
mod blocks;
mod dots;
mod half;
mod instructions;
mod layer;
mod panels;
mod scan;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use blocks::{Bits, BlockShape, Blocks, BlocksError, Rounded};
pub use dots::IntegerInstructions;
pub use instructions::Instructions;
pub use layer::{
    Call, Correction, From, HeadNorm, Layer, LayerError, Pool, Scratch, Settings, Spans, Storage, Target,
    Values,
};
pub use scan::scan;
