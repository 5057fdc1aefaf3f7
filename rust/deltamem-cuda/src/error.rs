//! What can go wrong between a model and its kernels on a card. Each message names what was found, what was expected and what to do.

/// Why the memory's own kernels cannot be had, or did not run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A library that cannot be opened, or lacks a function.
    #[error("{library}: {found}; {help}")]
    Library {
        /// Which one.
        library: String,
        /// What the system says.
        found: String,
        /// What to do.
        help: &'static str,
    },
    /// The driver refused or failed.
    #[error("the NVIDIA driver failed while {doing}: {found} (error {code})")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// The driver's word for it.
        found: String,
        /// The driver's number for it.
        code: i32,
    },
    /// NVRTC does not take the kernels.
    #[error("NVRTC failed while {doing}: {found}; please report it")]
    Compiler {
        /// What was being done.
        doing: &'static str,
        /// Its word and its log.
        found: String,
    },
    /// The compiled kernels do not compute the rule on this card.
    #[error(
        "the kernels compiled for this card are off: {what} differ from the rule by {found:e}, expected {allowed:e} at most; please report \
         it with the card's and the driver's names"
    )]
    Wrong {
        /// Which numbers.
        what: String,
        /// The largest difference, of the largest number's size. Infinite: something was not finite, or bits that must be equal were not.
        found: f32,
        /// The largest that is taken.
        allowed: f32,
    },
    /// Sizes that the kernels do not have.
    #[error("{what} is {found}, and the kernels have at most {most}")]
    Size {
        /// Of what.
        what: &'static str,
        /// What was found.
        found: usize,
        /// What there is.
        most: usize,
    },
    /// A layer or a call whose parts do not fit each other.
    #[error("{0}")]
    Call(String),
}
