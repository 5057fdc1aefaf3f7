//! The recurrence of δ-mem over a run of tokens, in f32, a row of S at a time. It takes q, k, v and the three gates as they are: what
//! makes them is in [`crate::gates`] and [`crate::networks`]. Twins: `deltamem_export.reference` (`PyTorch`) and the graft's
//! `LinearAttention` island (ONNX).
//!
//! Per token and head, with S of [r, r], rows for values and columns for keys:
//!
//! ```text
//! read = S q                                                        before the write
//! S    ← diag(keep) S − diag(erase) (S k) kᵀ + diag(write) v kᵀ       S k uses the undecayed S
//! ```

use serde::{Deserialize, Serialize};

/// How β and λ become the gates keep, erase and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateMode {
    /// keep λ, erase β, write β.
    Standard,
    /// keep λ, erase λβ, write β.
    LambdaOutside,
    /// keep 1, erase β, write β.
    NoLambda,
}

impl UpdateMode {
    /// The name that configurations and manifests use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::LambdaOutside => "lambda_outside",
            Self::NoLambda => "no_lambda",
        }
    }
}

impl std::fmt::Display for UpdateMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether every row of S has gates of its own or all rows of a head share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gates {
    /// One gate for each row of S: gate arrays of [T, H, r].
    Row,
    /// One gate for each head: gate arrays of [T, H, 1].
    Head,
}

impl Gates {
    /// The name that manifests use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Row => "row",
            Self::Head => "head",
        }
    }

    /// Gates in one head of rank `rank`: r or 1.
    pub const fn per_head(self, rank: usize) -> usize {
        match self {
            Self::Row => rank,
            Self::Head => 1,
        }
    }
}

impl std::fmt::Display for Gates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What T tokens bring to one layer's states. Row-major; G is r for [`Gates::Row`] and 1 for [`Gates::Head`].
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// Queries, [T, H, r].
    pub q: &'a [f32],
    /// Keys, [T, H, r].
    pub k: &'a [f32],
    /// Values, [T, H, r].
    pub v: &'a [f32],
    /// How much of each row stays, [T, H, G].
    pub keep: &'a [f32],
    /// How much of what the key recalls is taken out, [T, H, G].
    pub erase: &'a [f32],
    /// How much of the value is put in, [T, H, G].
    pub write: &'a [f32],
    /// Which tokens move the state, [T]. The others read it and leave every bit of it as it was.
    pub mask: &'a [bool],
}

/// Arrays that do not fit each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// A head set without heads, or a rank of 0.
    #[error("the rule needs at least one head and a rank of at least 1, found {heads} heads of rank {rank}")]
    Empty {
        /// Heads found.
        heads: usize,
        /// Rank found.
        rank: usize,
    },
    /// An array has the wrong length.
    #[error(
        "the rule's {name} holds {found} numbers, expected {expected} for {tokens} tokens, {heads} heads of rank {rank}"
    )]
    Length {
        /// The array's name.
        name: &'static str,
        /// Its length.
        found: usize,
        /// The length that the other sizes ask for.
        expected: usize,
        /// Tokens, taken from the mask.
        tokens: usize,
        /// Heads.
        heads: usize,
        /// Rank.
        rank: usize,
    },
}

/// Runs one layer's states over the tokens in order. `state` is [H, r, r] and moves in place; `reads`, [T, H, r], receives S q of each
/// token from before its write.
///
/// Each token's arithmetic depends on the state alone, so any split of the tokens into calls gives the same bits.
///
/// # Errors
/// [`RuleError`] when a length does not fit; nothing is touched then.
pub fn scan(
    heads: usize,
    rank: usize,
    gates: Gates,
    tokens: &Tokens<'_>,
    state: &mut [f32],
    reads: &mut [f32],
) -> Result<(), RuleError> {
    check_lengths(heads, rank, gates, tokens, state.len(), reads.len())?;
    // The rank as a constant lets the compiler unroll and vectorise the rows; the sums are the same in every arm.
    match rank {
        4 => scan_rows(heads, 4, gates, tokens, state, reads),
        8 => scan_rows(heads, 8, gates, tokens, state, reads),
        16 => scan_rows(heads, 16, gates, tokens, state, reads),
        32 => scan_rows(heads, 32, gates, tokens, state, reads),
        64 => scan_rows(heads, 64, gates, tokens, state, reads),
        rank => scan_rows(heads, rank, gates, tokens, state, reads),
    }
    Ok(())
}

