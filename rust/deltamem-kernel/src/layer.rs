//! One memory layer's pass over a call's tokens: proposals, gates, the rule, and the corrections laid onto what the decoder computed, with
//! the norms behind them where the caller has them taken in. Weights are packed once, when a layer is made.

use std::sync::{Mutex, PoisonError};

use deltamem_core::gates::Gate;
use deltamem_core::lanes::{LANES, Lanes};
use deltamem_core::rule::{Room, RuleError, Tokens};
use deltamem_core::{Gates, UpdateMode};

use crate::activation::{l2_normalize, sum_of_squares, tanh};
use crate::instructions::{Arithmetic, Instructions, Work};
use crate::panels::{Into, Panels};
use crate::scan::Scan;

/// Tokens that one task takes where a pool shares the work.
const TILE: usize = 24;
/// Products from which sharing pays for waking other threads.
const SHARED: usize = 4 << 20;
/// Rows that are brought, corrected and normed while they lie close to the processor.
const CLOSE: usize = 8;

/// How weights are kept. Arithmetic is in f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As they are.
    Single,
    /// In half precision: half the bytes come over the memory bus, and a weight is off by 2^-12 of its size at most.
    Half,
}

/// A layer's sizes and rule.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Width of the hidden state, D.
    pub hidden: usize,
    /// State heads, H.
    pub heads: usize,
    /// Rank of each state, r.
    pub rank: usize,
    /// How β and λ become gates.
    pub mode: UpdateMode,
    /// Gates per row of S or per head: G is H·r or H in all.
    pub gates: Gates,
    /// Whether λ has a network of its own; otherwise λ = 1 − β.
    pub own_lambda: bool,
    /// Whether q and k are l2(tanh(W h)), per head, or W h as it is.
    pub normalize_qk: bool,
    /// How the weights are kept.
    pub storage: Storage,
}

/// A correction `W_Δ` of a target, as columns of one matrix that holds those of all of them.
#[derive(Debug, Clone, Copy)]
pub struct Correction<'a> {
    /// The matrix, [H·r, stride].
    pub matrix: &'a [f32],
    /// Its columns.
    pub stride: usize,
    /// The first of this correction's columns.
    pub from: usize,
    /// How many are its own.
    pub width: usize,
    /// Where in the target's rows they are laid.
    pub start: usize,
    /// The weights [width] and the epsilon of the correction's own RMS norm.
    pub norm: Option<(&'a [f32], f32)>,
}

/// An RMS norm of every head of a target, behind its corrections.
#[derive(Debug, Clone)]
pub struct HeadNorm {
    /// Its weights, one for each number of a head.
    pub weights: Vec<f32>,
    /// Its epsilon.
    pub epsilon: f32,
}

/// Where a target's rows begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// With zeros: the target is the correction alone.
    Nothing,
    /// With columns of the caller's rows of `stride` numbers, from `start` on. A caller whose rows are the target's own memory, changed in
    /// place, gives none at the call.
    Rows {
        /// Numbers in a row.
        stride: usize,
        /// The first that is brought.
        start: usize,
    },
}

/// A value of the decoder's that the layer corrects.
#[derive(Debug)]
pub struct Target {
    width: usize,
    from: From,
    corrections: Vec<Packed>,
    norm: Option<HeadNorm>,
}

#[derive(Debug)]
struct Packed {
    weights: Panels,
    start: usize,
    norm: Option<(Vec<f32>, f32)>,
}

/// A call's rows of one target.
#[derive(Debug)]
pub struct Values<'a> {
    /// [B·T, width]; receives the corrected rows.
    pub out: &'a mut [f32],
    /// What they are made from, [B·T, stride]; `None`: they are in `out` already, or begin with nothing.
    pub source: Option<&'a [f32]>,
}

/// The spans of a call whose writes are of spans; S of them.
#[derive(Debug)]
pub struct Spans<'a> {
    /// What each token adds to each span, [B, S, T].
    pub weights: &'a [f32],
    /// Which spans are complete and written, [B, S].
    pub mask: &'a [f32],
    /// What they have gathered, [B, S, W]: before the call, and after it.
    pub gathered: &'a mut [f32],
}

