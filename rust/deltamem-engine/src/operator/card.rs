//! The memory's own kernels on a card, made before a graph that takes them is opened: what hinders them is then known before any weight is
//! read, and the graph's nodes find them made. It knows which library plays the card in tests; it knows no graph.

use std::path::PathBuf;
use std::sync::Arc;

use deltamem_core::{Gates, UpdateMode};
use deltamem_cuda::{Element, Kernels, Machine, Sizes};

use crate::bundle::Manifest;
use crate::device::provider::Provider;
use crate::error::{EngineError, Result};

/// Where the processor plays the card, the library that plays the driver and NVRTC: for tests. It is not looked at otherwise.
const EMULATED_CARD: &str = "DELTAMEM_EMULATED_CARD";

/// What a card with kernels for a bundle's layers is held by until the graph's nodes have them.
#[derive(Debug)]
pub(crate) struct Ready {
    _machine: Arc<Machine>,
    _kernels: Arc<Kernels>,
}

/// The machine of a provider.
pub(super) fn machine(provider: Provider) -> std::result::Result<Arc<Machine>, String> {
    match provider {
        Provider::Cuda { id, .. } => Machine::shared(id, None),
        Provider::Host => {
            let library = std::env::var_os(EMULATED_CARD).map(PathBuf::from).ok_or_else(|| {
                format!("the processor plays the card, and {EMULATED_CARD} names no library that plays its driver")
            })?;
            Machine::shared(0, Some(&library))
        }
    }
    .map_err(|error| error.to_string())
}

/// Compiles the kernels of a bundle's first graph for a card, or takes those that were kept, and holds them against the rule.
///
/// # Errors
/// [`EngineError::Device`] with what is missing or fails, and what to do.
pub(crate) fn prepare(provider: Provider, manifest: &Manifest) -> Result<Ready> {
    let memory = &manifest.memory;
    let sizes = Sizes {
        heads: memory.heads,
        rank: memory.rank,
        mode: memory.update_mode,
        gates: memory.gates,
        own_lambda: memory.gate_kinds() > 1,
        normalize_qk: memory.normalize_qk,
        // What activations are in; weights in blocks come with 16 bits on a card.
        element: match manifest.precision.as_str() {
            "fp32" => Element::Single,
            "bf16" => Element::Brain,
            _ => Element::Half,
        },
    };
    made(provider, sizes).map(|(machine, kernels)| Ready {
        _machine: machine,
        _kernels: kernels,
    })
}

/// Whether the first card can have kernels of the memory's own, in words; for `deltamem doctor`.
///
/// # Errors
/// [`EngineError::Device`] with what is missing and what to do.
pub fn examine_kernels() -> Result<String> {
    // Those of the released adapter.
    let sizes = Sizes {
        heads: 1,
        rank: 8,
        mode: UpdateMode::Standard,
        gates: Gates::Row,
        own_lambda: false,
        normalize_qk: true,
        element: Element::Half,
    };
    let (machine, _) = made(Provider::Cuda { id: 0, tf32: false }, sizes)?;
    Ok(format!(
        "compiled by {} and held against the rule on the card",
        machine.describe()
    ))
}

fn made(provider: Provider, sizes: Sizes) -> Result<(Arc<Machine>, Arc<Kernels>)> {
    let made = machine(provider).and_then(|machine| {
        let kernels = machine.kernels(sizes).map_err(|error| error.to_string())?;
        Ok((machine, kernels))
    });
    made.map_err(|why| {
        EngineError::Device(format!(
            "the memory's own kernels cannot be had on {provider}: {why}"
        ))
    })
}
