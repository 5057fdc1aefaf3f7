//! Where memories live: names, branches, commits and their history, durable, versioned, shared and deletable.
//!
//! It knows snapshots and their bytes (`deltamem-core`) and places that keep bytes ([`backend`]); it knows no model, no runtime and no
//! Python. What stands on disk is described in `FORMAT.md`.

#![forbid(unsafe_code)]

pub mod backend;
mod commit;
mod error;
pub mod name;

pub use commit::CommitId;
pub use error::Error;