/// What one call brings.
#[derive(Debug)]
pub struct Call<'a> {
    /// Sequences, B.
    pub batch: usize,
    /// Tokens of each, T.
    pub tokens: usize,
    /// The attention's input, [B, T, D].
    pub hidden: &'a [f32],
    /// Which tokens write: those that are not 0, [B, T].
    pub write_mask: &'a [f32],
    /// The states, [B, H, r, r]: before the call, and after it.
    pub state: &'a mut [f32],
    /// The rows of each target, in the targets' order.
    pub values: &'a mut [Values<'a>],
    /// The spans, where writes are of spans.
    pub spans: Option<Spans<'a>>,
}

/// Threads of the caller's.
pub trait Pool {
    /// Calls `task` with every number below `tasks`, in any order and on any thread, and returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// Weights or a call that do not fit the layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// Numbers that do not fill their shape.
    #[error("{name} holds {found} numbers, expected {expected}")]
    Length {
        /// What holds them.
        name: &'static str,
        /// How many there are.
        found: usize,
        /// How many there must be.
        expected: usize,
    },
    /// A correction that lies outside of its matrix or its target.
    #[error("a correction of columns {from} to {to} does not lie in the {columns} columns of its {of}")]
    Outside {
        /// Its first column.
        from: usize,
        /// Behind its last.
        to: usize,
        /// What there is.
        columns: usize,
        /// matrix or target.
        of: &'static str,
    },
    /// Sizes that the rule refuses.
    #[error(transparent)]
    Rule(#[from] RuleError),
}

/// One memory layer, its weights packed.
#[derive(Debug)]
pub struct Layer {
    settings: Settings,
    instructions: Instructions,
    networks: Panels,
    gate_bias: Vec<f32>,
    targets: Vec<Target>,
}

/// What a layer works in, kept from call to call: once it has grown, a call of as many tokens allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    proposals: Vec<f32>,
    steps: Steps,
    span_steps: Steps,
    reads: Vec<f32>,
    ignored: Vec<f32>,
    room: Room,
}

/// What the rule takes, for a run of steps; [`Tokens`] with its own memory.
#[derive(Debug, Default)]
struct Steps {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    keep: Vec<f32>,
    erase: Vec<f32>,
    write: Vec<f32>,
    mask: Vec<bool>,
}

impl Settings {
    /// H·r.
    pub fn read_width(&self) -> usize {
        self.heads.saturating_mul(self.rank)
    }

    /// G, the gates of one kind.
    pub fn gate_width(&self) -> usize {
        self.heads.saturating_mul(self.gates.per_head(self.rank))
    }

    /// W: q, k, v, β's logits, and where λ is its own those of 1 − λ.
    pub fn proposal_width(&self) -> usize {
        let kinds = if self.own_lambda { 2 } else { 1 };
        self.read_width()
            .saturating_mul(3)
            .saturating_add(self.gate_width().saturating_mul(kinds))
    }
}

impl Target {
    /// A target of rows of `width` numbers. The corrections' weights are packed here.
    ///
    /// # Errors
    /// [`LayerError`] when a correction does not lie in its matrix or in the target, or a norm's weights do not fit.
    pub fn new(
        settings: &Settings,
        width: usize,
        from: From,
        corrections: &[Correction<'_>],
        norm: Option<HeadNorm>,
    ) -> Result<Self, LayerError> {
        if let Some(norm) = &norm
            && (norm.weights.is_empty() || !width.is_multiple_of(norm.weights.len()))
        {
            return Err(length("a norm of heads", norm.weights.len(), width));
        }
        if width == 0 {
            return Err(length("a target's row", 0, 1));
        }
        if let From::Rows { stride, start } = from {
            inside(start, width, stride, "source")?;
        }
        let inner = settings.read_width();
        let mut packed = Vec::with_capacity(corrections.len());
        for correction in corrections {
            let &Correction {
                matrix,
                stride,
                from,
                width: own,
                start,
                norm,
            } = correction;
            expect("corrections", matrix.len(), inner.saturating_mul(stride))?;
            inside(from, own, stride, "matrix")?;
            inside(start, own, width, "target")?;
            if let Some((weights, _)) = norm {
                expect("a correction's norm", weights.len(), own)?;
            }
            packed.push(Packed {
                weights: Panels::pack(
                    matrix,
                    inner,
                    stride,
                    from,
                    own,
                    settings.storage == Storage::Half,
                ),
                start,
                norm: norm.map(|(weights, epsilon)| (weights.to_vec(), epsilon)),
            });
        }
        Ok(Self {
            width,
            from,
            corrections: packed,
            norm,
        })
    }

    /// Numbers in one of its rows.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Where its rows begin.
    pub fn from(&self) -> From {
        self.from
    }
}

impl Layer {
    /// Packs a layer's weights.
    ///
    /// `networks`, [D, W], holds the columns q, k, v, β and, where λ is its own, 1 − λ; `gate_bias` is that of the logits.
    ///
    /// # Errors
    /// [`LayerError`] when they do not fit the settings.
    pub fn new(
        settings: Settings,
        networks: &[f32],
        gate_bias: &[f32],
        targets: Vec<Target>,
        instructions: Instructions,
    ) -> Result<Self, LayerError> {
        let (width, reads) = (settings.proposal_width(), settings.read_width());
        if settings.hidden == 0 {
            return Err(length("hidden", 0, 1));
        }
        if settings.heads == 0 || settings.rank == 0 {
            return Err(RuleError::Empty {
                heads: settings.heads,
                rank: settings.rank,
            }
            .into());
        }
        expect("networks", networks.len(), settings.hidden.saturating_mul(width))?;
        expect("gate_bias", gate_bias.len(), width - 3 * reads)?;
        let narrow = settings.storage == Storage::Half;
        Ok(Self {
            networks: Panels::pack(networks, settings.hidden, width, 0, width, narrow),
            gate_bias: gate_bias.to_vec(),
            targets,
            settings,
            instructions,
        })
    }

