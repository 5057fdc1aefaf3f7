//! Which vector instructions the processor has. Work is written once, eight numbers at a time, is compiled for each set that is worth it,
//! and runs as the best one; nothing is built for one machine. AVX-512 is not among them: a decode step waits for memory, and the products
//! of a prefill are too small a part of it to pay for the wheel's bytes.

use std::fmt;

use deltamem_core::eight::{Eight, LANES, Plain};

#[cfg(target_arch = "x86_64")]
use crate::avx2::Avx2;
use crate::half;

/// A set of instructions that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instructions(Set);

// Private, so that a set can only be had from `available`, which has asked the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
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
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            found.push(Self(Set::Avx2));
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

/// What the products need beyond [`Eight`]. The sets' bits differ here: one rounding or two.
pub(crate) trait Arithmetic: Eight {
    /// a · b + c of each lane.
    fn multiply_add(self, a: Self::Numbers, b: Self::Numbers, c: Self::Numbers) -> Self::Numbers;

    /// What eight halves of [`half::narrow`] stand for.
    fn widen(self, halves: &[u16; LANES]) -> Self::Numbers;
}

#[allow(clippy::inline_always)] // see `Work`
impl Arithmetic for Plain {
    // One instruction on aarch64, rounded once. Elsewhere two: without one for both, Rust would call a function for each number.
    #[inline(always)]
    fn multiply_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        let mut out = c;
        for lane in 0..LANES {
            out[lane] = if cfg!(target_arch = "aarch64") {
                a[lane].mul_add(b[lane], out[lane])
            } else {
                a[lane] * b[lane] + out[lane]
            };
        }
        out
    }

    #[inline(always)]
    fn widen(self, halves: &[u16; LANES]) -> [f32; LANES] {
        halves.map(half::widen)
    }
}
