//! ONNX Runtime's CUDA provider: how a session is given it, and what its errors mean to somebody who has to do something about them. It knows
//! the provider's words; it knows no memory and no models.

use std::fmt;

use ort::ep::{self, ArenaExtendStrategy};
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use crate::error::{EngineError, Result};
use crate::runtime::Runtime;

/// ONNX Runtime's name of the provider.
pub(crate) const CUDA: &str = "CUDAExecutionProvider";

/// The variable by which CUDA hides cards.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// Who runs a graph whose buffers lie on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Provider {
    /// A card.
    Cuda {
        /// Its number among those that the process sees.
        id: i32,
        /// Whether float32 products may be rounded to TF32.
        tf32: bool,
    },
    /// The processor with its own memory as the device's, which is how tests reach this code without a card.
    Host,
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cuda { id, .. } => write!(f, "cuda:{id}"),
            Self::Host => f.write_str("cpu"),
        }
    }
}

/// Why there is no CUDA here.
#[derive(Debug)]
pub(crate) enum NoCuda {
    /// Nothing here should have worked: another library, no card, or cards that are hidden.
    Absent(EngineError),
    /// Something is there and fails.
    Failed(EngineError),
}

impl NoCuda {
    /// The error, either way.
    pub(crate) fn error(self) -> EngineError {
        match self {
            Self::Absent(error) | Self::Failed(error) => error,
        }
    }
}

impl Provider {
    /// The card's number; none for the processor.
    pub(crate) fn card(self) -> Option<i32> {
        match self {
            Self::Cuda { id, .. } => Some(id),
            Self::Host => None,
        }
    }

    /// Gives a session this provider; every node that it has no kernel for runs on the processor.
    /// `captures` has it capture runs as CUDA graphs.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the provider's library cannot be opened.
    pub(crate) fn register(self, builder: SessionBuilder, captures: bool) -> Result<SessionBuilder> {
        self.register_with(builder, ArenaExtendStrategy::NextPowerOfTwo, captures)
    }

    fn register_with(
        self,
        builder: SessionBuilder,
        arena: ArenaExtendStrategy,
        captures: bool,
    ) -> Result<SessionBuilder> {
        let Self::Cuda { id, tf32 } = self else {
            return Ok(builder);
        };
        // ONNX Runtime's own default is TF32 where the card has it, which loses 10 bits of every float32 product: the memory's too.
        let cuda = ep::CUDA::default()
            .with_device_id(id)
            .with_tf32(tf32)
            .with_arena_extend_strategy(arena)
            .with_cuda_graph(captures)
            .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic);
        builder
            .with_execution_providers([cuda.build().error_on_failure()])
            .map_err(EngineError::onnx("preparing the CUDA provider"))
            .map_err(|error| self.explain(error))
    }

    /// Opens one of the graphs that move memory.
    pub(crate) fn open_small(self, runtime: &Runtime, graph: &[u8]) -> Result<Session> {
        let builder = Session::builder(runtime.environment())
            .map_err(EngineError::onnx("preparing a session"))?
            .with_log_level(ort::logging::LogLevel::Fatal)
            .map_err(EngineError::onnx("preparing a session"))?
            .with_optimization_level(GraphOptimizationLevel::Disable)
            .map_err(EngineError::onnx("preparing a session"))?
            // Each runs one operator.
            .with_intra_threads(1)
            .map_err(EngineError::onnx("preparing a session"))?;
        // These hold the KV caches, which grow by doubling: a pool that doubles as well would take twice what they need.
        self.register_with(builder, ArenaExtendStrategy::SameAsRequested, false)?
            .commit_from_memory(graph)
            .map_err(EngineError::onnx("opening the device"))
            .map_err(|error| self.explain(error))
    }

    /// The same error in words about the device, where it is one of the device's.
    pub(crate) fn explain(self, error: EngineError) -> EngineError {
        match (self, error) {
            (Self::Cuda { .. }, EngineError::Onnx { doing, message }) => {
                match meaning(&self.to_string(), doing, &message) {
                    Some(said) => EngineError::Device(said),
                    None => EngineError::Onnx { doing, message },
                }
            }
            (_, error) => error,
        }
    }
}

/// Whether this process may expect a card, before ONNX Runtime is asked for one.
///
/// # Errors
/// What is missing.
pub(crate) fn expect_cuda(runtime: &Runtime) -> std::result::Result<(), NoCuda> {
    let found = runtime.providers();
    if !found.iter().any(|name| name == CUDA) {
        return Err(NoCuda::Absent(EngineError::Device(format!(
            "found ONNX Runtime without CUDA at {} (it has {}), expected a build with {CUDA}: pip uninstall onnxruntime, then pip install \
             \"deltamem-rt[cuda]\" \"onnxruntime-gpu[cuda,cudnn]\", or use device='cpu'",
            runtime.library().display(),
            found.join(", ")
        ))));
    }
    match std::env::var(VISIBLE) {
        Ok(visible) if visible.trim().is_empty() || visible.trim() == "-1" => {
            Err(NoCuda::Absent(EngineError::Device(format!(
                "found {VISIBLE}={visible:?}, which hides every card from this process; unset it or name a card (such as 0), or use device='cpu'"
            ))))
        }
        _ => Ok(()),
    }
}

