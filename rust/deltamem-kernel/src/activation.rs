//! What stands between the networks' products and the rule, many numbers at a time: tanh, and vectors made unit vectors. It knows nothing of
//! what the numbers mean.

use deltamem_core::gates::L2_EPSILON;
use deltamem_core::lanes::{LANES, Lanes};

/// From here on tanh is 1 in f32.
const SATURATED: f32 = 9.0;
/// tanh x = x · P(x²) / Q(x²) up to there, fitted for the smallest largest relative error (2e-8 before rounding); the lowest power last.
const P: [f32; 5] = [1.341_496_5e-8, 2.065_250_6e-5, 3.498_227_6e-3, 0.133_832_5, 1.0];
const Q: [f32; 5] = [7.801_202e-7, 3.289_95e-4, 2.588_702_7e-2, 0.467_165_65, 1.0];

/// tanh of each number, in place, 4e-7 of its size off at most.
#[inline(always)]
#[allow(clippy::inline_always)] // see `instructions::Work`
pub(crate) fn tanh<A: Lanes<LANES>>(arithmetic: A, x: &mut [f32]) {
    let (eights, rest) = x.as_chunks_mut::<LANES>();
    for eight in eights {
        *eight = arithmetic.store(tanh_of(arithmetic, arithmetic.load(eight)));
    }
    // The rest in a whole register too, so that a number's tanh is the same wherever it stands.
    let mut last = [0.0; LANES];
    last[..rest.len()].copy_from_slice(rest);
    let last = arithmetic.store(tanh_of(arithmetic, arithmetic.load(&last)));
    rest.copy_from_slice(&last[..rest.len()]);
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn tanh_of<A: Lanes<LANES>>(arithmetic: A, x: A::Numbers) -> A::Numbers {
    // What is not a number is neither lower nor higher, and stays.
    let x = arithmetic.lower(arithmetic.splat(SATURATED), x);
    let x = arithmetic.higher(arithmetic.splat(-SATURATED), x);
    let square = arithmetic.multiply(x, x);
    let (mut p, mut q) = (arithmetic.splat(P[0]), arithmetic.splat(Q[0]));
    for n in 1..P.len() {
        p = arithmetic.multiply_add(p, square, arithmetic.splat(P[n]));
        q = arithmetic.multiply_add(q, square, arithmetic.splat(Q[n]));
    }
    arithmetic.divide(arithmetic.multiply(x, p), q)
}

/// l2(x) = x / max(|x|, 1e-6), in place, for each vector of `rank` numbers in `x`.
#[inline(always)]
#[allow(clippy::inline_always)]
pub(crate) fn l2_normalize<A: Lanes<LANES>>(arithmetic: A, x: &mut [f32], rank: usize) {
    for vector in x.chunks_exact_mut(rank) {
        let length = sum_of_squares(arithmetic, vector).sqrt().max(L2_EPSILON);
        let (eights, rest) = vector.as_chunks_mut::<LANES>();
        for eight in eights {
            *eight = arithmetic.store(arithmetic.divide(arithmetic.load(eight), arithmetic.splat(length)));
        }
        for x in rest {
            *x /= length;
        }
    }
}

/// Σ x².
#[inline(always)]
#[allow(clippy::inline_always)]
pub(crate) fn sum_of_squares<A: Lanes<LANES>>(arithmetic: A, x: &[f32]) -> f32 {
    let (eights, rest) = x.as_chunks::<LANES>();
    let mut sums = arithmetic.splat(0.0);
    for eight in eights {
        let eight = arithmetic.load(eight);
        sums = arithmetic.add(sums, arithmetic.multiply(eight, eight));
    }
    arithmetic.store(sums).iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instructions::{Arithmetic, Instructions, Work};

    struct Tanh(Vec<f32>);

    impl Work for Tanh {
        type Output = Vec<f32>;

        #[inline(always)]
        #[allow(clippy::inline_always)]
        fn run<A: Arithmetic>(mut self, arithmetic: A) -> Vec<f32> {
            tanh(arithmetic, &mut self.0);
            self.0
        }
    }

    #[test]
    fn tanh_is_within_4e_7_of_its_size_from_nothing_to_infinity() {
        let mut all = vec![0.0, -0.0, f32::MIN_POSITIVE, f32::MAX, f32::INFINITY];
        let mut x = 1e-30_f32;
        while x < 1e5 {
            all.push(x);
            x *= if (1e-3..20.0).contains(&x) { 1.0001 } else { 1.1 };
        }
        let negative: Vec<f32> = all.iter().map(|x| -x).collect();
        for instructions in Instructions::available() {
            for all in [&all, &negative] {
                let found = instructions.run(Tanh(all.clone()));
                assert_eq!(found.len(), all.len());
                for (&x, &found) in all.iter().zip(&found) {
                    let wanted = f64::from(x).tanh();
                    let off = (f64::from(found) - wanted).abs();
                    assert!(
                        off <= 4e-7 * wanted.abs(),
                        "{instructions}: tanh {x} = {found}, expected {wanted}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so_and_a_number_has_one_tanh_wherever_it_stands() {
        for instructions in Instructions::available() {
            assert!(
                instructions
                    .run(Tanh(vec![f32::NAN; 9]))
                    .iter()
                    .all(|x| x.is_nan())
            );
            for x in [0.3_f32, -4.0, 1e-7] {
                let found = instructions.run(Tanh(vec![x; 11]));
                assert!(found.iter().all(|y| y.to_bits() == found[0].to_bits()));
            }
        }
    }
}