    /// The sizes and the rule.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The targets.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// One call. Any split of a stream into calls gives the same bits, whatever the pool.
    ///
    /// # Errors
    /// [`LayerError`] when the call does not fit the layer; nothing was touched then.
    pub fn forward(&self, call: Call<'_>, scratch: &mut Scratch, pool: &dyn Pool) -> Result<(), LayerError> {
        self.check(&call)?;
        let settings = &self.settings;
        let Call {
            batch,
            tokens,
            hidden,
            write_mask,
            state,
            values,
            spans,
        } = call;
        let rows = batch * tokens;
        let (width, reads, layer) = (
            settings.proposal_width(),
            settings.read_width(),
            settings.read_width() * settings.rank,
        );
        let products = settings.hidden * width
            + reads
                * self
                    .targets
                    .iter()
                    .flat_map(|target| &target.corrections)
                    .map(|c| c.weights.columns())
                    .sum::<usize>();
        let pool = (rows >= 2 * TILE && rows.saturating_mul(products) >= SHARED).then_some(pool);

        scratch.proposals.resize(rows * width, 0.0);
        scratch.steps.resize(settings, rows);
        scratch.reads.resize(rows * reads, 0.0);
        for (moves, &mask) in scratch.steps.mask.iter_mut().zip(write_mask) {
            *moves = mask != 0.0;
        }
        self.propose(hidden, &mut scratch.proposals, &mut scratch.steps, pool);

        let mut count = 0; // of each sequence's spans
        if let Some(mut spans) = spans {
            count = spans.mask.len() / batch.max(1);
            gather(&scratch.proposals, &mut spans, count, tokens, width);
            scratch.span_steps.resize(settings, spans.mask.len());
            for (moves, &mask) in scratch.span_steps.mask.iter_mut().zip(spans.mask) {
                *moves = mask != 0.0;
            }
            self.activate(spans.gathered, &mut scratch.span_steps.tile());
            scratch.ignored.resize(count * reads, 0.0);
        }
        for (b, state) in state.chunks_exact_mut(layer).enumerate() {
            let own = &mut scratch.reads[b * tokens * reads..][..tokens * reads];
            self.scan(&scratch.steps, b * tokens, tokens, state, own, &mut scratch.room)?;
            if count > 0 {
                self.scan(
                    &scratch.span_steps,
                    b * count,
                    count,
                    state,
                    &mut scratch.ignored,
                    &mut scratch.room,
                )?;
            }
        }
        for (target, values) in self.targets.iter().zip(values) {
            self.correct(target, values, &scratch.reads, pool);
        }
        Ok(())
    }

