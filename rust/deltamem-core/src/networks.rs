//! One layer's edit and gate networks, written to be read: from the attention's input to the corrections. It is the whole rule on
//! plain matrices, for tests and for those who want to know what a bundle computes; production runs its twin, the graph that the
//! exporter grafts. It knows nothing of the backbone around it. The other twin is `deltamem_export.reference`.

use std::cmp::Ordering;

use crate::gates::{Gate, l2_normalize};
use crate::rule::{self, Gates, RuleError, Tokens, UpdateMode};

/// A row-major matrix of `[rows, columns]` with a bias of `[rows]` or none.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    rows: usize,
    columns: usize,
}

/// One of the corrections: `W_Δ`, and the factor that a trainable scale adds to it (1 without one).
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// `W_Δ`, [width of the corrected projection, H·r].
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

/// One layer's weights: the edit network (`W_k`, `W_v`, `W_Δ`) and the gate network (`W_q`, `W_β`, `W_λ`).
#[derive(Debug, Clone, PartialEq)]
pub struct EditGate {
    /// State heads, H.
    pub heads: usize,
    /// Rank of each state, r.
    pub rank: usize,
    /// `W_q`, [H·r, hidden].
    pub query: Linear,
    /// `W_k`, [H·r, hidden].
    pub key: Linear,
    /// `W_v`, [H·r, hidden].
    pub value: Linear,
    /// `W_β` and `b_β`, [H·r, hidden] with gates per row, [H, hidden] with gates per head.
    pub beta: Linear,
    /// `W_λ` and `b_λ` of the same shape; `None`: λ = 1 − β.
    pub lambda: Option<Linear>,
    /// The corrections that the layer makes.
    pub delta: PerProjection<Option<Delta>>,
    /// alpha of alpha / r.
    pub alpha: f32,
    /// Whether q and k are l2(tanh(W h)), per head, or W h as it is.
    pub normalize_qk: bool,
    /// How β and λ become gates.
    pub mode: UpdateMode,
    /// Gates per row of S or per head.
    pub gates: Gates,
}

/// What the tokens of a call write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes<'a> {
    /// Each token reads the state and then writes it, where this mask [T] says so; the others only read.
    Tokens(&'a [bool]),
    /// All tokens read the state from before the call. Then the mean hidden vector of each span is proposed and written, in ascending
    /// id. For each token the id of the span that it belongs to, never falling among those from 0 on; below 0: it is not written.
    Spans(&'a [i32]),
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
    /// A span's id is below an earlier one.
    #[error(
        "spans[{index}] is {found}, below the {before} in front of it; spans are written in ascending id"
    )]
    SpanOrder {
        /// The token.
        index: usize,
        /// Its span's id.
        found: i32,
        /// The largest id in front of it.
        before: i32,
    },
    /// The state or the rule's own arrays do not fit.
    #[error(transparent)]
    Rule(#[from] RuleError),
}

