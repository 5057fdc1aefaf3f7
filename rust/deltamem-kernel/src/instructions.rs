//! Which vector instructions the processor has. Work that is written once, in plain loops, is compiled for each set that is worth it and
//! runs as the best one; nothing is built for one machine. AVX-512 is not among them: a decode step waits for memory, and the products of a
//! prefill are too small a part of it to pay for the wheel's bytes.

use std::fmt;

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
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
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
            #[cfg(target_arch = "aarch64")]
            Set::Baseline => work.run::<Fused>(),
            #[cfg(not(target_arch = "aarch64"))]
            Set::Baseline => work.run::<Apart>(),
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

    fn run<A: Arithmetic>(self) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<W: Work>(work: W) -> W::Output {
    work.run::<Fused>()
}

/// What differs between the sets beyond the compiler's choice.
pub(crate) trait Arithmetic {
    /// a · b + c.
    fn multiply_add(a: f32, b: f32, c: f32) -> f32;
}

/// One instruction, rounded once.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) struct Fused;

/// Two instructions: without one for both, Rust would call a function for each number.
#[cfg(not(target_arch = "aarch64"))]
pub(crate) struct Apart;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Arithmetic for Fused {
    #[inline(always)]
    #[allow(clippy::inline_always)] // see `Work`
    fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

#[cfg(not(target_arch = "aarch64"))]
impl Arithmetic for Apart {
    #[inline(always)]
    #[allow(clippy::inline_always)] // see `Work`
    fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}
