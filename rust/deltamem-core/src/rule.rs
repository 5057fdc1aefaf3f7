//! The recurrence of δ-mem over a run of tokens, in f32, as many rows of S at a time as registers hold. It takes q, k, v and the three gates as they are: what
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

use crate::lanes::{LANES, Lanes, Plain, Vectors, WIDE, spare, to_line};

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
    /// Which tokens move the state, `[T]`. The others read it and leave every bit of it as it was.
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
    scan_in(
        Plain,
        &mut Room::default(),
        heads,
        rank,
        gates,
        tokens,
        state,
        reads,
    )
}

/// What [`scan_in`] works in; kept from call to call, nothing is allocated for a rank that was seen before.
#[derive(Debug, Clone, Default)]
pub struct Room {
    columns: Vec<f32>,
}

impl Room {
    /// Room for `count` numbers from the beginning of a cache line on, where the allocator can say where that is.
    fn columns(&mut self, count: usize) -> &mut [f32] {
        let whole = count + spare::<f32>();
        if self.columns.len() < whole {
            self.columns.resize(whole, 0.0);
        }
        let from = to_line(&self.columns);
        &mut self.columns[from..from + count]
    }
}

/// [`scan`] in room of the caller's and with the caller's instructions, which may round a product and a sum once. It is compiled into its
/// caller.
///
/// # Errors
/// As [`scan`].
#[inline(always)]
#[allow(clippy::inline_always)] // a function with more target features takes it in
#[allow(clippy::too_many_arguments)]
pub fn scan_in<E: Vectors>(
    vectors: E,
    room: &mut Room,
    heads: usize,
    rank: usize,
    gates: Gates,
    tokens: &Tokens<'_>,
    state: &mut [f32],
    reads: &mut [f32],
) -> Result<(), RuleError> {
    check_lengths(heads, rank, gates, tokens, state.len(), reads.len())?;
    for head in 0..heads {
        let mut first = 0;
        while first < rank {
            let left = rank - first;
            let block = Block {
                heads,
                rank,
                gates,
                head,
                first,
            };
            first += if E::STATE_ROWS >= 4 * WIDE && left >= 4 * WIDE {
                scan_block::<E, WIDE, 4, 1>(vectors, block, tokens, room, state, reads)
            } else if E::STATE_ROWS >= 2 * WIDE && left >= 2 * WIDE {
                scan_block::<E, WIDE, 2, 2>(vectors, block, tokens, room, state, reads)
            } else if E::STATE_ROWS >= WIDE && left > LANES {
                scan_block::<E, WIDE, 1, 2>(vectors, block, tokens, room, state, reads)
            } else {
                scan_block::<E, LANES, 1, 4>(vectors, block, tokens, room, state, reads)
            };
        }
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
    let gate_count = product(&[count, heads, gates.per_head(rank)]);
    for (name, found, expected) in [
        ("q", tokens.q.len(), vectors),
        ("k", tokens.k.len(), vectors),
        ("v", tokens.v.len(), vectors),
        ("keep", tokens.keep.len(), gate_count),
        ("erase", tokens.erase.len(), gate_count),
        ("write", tokens.write.len(), gate_count),
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

/// Which rows of a state a block holds: as many as its vectors have lanes, from row `first` of `head` on, or those that are left. The rows
/// of a state never look at each other, so a block of them goes through all the tokens before the next one begins, and stays close to
/// the processor meanwhile.
#[derive(Clone, Copy)]
struct Block {
    heads: usize,
    rank: usize,
    gates: Gates,
    head: usize,
    first: usize,
}

impl Block {
    /// Where one token's vector of the block's head begins in [T, H, r].
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn vector(&self, token: usize) -> usize {
        (token * self.heads + self.head) * self.rank
    }

    /// The `rows` of the block in one token's vector of [T, H, r]. Lanes without a row get 0.
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn of<E: Lanes<N>, const N: usize, const V: usize>(
        &self,
        vectors: E,
        all: &[f32],
        token: usize,
        rows: usize,
    ) -> [E::Numbers; V] {
        let own = &all[self.vector(token) + self.first..][..rows];
        let mut out = [vectors.splat(0.0); V];
        if let Some(whole) = own.as_chunks::<N>().0.first_chunk::<V>() {
            for v in 0..V {
                out[v] = vectors.load(&whole[v]);
            }
            return out;
        }
        for (out, part) in out.iter_mut().zip(own.chunks(N)) {
            let mut lanes = [0.0; N];
            for (lane, &x) in lanes.iter_mut().zip(part) {
                *lane = x;
            }
            *out = vectors.load(&lanes);
        }
        out
    }

    /// One token's gates for the block's rows, from [T, H, r] or [T, H, 1].
    #[inline(always)]
    #[allow(clippy::inline_always)]
    fn gate<E: Lanes<N>, const N: usize, const V: usize>(
        &self,
        vectors: E,
        all: &[f32],
        token: usize,
        rows: usize,
    ) -> [E::Numbers; V] {
        match self.gates {
            Gates::Row => self.of(vectors, all, token, rows),
            Gates::Head => [vectors.splat(all[token * self.heads + self.head]); V],
        }
    }
}

/// What a token does to a block's rows: S ← keep S + amount kᵀ.
struct Write<'a, Numbers, const V: usize> {
    keep: [Numbers; V],
    amount: [Numbers; V],
    k: &'a [f32],
}

/// Takes one block through all tokens, and returns how many rows it held. The block lies in room of its own as [r][V][N]: laid out so, one
/// number of a key meets all rows at once, and no sum runs across lanes. A sum over columns has `C` parts, so that one addition need not
/// wait for the one before it.
#[inline(always)]
#[allow(clippy::inline_always)] // see `scan_in`
fn scan_block<E: Vectors + Lanes<N>, const N: usize, const V: usize, const C: usize>(
    vectors: E,
    block: Block,
    tokens: &Tokens<'_>,
    room: &mut Room,
    state: &mut [f32],
    reads: &mut [f32],
) -> usize {
    let rank = block.rank;
    let rows = (rank - block.first).min(V * N);
    let columns = room.columns(rank * V * N);
    let own = &mut state[(block.head * rank + block.first) * rank..][..rows * rank];
    if rows < V * N {
        columns.fill(0.0); // what another block left in lanes without a row may not be a number
    }
    let state = Matrix {
        numbers: &*own,
        stride: rank,
        rows,
        columns: rank,
    };
    transpose(vectors, &state, columns, V * N);
    let (lanes, _) = columns.as_chunks_mut::<N>();
    let (lanes, _) = lanes.as_chunks_mut::<V>();
    run_block::<E, N, V, C>(vectors, block, tokens, &mut lanes[..rank], reads);
    let columns = Matrix {
        numbers: &*columns,
        stride: V * N,
        rows: rank,
        columns: rows,
    };
    transpose(vectors, &columns, own, rank);
    rows
}

/// One pass over the block for each token: the write of the token before it, then what its own query reads and its key recalls.
#[inline(always)]
#[allow(clippy::inline_always)] // see `scan_in`
fn run_block<E: Lanes<N>, const N: usize, const V: usize, const C: usize>(
    vectors: E,
    block: Block,
    tokens: &Tokens<'_>,
    lanes: &mut [[[f32; N]; V]],
    reads: &mut [f32],
) {
    let rank = block.rank;
    let rows = (rank - block.first).min(V * N);
    let mut written = None;
    for (token, &moves) in tokens.mask.iter().enumerate() {
        let vector = block.vector(token);
        let (q, k) = (&tokens.q[vector..][..rank], &tokens.k[vector..][..rank]);
        let (read, recalled) = if let Some(write) = written {
            pass::<E, N, V, C, true>(vectors, lanes, &write, q, k)
        } else {
            let zero = [vectors.splat(0.0); V];
            let write = Write {
                keep: zero,
                amount: zero,
                k,
            };
            pass::<E, N, V, C, false>(vectors, lanes, &write, q, k)
        };
        let reads = &mut reads[vector + block.first..][..rows];
        for (out, read) in reads.chunks_mut(N).zip(read) {
            let read = vectors.store(read);
            if let Some(whole) = out.first_chunk_mut::<N>() {
                *whole = read;
            } else {
                for (out, read) in out.iter_mut().zip(read) {
                    *out = read;
                }
            }
        }
        written = None;
        if moves {
            let v = block.of::<E, N, V>(vectors, tokens.v, token, rows);
            let keep = block.gate::<E, N, V>(vectors, tokens.keep, token, rows);
            let erase = block.gate::<E, N, V>(vectors, tokens.erase, token, rows);
            let write = block.gate::<E, N, V>(vectors, tokens.write, token, rows);
            let (zero, mut amount) = (vectors.splat(0.0), v);
            for i in 0..V {
                let taken = vectors.subtract(zero, erase[i]);
                amount[i] = vectors.multiply_add(taken, recalled[i], vectors.multiply(write[i], v[i]));
            }
            written = Some(Write { keep, amount, k });
        }
    }
    if let Some(write) = written {
        for (column, &k) in lanes.iter_mut().zip(write.k) {
            put(vectors, column, &write, k);
        }
    }
}

/// A matrix [rows, columns] in rows of `stride` numbers.
struct Matrix<Numbers> {
    numbers: Numbers,
    stride: usize,
    rows: usize,
    columns: usize,
}

/// Puts `to[j][i] = from[i][j]`: in squares of eight by eight where the set has something for them, else number by number.
#[inline(always)]
#[allow(clippy::inline_always)] // see `scan_in`
fn transpose<E: Vectors>(vectors: E, from: &Matrix<&[f32]>, to: &mut [f32], stride: usize) {
    let squares = |count: usize| if E::SQUARES { count - count % LANES } else { 0 };
    let (whole_rows, whole_columns) = (squares(from.rows), squares(from.columns));
    for i in (0..whole_rows).step_by(LANES) {
        let rows = &from.numbers[i * from.stride..][..LANES * from.stride];
        for j in (0..whole_columns).step_by(LANES) {
            let mut square = [Lanes::<LANES>::splat(vectors, 0.0); LANES];
            for n in 0..LANES {
                if let Some(row) = rows[n * from.stride + j..].first_chunk::<LANES>() {
                    square[n] = vectors.load(row);
                }
            }
            let square = vectors.transpose(square);
            let to = &mut to[j * stride + i..];
            for n in 0..LANES {
                if let Some(row) = to[n * stride..].first_chunk_mut::<LANES>() {
                    *row = Lanes::<LANES>::store(vectors, square[n]);
                }
            }
        }
    }
    for (i, row) in from.numbers.chunks_exact(from.stride).take(from.rows).enumerate() {
        let left = if i < whole_rows { whole_columns } else { 0 };
        let to = to[left * stride..].chunks_exact_mut(stride);
        for (to, &x) in to.zip(&row[left..from.columns]) {
            to[i] = x;
        }
    }
}

/// S q and S k over the columns so far, in `C` parts.
struct Sums<Numbers, const V: usize, const C: usize> {
    read: [[Numbers; V]; C],
    recalled: [[Numbers; V]; C],
}

/// Writes if `MOVES`, and gives S q and S k of the state behind it.
#[inline(always)]
#[allow(clippy::inline_always)] // see `scan_in`
fn pass<E: Lanes<N>, const N: usize, const V: usize, const C: usize, const MOVES: bool>(
    vectors: E,
    lanes: &mut [[[f32; N]; V]],
    write: &Write<'_, E::Numbers, V>,
    q: &[f32],
    k: &[f32],
) -> ([E::Numbers; V], [E::Numbers; V]) {
    let zero = vectors.splat(0.0);
    let mut sums = Sums {
        read: [[zero; V]; C],
        recalled: [[zero; V]; C],
    };
    let (runs, rest) = lanes.as_chunks_mut::<C>();
    let (ks_written, last_written) = write.k.as_chunks::<C>();
    let ((qs, last_q), (ks, last_k)) = (q.as_chunks::<C>(), k.as_chunks::<C>());
    for (((run, written), q), k) in runs.iter_mut().zip(ks_written).zip(qs).zip(ks) {
        for c in 0..C {
            let meets = Meets {
                written: written[c],
                q: q[c],
                k: k[c],
            };
            pass_column::<E, N, V, C, MOVES>(vectors, &mut run[c], write, meets, c, &mut sums);
        }
    }
    for (((column, &written), &q), &k) in rest.iter_mut().zip(last_written).zip(last_q).zip(last_k) {
        let meets = Meets { written, q, k };
        pass_column::<E, N, V, C, MOVES>(vectors, column, write, meets, 0, &mut sums);
    }
    // Halves onto halves, for the next write waits for this.
    let mut parts = C;
    while parts > 1 {
        parts /= 2;
        for c in 0..parts {
            for v in 0..V {
                sums.read[c][v] = vectors.add(sums.read[c][v], sums.read[c + parts][v]);
                sums.recalled[c][v] = vectors.add(sums.recalled[c][v], sums.recalled[c + parts][v]);
            }
        }
    }
    (sums.read[0], sums.recalled[0])
}

/// A column's numbers of the key that is written, of the query and of the key.
#[derive(Clone, Copy)]
struct Meets {
    written: f32,
    q: f32,
    k: f32,
}

#[inline(always)]
#[allow(clippy::inline_always)] // see `scan_in`
fn pass_column<E: Lanes<N>, const N: usize, const V: usize, const C: usize, const MOVES: bool>(
    vectors: E,
    column: &mut [[f32; N]; V],
    write: &Write<'_, E::Numbers, V>,
    meets: Meets,
    c: usize,
    sums: &mut Sums<E::Numbers, V, C>,
) {
    if MOVES {
        put(vectors, column, write, meets.written);
    }
    let (q, k) = (vectors.splat(meets.q), vectors.splat(meets.k));
    for (v, s) in column.iter().enumerate() {
        let s = vectors.load(s);
        sums.recalled[c][v] = vectors.multiply_add(s, k, sums.recalled[c][v]);
        sums.read[c][v] = vectors.multiply_add(s, q, sums.read[c][v]);
    }
}

/// Writes one column of a block's rows.
#[inline(always)]
#[allow(clippy::inline_always)] // see `scan_in`
fn put<E: Lanes<N>, const N: usize, const V: usize>(
    vectors: E,
    column: &mut [[f32; N]; V],
    write: &Write<'_, E::Numbers, V>,
    k: f32,
) {
    let k = vectors.splat(k);
    for (v, s) in column.iter_mut().enumerate() {
        let kept = vectors.multiply(write.keep[v], vectors.load(s));
        *s = vectors.store(vectors.multiply_add(write.amount[v], k, kept));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use proptest::prelude::*;

    use super::*;
    use crate::gates::Gate;

    /// One layer's inputs, owned, and its state.
    #[derive(Debug, Clone)]
    struct Case {
        heads: usize,
        rank: usize,
        gates: Gates,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        keep: Vec<f32>,
        erase: Vec<f32>,
        write: Vec<f32>,
        mask: Vec<bool>,
        state: Vec<f32>,
    }

    impl Case {
        fn run(&self) -> (Vec<f32>, Vec<f32>) {
            self.run_in_pieces(&[self.mask.len()])
        }

        /// Runs the tokens in calls of `sizes` tokens.
        fn run_in_pieces(&self, sizes: &[usize]) -> (Vec<f32>, Vec<f32>) {
            let (mut state, mut reads) = (self.state.clone(), vec![f32::NAN; self.q.len()]);
            let (vector, gate) = (
                self.heads * self.rank,
                self.heads * self.gates.per_head(self.rank),
            );
            let mut from = 0;
            for size in sizes {
                let (to, cut) = (from + size, |all: &'_ [f32], width: usize| {
                    all[from * width..][..size * width].to_vec()
                });
                let [q, k, v] = [&self.q, &self.k, &self.v].map(|all| cut(all, vector));
                let [keep, erase, write] = [&self.keep, &self.erase, &self.write].map(|all| cut(all, gate));
                let tokens = Tokens {
                    q: &q,
                    k: &k,
                    v: &v,
                    keep: &keep,
                    erase: &erase,
                    write: &write,
                    mask: &self.mask[from..to],
                };
                let reads = &mut reads[from * vector..][..size * vector];
                scan(self.heads, self.rank, self.gates, &tokens, &mut state, reads).unwrap();
                from = to;
            }
            (state, reads)
        }

        /// The rule as the paper writes it, number by number in f64.
        fn run_naively(&self) -> (Vec<f64>, Vec<f64>) {
            let (heads, rank) = (self.heads, self.rank);
            let mut state: Vec<f64> = self.state.iter().copied().map(f64::from).collect();
            let mut reads = Vec::new();
            for token in 0..self.mask.len() {
                for head in 0..heads {
                    let vector = |all: &[f32], i: usize| f64::from(all[(token * heads + head) * rank + i]);
                    let gate = |all: &[f32], i: usize| match self.gates {
                        Gates::Row => f64::from(all[(token * heads + head) * rank + i]),
                        Gates::Head => f64::from(all[token * heads + head]),
                    };
                    let before = state.clone();
                    let at = |i: usize, j: usize| (head * rank + i) * rank + j;
                    for i in 0..rank {
                        reads.push((0..rank).map(|j| before[at(i, j)] * vector(&self.q, j)).sum());
                        let recalled: f64 = (0..rank).map(|j| before[at(i, j)] * vector(&self.k, j)).sum();
                        for j in 0..rank {
                            if self.mask[token] {
                                state[at(i, j)] = gate(&self.keep, i) * before[at(i, j)]
                                    - gate(&self.erase, i) * recalled * vector(&self.k, j)
                                    + gate(&self.write, i) * vector(&self.v, i) * vector(&self.k, j);
                            }
                        }
                    }
                }
            }
            (state, reads)
        }
    }

    fn numbers(count: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-1.0_f32..1.0, count)
    }

    fn case() -> impl Strategy<Value = Case> {
        let rank = prop_oneof![1..=24_usize, Just(32), Just(64), Just(65)];
        let gates = prop_oneof![Just(Gates::Row), Just(Gates::Head)];
        let mode = prop_oneof![
            Just(UpdateMode::Standard),
            Just(UpdateMode::LambdaOutside),
            Just(UpdateMode::NoLambda)
        ];
        (1..=3_usize, rank, gates, mode, 0..=20_usize, any::<bool>()).prop_flat_map(
            |(heads, rank, gates, mode, count, coupled)| {
                let (vector, gate) = (count * heads * rank, count * heads * gates.per_head(rank));
                let vectors = (numbers(vector), numbers(vector), numbers(vector));
                let logits = (
                    prop::collection::vec((-6.0_f32..6.0, -6.0_f32..6.0), gate),
                    Just(coupled),
                );
                let mask = prop::collection::vec(prop::bool::weighted(0.8), count);
                (vectors, logits, mask, numbers(heads * rank * rank)).prop_map(
                    move |((mut q, mut k, v), (logits, coupled), mask, state)| {
                        crate::gates::l2_normalize(&mut q, rank);
                        crate::gates::l2_normalize(&mut k, rank);
                        let gate = |&(beta, lambda): &(f32, f32)| {
                            Gate::new(mode, beta, (!coupled).then_some(lambda))
                        };
                        let all: Vec<Gate> = logits.iter().map(gate).collect();
                        Case {
                            heads,
                            rank,
                            gates,
                            q,
                            k,
                            v,
                            keep: all.iter().map(|gate| gate.keep).collect(),
                            erase: all.iter().map(|gate| gate.erase).collect(),
                            write: all.iter().map(|gate| gate.write).collect(),
                            mask,
                            state,
                        }
                    },
                )
            },
        )
    }

    fn largest_difference(found: &[f32], expected: &[f64]) -> f64 {
        assert_eq!(found.len(), expected.len());
        found
            .iter()
            .zip(expected)
            .map(|(&f, &e)| (f64::from(f) - e).abs())
            .fold(0.0, f64::max)
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    proptest! {
        #[test]
        fn the_scan_is_the_rule_for_any_shape_mode_and_mask(case in case()) {
            let ((state, reads), (naive_state, naive_reads)) = (case.run(), case.run_naively());
            let differences = [largest_difference(&state, &naive_state), largest_difference(&reads, &naive_reads)];
            prop_assert!(differences.iter().all(|&difference| difference < 2e-5), "state and reads differ by {differences:?}");
        }

        #[test]
        fn any_split_of_the_tokens_gives_the_same_bits(case in case(), cuts in prop::collection::vec(0..=20_usize, 0..5)) {
            let count = case.mask.len();
            let mut ends: Vec<usize> = cuts.into_iter().map(|cut| cut.min(count)).chain([count]).collect();
            ends.sort_unstable();
            let sizes: Vec<usize> = ends.iter().zip([0].iter().chain(&ends)).map(|(to, from)| to - from).collect();
            let ((state, reads), (whole_state, whole_reads)) = (case.run_in_pieces(&sizes), case.run());
            prop_assert_eq!(bits(&state), bits(&whole_state));
            prop_assert_eq!(bits(&reads), bits(&whole_reads));
        }

        #[test]
        fn masked_tokens_leave_every_bit_of_the_state(mut case in case()) {
            case.mask.fill(false);
            let (state, reads) = case.run();
            prop_assert_eq!(bits(&state), bits(&case.state));
            prop_assert!(largest_difference(&reads, &case.run_naively().1) < 1e-5);
        }
    }

    #[test]
    fn the_first_read_of_an_empty_memory_is_zero_and_the_next_recalls_the_value() {
        let (q, k, v) = (
            [1.0, 0.0, 0.0, 1.0, 1.0, 0.0],
            [1.0, 0.0, 0.0, 1.0, 1.0, 0.0],
            [0.5, -2.0, 3.0, 4.0, 0.0, 0.0],
        );
        let (keep, gate) = ([1.0; 3], [1.0; 3]);
        let tokens = Tokens {
            q: &q,
            k: &k,
            v: &v,
            keep: &keep,
            erase: &gate,
            write: &gate,
            mask: &[true; 3],
        };
        let (mut state, mut reads) = ([0.0; 4], [f32::NAN; 6]);
        scan(1, 2, Gates::Head, &tokens, &mut state, &mut reads).unwrap();
        assert_eq!(reads, [0.0, 0.0, 0.0, 0.0, 0.5, -2.0]);
        // S[i, j]: row i is the value's, column j the key's; the last token rewrote the first key with zeros.
        assert_eq!(state, [0.0, 3.0, 0.0, 4.0]);
    }

    #[test]
    fn a_wrong_length_is_refused_by_name_and_nothing_is_touched() {
        let (three, four) = ([0.5; 3], [0.5; 4]);
        let good = Tokens {
            q: &four,
            k: &four,
            v: &four,
            keep: &four,
            erase: &four,
            write: &four,
            mask: &[true; 2],
        };
        let (mut state, mut reads) = ([1.0; 4], [7.0; 4]);
        for (name, tokens) in [
            ("q", Tokens { q: &three, ..good }),
            ("k", Tokens { k: &three, ..good }),
            ("v", Tokens { v: &three, ..good }),
            ("keep", Tokens { keep: &three, ..good }),
            (
                "erase",
                Tokens {
                    erase: &three,
                    ..good
                },
            ),
            (
                "write",
                Tokens {
                    write: &three,
                    ..good
                },
            ),
            (
                "q",
                Tokens {
                    mask: &[true],
                    ..good
                },
            ),
        ] {
            let error = scan(1, 2, Gates::Row, &tokens, &mut state, &mut reads).unwrap_err();
            assert!(
                matches!(error, RuleError::Length { name: wrong, .. } if wrong == name),
                "{error}"
            );
        }
        let error = scan(1, 2, Gates::Head, &good, &mut state, &mut reads).unwrap_err();
        assert!(
            error.to_string().contains("keep holds 4 numbers, expected 2"),
            "{error}"
        );
        assert!(scan(1, 2, Gates::Row, &good, &mut state[..3], &mut reads).is_err());
        assert!(scan(1, 2, Gates::Row, &good, &mut state, &mut reads[..3]).is_err());
        for (heads, rank) in [(0, 2), (1, 0), (usize::MAX, usize::MAX)] {
            assert!(scan(heads, rank, Gates::Row, &good, &mut state, &mut reads).is_err());
        }
        assert_eq!((state, reads), ([1.0; 4], [7.0; 4]));
    }

    #[test]
    fn names_are_those_of_the_manifest() {
        for mode in [
            UpdateMode::Standard,
            UpdateMode::LambdaOutside,
            UpdateMode::NoLambda,
        ] {
            assert_eq!(serde_json::to_string(&mode).unwrap(), format!("\"{mode}\""));
            assert_eq!(
                serde_json::from_str::<UpdateMode>(&format!("\"{mode}\"")).unwrap(),
                mode
            );
        }
        for gates in [Gates::Row, Gates::Head] {
            assert_eq!(serde_json::to_string(&gates).unwrap(), format!("\"{gates}\""));
        }
    }
}