fn check_lengths(
    heads: usize,
    rank: usize,
    gates: Gates,
    tokens: &Tokens<'_>,
    state: usize,
    reads: usize,
) -> Result<(), RuleError> {
    if heads == 0 || rank == 0 {
        return Err(RuleError::Empty { heads, rank });
    }
    let count = tokens.mask.len();
    let vectors = product(&[count, heads, rank]);
    let gated = product(&[count, heads, gates.per_head(rank)]);
    for (name, found, expected) in [
        ("q", tokens.q.len(), vectors),
        ("k", tokens.k.len(), vectors),
        ("v", tokens.v.len(), vectors),
        ("keep", tokens.keep.len(), gated),
        ("erase", tokens.erase.len(), gated),
        ("write", tokens.write.len(), gated),
        ("state", state, product(&[heads, rank, rank])),
        ("reads", reads, vectors),
    ] {
        if found != expected {
            return Err(RuleError::Length {
                name,
                found,
                expected,
                tokens: count,
                heads,
                rank,
            });
        }
    }
    Ok(())
}

/// A product that stays at the largest number, which no slice has as its length, when it would overflow.
fn product(sizes: &[usize]) -> usize {
    sizes
        .iter()
        .fold(1, |product: usize, &size| product.saturating_mul(size))
}

#[inline(always)]
#[allow(clippy::inline_always)] // so that each arm of `scan` gets its own copy with a constant rank
fn scan_rows(
    heads: usize,
    rank: usize,
    gates: Gates,
    tokens: &Tokens<'_>,
    state: &mut [f32],
    reads: &mut [f32],
) {
    let per_head = gates.per_head(rank);
    let stride = usize::from(gates == Gates::Row);
    for (token, &moves) in tokens.mask.iter().enumerate() {
        for head in 0..heads {
            let (vector, gate) = ((token * heads + head) * rank, (token * heads + head) * per_head);
            let q = &tokens.q[vector..][..rank];
            let k = &tokens.k[vector..][..rank];
            let v = &tokens.v[vector..][..rank];
            let keep = &tokens.keep[gate..][..per_head];
            let erase = &tokens.erase[gate..][..per_head];
            let write = &tokens.write[gate..][..per_head];
            let reads = &mut reads[vector..][..rank];
            let rows = state[head * rank * rank..][..rank * rank].chunks_exact_mut(rank);
            for (i, row) in rows.enumerate() {
                let (read, recalled) = two_dots(row, q, k);
                reads[i] = read;
                if moves {
                    let g = i * stride;
                    let amount = write[g] * v[i] - erase[g] * recalled;
                    for (s, &key) in row.iter_mut().zip(k) {
                        *s = keep[g] * *s + amount * key;
                    }
                }
            }
        }
    }
}

/// Partial sums of a dot product; the compiler keeps them in one or two vector registers.
const LANES: usize = 8;

/// (row · q, row · k), both summed in the same fixed order whatever the machine.
#[inline(always)]
#[allow(clippy::inline_always)] // part of `scan_rows`, whose constant rank must reach this loop
fn two_dots(row: &[f32], q: &[f32], k: &[f32]) -> (f32, f32) {
    let (mut read, mut recalled) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let (rows, qs, ks) = (
        row.chunks_exact(LANES),
        q.chunks_exact(LANES),
        k.chunks_exact(LANES),
    );
    let tail = rows.remainder().iter().zip(qs.remainder()).zip(ks.remainder());
    for (lane, ((&s, &q), &k)) in tail.enumerate() {
        read[lane] = s * q;
        recalled[lane] = s * k;
    }
    for ((row, q), k) in rows.zip(qs).zip(ks) {
        for lane in 0..LANES {
            read[lane] += row[lane] * q[lane];
            recalled[lane] += row[lane] * k[lane];
        }
    }
    (sum(read), sum(recalled))
}

/// The lanes' sum, pairwise.
#[inline(always)]
#[allow(clippy::inline_always)] // as `two_dots`
fn sum([a, b, c, d, e, f, g, h]: [f32; LANES]) -> f32 {
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
