//! Where memories live: names, branches, commits and their history, durable, versioned, shared and deletable.
//!
//! It knows snapshots and their bytes (`deltamem-core`) and places that keep bytes ([`backend`]); it knows no model, no runtime and no
//! Python. What stands on disk, and what is guaranteed, is described in `FORMAT.md`.

#![forbid(unsafe_code)]

pub mod backend;
mod care;
mod codec;
mod commit;
mod edit;
mod error;
mod history;
mod name;
mod record;
mod resolve;
mod schema;
mod seal;
mod store;
mod transfer;

pub use care::{Damage, GcOptions, GcReport, RepairReport, Stats, VerifyReport};
pub use commit::{Commit, CommitId, MAX_MESSAGE, MAX_META, Parts, StateId};
pub use edit::{Info, Model, NewCommit, Ref};
pub use error::Error;
pub use history::Relation;
pub use name::{MAX_NAME, MAX_REF_NAME};
pub use record::{Limits, MAX_REFS, Move, RefKind, Usage, WhenFull};
pub use resolve::MIN_PREFIX;
pub use schema::SCHEMA;
pub use seal::StoreKey;
pub use store::{Clock, Options, Store};
