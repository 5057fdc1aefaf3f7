//! The kernels of one set of sizes, as they lie on a card, and what their text is told when it is compiled.

use std::sync::Arc;

use deltamem_core::{Gates, UpdateMode};

use crate::driver::{Device, Function, Module};
use crate::layer::{CALL_BYTES, STEP};
use crate::{CudaError, Result};

/// The kernels' text.
pub const SOURCE: &str = include_str!("kernels.cu");

/// The largest rank: a thread holds a row of S in registers.
pub(crate) const MOST_RANK: usize = 64;
/// The largest H·r: a block holds what one token proposes in the memory that its threads share.
pub(crate) const MOST_READS: usize = 1024;

/// What the decoder's numbers are. The memory's are float32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// float32.
    Single,
    /// IEEE half precision.
    Half,
    /// bfloat16.
    Brain,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::Single => 4,
            Self::Half | Self::Brain => 2,
        }
    }
}

/// What a set of kernels is compiled for. Everything else of a layer is said at each call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sizes {
    /// State heads, H.
    pub heads: usize,
    /// Rank of each state, r.
    pub rank: usize,
    /// How β and λ become gates.
    pub mode: UpdateMode,
    /// Gates per row of S or per head.
    pub gates: Gates,
    /// Whether λ has a network of its own; otherwise λ = 1 − β.
    pub own_lambda: bool,
    /// Whether q and k are l2(tanh(W h)), per head, or W h as it is.
    pub normalize_qk: bool,
    /// The decoder's numbers.
    pub element: Element,
}

impl Sizes {
    /// H·r.
    pub fn reads(&self) -> usize {
        self.heads.saturating_mul(self.rank)
    }

    /// G, the gates of one kind.
    pub fn gate_width(&self) -> usize {
        self.heads.saturating_mul(self.gates.per_head(self.rank))
    }

    /// Logits of gates: G, or 2 G where λ is its own.
    pub fn logits(&self) -> usize {
        self.gate_width()
            .saturating_mul(if self.own_lambda { 2 } else { 1 })
    }

    /// W: q, k, v and the logits.
    pub fn proposal_width(&self) -> usize {
        self.reads().saturating_mul(3).saturating_add(self.logits())
    }

    /// Whether there are kernels of these sizes.
    ///
    /// # Errors
    /// [`CudaError::Size`] that says up to where there are.
    pub fn check(&self) -> Result<()> {
        if self.heads == 0 || self.rank == 0 {
            return Err(CudaError::Call(format!(
                "found {} state heads of rank {}, expected 1 or more of each",
                self.heads, self.rank
            )));
        }
        for (what, found, most) in [
            ("the rank", self.rank, MOST_RANK),
            ("the state heads' rank together", self.reads(), MOST_READS),
        ] {
            if found > most {
                return Err(CudaError::Size { what, found, most });
            }
        }
        Ok(())
    }

    /// What the compiler is told.
    pub fn options(&self) -> Vec<String> {
        let mode = match self.mode {
            UpdateMode::Standard => 0,
            UpdateMode::LambdaOutside => 1,
            UpdateMode::NoLambda => 2,
        };
        let element = match self.element {
            Element::Single => 0,
            Element::Half => 1,
            Element::Brain => 2,
        };
        let mut options = vec!["--fmad=false".to_owned()];
        options.extend(
            [
                ("RANK", self.rank),
                ("HEADS", self.heads),
                ("MODE", mode),
                ("GATES", self.gates.per_head(self.rank)),
                ("OWN_LAMBDA", usize::from(self.own_lambda)),
                ("NORMALIZE", usize::from(self.normalize_qk)),
                ("ELEMENT", element),
                ("CALL_BYTES", CALL_BYTES),
            ]
            .map(|(name, value)| format!("-D{name}={value}")),
        );
        options
    }
}

/// Kernels on a card, ready to be launched.
#[derive(Debug)]
pub struct Kernels {
    sizes: Sizes,
    /// Where the networks are narrow enough for it.
    pub(crate) step: Option<Function>,
    pub(crate) propose: Function,
    pub(crate) remember: Function,
    pub(crate) propose_many: Function,
    pub(crate) scan: Function,
    pub(crate) correct: Function,
    pub(crate) correct_fours: Function,
    pub(crate) correct_normed: Function,
    // The functions are its.
    module: Module,
}

impl Kernels {
    pub(crate) fn load(device: &Arc<Device>, sizes: Sizes, image: &[u8]) -> Result<Self> {
        let module = device.load(image)?;
        Ok(Self {
            sizes,
            step: if sizes.proposal_width() <= STEP {
                Some(module.function(c"step")?)
            } else {
                None
            },
            propose: module.function(c"propose")?,
            remember: module.function(c"remember")?,
            propose_many: module.function(c"propose_many")?,
            scan: module.function(c"scan")?,
            correct: module.function(c"correct")?,
            correct_fours: module.function(c"correct_fours")?,
            correct_normed: module.function(c"correct_normed")?,
            module,
        })
    }

    /// What they were compiled for.
    pub fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// The card that they are on.
    pub fn device(&self) -> &Arc<Device> {
        self.module.device()
    }
}
