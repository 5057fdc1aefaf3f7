//! The core of δ-mem: shapes, the rule, a snapshot's bytes, the mathematics of states as edits, and what a healthy state looks like, in
//! plain f32 and plain slices.
//!
//! It knows no model, no runtime, no file and no Python. The rule stands here once, in [`rule`] (the recurrence), [`gates`] and
//! [`networks`] (what feeds it); its twins are `deltamem_export.reference` in `PyTorch` and the graph that the exporter grafts.

#![forbid(unsafe_code)]

pub mod edits;
pub mod gates;
pub mod geometry;
pub mod health;
pub mod lanes;
pub mod networks;
pub mod rule;
pub mod snapshot;

pub use geometry::{Geometry, GeometryError};
pub use rule::{Gates, UpdateMode};
pub use snapshot::{Fingerprint, FingerprintError, SamplerState, Snapshot, SnapshotError};
