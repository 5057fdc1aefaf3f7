//! Eight or sixteen numbers in registers of AVX2 and of AVX-512. The instructions are named one by one: the extension is linked for size,
//! and at that level the compiler turns no loop into vectors.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, __m512, __m512i, _MM_HINT_T0, _mm_packs_epi16, _mm_packs_epi32, _mm_prefetch,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_si128, _mm256_cvtepi32_ps,
    _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_div_ps, _mm256_dpbusd_avx_epi32, _mm256_extracti128_si256,
    _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps,
    _mm256_permute2f128_ps, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_shuffle_ps, _mm256_slli_epi16, _mm256_srai_epi16, _mm256_srli_epi16, _mm256_sub_ps,
    _mm256_unpackhi_ps, _mm256_unpacklo_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_cvtsepi32_epi8, _mm512_div_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_srli_epi16, _mm512_sub_ps,
};

use deltamem_core::lanes::{LANES, Lanes, Vectors, WIDE};

use crate::dots::Dots;
use crate::instructions::{Arithmetic, Halves};

/// A processor with AVX2, FMA and F16C: whoever holds one runs on it.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Whether this processor has what [`Avx2::new`] takes.
    pub(crate) fn is_available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }

    /// Only where these instructions are allowed, which Rust checks: a caller that may not use them needs `unsafe` and a reason.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

#[allow(clippy::inline_always)] // see `instructions::Work`
impl Vectors for Avx2 {
    const STATE_ROWS: usize = 16;
    const SQUARES: bool = true;

    #[inline(always)]
    fn transpose(self, rows: [__m256; LANES]) -> [__m256; LANES] {
        transpose(self, rows)
    }
}

impl Arithmetic for Avx2 {
    const ROWS: usize = 6;
}

/// A processor with AVX-512F and AVX-512VL besides: whoever holds one runs on it.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// Whether this processor has what [`Avx512::new`] takes.
    pub(crate) fn is_available() -> bool {
        Avx2::is_available() && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
    }

    /// As [`Avx2::new`].
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

#[allow(clippy::inline_always)] // see `instructions::Work`
impl Vectors for Avx512 {
    const STATE_ROWS: usize = 64;
    const SQUARES: bool = true;

    #[inline(always)]
    fn transpose(self, rows: [__m256; LANES]) -> [__m256; LANES] {
        transpose(self, rows)
    }
}

impl Arithmetic for Avx512 {
    const ROWS: usize = 8;
}

/// `$count` numbers in one register of `$set`, and halves in one of half the size.
macro_rules! registers {
    ($set:ty, $count:expr, $register:ty, $halves:ty,
     $splat:ident, $add:ident, $subtract:ident, $multiply:ident, $divide:ident, $lower:ident, $higher:ident, $multiply_add:ident, $widen:ident) => {
        // SAFETY: of each block below: the processor has the instructions, for only `new` makes `self`, and where they are allowed. Arrays
        // and registers of the same size hold the same plain numbers, so that one may be taken for the other.
        #[allow(unsafe_code)]
        #[allow(clippy::inline_always)] // see `instructions::Work`
        impl Lanes<{ $count }> for $set {
            type Numbers = $register;

            #[inline(always)]
            fn load(self, numbers: &[f32; $count]) -> $register {
                // SAFETY: see above.
                unsafe { std::mem::transmute::<[f32; $count], $register>(*numbers) }
            }

            #[inline(always)]
            fn store(self, numbers: $register) -> [f32; $count] {
                // SAFETY: see above.
                unsafe { std::mem::transmute::<$register, [f32; $count]>(numbers) }
            }

            #[inline(always)]
            fn splat(self, x: f32) -> $register {
                // SAFETY: see above.
                unsafe { $splat(x) }
            }

            #[inline(always)]
            fn add(self, a: $register, b: $register) -> $register {
                // SAFETY: see above.
                unsafe { $add(a, b) }
            }

            #[inline(always)]
            fn subtract(self, a: $register, b: $register) -> $register {
                // SAFETY: see above.
                unsafe { $subtract(a, b) }
            }

            #[inline(always)]
            fn multiply(self, a: $register, b: $register) -> $register {
                // SAFETY: see above.
                unsafe { $multiply(a, b) }
            }

            #[inline(always)]
            fn divide(self, a: $register, b: $register) -> $register {
                // SAFETY: see above.
                unsafe { $divide(a, b) }
            }

            #[inline(always)]
            fn lower(self, a: $register, b: $register) -> $register {
                // SAFETY: see above.
                unsafe { $lower(a, b) }
            }

            #[inline(always)]
            fn higher(self, a: $register, b: $register) -> $register {
                // SAFETY: see above.
                unsafe { $higher(a, b) }
            }

            #[inline(always)]
            fn multiply_add(self, a: $register, b: $register, c: $register) -> $register {
                // SAFETY: see above.
                unsafe { $multiply_add(a, b, c) }
            }
        }

        #[allow(unsafe_code)]
        #[allow(clippy::inline_always)] // see `instructions::Work`
        impl Halves<{ $count }> for $set {
            #[inline(always)]
            fn widen(self, halves: &[u16; $count]) -> $register {
                // SAFETY: as above.
                unsafe { $widen(std::mem::transmute::<[u16; $count], $halves>(*halves)) }
            }
        }
    };
}

