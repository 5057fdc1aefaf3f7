//! The engine: it opens a bundle, runs its graph in ONNX Runtime, and keeps what a session needs between runs.
//!
//! It knows tokens, buffers and graphs. It knows nothing of Python, and nothing of where memories are kept.
//!
//! The way of a token: [`text`] → [`session::Session::feed`] (chunks) → `schedule` (when) → `running` (with whom) →
//! `graph` (one run) → [`memory`] (the back buffer becomes the
//! front) → [`sampling`] → [`generation`] (a piece of text).

mod buffer;
pub mod bundle;
mod call;
mod captures;
mod device;
pub mod error;
mod fixed;
pub mod generation;
mod graph;
pub mod health;
mod kv;
mod logits;
pub mod memory;
pub mod model;
mod operator;
mod pool;
pub mod prefix;
pub mod prompt;
mod running;
pub mod runtime;
pub mod sampling;
mod schedule;
pub mod session;
mod slots;
pub mod spans;
mod states;
pub mod text;
mod turn;

#[doc(hidden)]
pub use device::mover::Disturbance;
pub use error::EngineError;
pub use generation::{FinishReason, Generation, GenerationOptions, GenerationStats};
pub use model::{Device, GraphChoice, LoadOptions, Model, examine_cuda};
pub use operator::{examine_kernels, kernel_instructions, product_instructions};
pub use prefix::Prefix;
pub use running::RunStats;
pub use runtime::Runtime;
pub use session::{FeedOptions, Session};
pub use spans::Spans;
