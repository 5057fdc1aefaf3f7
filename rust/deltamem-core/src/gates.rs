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