impl Linear {
    /// A matrix of `[rows, columns]`, row-major, with an optional bias of `[rows]`.
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
    /// place, by what `writes` says.
    ///
    /// # Errors
    /// [`NetworkError`] when weights, inputs, spans and state do not fit each other; the state is untouched then.
    pub fn forward(
        &self,
        hidden: &[f32],
        state: &mut [f32],
        writes: Writes<'_>,
    ) -> Result<Corrections, NetworkError> {
        let reads = match writes {
            Writes::Tokens(mask) => {
                self.check(hidden.len(), mask.len())?;
                self.scan(hidden, state, mask)?
            }
            Writes::Spans(spans) => {
                self.check(hidden.len(), spans.len())?;
                let means = self.means(hidden, spans)?;
                let reads = self.scan(hidden, state, &vec![false; spans.len()])?;
                self.scan(
                    &means,
                    state,
                    &vec![true; means.len() / self.query.columns.max(1)],
                )?;
                reads
            }
        };
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

    /// Proposes and writes each of the hidden vectors that `mask` [T] names, one behind the other; the reads [T, H·r] of all of them.
    fn scan(&self, hidden: &[f32], state: &mut [f32], mask: &[bool]) -> Result<Vec<f32>, NetworkError> {
        let mut q = self.query.apply(hidden);
        let mut k = self.key.apply(hidden);
        let v = self.value.apply(hidden);
        if self.normalize_qk {
            for x in q.iter_mut().chain(&mut k) {
                *x = x.tanh();
            }
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
        Ok(reads)
    }

    /// The mean hidden vector of each span, [S, hidden width], in ascending id.
    fn means(&self, hidden: &[f32], spans: &[i32]) -> Result<Vec<f32>, NetworkError> {
        let width = self.query.columns;
        let mut means: Vec<f32> = Vec::new();
        let (mut last, mut count) = (-1, 0_u32);
        let divide = |means: &mut [f32], count: u32| {
            let from = means.len().saturating_sub(width);
            means[from..].iter_mut().for_each(|sum| *sum /= count as f32);
        };
        for (index, (&id, hidden)) in spans.iter().zip(hidden.chunks_exact(width.max(1))).enumerate() {
            match id.cmp(&last) {
                _ if id < 0 => {}
                Ordering::Less => {
                    return Err(NetworkError::SpanOrder {
                        index,
                        found: id,
                        before: last,
                    });
                }
                Ordering::Equal => {
                    let from = means.len() - width;
                    means[from..]
                        .iter_mut()
                        .zip(hidden)
                        .for_each(|(sum, &x)| *sum += x);
                    count += 1;
                }
                Ordering::Greater => {
                    divide(&mut means, count);
                    means.extend_from_slice(hidden);
                    (last, count) = (id, 1);
                }
            }
        }
        divide(&mut means, count);
        Ok(means)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp, clippy::many_single_char_names)]
    use super::*;

    /// Numbers between −1 and 1 that look drawn and are always the same.
    fn numbers(count: usize, salt: u64) -> Vec<f32> {
        let mut state = salt.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn wide(numbers: &[f32]) -> Vec<f64> {
        numbers.iter().copied().map(f64::from).collect()
    }

    fn linear(rows: usize, columns: usize, bias: bool, salt: u64) -> Linear {
        Linear::new(
            numbers(rows * columns, salt),
            bias.then(|| numbers(rows, salt + 1)),
            rows,
            columns,
        )
        .unwrap()
    }

    fn layer(mode: UpdateMode, gates: Gates, own_lambda: bool) -> EditGate {
        let (heads, rank, width) = (2, 3, 5);
        let gate_rows = heads * gates.per_head(rank);
        EditGate {
            heads,
            rank,
            query: linear(6, width, false, 10),
            key: linear(6, width, false, 20),
            value: linear(6, width, false, 30),
            beta: linear(gate_rows, width, true, 40),
            lambda: own_lambda.then(|| linear(gate_rows, width, true, 50)),
            delta: PerProjection {
                q: Some(Delta {
                    weight: linear(7, 6, false, 60),
                    scale: 1.0,
                }),
                o: Some(Delta {
                    weight: linear(5, 6, false, 70),
                    scale: 0.25,
                }),
                ..PerProjection::default()
            },
            alpha: 6.0,
            normalize_qk: true,
            mode,
            gates,
        }
    }

    /// DESIGN's formulas in f64, token by token; returns Δq and Δo.
    fn naive(layer: &EditGate, hidden: &[f64], state: &mut [f64], mask: &[bool]) -> (Vec<f64>, Vec<f64>) {
        let apply = |linear: &Linear, x: &[f64]| -> Vec<f64> {
            (0..linear.rows)
                .map(|row| {
                    let weight = &linear.weight[row * linear.columns..][..linear.columns];
                    let dot: f64 = weight.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
                    dot + linear.bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]))
                })
                .collect()
        };
        let unit = |x: Vec<f64>| -> Vec<f64> {
            if !layer.normalize_qk {
                return x;
            }
            let x: Vec<f64> = x.into_iter().map(f64::tanh).collect();
            x.chunks(layer.rank)
                .flat_map(|head| {
                    let length = head.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-6);
                    head.iter().map(move |x| x / length).collect::<Vec<_>>()
                })
                .collect()
        };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let (mut delta_q, mut delta_o) = (Vec::new(), Vec::new());
        for (token, h) in hidden.chunks(layer.query.columns).enumerate() {
            let (q, k, v) = (
                unit(apply(&layer.query, h)),
                unit(apply(&layer.key, h)),
                apply(&layer.value, h),
            );
            let beta: Vec<f64> = apply(&layer.beta, h).into_iter().map(sigmoid).collect();
            let lambda: Vec<f64> = match &layer.lambda {
                Some(lambda) => apply(lambda, h).into_iter().map(sigmoid).collect(),
                None => beta.iter().map(|beta| 1.0 - beta).collect(),
            };
            let rank = layer.rank;
            let mut read = Vec::new();
            for row in 0..layer.heads * rank {
                let (head, gate) = (
                    row / rank,
                    if layer.gates == Gates::Row {
                        row
                    } else {
                        row / rank
                    },
                );
                let s = &mut state[row * rank..][..rank];
                let (q, k) = (&q[head * rank..][..rank], &k[head * rank..][..rank]);
                read.push(s.iter().zip(q).map(|(s, q)| s * q).sum::<f64>());
                let recalled: f64 = s.iter().zip(k).map(|(s, k)| s * k).sum();
                let (keep, erase) = match layer.mode {
                    UpdateMode::Standard => (lambda[gate], beta[gate]),
                    UpdateMode::LambdaOutside => (lambda[gate], lambda[gate] * beta[gate]),
                    UpdateMode::NoLambda => (1.0, beta[gate]),
                };
                if mask[token] {
                    for (s, k) in s.iter_mut().zip(k) {
                        *s = keep * *s - erase * recalled * k + beta[gate] * v[row] * k;
                    }
                }
            }
            for (delta, out) in [(&layer.delta.q, &mut delta_q), (&layer.delta.o, &mut delta_o)] {
                let delta = delta.as_ref().unwrap();
                let factor = f64::from(layer.alpha) / rank as f64 * f64::from(delta.scale);
                out.extend(apply(&delta.weight, &read).into_iter().map(|x| factor * x));
            }
        }
        (delta_q, delta_o)
    }

    #[test]
    fn a_layer_computes_the_paper_s_formulas_in_every_mode() {
        let hidden = numbers(9 * 5, 99);
        let mask = [true, true, false, true, true, true, false, true, true];
        for mode in [
            UpdateMode::Standard,
            UpdateMode::LambdaOutside,
            UpdateMode::NoLambda,
        ] {
            for gates in [Gates::Row, Gates::Head] {
                for (own_lambda, normalize_qk) in [(false, true), (true, true), (false, false)] {
                    let layer = EditGate {
                        normalize_qk,
                        ..layer(mode, gates, own_lambda)
                    };
                    let start = numbers(2 * 3 * 3, 7);
                    let mut state = start.clone();
                    let mut naive_state: Vec<f64> = wide(&start);
                    let corrections = layer.forward(&hidden, &mut state, Writes::Tokens(&mask)).unwrap();
                    let (delta_q, delta_o) = naive(&layer, &wide(&hidden), &mut naive_state, &mask);
                    assert_eq!((&corrections.k, &corrections.v), (&None, &None));
                    for (found, expected) in [
                        (&state, &naive_state),
                        (corrections.q.as_ref().unwrap(), &delta_q),
                        (corrections.o.as_ref().unwrap(), &delta_o),
                    ] {
                        assert_eq!(found.len(), expected.len());
                        let worst = found
                            .iter()
                            .zip(expected)
                            .map(|(&f, e)| (f64::from(f) - e).abs())
                            .fold(0.0, f64::max);
                        assert!(worst < 1e-5, "{mode} {gates} own λ {own_lambda}: off by {worst}");
                    }
                }
            }
        }
    }

    /// A span write in f64 from the same formulas: reads of all tokens first, then the means, one a span.
    fn naive_spans(
        layer: &EditGate,
        hidden: &[f64],
        state: &mut [f64],
        spans: &[i32],
    ) -> (Vec<f64>, Vec<f64>) {
        let deltas = naive(layer, hidden, &mut state.to_vec(), &vec![false; spans.len()]);
        let width = layer.query.columns;
        let ids: std::collections::BTreeSet<i32> = spans.iter().copied().filter(|&id| id >= 0).collect();
        for span in ids {
            let members: Vec<&[f64]> = hidden
                .chunks(width)
                .zip(spans)
                .filter(|&(_, &id)| id == span)
                .map(|(h, _)| h)
                .collect();
            let mean: Vec<f64> = (0..width)
                .map(|i| members.iter().map(|h| h[i]).sum::<f64>() / members.len() as f64)
                .collect();
            naive(layer, &mean, state, &[true]);
        }
        deltas
    }

    #[test]
    fn spans_are_read_before_and_written_as_means_in_every_mode() {
        let hidden = numbers(9 * 5, 98);
        // Spans of one, two and three tokens, ids with gaps, tokens of none in front, inside and behind.
        let spans = [-1, 2, 5, -1, 5, 7, 7, 7, -1];
        for mode in [
            UpdateMode::Standard,
            UpdateMode::LambdaOutside,
            UpdateMode::NoLambda,
        ] {
            for gates in [Gates::Row, Gates::Head] {
                for (own_lambda, normalize_qk) in [(false, true), (true, true), (false, false)] {
                    let layer = EditGate {
                        normalize_qk,
                        ..layer(mode, gates, own_lambda)
                    };
                    let start = numbers(2 * 3 * 3, 8);
                    let mut state = start.clone();
                    let mut expected_state: Vec<f64> = wide(&start);
                    let found = layer.forward(&hidden, &mut state, Writes::Spans(&spans)).unwrap();
                    let (delta_q, delta_o) = naive_spans(&layer, &wide(&hidden), &mut expected_state, &spans);
                    for (found, expected) in [
                        (&state, &expected_state),
                        (found.q.as_ref().unwrap(), &delta_q),
                        (found.o.as_ref().unwrap(), &delta_o),
                    ] {
                        assert_eq!(found.len(), expected.len());
                        let worst = found
                            .iter()
                            .zip(expected)
                            .map(|(&f, e)| (f64::from(f) - e).abs())
                            .fold(0.0, f64::max);
                        assert!(worst < 1e-5, "{mode} {gates} own λ {own_lambda}: off by {worst}");
                    }
                    assert_ne!(state, start);
                }
            }
        }
    }

    #[test]
    fn a_span_of_one_token_is_a_token_write_and_no_span_is_none() {
        let layer = layer(UpdateMode::LambdaOutside, Gates::Row, true);
        let (hidden, start) = (numbers(5, 3), numbers(18, 4));
        let (mut token, mut span, mut none) = (start.clone(), start.clone(), start.clone());
        let by_token = layer
            .forward(&hidden, &mut token, Writes::Tokens(&[true]))
            .unwrap();
        let by_span = layer.forward(&hidden, &mut span, Writes::Spans(&[9])).unwrap();
        let by_none = layer.forward(&hidden, &mut none, Writes::Spans(&[-1])).unwrap();
        assert_eq!((&by_span, &span), (&by_token, &token));
        assert_eq!((&by_none, &none), (&by_token, &start));
    }

    #[test]
    fn falling_spans_are_refused_and_the_state_is_as_it_was() {
        let layer = layer(UpdateMode::Standard, Gates::Row, false);
        let mut state = numbers(18, 4);
        let error = layer
            .forward(&numbers(15, 3), &mut state, Writes::Spans(&[3, -1, 2]))
            .unwrap_err();
        assert_eq!(
            error,
            NetworkError::SpanOrder {
                index: 2,
                found: 2,
                before: 3
            }
        );
        assert_eq!(state, numbers(18, 4));
        assert!(matches!(
            layer.forward(&numbers(15, 3), &mut state, Writes::Spans(&[0])),
            Err(NetworkError::Length { .. })
        ));
    }

    #[test]
    fn an_empty_memory_corrects_nothing() {
        let layer = layer(UpdateMode::Standard, Gates::Row, false);
        let corrections = layer
            .forward(&numbers(5, 1), &mut [0.0; 18], Writes::Tokens(&[true]))
            .unwrap();
        assert!(
            corrections
                .q
                .unwrap()
                .iter()
                .chain(&corrections.o.unwrap())
                .all(|&x| x == 0.0)
        );
    }

    #[test]
    fn weights_and_inputs_that_do_not_fit_are_refused_by_name() {
        let good = layer(UpdateMode::Standard, Gates::Row, true);
        let (hidden, mut state) = (numbers(5, 1), [0.5; 18]);
        for (name, layer) in [
            (
                "W_q",
                EditGate {
                    query: linear(5, 5, false, 1),
                    ..good.clone()
                },
            ),
            (
                "W_k",
                EditGate {
                    key: linear(6, 4, false, 1),
                    ..good.clone()
                },
            ),
            (
                "W_v",
                EditGate {
                    value: linear(7, 5, false, 1),
                    ..good.clone()
                },
            ),
            (
                "W_beta",
                EditGate {
                    gates: Gates::Head,
                    ..good.clone()
                },
            ),
            (
                "W_lambda",
                EditGate {
                    lambda: Some(linear(2, 5, true, 1)),
                    ..good.clone()
                },
            ),
            (
                "W_delta of q",
                EditGate {
                    delta: PerProjection {
                        q: Some(Delta {
                            weight: linear(7, 5, false, 1),
                            scale: 1.0,
                        }),
                        ..PerProjection::default()
                    },
                    ..good.clone()
                },
            ),
        ] {
            let error = layer
                .forward(&hidden, &mut state, Writes::Tokens(&[true]))
                .unwrap_err();
            assert!(error.to_string().starts_with(&format!("{name} is [")), "{error}");
        }
        assert!(matches!(
            good.forward(&hidden[..4], &mut state, Writes::Tokens(&[true])),
            Err(NetworkError::Length {
                name: "hidden",
                found: 4,
                expected: 5
            })
        ));
        assert!(matches!(
            good.forward(&hidden, &mut state[..17], Writes::Tokens(&[true])),
            Err(NetworkError::Rule(_))
        ));
        assert!(Linear::new(vec![0.0; 5], None, 2, 3).is_err());
        assert!(Linear::new(vec![0.0; 6], Some(vec![0.0; 3]), 2, 3).is_err());
        assert_eq!(state, [0.5; 18]);
    }
}