    /// The networks' product for every token, and what the rule takes of it.
    fn propose(&self, hidden: &[f32], proposals: &mut [f32], steps: &mut Steps, pool: Option<&dyn Pool>) {
        let settings = &self.settings;
        let one = |hidden: &[f32], proposals: &mut [f32], mut steps: Tile<'_>| {
            self.instructions.run(Product {
                weights: &self.networks,
                x: hidden,
                into: Into {
                    values: &mut *proposals,
                    stride: self.networks.columns(),
                    start: 0,
                    add: false,
                },
            });
            self.activate(proposals, &mut steps);
        };
        let Some(pool) = pool else {
            return one(hidden, proposals, steps.tile());
        };
        let (width, reads, gates) = (
            settings.proposal_width(),
            settings.read_width(),
            settings.gate_width(),
        );
        let vectors = steps
            .q
            .chunks_mut(TILE * reads)
            .zip(steps.k.chunks_mut(TILE * reads))
            .zip(steps.v.chunks_mut(TILE * reads));
        let moved = steps
            .keep
            .chunks_mut(TILE * gates)
            .zip(steps.erase.chunks_mut(TILE * gates))
            .zip(steps.write.chunks_mut(TILE * gates));
        let tiles = hidden
            .chunks(TILE * settings.hidden)
            .zip(proposals.chunks_mut(TILE * width))
            .zip(vectors.zip(moved));
        share(
            pool,
            tiles,
            |((hidden, proposals), (((q, k), v), ((keep, erase), write)))| {
                one(
                    hidden,
                    proposals,
                    Tile {
                        q,
                        k,
                        v,
                        keep,
                        erase,
                        write,
                    },
                );
            },
        );
    }

    /// From proposals [n, W] to what the rule takes.
    fn activate(&self, proposals: &[f32], steps: &mut Tile<'_>) {
        self.instructions.run(Activate {
            settings: &self.settings,
            gate_bias: &self.gate_bias,
            proposals,
            steps,
        });
    }

    fn scan(
        &self,
        steps: &Steps,
        from: usize,
        count: usize,
        state: &mut [f32],
        reads: &mut [f32],
        room: &mut Room,
    ) -> Result<(), RuleError> {
        let (vector, gate) = (self.settings.read_width(), self.settings.gate_width());
        let cut = |all: &'_ [f32], width: usize| -> std::ops::Range<usize> {
            debug_assert!(all.len() >= (from + count) * width);
            from * width..(from + count) * width
        };
        let tokens = Tokens {
            q: &steps.q[cut(&steps.q, vector)],
            k: &steps.k[cut(&steps.k, vector)],
            v: &steps.v[cut(&steps.v, vector)],
            keep: &steps.keep[cut(&steps.keep, gate)],
            erase: &steps.erase[cut(&steps.erase, gate)],
            write: &steps.write[cut(&steps.write, gate)],
            mask: &steps.mask[from..from + count],
        };
        let Settings {
            heads, rank, gates, ..
        } = self.settings;
        self.instructions.run(Scan {
            heads,
            rank,
            gates,
            tokens: &tokens,
            state,
            reads,
            room,
        })
    }

    fn correct(&self, target: &Target, values: &mut Values<'_>, reads: &[f32], pool: Option<&dyn Pool>) {
        let (width, inner) = (target.width, self.settings.read_width());
        let stride = match target.from {
            From::Nothing => 0,
            From::Rows { stride, .. } => stride,
        };
        let work = |out: &mut [f32], first: usize| {
            let rows = out.len() / width.max(1);
            let source = values
                .source
                .map(|source| &source[first * stride..][..rows * stride]);
            let reads = &reads[first * inner..][..rows * inner];
            Correct {
                instructions: self.instructions,
                target,
                out,
                source,
                reads,
                inner,
            }
            .run();
        };
        match pool {
            None => work(values.out, 0),
            Some(pool) => share(
                pool,
                values.out.chunks_mut(TILE * width.max(1)).enumerate(),
                |(n, out)| work(out, n * TILE),
            ),
        }
    }

    fn check(&self, call: &Call<'_>) -> Result<(), LayerError> {
        let settings = &self.settings;
        let rows = call.batch.saturating_mul(call.tokens);
        expect("hidden", call.hidden.len(), rows.saturating_mul(settings.hidden))?;
        expect("write_mask", call.write_mask.len(), rows)?;
        let layer = settings.read_width().saturating_mul(settings.rank);
        expect("past_memory", call.state.len(), call.batch.saturating_mul(layer))?;
        expect("the targets", call.values.len(), self.targets.len())?;
        for (target, values) in self.targets.iter().zip(call.values.iter()) {
            expect("a target", values.out.len(), rows.saturating_mul(target.width))?;
            if let (Some(source), From::Rows { stride, .. }) = (values.source, target.from) {
                expect("a target's source", source.len(), rows.saturating_mul(stride))?;
            } else if values.source.is_some() {
                return Err(length("a target that begins with nothing", 1, 0));
            }
        }
        if let Some(spans) = &call.spans {
            let count = spans.mask.len();
            if !count.is_multiple_of(call.batch.max(1)) {
                return Err(length("span_mask", count, count / call.batch.max(1) * call.batch));
            }
            expect(
                "span_weights",
                spans.weights.len(),
                count.saturating_mul(call.tokens),
            )?;
            expect(
                "past_spans",
                spans.gathered.len(),
                count.saturating_mul(settings.proposal_width()),
            )?;
        }
        Ok(())
    }
}

