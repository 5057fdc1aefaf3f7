//! One layer's edit and gate networks, written to be read: from the attention's input to the corrections. It is the whole rule on
//! plain matrices, for tests and for those who want to know what a bundle computes; production runs its twin, the graph that the
//! exporter grafts. It knows nothing of the backbone around it. The other twin is `deltamem_export.reference`.

use crate::gates::{Gate, l2_normalize};
use crate::rule::{self, Gates, RuleError, Tokens, UpdateMode};

/// A row-major matrix of [`rows`, `columns`] with a bias of [`rows`] or none.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    rows: usize,
    columns: usize,
}

/// One of the corrections: W_Δ, and the factor that a trainable scale adds to it (1 without one).
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// W_Δ, [width of the corrected projection, H·r].
    pub weight: Linear,
    /// `scale` of the rule.
    pub scale: f32,
}

/// One value for each of the projections that a layer may correct.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PerProjection<T> {
    /// The attention's query projection.
    pub q: T,
    /// The attention's key projection.
    pub k: T,
    /// The attention's value projection.
    pub v: T,
    /// The attention's output projection.
    pub o: T,
}

/// What a layer adds to its projections, each [T, width]; `None` for a projection without a delta head.
pub type Corrections = PerProjection<Option<Vec<f32>>>;

/// One layer's weights: the edit network (W_k, W_v, W_Δ) and the gate network (W_q, W_β, W_λ).
#[derive(Debug, Clone, PartialEq)]
pub struct EditGate {
    /// State heads, H.
    pub heads: usize,
    /// Rank of each state, r.
    pub rank: usize,
    /// W_q, [H·r, hidden].
    pub query: Linear,
    /// W_k, [H·r, hidden].
    pub key: Linear,
    /// W_v, [H·r, hidden].
    pub value: Linear,
    /// W_β and b_β, [H·r, hidden] with gates per row, [H, hidden] with gates per head.
    pub beta: Linear,
    /// W_λ and b_λ of the same shape; `None`: λ = 1 − β.
    pub lambda: Option<Linear>,
    /// The corrections that the layer makes.
    pub delta: PerProjection<Option<Delta>>,
    /// alpha of alpha / r.
    pub alpha: f32,
    /// Whether q and k become unit vectors, per head.
    pub normalize_qk: bool,
    /// How β and λ become gates.
    pub mode: UpdateMode,
    /// Gates per row of S or per head.
    pub gates: Gates,
}

/// Weights or inputs that do not fit each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// A weight has the wrong number of rows or columns.
    #[error("{name} is [{}, {}], expected [{}, {}]", found.0, found.1, expected.0, expected.1)]
    Shape {
        /// The weight's name.
        name: &'static str,
        /// (rows, columns) found.
        found: (usize, usize),
        /// (rows, columns) expected.
        expected: (usize, usize),
    },
    /// A slice does not have the length that its shape asks for.
    #[error("{name} holds {found} numbers, expected {expected}")]
    Length {
        /// The slice's name.
        name: &'static str,
        /// Its length.
        found: usize,
        /// The length expected.
        expected: usize,
    },
    /// The state or the rule's own arrays do not fit.
    #[error(transparent)]
    Rule(#[from] RuleError),
}

impl Linear {
    /// A matrix of [`rows`, `columns`], row-major, with an optional bias of [`rows`].
    ///
    /// # Errors
    /// [`NetworkError::Length`] when the numbers do not fill that shape.
    pub fn new(
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        rows: usize,
        columns: usize,
    ) -> Result<Self, NetworkError> {
        let expected = rows.saturating_mul(columns);
        if weight.len() != expected {
            return Err(NetworkError::Length {
                name: "weight",
                found: weight.len(),
                expected,
            });
        }
        match &bias {
            Some(bias) if bias.len() != rows => Err(NetworkError::Length {
                name: "bias",
                found: bias.len(),
                expected: rows,
            }),
            _ => Ok(Self {
                weight,
                bias,
                rows,
                columns,
            }),
        }
    }

