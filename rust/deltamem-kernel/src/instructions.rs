//! Which vector instructions the processor has. Work is written once, eight or sixteen numbers at a time, is compiled for each set that is
//! worth it, and runs as the best one; nothing is built for one machine.

use std::fmt;

use deltamem_core::lanes::{LANES, Lanes, Plain, Vectors, WIDE};

use crate::half;
#[cfg(target_arch = "x86_64")]
use crate::x86::{Avx2, Avx512};

/// A set of instructions that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instructions(Set);

// Private, so that a set can only be had from `available`, which has asked the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Instructions {
    /// The best set that this processor has.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Set::Baseline))
    }

    /// All the sets that this processor has, the best one last.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self(Set::Baseline)];
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(Avx2::is_available().then_some(Self(Set::Avx2)));
            found.extend(Avx512::is_available().then_some(Self(Set::Avx512)));
        }
        found
    }

    /// The set's name.
    pub const fn as_str(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "aarch64")]
            Set::Baseline => "neon",
            #[cfg(not(target_arch = "aarch64"))]
            Set::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2+fma",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }

    /// Does the work with these instructions.
    #[allow(unsafe_code)]
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        match self.0 {
            Set::Baseline => work.run(Plain),
            // SAFETY: `available` is the only place that makes this set, and has found these features in this processor.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { with_avx2(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { with_avx512(work) },
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something to do that is compiled once for each set. `run` and all it calls must be `#[inline(always)]`: what is not taken in is compiled
/// for the baseline.
pub(crate) trait Work {
    type Output;

    fn run<A: Arithmetic>(self, arithmetic: A) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<W: Work>(work: W) -> W::Output {
    work.run(Avx2::new())
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl")]
fn with_avx512<W: Work>(work: W) -> W::Output {
    work.run(Avx512::new())
}

/// What the products need beyond [`Vectors`].
pub(crate) trait Arithmetic: Vectors + Halves<LANES> + Halves<WIDE> {
    /// Rows of a product whose sums fit into registers: 4 (with 8 columns), 6 (with 16) or 8 (with 32).
    const ROWS: usize;
}

/// Weights in half precision.
pub(crate) trait Halves<const N: usize>: Lanes<N> {
    /// What halves of [`half::narrow`] stand for.
    fn widen(self, halves: &[u16; N]) -> Self::Numbers;
}

impl Arithmetic for Plain {
    const ROWS: usize = 4;
}

#[allow(clippy::inline_always)] // see `Work`
impl<const N: usize> Halves<N> for Plain {
    #[inline(always)]
    fn widen(self, halves: &[u16; N]) -> [f32; N] {
        halves.map(half::widen)
    }
}
