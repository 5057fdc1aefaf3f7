//! Everything that can go wrong while a model is loaded or run. Each message names the thing, what was found, what was expected and
//! what to do; the binding maps each variant to one Python exception and adds nothing.

use crate::bundle::BundleError;
use crate::sampling::SamplingError;
use crate::text::TextError;

/// What can go wrong in the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The bundle cannot be used as it lies on disk.
    #[error(transparent)]
    Bundle(#[from] BundleError),

    /// A tokenizer or a chat template failed.
    #[error(transparent)]
    Text(#[from] TextError),

    /// A sampling option is out of range, or the logits cannot be sampled.
    #[error(transparent)]
    Sampling(#[from] SamplingError),

    /// The graph is not the graph that the manifest describes.
    #[error("{file}: {what}; the graph and deltamem.json do not belong together, export the bundle again")]
    Graph {
        /// The graph's file name.
        file: String,
        /// What differs, with both sides.
        what: String,
    },

    /// The bundle asks for something that this runtime does not do.
    #[error("{0}")]
    Unsupported(String),

    /// ONNX Runtime's library could not be opened, or is another one than the process already uses.
    #[error("ONNX Runtime could not be loaded: {0}")]
    Library(String),

    /// ONNX Runtime refused or failed.
    #[error("ONNX Runtime failed while {doing}: {message}")]
    Onnx {
        /// What was being done.
        doing: &'static str,
        /// ONNX Runtime's own words.
        message: String,
    },

    /// A device that is not there, is full, or fails.
    #[error("{0}")]
    Device(String),

    /// A token id outside the vocabulary.
    #[error("token id {id} at index {index} is outside the vocabulary of {vocab} (valid: 0 to {}); was it made by another tokenizer?", vocab - 1)]
    TokenOutOfRange {
        /// The id found.
        id: i64,
        /// Where in the input it stands.
        index: usize,
        /// The size of the vocabulary.
        vocab: usize,
    },

    /// The turn would be longer than the model's context.
    #[error(
        "{tokens} more tokens after the turn's {position} make {}, over the model's context of {context}; call end_turn() first (the \
         memory stays), or feed the text in several turns", position + tokens
    )]
    ContextLength {
        /// Tokens asked for.
        tokens: usize,
        /// Tokens already in this turn.
        position: usize,
        /// The model's limit.
        context: usize,
    },

    /// An argument out of range.
    #[error("{0}")]
    Value(String),

    /// The call makes no sense in the session's present state.
    #[error("{0}")]
    Session(String),

    /// A snapshot that belongs to another model.
    #[error(
        "the snapshot was written under fingerprint {found}, this model has {expected}: a memory means nothing to another model; load the \
         bundle that wrote it (`deltamem inspect` shows a bundle's fingerprint)"
    )]
    Fingerprint {
        /// The snapshot's fingerprint.
        found: String,
        /// The model's fingerprint.
        expected: String,
    },

    /// The run left values that are not numbers; the state from before the call was kept.
    #[error("{0}; the memory from before the call was kept")]
    NotFinite(String),

    /// The caller asked to stop; the state from before the call was kept.
    #[error("interrupted; the session is as it was before the call")]
    Interrupted,
}

/// The engine's result.
pub type Result<T> = std::result::Result<T, EngineError>;

impl EngineError {
    /// The same for another session that it also struck.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::Onnx { doing, message } => Self::Onnx {
                doing,
                message: message.clone(),
            },
            Self::Device(message) => Self::Device(message.clone()),
            other => Self::Session(other.to_string()),
        }
    }

    /// Wraps an error of the `ort` crate, with what was being done.
    pub(crate) fn onnx<R>(doing: &'static str) -> impl FnOnce(ort::Error<R>) -> Self {
        move |error| Self::Onnx {
            doing,
            message: error.to_string(),
        }
    }
}
