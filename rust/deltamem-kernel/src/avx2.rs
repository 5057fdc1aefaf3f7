//! Eight numbers in one register of AVX2. The instructions are named one by one: the extension is linked for size, and at that level the
//! compiler turns no loop into vectors.

use std::arch::x86_64::{
    __m128i, __m256, _mm256_add_ps, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_mul_ps, _mm256_set1_ps,
    _mm256_sub_ps,
};

use deltamem_core::eight::{Eight, LANES};

use crate::instructions::Arithmetic;

/// A processor with AVX2, FMA and F16C: whoever holds one runs on it.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Only where these instructions are allowed, which Rust checks: a caller that may not use them needs `unsafe` and a reason.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

// SAFETY: of each block below: the processor has the instructions, for only `new` makes `self`, and where they are allowed. Arrays and
// registers of the same size hold the same plain numbers, so that one may be taken for the other.
#[allow(unsafe_code)]
#[allow(clippy::inline_always)] // see `instructions::Work`
impl Eight for Avx2 {
    type Numbers = __m256;

    #[inline(always)]
    fn load(self, numbers: &[f32; LANES]) -> __m256 {
        // SAFETY: see above.
        unsafe { std::mem::transmute::<[f32; LANES], __m256>(*numbers) }
    }

    #[inline(always)]
    fn store(self, numbers: __m256) -> [f32; LANES] {
        // SAFETY: see above.
        unsafe { std::mem::transmute::<__m256, [f32; LANES]>(numbers) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn subtract(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn multiply(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
}

#[allow(unsafe_code)]
#[allow(clippy::inline_always)] // see `instructions::Work`
impl Arithmetic for Avx2 {
    #[inline(always)]
    fn multiply_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn widen(self, halves: &[u16; LANES]) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(std::mem::transmute::<[u16; LANES], __m128i>(*halves)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::half;
    use crate::instructions::{Instructions, Work};

    /// All halves that are numbers, widened.
    struct Widened;

    impl Work for Widened {
        type Output = Vec<f32>;

        #[inline(always)]
        #[allow(clippy::inline_always)]
        fn run<A: Arithmetic>(self, arithmetic: A) -> Vec<f32> {
            let (mut all, halves) = (Vec::new(), halves());
            for eight in halves.as_chunks().0 {
                all.extend(arithmetic.store(arithmetic.widen(eight)));
            }
            all
        }
    }

    fn halves() -> Vec<u16> {
        (0..=u16::MAX).filter(|half| half & 0x7C00 != 0x7C00).collect()
    }

    #[test]
    fn every_half_is_the_same_number_for_every_set() {
        let wanted: Vec<u32> = halves()
            .into_iter()
            .map(|half| half::widen(half).to_bits())
            .collect();
        for instructions in Instructions::available() {
            let found: Vec<u32> = instructions.run(Widened).into_iter().map(f32::to_bits).collect();
            assert!(found == wanted, "{instructions}");
        }
    }
}
