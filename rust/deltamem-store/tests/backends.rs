//! The suite over every backend.

#![allow(clippy::unwrap_used)]

mod suite;

use std::sync::Arc;

use deltamem_store::backend::memory::MemoryBackend;

backends!(memory, (Arc::new(MemoryBackend::new()), ()));
