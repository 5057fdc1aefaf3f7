//! The suite over every backend.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod suite;

use std::sync::Arc;

use deltamem_store::backend::memory::MemoryBackend;
use deltamem_store::backend::redb::{RedbBackend, RedbOptions};

backends!(memory, (Arc::new(MemoryBackend::new()), ()));

fn redb(shared: bool) -> (Arc<RedbBackend>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let options = RedbOptions {
        shared,
        ..RedbOptions::default()
    };
    let backend = RedbBackend::open(&directory.path().join("memories"), options).unwrap();
    (Arc::new(backend), directory)
}

backends!(redb_of_one_process, redb(false));
backends!(redb_with_readers_beside, redb(true));

memories!(stores_in_memory, (Arc::new(MemoryBackend::new()), ()));
memories!(stores_in_redb, redb(false));