registers!(
    Avx2,
    LANES,
    __m256,
    __m128i,
    _mm256_set1_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_div_ps,
    _mm256_min_ps,
    _mm256_max_ps,
    _mm256_fmadd_ps,
    _mm256_cvtph_ps
);
registers!(
    Avx512,
    LANES,
    __m256,
    __m128i,
    _mm256_set1_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_div_ps,
    _mm256_min_ps,
    _mm256_max_ps,
    _mm256_fmadd_ps,
    _mm256_cvtph_ps
);
registers!(
    Avx512,
    WIDE,
    __m512,
    __m256i,
    _mm512_set1_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_div_ps,
    _mm512_min_ps,
    _mm512_max_ps,
    _mm512_fmadd_ps,
    _mm512_cvtph_ps
);

/// Eight registers as rows, made columns. Whoever holds a set with such registers runs on a processor that has them.
#[allow(unsafe_code)]
#[allow(clippy::inline_always)] // see `instructions::Work`
#[inline(always)]
fn transpose<A: Lanes<LANES, Numbers = __m256>>(_: A, rows: [__m256; LANES]) -> [__m256; LANES] {
    // SAFETY: the set stands for a processor with AVX.
    unsafe {
        // Pairs of rows, then fours, each in the halves of a register that hold the rows' halves; then the halves change places.
        let mut pairs = [[rows[0]; 2]; 4];
        for (n, pair) in pairs.iter_mut().enumerate() {
            let (first, second) = (rows[2 * n], rows[2 * n + 1]);
            *pair = [
                _mm256_unpacklo_ps(first, second),
                _mm256_unpackhi_ps(first, second),
            ];
        }
        let [ab, cd, ef, gh] = pairs;
        let mut out = rows;
        for i in 0..2 {
            let low = [
                _mm256_shuffle_ps::<0x44>(ab[i], cd[i]),
                _mm256_shuffle_ps::<0xEE>(ab[i], cd[i]),
            ];
            let high = [
                _mm256_shuffle_ps::<0x44>(ef[i], gh[i]),
                _mm256_shuffle_ps::<0xEE>(ef[i], gh[i]),
            ];
            for j in 0..2 {
                out[2 * i + j] = _mm256_permute2f128_ps::<0x20>(low[j], high[j]);
                out[4 + 2 * i + j] = _mm256_permute2f128_ps::<0x31>(low[j], high[j]);
            }
        }
        out
    }
}

/// Operations on two registers, each on the first of every number and on the second.
macro_rules! by_registers {
    ($($operation:ident($($number:ident),+)),+ $(,)?) => {
        $(
            #[inline(always)]
            fn $operation(self, $($number: [__m256; 2]),+) -> [__m256; 2] {
                [
                    Lanes::<LANES>::$operation(self, $($number[0]),+),
                    Lanes::<LANES>::$operation(self, $($number[1]),+),
                ]
            }
        )+
    };
}

/// Two registers.
#[allow(clippy::inline_always)] // see `instructions::Work`
impl Lanes<WIDE> for Avx2 {
    type Numbers = [__m256; 2];

    #[inline(always)]
    fn load(self, numbers: &[f32; WIDE]) -> [__m256; 2] {
        let (eights, _) = numbers.as_chunks::<LANES>();
        [
            Lanes::<LANES>::load(self, &eights[0]),
            Lanes::<LANES>::load(self, &eights[1]),
        ]
    }

    #[inline(always)]
    fn store(self, [low, high]: [__m256; 2]) -> [f32; WIDE] {
        let mut numbers = [0.0; WIDE];
        let (eights, _) = numbers.as_chunks_mut::<LANES>();
        eights[0] = Lanes::<LANES>::store(self, low);
        eights[1] = Lanes::<LANES>::store(self, high);
        numbers
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        let one = Lanes::<LANES>::splat(self, x);
        [one, one]
    }

    by_registers!(
        add(a, b),
        subtract(a, b),
        multiply(a, b),
        divide(a, b),
        lower(a, b),
        higher(a, b),
        multiply_add(a, b, c),
    );
}

