//! Weights in 16 bits: IEEE half precision as a store, f32 as soon as it is read. Half the bytes of the adapter come over the memory bus in
//! a decode step. It knows nothing of what the weights mean.

/// The largest number that half precision holds.
pub(crate) const LARGEST: f32 = 65504.0;

/// The nearest number in half precision, ties to even. Defined for |x| ≤ [`LARGEST`].
pub(crate) fn narrow(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16) & 0x8000;
    let magnitude = x.abs();
    // Below 2^-14 halves stand 2^-24 apart; above, ten bits of the fraction are kept, and a carry walks into the exponent.
    let half = if magnitude < f32::from_bits((127 - 14) << 23) {
        let steps = (magnitude * f32::from_bits((127 + 24) << 23)).round_ties_even();
        // Whole and at most 1024.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        {
            steps as u32
        }
    } else {
        let bits = magnitude.to_bits() - ((127 - 15) << 23);
        (bits + 0x0FFF + ((bits >> 13) & 1)) >> 13
    };
    // Sign and half fill 16 bits.
    #[allow(clippy::cast_possible_truncation)]
    {
        (sign | half) as u16
    }
}

/// The number that 16 bits of [`narrow`] stand for, exactly. A shift and one product, so that loops of it vectorise.
#[inline(always)]
#[allow(clippy::inline_always)] // see `instructions::Work`
pub(crate) fn widen(half: u16) -> f32 {
    let signed = i32::from(half.cast_signed()) << 13;
    f32::from_bits(signed.cast_unsigned() & 0x8FFF_E000) * f32::from_bits((127 + 112) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_comes_back_from_its_number() {
        for half in (0..=u16::MAX).filter(|half| half & 0x7C00 != 0x7C00) {
            let x = widen(half);
            assert_eq!(narrow(x), half, "{half:#06x} is {x}");
            let exponent = i32::from(half >> 10 & 0x1F);
            let fraction = f64::from(half & 0x3FF) / 1024.0;
            let size = if exponent == 0 {
                fraction * 2_f64.powi(-14)
            } else {
                (1.0 + fraction) * 2_f64.powi(exponent - 15)
            };
            assert!((f64::from(x.abs()) - size).abs() < f64::MIN_POSITIVE);
            assert_eq!(x.is_sign_negative(), half & 0x8000 != 0);
        }
    }

    #[test]
    fn a_number_becomes_the_nearest_half_and_ties_go_to_even() {
        for (x, wanted) in [
            (1.0, 1.0),
            (1.0 + 2.0_f32.powi(-11), 1.0),
            (1.0 + 3.0 * 2.0_f32.powi(-11), 1.0 + 2.0_f32.powi(-9)),
        ] {
            assert!((widen(narrow(x)) - wanted).abs() < f32::EPSILON, "{x}");
            assert!((widen(narrow(-x)) + wanted).abs() < f32::EPSILON, "{x}");
        }
        let mut x = 1e-9_f32;
        while x < LARGEST {
            let step = if x < 6.1e-5 {
                2.0_f32.powi(-24)
            } else {
                x * 2.0_f32.powi(-10)
            };
            assert!((widen(narrow(x)) - x).abs() <= step / 2.0, "{x}");
            x *= 1.001;
        }
        assert!((widen(narrow(LARGEST)) - LARGEST).abs() < 1.0);
    }
}