    /// (rows, columns).
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// W x + b for each of the rows of `x`: [T, columns] to [T, rows].
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = Vec::with_capacity(x.len() / self.columns.max(1) * self.rows);
        for x in x.chunks_exact(self.columns.max(1)) {
            for (row, weight) in self.weight.chunks_exact(self.columns.max(1)).enumerate() {
                let dot: f32 = weight.iter().zip(x).map(|(&w, &x)| w * x).sum();
                y.push(dot + self.bias.as_ref().map_or(0.0, |bias| bias[row]));
            }
        }
        y
    }

    fn expect(&self, name: &'static str, expected: (usize, usize)) -> Result<(), NetworkError> {
        if self.shape() == expected {
            Ok(())
        } else {
            Err(NetworkError::Shape {
                name,
                found: self.shape(),
                expected,
            })
        }
    }
}

impl EditGate {
    /// The corrections for `hidden`, [T, hidden width] (the attention's input, after the input norm). `state`, [H, r, r], moves in
    /// place; tokens whose `mask` is false read it and do not move it.
    ///
    /// # Errors
    /// [`NetworkError`] when weights, inputs and state do not fit each other; the state is untouched then.
    pub fn forward(
        &self,
        hidden: &[f32],
        state: &mut [f32],
        mask: &[bool],
    ) -> Result<Corrections, NetworkError> {
        self.check(hidden.len(), mask.len())?;
        let mut q = self.query.apply(hidden);
        let mut k = self.key.apply(hidden);
        let v = self.value.apply(hidden);
        for x in q.iter_mut().chain(&mut k) {
            *x = x.tanh();
        }
        if self.normalize_qk {
            l2_normalize(&mut q, self.rank);
            l2_normalize(&mut k, self.rank);
        }

        let beta = self.beta.apply(hidden);
        let lambda = self.lambda.as_ref().map(|lambda| lambda.apply(hidden));
        let (mut keep, mut erase, mut write) = (Vec::new(), Vec::new(), Vec::new());
        for (i, &logit) in beta.iter().enumerate() {
            let gate = Gate::new(self.mode, logit, lambda.as_ref().map(|lambda| lambda[i]));
            keep.push(gate.keep);
            erase.push(gate.erase);
            write.push(gate.write);
        }

        let mut reads = vec![0.0; q.len()];
        let tokens = Tokens {
            q: &q,
            k: &k,
            v: &v,
            keep: &keep,
            erase: &erase,
            write: &write,
            mask,
        };
        rule::scan(self.heads, self.rank, self.gates, &tokens, state, &mut reads)?;

        let correction = |delta: &Option<Delta>| {
            delta.as_ref().map(|delta| {
                let factor = self.alpha / self.rank as f32 * delta.scale;
                delta
                    .weight
                    .apply(&reads)
                    .into_iter()
                    .map(|x| factor * x)
                    .collect()
            })
        };
        Ok(PerProjection {
            q: correction(&self.delta.q),
            k: correction(&self.delta.k),
            v: correction(&self.delta.v),
            o: correction(&self.delta.o),
        })
    }

    fn check(&self, hidden: usize, tokens: usize) -> Result<(), NetworkError> {
        let reads = self.heads.saturating_mul(self.rank);
        let gates = self.heads.saturating_mul(self.gates.per_head(self.rank));
        let width = self.query.columns;
        self.query.expect("W_q", (reads, width))?;
        self.key.expect("W_k", (reads, width))?;
        self.value.expect("W_v", (reads, width))?;
        self.beta.expect("W_beta", (gates, width))?;
        if let Some(lambda) = &self.lambda {
            lambda.expect("W_lambda", (gates, width))?;
        }
        let delta = &self.delta;
        for (name, delta) in [
            ("W_delta of q", &delta.q),
            ("W_delta of k", &delta.k),
            ("W_delta of v", &delta.v),
            ("W_delta of o", &delta.o),
        ] {
            if let Some(delta) = delta {
                delta.weight.expect(name, (delta.weight.rows, reads))?;
            }
        }
        let expected = tokens.saturating_mul(width);
        if hidden == expected {
            Ok(())
        } else {
            Err(NetworkError::Length {
                name: "hidden",
                found: hidden,
                expected,
            })
        }
    }
}