/// Whether an error that opening a device gave says that there is no card at all.
pub(crate) fn no_card(error: EngineError) -> NoCuda {
    match &error {
        EngineError::Device(said) if said.contains(NO_DRIVER) || said.contains(NO_CARD) => {
            NoCuda::Absent(error)
        }
        _ => NoCuda::Failed(error),
    }
}

const NO_DRIVER: &str = "no NVIDIA driver";
const NO_CARD: &str = "no card that CUDA can use";

/// What the provider's words mean and what to do. `None`: they are not about the device.
fn meaning(device: &str, doing: &str, message: &str) -> Option<String> {
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    let to_do = if has(&["libcuda.so", "nvcuda.dll"]) {
        format!(
            "found {NO_DRIVER} (its library libcuda.so.1 cannot be opened), expected one: install the driver of the card, or use device='cpu'"
        )
    } else if has(&[
        "Failed to load library",
        "cannot open shared object",
        "LoadLibrary failed",
    ]) {
        "the CUDA provider is there, a library that it needs is not: pip install \"onnxruntime-gpu[cuda,cudnn]\", which brings them, or put \
         those of CUDA and cuDNN on the library path"
            .to_owned()
    } else if has(&[
        "driver version is insufficient",
        "CUDA failure 35",
        "unsupported toolchain",
        "CUDA failure 222",
    ]) {
        "the NVIDIA driver is too old for the CUDA that this ONNX Runtime was built for; update the driver (nvidia-smi shows both), or install \
         an onnxruntime-gpu for an older CUDA"
            .to_owned()
    } else if has(&["no CUDA-capable device", "CUDA failure 100"]) {
        format!("found {NO_CARD}, expected one: check nvidia-smi and {VISIBLE}, or use device='cpu'")
    } else if has(&[
        "invalid device ordinal",
        "CUDA failure 101",
        "Invalid device ID",
        "must be between 0 and",
    ]) {
        format!(
            "this process sees no card of that number; check nvidia-smi and {VISIBLE}, which also numbers the cards from 0 on"
        )
    } else if has(&["no kernel image is available", "CUDA failure 209"]) {
        "this ONNX Runtime was not built for this card; install an onnxruntime-gpu that is".to_owned()
    } else if has(&[
        "out of memory",
        "Failed to allocate memory",
        "CUDA failure 2:",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "bfc_arena",
    ]) {
        "the card has no memory left for it; what the sessions held before stays, so end turns (their KV caches are freed), use fewer \
         sessions at once, a bundle of lower precision or another card, or see with nvidia-smi who else holds memory"
            .to_owned()
    } else if has(&[
        "CUDA failure",
        "CUDA error",
        "CUBLAS failure",
        "CUDNN failure",
        "cudaError",
        "the NVIDIA driver failed",
    ]) {
        "the card failed, and what lay on it may be lost; snapshots and commits are not, they are on the host. Restart this process, or load \
         with device='cpu', and take up the last commit"
            .to_owned()
    } else {
        return None;
    };
    Some(format!(
        "{device} while {doing}: {to_do}. ONNX Runtime says: {message}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_providers_words_are_told_with_what_to_do() {
        let cuda = Provider::Cuda { id: 1, tf32: false };
        let said = |message: &str| {
            cuda.explain(EngineError::Onnx {
                doing: "running the graph",
                message: message.into(),
            })
        };
        for (message, expected) in [
            (
                "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object file",
                "pip install \"onnxruntime-gpu[cuda,cudnn]\"",
            ),
            (
                "Failed to load library x.so with error: libcuda.so.1: cannot open shared object file: No such file",
                "install the driver",
            ),
            (
                "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1",
                "update the driver",
            ),
            (
                "CUDA failure 100: no CUDA-capable device is detected",
                "check nvidia-smi and CUDA_VISIBLE_DEVICES",
            ),
            (
                "CUDA failure 101: invalid device ordinal",
                "no card of that number",
            ),
            (
                "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1073741824",
                "end turns",
            ),
            ("CUDA failure 2: out of memory", "end turns"),
            (
                "CUDA failure 719: unspecified launch failure",
                "Restart this process",
            ),
        ] {
            let EngineError::Device(text) = said(message) else {
                panic!("{message} is no error of the device");
            };
            assert!(text.starts_with("cuda:1 while running the graph: "), "{text}");
            assert!(text.contains(expected) && text.ends_with(message), "{text}");
        }
        assert!(matches!(
            said("Non-zero status code while running Add"),
            EngineError::Onnx { .. }
        ));
        let on_host = Provider::Host.explain(EngineError::Onnx {
            doing: "x",
            message: "out of memory".into(),
        });
        assert!(matches!(on_host, EngineError::Onnx { .. }));
    }

    #[test]
    fn a_missing_card_is_no_failure_and_a_broken_one_is() {
        let cuda = Provider::Cuda { id: 0, tf32: false };
        let of = |message: &str| {
            no_card(cuda.explain(EngineError::Onnx {
                doing: "opening the device",
                message: message.into(),
            }))
        };
        assert!(matches!(
            of("libcuda.so.1: cannot open shared object file"),
            NoCuda::Absent(_)
        ));
        assert!(matches!(
            of("CUDA failure 100: no CUDA-capable device is detected"),
            NoCuda::Absent(_)
        ));
        for message in [
            "libcudnn.so.9: cannot open shared object file",
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
            "CUDA failure 999: unknown error",
            "something else",
        ] {
            assert!(matches!(of(message), NoCuda::Failed(_)), "{message}");
        }
    }
}
