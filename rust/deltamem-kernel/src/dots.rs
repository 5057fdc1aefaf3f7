//! Products of whole numbers: which of the processor's instructions multiply bytes and add the products up four by four. As in
//! [`crate::instructions`] work is written once and compiled for each set that is worth it.

use std::fmt;

use deltamem_core::lanes::{LANES, Lanes, WIDE};

#[cfg(target_arch = "x86_64")]
use crate::x86::{Avx2, Avx2Dots, Avx512, Avx512Dots, VnniDots};

/// A set of instructions for products of whole numbers that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntegerInstructions(Set);

// Private, so that a set can only be had from `available`, which has asked the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl IntegerInstructions {
    /// The best set that this processor has; none where ONNX Runtime's own products are the better choice.
    pub fn best() -> Option<Self> {
        Self::available().pop()
    }

    /// All the sets that this processor has, the best one last.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if Avx2::is_available() {
            found.push(Self(Set::Avx2));
            if is_x86_feature_detected!("avxvnni") {
                found.push(Self(Set::Vnni));
            }
            if Avx512::is_available()
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
            {
                found.push(Self(Set::Avx512));
            }
        }
        found
    }

    /// The set's name.
    pub const fn as_str(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Vnni => "avx-vnni",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512-vnni",
        }
    }

    /// Does the work with these instructions.
    #[allow(unsafe_code)]
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(crate) fn run<W: DotsWork>(self, work: W) {
        match self.0 {
            // SAFETY: of the three: `available` is the only place that makes the set, and has found these features in this processor.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { with_avx2(work) },
            // SAFETY: see above.
            #[cfg(target_arch = "x86_64")]
            Set::Vnni => unsafe { with_vnni(work) },
            // SAFETY: see above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { with_avx512(work) },
        }
    }
}

impl fmt::Display for IntegerInstructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something to do that is compiled once for each set. `run` and all it calls must be `#[inline(always)]`, as for
/// [`crate::instructions::Work`].
pub(crate) trait DotsWork {
    fn run<D: Dots<N>, const N: usize>(self, dots: D);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<W: DotsWork>(work: W) {
    work.run::<_, LANES>(Avx2Dots::new(Avx2::new()));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn with_vnni<W: DotsWork>(work: W) {
    work.run::<_, LANES>(VnniDots::new(Avx2::new()));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512vnni")]
fn with_avx512<W: DotsWork>(work: W) {
    work.run::<_, WIDE>(Avx512Dots::new(Avx512::new()));
}

/// Registers of `N` whole numbers, or of four bytes in each of their places. A value of the type stands for a processor that can do it. All
/// sets give the same numbers.
pub(crate) trait Dots<const N: usize>: Copy {
    /// `N` whole numbers of 32 bits, or 4·`N` bytes.
    type Integers: Copy;
    /// What works on floats beside it, with a product and a sum rounded once.
    type Floats: Lanes<N>;
    /// Rows of a product whose sums fit into registers with two of columns: 6 or 3.
    const ROWS: usize;

    fn floats(self) -> Self::Floats;

    /// Bytes from memory, of which there are `N` fours.
    fn bytes(self, bytes: &[[u8; 4]]) -> Self::Integers;

    /// Asks for the cache line that lies `ahead` numbers of 4 bytes behind the first one, and will be read soon; there need not be any.
    fn prefetch<T>(self, numbers: &[T], ahead: usize);

    /// One number in all places.
    fn repeat(self, number: i32) -> Self::Integers;

    /// The lower half of each byte.
    fn low(self, bytes: Self::Integers) -> Self::Integers;

    /// The upper half of each byte.
    fn high(self, bytes: Self::Integers) -> Self::Integers;

    fn add(self, a: Self::Integers, b: Self::Integers) -> Self::Integers;

    /// The sum of all places, without what does not fit into 32 bits.
    fn sum(self, numbers: Self::Integers) -> i32;

    /// In each place: the four unsigned bytes times the four signed ones, and the sum. `NARROW`: the unsigned ones are below 16.
    fn dot<const NARROW: bool>(
        self,
        sums: Self::Integers,
        unsigned: Self::Integers,
        signed: Self::Integers,
    ) -> Self::Integers;

    /// Whole numbers below 2²⁴ as floats.
    fn to_floats(self, numbers: Self::Integers) -> <Self::Floats as Lanes<N>>::Numbers;

    /// The nearest whole numbers, the even one of two.
    fn round(self, numbers: <Self::Floats as Lanes<N>>::Numbers) -> Self::Integers;

    /// Numbers of −128 to 127 as signed bytes, into `N` / 4 fours.
    fn narrow(self, numbers: Self::Integers, bytes: &mut [[u8; 4]]);
}