impl Steps {
    fn resize(&mut self, settings: &Settings, count: usize) {
        let (vectors, gates) = (count * settings.read_width(), count * settings.gate_width());
        for all in [&mut self.q, &mut self.k, &mut self.v] {
            all.resize(vectors, 0.0);
        }
        for all in [&mut self.keep, &mut self.erase, &mut self.write] {
            all.resize(gates, 0.0);
        }
        self.mask.resize(count, false);
    }

    fn tile(&mut self) -> Tile<'_> {
        Tile {
            q: &mut self.q,
            k: &mut self.k,
            v: &mut self.v,
            keep: &mut self.keep,
            erase: &mut self.erase,
            write: &mut self.write,
        }
    }
}

/// A run of steps to be filled.
struct Tile<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    keep: &'a mut [f32],
    erase: &'a mut [f32],
    write: &'a mut [f32],
}

/// Adds to every span what its tokens propose.
fn gather(proposals: &[f32], spans: &mut Spans<'_>, count: usize, tokens: usize, width: usize) {
    for (s, gathered) in spans.gathered.chunks_exact_mut(width).enumerate() {
        let own = &proposals[s / count * tokens * width..][..tokens * width];
        for (proposal, &weight) in own
            .chunks_exact(width)
            .zip(&spans.weights[s * tokens..][..tokens])
        {
            if weight != 0.0 {
                for (sum, x) in gathered.iter_mut().zip(proposal) {
                    *sum += weight * x;
                }
            }
        }
    }
}

/// Each tile to one thread of the pool.
pub(crate) fn share<T: Send>(pool: &dyn Pool, tiles: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let tiles: Vec<Mutex<Option<T>>> = tiles.map(|tile| Mutex::new(Some(tile))).collect();
    pool.run(tiles.len(), &|n| {
        let tile = tiles
            .get(n)
            .and_then(|tile| tile.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(tile) = tile {
            work(tile);
        }
    });
}

/// One product, compiled once for all that need one.
struct Product<'a, 'o> {
    weights: &'a Panels,
    x: &'a [f32],
    into: Into<'o>,
}

impl Work for Product<'_, '_> {
    type Output = ();

    #[inline(always)]
    #[allow(clippy::inline_always)] // see `instructions::Work`
    fn run<A: Arithmetic>(mut self, arithmetic: A) {
        self.weights.multiply(arithmetic, self.x, &mut self.into);
    }
}

struct Activate<'a, 't> {
    settings: &'a Settings,
    gate_bias: &'a [f32],
    proposals: &'a [f32],
    steps: &'a mut Tile<'t>,
}

impl Work for Activate<'_, '_> {
    type Output = ();

    #[inline(always)]
    #[allow(clippy::inline_always)] // see `instructions::Work`
    fn run<A: Arithmetic>(self, arithmetic: A) {
        let Self {
            settings,
            gate_bias,
            proposals,
            steps,
        } = self;
        let (width, reads, gates) = (
            settings.proposal_width(),
            settings.read_width(),
            settings.gate_width(),
        );
        for (n, proposal) in proposals.chunks_exact(width).enumerate() {
            let (vectors, logits) = proposal.split_at(3 * reads);
            let own = n * reads..(n + 1) * reads;
            steps.v[own.clone()].copy_from_slice(&vectors[2 * reads..]);
            for (all, proposed) in [(&mut *steps.q, 0), (&mut *steps.k, reads)] {
                let vector = &mut all[own.clone()];
                vector.copy_from_slice(&vectors[proposed..][..reads]);
                if settings.normalize_qk {
                    tanh(arithmetic, vector);
                    l2_normalize(arithmetic, vector, settings.rank);
                }
            }
            let own = n * gates..(n + 1) * gates;
            let (keep, erase, write) = (
                &mut steps.keep[own.clone()],
                &mut steps.erase[own.clone()],
                &mut steps.write[own],
            );
            for g in 0..gates {
                let lambda = settings
                    .own_lambda
                    .then(|| -(logits[gates + g] + gate_bias[gates + g]));
                let gate = Gate::new(settings.mode, logits[g] + gate_bias[g], lambda);
                (keep[g], erase[g], write[g]) = (gate.keep, gate.erase, gate.write);
            }
        }
    }
}

struct Correct<'a> {
    instructions: Instructions,
    target: &'a Target,
    out: &'a mut [f32],
    source: Option<&'a [f32]>,
    reads: &'a [f32],
    inner: usize,
}