#[allow(clippy::inline_always)] // see `instructions::Work`
impl Halves<WIDE> for Avx2 {
    #[inline(always)]
    fn widen(self, halves: &[u16; WIDE]) -> [__m256; 2] {
        let (eights, _) = halves.as_chunks::<LANES>();
        [
            Halves::<LANES>::widen(self, &eights[0]),
            Halves::<LANES>::widen(self, &eights[1]),
        ]
    }
}

/// Whole numbers with AVX2 alone.
#[derive(Clone, Copy)]
pub(crate) struct Avx2Dots(Avx2);

/// Whole numbers with AVX-VNNI.
#[derive(Clone, Copy)]
pub(crate) struct VnniDots(Avx2);

/// Whole numbers with AVX-512BW and AVX-512VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Dots(Avx512);

/// For each set: only where these instructions are allowed, as [`Avx2::new`].
impl Avx2Dots {
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn new(floats: Avx2) -> Self {
        Self(floats)
    }
}

impl VnniDots {
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    pub(crate) fn new(floats: Avx2) -> Self {
        Self(floats)
    }
}

impl Avx512Dots {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512vnni")]
    pub(crate) fn new(floats: Avx512) -> Self {
        Self(floats)
    }
}

/// Whole numbers in registers of each `$set`, `$count` in each, with its own way of `$dot`.
macro_rules! integers {
    ($($set:ident: $dot:ident),+; $floats:ty, $rows:expr, $count:expr, $register:ty,
     $splat:ident, $splat_bytes:ident, $and:ident, $shift:ident, $add:ident, $to_floats:ident, $round:ident, $narrow:ident) => {$(
        // SAFETY: of each block below: the processor has the instructions, for only `new` makes `self`, and where they are allowed. Arrays
        // and registers of the same size hold the same plain numbers, so that one may be taken for the other.
        #[allow(unsafe_code)]
        #[allow(clippy::inline_always)] // see `instructions::Work`
        impl Dots<{ $count }> for $set {
            type Integers = $register;
            type Floats = $floats;
            const ROWS: usize = $rows;

            #[inline(always)]
            fn floats(self) -> $floats {
                self.0
            }

            #[inline(always)]
            fn bytes(self, bytes: &[[u8; 4]]) -> $register {
                let (own, _) = bytes.as_chunks::<{ $count }>();
                // SAFETY: see above.
                unsafe { std::mem::transmute::<[[u8; 4]; $count], $register>(own[0]) }
            }

            #[inline(always)]
            fn prefetch<T>(self, numbers: &[T], ahead: usize) {
                let place = numbers.as_ptr().wrapping_add(ahead);
                // SAFETY: see above; nothing is read.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) }
            }

            #[inline(always)]
            fn repeat(self, number: i32) -> $register {
                // SAFETY: see above.
                unsafe { $splat(number) }
            }

            #[inline(always)]
            fn low(self, bytes: $register) -> $register {
                // SAFETY: see above.
                unsafe { $and(bytes, $splat_bytes(15)) }
            }

            #[inline(always)]
            fn high(self, bytes: $register) -> $register {
                // SAFETY: see above.
                unsafe { $and($shift::<4>(bytes), $splat_bytes(15)) }
            }

            #[inline(always)]
            fn add(self, a: $register, b: $register) -> $register {
                // SAFETY: see above.
                unsafe { $add(a, b) }
            }

            #[inline(always)]
            fn sum(self, numbers: $register) -> i32 {
                // SAFETY: see above.
                let numbers = unsafe { std::mem::transmute::<$register, [i32; $count]>(numbers) };
                numbers
                    .iter()
                    .fold(0, |sum: i32, &number| sum.wrapping_add(number))
            }

            #[inline(always)]
            fn dot<const NARROW: bool>(
                self,
                sums: $register,
                unsigned: $register,
                signed: $register,
            ) -> $register {
                // SAFETY: see above.
                unsafe { $dot::<NARROW>(sums, unsigned, signed) }
            }

            #[inline(always)]
            fn to_floats(self, numbers: $register) -> <$floats as Lanes<{ $count }>>::Numbers {
                // SAFETY: see above.
                unsafe { $to_floats(numbers) }
            }

            #[inline(always)]
            fn round(self, numbers: <$floats as Lanes<{ $count }>>::Numbers) -> $register {
                // SAFETY: see above.
                unsafe { $round(numbers) }
            }

            #[inline(always)]
            fn narrow(self, numbers: $register, bytes: &mut [[u8; 4]]) {
                let (own, _) = bytes.as_chunks_mut::<{ $count / 4 }>();
                // SAFETY: see above.
                own[0] = unsafe { $narrow(numbers) };
            }
        }
    )+};
}

