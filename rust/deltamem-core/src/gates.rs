//! From logits to gates, and from projections to unit keys: the point-wise half of the rule. It knows β and λ; it knows neither the
//! weights that made their logits nor the state.

use crate::rule::UpdateMode;

/// The smallest length that a vector is divided by.
pub const L2_EPSILON: f32 = 1e-6;

/// l2(x) = x / max(|x|, 1e-6), in place, for each vector of `rank` numbers in `x` ([.., rank]).
pub fn l2_normalize(x: &mut [f32], rank: usize) {
    for vector in x.chunks_mut(rank.max(1)) {
        let length = vector.iter().map(|&value| value * value).sum::<f32>().sqrt();
        let divisor = length.max(L2_EPSILON);
        for value in vector {
            *value /= divisor;
        }
    }
}

/// σ(x), without an overflow on either side.
pub fn sigmoid(x: f32) -> f32 {
    // exp of a number that is never positive cannot overflow.
    let small = (-x.abs()).exp();
    if x >= 0.0 {
        1.0 / (1.0 + small)
    } else {
        small / (1.0 + small)
    }
}

/// The three gates of one row or head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    /// How much of the row stays.
    pub keep: f32,
    /// How much of what the key recalls is taken out.
    pub erase: f32,
    /// How much of the value is put in.
    pub write: f32,
}

impl Gate {
    /// The gates for β's logit and, where λ is not coupled to β, λ's own logit. Coupled, λ = 1 − β, computed as σ(−x) so that it keeps
    /// its digits when β is close to 1.
    pub fn new(mode: UpdateMode, beta_logit: f32, lambda_logit: Option<f32>) -> Self {
        let beta = sigmoid(beta_logit);
        let lambda = lambda_logit.map_or_else(|| sigmoid(-beta_logit), sigmoid);
        match mode {
            UpdateMode::Standard => Self {
                keep: lambda,
                erase: beta,
                write: beta,
            },
            UpdateMode::LambdaOutside => Self {
                keep: lambda,
                erase: lambda * beta,
                write: beta,
            },
            UpdateMode::NoLambda => Self {
                keep: 1.0,
                erase: beta,
                write: beta,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp)]
    use super::*;

    const MODES: [UpdateMode; 3] = [
        UpdateMode::Standard,
        UpdateMode::LambdaOutside,
        UpdateMode::NoLambda,
    ];

    #[test]
    fn l2_makes_unit_vectors_head_by_head() {
        let mut x = [3.0, 4.0, 0.0, -0.5];
        l2_normalize(&mut x, 2);
        assert_eq!(x, [0.6, 0.8, 0.0, -1.0]);
    }

    #[test]
    fn l2_of_nothing_is_nothing_and_of_almost_nothing_is_bounded_by_its_epsilon() {
        let mut zeros = [0.0, -0.0, 0.0, 0.0];
        l2_normalize(&mut zeros, 4);
        assert_eq!(zeros, [0.0; 4]);
        // Shorter than 1e-6: divided by 1e-6, not by its own length.
        let mut short = [5e-7, 0.0];
        l2_normalize(&mut short, 2);
        assert!((short[0] - 0.5).abs() < 1e-6);
        // At the limit both are the same.
        let mut limit = [1e-6];
        l2_normalize(&mut limit, 1);
        assert!((limit[0] - 1.0).abs() < 1e-6);
        // Squares below the smallest float vanish; the result is finite.
        let mut tiny = [f32::MIN_POSITIVE, 1e-30];
        l2_normalize(&mut tiny, 2);
        assert!(tiny.iter().all(|value| value.is_finite() && *value < 1e-20));
        l2_normalize(&mut [], 4);
        l2_normalize(&mut [1.0], 0);
    }

    #[test]
    fn sigmoid_is_finite_and_symmetric_everywhere() {
        for x in [
            0.0,
            1e-30,
            0.5,
            1.0,
            10.0,
            50.0,
            88.0,
            200.0,
            f32::MAX,
            f32::INFINITY,
        ] {
            let (up, down) = (sigmoid(x), sigmoid(-x));
            assert!(
                (0.5..=1.0).contains(&up) && (0.0..=0.5).contains(&down),
                "σ(±{x}) = {up}, {down}"
            );
            assert!((up + down - 1.0).abs() < 1e-6);
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(up) - exact).abs() < 1e-6);
        }
        // 1 − σ(20) would be 0 in f32 with few digits left; σ(−20) keeps them.
        assert!((f64::from(sigmoid(-20.0)) / (1.0 / (1.0 + 20_f64.exp())) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn gates_follow_the_mode() {
        for (beta_logit, lambda_logit) in [(0.0, None), (2.0, None), (-3.0, Some(1.5)), (30.0, Some(-30.0))] {
            let beta = sigmoid(beta_logit);
            let lambda = lambda_logit.map_or(sigmoid(-beta_logit), sigmoid);
            let [standard, outside, none] = MODES.map(|mode| Gate::new(mode, beta_logit, lambda_logit));
            assert_eq!(
                standard,
                Gate {
                    keep: lambda,
                    erase: beta,
                    write: beta
                }
            );
            assert_eq!(
                outside,
                Gate {
                    keep: lambda,
                    erase: lambda * beta,
                    write: beta
                }
            );
            assert_eq!(
                none,
                Gate {
                    keep: 1.0,
                    erase: beta,
                    write: beta
                }
            );
        }
    }
}