impl Correct<'_> {
    fn run(self) {
        let Self {
            instructions,
            target,
            out,
            source,
            reads,
            inner,
        } = self;
        let width = target.width;
        for (n, (out, reads)) in out
            .chunks_mut(CLOSE * width)
            .zip(reads.chunks(CLOSE * inner))
            .enumerate()
        {
            match (target.from, source) {
                (From::Nothing, _) => out.fill(0.0),
                (From::Rows { stride, start }, Some(source)) => {
                    let rows = source[n * CLOSE * stride..].chunks_exact(stride);
                    for (out, row) in out.chunks_exact_mut(width).zip(rows) {
                        out.copy_from_slice(&row[start..start + width]);
                    }
                }
                (From::Rows { .. }, None) => {}
            }
            for correction in &target.corrections {
                let (weights, start) = (&correction.weights, correction.start);
                let product = |values, stride, start, add| {
                    instructions.run(Product {
                        weights,
                        x: reads,
                        into: Into {
                            values,
                            stride,
                            start,
                            add,
                        },
                    });
                };
                let Some((norm, epsilon)) = &correction.norm else {
                    product(out, width, start, true);
                    continue;
                };
                let own = weights.columns();
                let mut delta = vec![0.0; reads.len() / inner * own];
                product(&mut delta, own, 0, false);
                instructions.run(Norm {
                    x: &mut delta,
                    weights: norm,
                    epsilon: *epsilon,
                });
                for (row, delta) in out.chunks_exact_mut(width).zip(delta.chunks_exact(own)) {
                    for (out, delta) in row[start..start + own].iter_mut().zip(delta) {
                        *out += *delta;
                    }
                }
            }
            if let Some(norm) = &target.norm {
                instructions.run(Norm {
                    x: out,
                    weights: &norm.weights,
                    epsilon: norm.epsilon,
                });
            }
        }
    }
}

/// An RMS norm of every vector as long as the weights.
struct Norm<'a> {
    x: &'a mut [f32],
    weights: &'a [f32],
    epsilon: f32,
}

impl Work for Norm<'_> {
    type Output = ();

    #[inline(always)]
    #[allow(clippy::inline_always)] // see `instructions::Work`
    fn run<A: Arithmetic>(self, arithmetic: A) {
        for x in self.x.chunks_exact_mut(self.weights.len()) {
            rms_norm(arithmetic, x, self.weights, self.epsilon);
        }
    }
}

/// x / sqrt(mean(x²) + ε) · weights, in place.
#[inline(always)]
#[allow(clippy::inline_always)] // see `instructions::Work`
fn rms_norm<A: Lanes<LANES>>(arithmetic: A, x: &mut [f32], weights: &[f32], epsilon: f32) {
    let count = x.len() as f32;
    let sum = sum_of_squares(arithmetic, x);
    let factor = 1.0 / (sum / count + epsilon).sqrt();
    let (whole, rest) = x.as_chunks_mut::<LANES>();
    let (eights, last) = weights.as_chunks::<LANES>();
    for (x, weights) in whole.iter_mut().zip(eights) {
        let by = arithmetic.multiply(arithmetic.splat(factor), arithmetic.load(weights));
        *x = arithmetic.store(arithmetic.multiply(arithmetic.load(x), by));
    }
    for (x, weight) in rest.iter_mut().zip(last) {
        *x *= factor * weight;
    }
}

fn expect(name: &'static str, found: usize, expected: usize) -> Result<(), LayerError> {
    if found == expected {
        Ok(())
    } else {
        Err(length(name, found, expected))
    }
}

fn length(name: &'static str, found: usize, expected: usize) -> LayerError {
    LayerError::Length {
        name,
        found,
        expected,
    }
}

fn inside(from: usize, width: usize, columns: usize, of: &'static str) -> Result<(), LayerError> {
    let to = from.saturating_add(width);
    if width > 0 && to <= columns {
        Ok(())
    } else {
        Err(LayerError::Outside {
            from,
            to,
            columns,
            of,
        })
    }
}