integers!(
    Avx2Dots: dot_avx2, VnniDots: dot_vnni;
    Avx2,
    3,
    LANES,
    __m256i,
    _mm256_set1_epi32,
    _mm256_set1_epi8,
    _mm256_and_si256,
    _mm256_srli_epi16,
    _mm256_add_epi32,
    _mm256_cvtepi32_ps,
    _mm256_cvtps_epi32,
    narrow_eight
);
integers!(
    Avx512Dots: dot_avx512;
    Avx512,
    6,
    WIDE,
    __m512i,
    _mm512_set1_epi32,
    _mm512_set1_epi8,
    _mm512_and_si512,
    _mm512_srli_epi16,
    _mm512_add_epi32,
    _mm512_cvtepi32_ps,
    _mm512_cvtps_epi32,
    narrow_sixteen
);

/// Products of bytes without an instruction for it. Of unsigned bytes below 16 two products fit into 16 bits; others are widened first, even
/// and odd ones apart.
///
/// # Safety
/// The processor has AVX2.
#[allow(unsafe_code)]
#[allow(clippy::inline_always)]
#[inline(always)]
unsafe fn dot_avx2<const NARROW: bool>(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: the caller has seen to it.
    unsafe {
        if NARROW {
            let pairs = _mm256_maddubs_epi16(unsigned, signed);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        } else {
            let even = _mm256_madd_epi16(
                _mm256_and_si256(unsigned, _mm256_set1_epi16(0xFF)),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(signed)),
            );
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(unsigned), _mm256_srai_epi16::<8>(signed));
            _mm256_add_epi32(sums, _mm256_add_epi32(even, odd))
        }
    }
}

/// # Safety
/// The processor has AVX-VNNI.
#[allow(unsafe_code)]
#[allow(clippy::inline_always)]
#[inline(always)]
unsafe fn dot_vnni<const NARROW: bool>(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: the caller has seen to it.
    unsafe { _mm256_dpbusd_avx_epi32(sums, unsigned, signed) }
}

/// # Safety
/// The processor has AVX-512VNNI.
#[allow(unsafe_code)]
#[allow(clippy::inline_always)]
#[inline(always)]
unsafe fn dot_avx512<const NARROW: bool>(sums: __m512i, unsigned: __m512i, signed: __m512i) -> __m512i {
    // SAFETY: the caller has seen to it.
    unsafe { _mm512_dpbusd_epi32(sums, unsigned, signed) }
}

/// Eight whole numbers as signed bytes.
///
/// # Safety
/// The processor has AVX2.
#[allow(unsafe_code)]
#[allow(clippy::inline_always)]
#[inline(always)]
unsafe fn narrow_eight(numbers: __m256i) -> [[u8; 4]; 2] {
    // SAFETY: the caller has seen to it. Arrays and registers of the same size hold the same plain numbers.
    unsafe {
        let words = _mm_packs_epi32(
            _mm256_castsi256_si128(numbers),
            _mm256_extracti128_si256::<1>(numbers),
        );
        let [bytes, _] = std::mem::transmute::<__m128i, [[[u8; 4]; 2]; 2]>(_mm_packs_epi16(words, words));
        bytes
    }
}

/// Sixteen whole numbers as signed bytes.
///
/// # Safety
/// The processor has AVX-512F.
#[allow(unsafe_code)]
#[allow(clippy::inline_always)]
#[inline(always)]
unsafe fn narrow_sixteen(numbers: __m512i) -> [[u8; 4]; 4] {
    // SAFETY: as for eight.
    unsafe { std::mem::transmute::<__m128i, [[u8; 4]; 4]>(_mm512_cvtsepi32_epi8(numbers)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::half;
    use crate::instructions::{Instructions, Work};

    /// All halves that are numbers, widened eight and sixteen at a time.
    struct Widened;

    impl Work for Widened {
        type Output = [Vec<f32>; 2];

        #[inline(always)]
        #[allow(clippy::inline_always)]
        fn run<A: Arithmetic>(self, arithmetic: A) -> [Vec<f32>; 2] {
            let (mut eights, mut sixteens, halves) = (Vec::new(), Vec::new(), halves());
            for eight in halves.as_chunks::<LANES>().0 {
                eights.extend(Lanes::<LANES>::store(arithmetic, arithmetic.widen(eight)));
            }
            for sixteen in halves.as_chunks::<WIDE>().0 {
                sixteens.extend(Lanes::<WIDE>::store(arithmetic, arithmetic.widen(sixteen)));
            }
            [eights, sixteens]
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
            for found in instructions.run(Widened) {
                let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
                assert!(found == wanted, "{instructions}");
            }
        }
    }
}
