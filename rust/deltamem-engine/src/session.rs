//! One user's session: a memory that stays, a turn's KV cache that goes, and a sampler. Every call either happens whole or leaves the
//! session as it was. It knows tokens only; text becomes tokens in [`crate::text`], pieces of text are made in [`crate::generation`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deltamem_core::{Geometry, Snapshot};

use crate::error::{EngineError, Result};
use crate::graph::{ChunkSpans, Measures, as_trained};
use crate::logits::Logits;
use crate::memory::{MemoryBuffers, MemoryView, State};
use crate::model::{CHUNK_TOKENS, Model};
use crate::prefix::Prefix;
use crate::running::{Chunk, LogitsTo, Outcome, Row};
use crate::sampling::{Sampler, SamplingOptions};
use crate::schedule::Seat;
use crate::spans::{Gathered, Spans, Writes};
use crate::turn::{TurnCache, TurnKv};

/// Asked between chunks whether the caller wants to stop.
pub type Interrupt<'a> = &'a mut dyn FnMut() -> bool;

/// How many tokens a session keeps beyond their turn: on them [`Session::measure`] reads the memory.
pub const RECENT_TOKENS: usize = 256;

/// What a call of [`Session::feed`] does beside reading.
#[derive(Debug)]
pub struct FeedOptions<'a> {
    /// Whether these tokens may write the memory.
    pub write: bool,
    /// What they write: each by itself, or the means of spans.
    pub spans: Spans<'a>,
    /// Where every token's logits go, float32 [tokens, vocab]; `None` when they are not wanted.
    pub logits: Option<&'a mut [f32]>,
    /// Adds up the energies of corrections and of what they correct, layer by layer and delta head by delta head; takes the
    /// measured graph.
    pub energy: Option<&'a mut DeltaEnergy>,
}

impl Default for FeedOptions<'_> {
    fn default() -> Self {
        Self {
            write: true,
            spans: Spans::Unsaid,
            logits: None,
            energy: None,
        }
    }
}

/// Sums of squares of the corrections and of the projections that they correct, over all tokens measured so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeltaEnergy {
    /// (correction, base) for each memory layer and delta head, row-major [layers, delta heads].
    pub sums: Vec<(f64, f64)>,
}

impl DeltaEnergy {
    /// |correction| / |base| over everything measured; `None` before the first token.
    pub fn ratio(&self) -> Option<f64> {
        let (delta, base) = self
            .sums
            .iter()
            .fold((0.0, 0.0), |(d, b), (delta, base)| (d + delta, b + base));
        (base > 0.0).then(|| (delta / base).sqrt())
    }

    /// |correction| / |base| for each memory layer and delta head, [layers, delta heads]; 0 where nothing was corrected.
    pub fn ratios(&self) -> Vec<f64> {
        self.sums
            .iter()
            .map(|&(delta, base)| if base > 0.0 { (delta / base).sqrt() } else { 0.0 })
            .collect()
    }

    pub(crate) fn add(&mut self, energies: &[f32], pairs: usize) {
        self.sums.resize(pairs, (0.0, 0.0));
        for token in energies.chunks_exact(pairs * 2) {
            for (sum, pair) in self.sums.iter_mut().zip(token.chunks_exact(2)) {
                sum.0 += f64::from(pair[0]);
                sum.1 += f64::from(pair[1]);
            }
        }
    }
}

/// A sampled token that was given to the caller and is not read yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pending {
    pub(crate) token: i32,
    pub(crate) write: bool,
}

/// One user's session over a shared model.
#[derive(Debug)]
pub struct Session {
    model: Arc<Model>,
    memory: MemoryBuffers,
    /// What the turn carries; none between turns.
    cache: Option<TurnCache>,
    /// The logits behind the last token of the turn; none when the turn is empty.
    logits: Logits,
    spare_logits: Logits,
    /// How many of the largest logits the coming read needs, where they are on a device; none for all.
    enough: Option<usize>,
    /// The turn's tokens, for the repetition penalty.
    turn: Vec<i32>,
    pending: Option<Pending>,
    /// Set while a chat's reply is being made: whatever is called next ends that turn first.
    ends_turn: bool,
    sampler: Sampler,
    tokens_seen: u64,
    turns: u64,
    /// Whether any token may write the memory.
    writable: bool,
    /// What the corrections are multiplied by at reads.
    strength: f32,
    /// The last tokens of the turns that ended, at most [`RECENT_TOKENS`].
    recent: Vec<i32>,
    /// Counts the calls that move the session, so that an older generation knows that it is over.
    epoch: u64,
    /// Where the session waits for its runs.
    seat: Seat<Row>,
    /// Whether a reply is being made, token after token.
    streaming: bool,
    /// Whether somebody has asked for the state on the host since the last turn ended, as who commits every turn does.
    asked: AtomicBool,
}

/// What a failed call puts back.
struct Before {
    memory: State,
    cached: Option<usize>,
    turn: usize,
    tokens_seen: u64,
}

impl Session {
    /// A session with an empty memory, its sampler seeded by the machine's own randomness.
    pub fn new(model: Arc<Model>) -> Self {
        let geometry = model.geometry();
        Self {
            memory: MemoryBuffers::zeroed(&geometry, model.home().clone()),
            cache: None,
            logits: Logits::default(),
            spare_logits: Logits::default(),
            enough: None,
            turn: Vec::new(),
            pending: None,
            ends_turn: false,
            sampler: Sampler::from_entropy(),
            tokens_seen: 0,
            turns: 0,
            writable: true,
            strength: 1.0,
            recent: Vec::new(),
            epoch: 0,
            seat: Seat::new(),
            streaming: false,
            asked: AtomicBool::new(false),
            model,
        }
    }

    /// The model under the session.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The memory's geometry.
    pub fn geometry(&self) -> Geometry {
        self.model.geometry()
    }

    /// The present state, float32 [layers, heads, r, r], on the host: where it lies on a device it is copied, once for each state. Holding
    /// it keeps it as it is.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device fails; [`EngineError::NotFinite`] for a state of a device that holds NaN or infinite numbers.
    pub fn memory(&self) -> Result<MemoryView> {
        self.asked.store(true, Ordering::Relaxed);
        self.memory.front().host()
    }

    /// The present state where runs leave it, on the host or on the device, without a copy. Holding it keeps it as it is.
    ///
    /// # Errors
    /// [`EngineError::Device`] when a state that came from the host cannot be put on the device.
    pub fn state(&mut self) -> Result<State> {
        self.memory.settled()
    }

    /// Tokens read since the memory was empty, over all turns and restarts.
    pub fn tokens_seen(&self) -> u64 {
        self.tokens_seen
    }

    /// Turns ended since the memory was empty.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// Whether tokens may write the memory at all.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Lets tokens write the memory, or none, whatever the calls say.
    pub fn set_writable(&mut self, writable: bool) {
        self.writable = writable;
    }

    /// What the corrections are multiplied by at reads; 1 is as trained.
    pub fn strength(&self) -> f32 {
        self.strength
    }

    /// The graph that the session's tokens run on: `blocks`, `fused` or `portable`.
    pub fn graph(&self) -> &'static str {
        if as_trained(self.strength) {
            self.model.graph()
        } else {
            "portable"
        }
    }

    /// Has the corrections of all tokens that are read from now on multiplied by `strength`: 0 reads nothing, 1 is as trained and the same
    /// bits as ever. Any other one runs the measured graph, which is a second copy of the weights in memory.
    ///
    /// # Errors
    /// [`EngineError::Value`] for a strength that is negative or not finite; [`EngineError::Unsupported`] when the bundle's graph has no such
    /// input. The session is as it was.
    pub fn set_strength(&mut self, strength: f32) -> Result<()> {
        if !strength.is_finite() || strength < 0.0 {
            return Err(EngineError::Value(format!(
                "strength is {strength}, expected a number from 0 on; 1 is as trained"
            )));
        }
        let graph = &self.model.manifest().graph;
        if !as_trained(strength) && (!graph.strength || graph.measured_file.is_none()) {
            return Err(EngineError::Unsupported(format!(
                "strength is {strength}, but this bundle's graph has no input for it, only 1 can be had; export the bundle again with this \
                 version of deltamem-export"
            )));
        }
        self.strength = strength;
        Ok(())
    }

    /// Whether the next token that is read begins a turn.
    pub fn at_start(&self) -> bool {
        self.position() == 0 || self.ends_turn
    }

    /// Tokens in the present turn.
    pub fn position(&self) -> usize {
        self.cache.as_ref().map_or(0, TurnCache::len)
    }

    /// Bytes of the turn's KV cache and other states; 0 between turns.
    pub fn cache_bytes(&self) -> usize {
        self.cache.as_ref().map_or(0, TurnCache::bytes)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether there is anything to go on from.
    pub(crate) fn has_logits(&self) -> bool {
        self.logits.any()
    }

    /// Chooses the next token. On a device all logits are brought from it only where the best that came down do not say which it is.
    pub(crate) fn sample(&mut self, options: &SamplingOptions) -> Result<i32> {
        if let Some((best, vocab)) = self.logits.best()
            && let Some(token) = self.sampler.sample_best(options, best, vocab)
        {
            return Ok(token);
        }
        Ok(self.sampler.sample(options, self.logits.all()?, &self.turn)?)
    }

    /// Brings all logits of the last token, so that others than those that they came down for may choose from them.
    pub(crate) fn keep_logits(&mut self) -> Result<()> {
        self.logits.all().map(|_| ())
    }

    /// Has the reads from here on bring as much of the logits as these options need, or all.
    pub(crate) fn set_enough(&mut self, options: Option<&SamplingOptions>) {
        self.enough = options.and_then(|options| options.depends_on(self.model.vocab()));
    }

    pub(crate) fn set_pending(&mut self, token: i32, write: bool) {
        self.logits.let_go();
        self.pending = Some(Pending { token, write });
    }

    /// A reply is being made: tokens will follow one another.
    pub(crate) fn stream(&mut self) {
        self.streaming = true;
    }

    /// No token will follow soon; sessions that step together need not wait for this one.
    pub(crate) fn rest(&mut self) {
        self.streaming = false;
        self.model.schedule.leave(&mut self.seat);
    }

    pub(crate) fn set_ends_turn(&mut self) {
        self.ends_turn = true;
    }

    /// Reads tokens. The KV cache goes on inside the turn; where tokens write, the split of a stream into calls never changes a result.
    /// Where spans write, all tokens of the call read the state from before it, and then each span is one write, in order.
    ///
    /// # Errors
    /// [`EngineError::Value`] for spans that do not fit, or that a span bundle needs; [`EngineError::TokenOutOfRange`] and [`EngineError::ContextLength`] before anything is computed; [`EngineError::Interrupted`]
    /// when `interrupt` says so between chunks; [`EngineError::NotFinite`], [`EngineError::Onnx`]. In each case the session is as it was.
    pub fn feed(&mut self, tokens: &[i32], options: FeedOptions<'_>, interrupt: Interrupt<'_>) -> Result<()> {
        let writes = self.writes(&options.spans, tokens.len(), options.write)?;
        self.settle(interrupt)?;
        self.read(tokens, &writes, options.logits, options.energy, interrupt)
    }

    /// What so many tokens of this model write.
    ///
    /// # Errors
    /// [`EngineError::Value`] for spans that do not fit the tokens or the bundle, or that a span bundle needs.
    pub(crate) fn writes(&self, spans: &Spans<'_>, tokens: usize, write: bool) -> Result<Writes> {
        let granularity = self.model.manifest().memory.write_granularity;
        Writes::new(spans, granularity, tokens, write && self.writable)
    }

    /// Ends the turn: the KV cache is dropped, the memory stays.
    ///
    /// # Errors
    /// As [`Session::feed`], for the last sampled token, which is read first.
    pub fn end_turn(&mut self, interrupt: Interrupt<'_>) -> Result<()> {
        self.settle(interrupt)?;
        self.close_turn();
        Ok(())
    }

    /// Empties the memory and drops the turn; the sampler goes on.
    pub fn reset(&mut self) {
        self.abandon_turn();
        self.recent = Vec::new();
        self.memory
            .set_front(State::Host(vec![0.0; self.geometry().elements()].into()));
        self.tokens_seen = 0;
        self.turns = 0;
    }

    /// What the session would need to go on elsewhere: memory, counters, sampler. The turn's KV cache is not in it.
    ///
    /// # Errors
    /// As [`Session::feed`], for the last sampled token, which is read first.
    pub fn snapshot(&mut self, interrupt: Interrupt<'_>) -> Result<Snapshot> {
        self.settle(interrupt)?;
        Snapshot::new(
            self.geometry(),
            self.model.fingerprint(),
            self.memory()?,
            self.tokens_seen,
            self.turns,
            self.sampler.state(),
        )
        .map_err(|error| EngineError::Session(error.to_string()))
    }

    /// Takes up a snapshot: its memory, counters and sampler. The present turn is dropped.
    ///
    /// # Errors
    /// [`EngineError::Fingerprint`] when the snapshot was written by another model; the session is as it was.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let (found, expected) = (snapshot.fingerprint(), self.model.fingerprint());
        if found != expected || snapshot.geometry() != self.geometry() {
            return Err(EngineError::Fingerprint {
                found: found.to_string(),
                expected: expected.to_string(),
            });
        }
        self.abandon_turn();
        // They may be another's.
        self.recent = Vec::new();
        self.memory.set_front(State::Host(Arc::clone(snapshot.memory())));
        self.tokens_seen = snapshot.tokens_seen();
        self.turns = snapshot.turns();
        self.sampler = Sampler::from_state(snapshot.sampler());
        Ok(())
    }

    /// Starts the session's sampler afresh from `seed`.
    pub fn reseed(&mut self, seed: u64) {
        self.sampler.reseed(seed);
    }

    /// Begins a turn with a prefix that was read before: its keys and values are copied, the memory stays as it is.
    ///
    /// # Errors
    /// [`EngineError::Session`] in the middle of a turn; [`EngineError::Value`] for a prefix of another model; as [`Session::feed`] for the last
    /// sampled token, which is read first.
    pub fn begin(&mut self, prefix: &Prefix, interrupt: Interrupt<'_>) -> Result<()> {
        prefix.check(&self.model)?;
        self.settle(interrupt)?;
        if self.position() > 0 {
            return Err(EngineError::Session(format!(
                "a prefix stands at the start of a turn, and this turn has {} tokens; call end_turn() first",
                self.position()
            )));
        }
        self.cache = Some(prefix.cache(&self.model)?);
        prefix.tokens().clone_into(&mut self.turn);
        self.logits.set(prefix.logits());
        Ok(())
    }

    /// Whether a sampled token is not read yet, or a chat's turn waits for its end: [`Session::settle`] would move the session.
    pub fn unsettled(&self) -> bool {
        self.pending.is_some() || self.ends_turn
    }

    /// Brings what an unfinished generation left into order: its last token is read, and if it was a chat's reply the turn ends.
    /// Every call that moves the session begins here; older generations are over from here on.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn settle(&mut self, interrupt: Interrupt<'_>) -> Result<()> {
        self.epoch += 1;
        self.read_pending(None, interrupt)?;
        if self.ends_turn {
            self.close_turn();
        }
        Ok(())
    }

    /// Reads the last sampled token, if it is not read yet. At the end of the context there is no room for it, and it is let go.
    pub(crate) fn read_pending(
        &mut self,
        energy: Option<&mut DeltaEnergy>,
        interrupt: Interrupt<'_>,
    ) -> Result<()> {
        if let Some(Pending { token, write }) = self.pending {
            if self.position() < self.model.context_length() {
                // A span of one token is a token write.
                let writes = if write && self.writable {
                    Writes::Tokens
                } else {
                    Writes::Nothing
                };
                self.read(&[token], &writes, None, energy, interrupt)?;
            }
            self.pending = None;
        }
        Ok(())
    }

    /// Checks that the turn has room for `tokens` more.
    ///
    /// # Errors
    /// [`EngineError::ContextLength`] when it has not.
    pub fn check_room(&self, tokens: usize) -> Result<()> {
        let (position, context) = (self.position(), self.model.context_length());
        if tokens > context.saturating_sub(position) {
            return Err(EngineError::ContextLength {
                tokens,
                position,
                context,
            });
        }
        Ok(())
    }

    /// Drops the turn's KV cache and counts the turn, if there was one.
    pub(crate) fn close_turn(&mut self) {
        if self.position() > 0 {
            self.turns += 1;
            self.recent = self.recent_tokens();
        }
        self.abandon_turn();
    }

    fn abandon_turn(&mut self) {
        self.epoch += 1;
        self.rest();
        if let Some(cache) = self.cache.take() {
            self.model.return_cache(cache);
        }
        // Between turns a session is its state: what a turn needs is allocated by its first tokens.
        self.logits = Logits::default();
        self.spare_logits = Logits::default();
        self.turn = Vec::new();
        self.memory.leave_turn(std::mem::take(self.asked.get_mut()));
        self.pending = None;
        self.ends_turn = false;
    }

    /// What each token reads the memory with, float32 [tokens, layers, heads, r]: the queries of these tokens in a turn of their own
    /// that writes nothing, on the memory as it is. The session stays as it is.
    ///
    /// # Errors
    /// As [`Session::feed`]; [`EngineError::Unsupported`] when the bundle has no measured graph.
    pub fn queries(&self, tokens: &[i32], interrupt: Interrupt<'_>) -> Result<Vec<f32>> {
        let [layers, heads, rank, _] = self.geometry().shape();
        let mut all = vec![0.0; tokens.len() * layers * heads * rank];
        let mut chunks = all.chunks_mut(CHUNK_TOKENS * layers * heads * rank);
        self.read_aside(tokens, interrupt, |read| {
            read(Measures {
                queries: chunks.next(),
                ..Measures::default()
            })
        })?;
        Ok(all)
    }

    /// Reads tokens in a turn of their own that writes nothing, on the memory as it is, and leaves the session as it is. `each` is called
    /// once for every chunk and must call what it is given once, with what it wants measured.
    pub(crate) fn read_aside(
        &self,
        tokens: &[i32],
        interrupt: Interrupt<'_>,
        mut each: impl FnMut(&mut dyn FnMut(Measures<'_>) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        self.model.check_tokens(tokens)?;
        let mut aside = Self::new(Arc::clone(&self.model));
        aside.check_room(tokens.len())?;
        aside.memory.set_front(self.memory.front());
        aside.strength = self.strength;
        let mut cache = self.model.lend_own_cache()?;
        let mut outcome = Ok(());
        for tokens in tokens.chunks(CHUNK_TOKENS) {
            outcome = if interrupt() {
                Err(EngineError::Interrupted)
            } else {
                each(&mut |measures| aside.read_chunk(tokens, false, None, &mut cache, None, measures))
            };
            if outcome.is_err() {
                break;
            }
        }
        self.model.return_cache(cache);
        outcome
    }

    /// Reads a turn's first tokens into buffers of its own, without writing; returns them and the last token's logits.
    pub(crate) fn read_prefix(
        &mut self,
        tokens: &[i32],
        interrupt: Interrupt<'_>,
    ) -> Result<(TurnCache, Vec<f32>)> {
        self.cache = Some(self.model.lend_own_cache()?);
        self.read(tokens, &Writes::Nothing, None, None, interrupt)?;
        let cache = self.cache.take().ok_or_else(lost)?;
        Ok((cache, self.logits.take()))
    }

    /// The last tokens that were read, over turns, at most [`RECENT_TOKENS`].
    pub(crate) fn recent_tokens(&self) -> Vec<i32> {
        let all = self.recent.iter().chain(&self.turn).copied();
        all.skip((self.recent.len() + self.turn.len()).saturating_sub(RECENT_TOKENS))
            .collect()
    }

    /// Reads tokens, whole or not at all.
    pub(crate) fn read(
        &mut self,
        tokens: &[i32],
        writes: &Writes,
        logits: Option<&mut [f32]>,
        energy: Option<&mut DeltaEnergy>,
        interrupt: Interrupt<'_>,
    ) -> Result<()> {
        self.model.check_tokens(tokens)?;
        self.check_room(tokens.len())?;
        let vocab = self.model.vocab();
        if let Some(logits) = &logits
            && Some(logits.len()) != tokens.len().checked_mul(vocab)
        {
            return Err(EngineError::Session(format!(
                "the logits' buffer holds {} numbers, expected {} x {vocab}",
                logits.len(),
                tokens.len()
            )));
        }
        if tokens.is_empty() {
            return Ok(());
        }
        let before = Before {
            memory: self.memory.front(),
            cached: self.cache.as_ref().map(TurnCache::len),
            turn: self.turn.len(),
            tokens_seen: self.tokens_seen,
        };
        if let Some(cache) = &mut self.cache {
            cache.begin();
        }
        let result = self.read_chunks(tokens, writes, logits, energy, interrupt);
        match result {
            Ok(()) => std::mem::swap(&mut self.logits, &mut self.spare_logits),
            Err(_) => self.put_back(before),
        }
        result
    }

    fn read_chunks(
        &mut self,
        tokens: &[i32],
        writes: &Writes,
        mut logits: Option<&mut [f32]>,
        mut energy: Option<&mut DeltaEnergy>,
        interrupt: Interrupt<'_>,
    ) -> Result<()> {
        let vocab = self.model.vocab();
        let pairs = self.model.energy_per_token() / 2;
        let mut all_energies = Vec::new();
        let mut weights = Vec::new();
        let mut gathered = match writes {
            Writes::Spans(plan) => Gathered::zeroed(plan.count(), self.model.numbers_per_span())?,
            Writes::Nothing | Writes::Tokens => Gathered::default(),
        };
        let mut cache = match self.cache.take() {
            Some(cache) => cache,
            None => self.model.lend_cache()?,
        };
        let mut outcome = Ok(());
        let mut first = 0;
        while first < tokens.len() {
            if first > 0 && interrupt() {
                outcome = Err(EngineError::Interrupted);
                break;
            }
            let end = tokens.len().min(first + self.model.chunk_tokens(&self.seat));
            let chunk = &tokens[first..end];
            let wanted = logits
                .as_deref_mut()
                .map(|all| &mut all[first * vocab..][..chunk.len() * vocab]);
            if energy.is_some() {
                all_energies.resize(chunk.len() * pairs * 2, 0.0);
            }
            let measures = Measures {
                energy: energy.is_some().then_some(&mut all_energies[..]),
                ..Measures::default()
            };
            outcome = match writes {
                Writes::Nothing | Writes::Tokens => {
                    let write = *writes == Writes::Tokens;
                    self.read_chunk(chunk, write, None, &mut cache, wanted, measures)
                }
                Writes::Spans(plan) => {
                    // The last chunk writes every span of the call; the others gather for those that they touch.
                    let range = first..end;
                    let complete = range.end == tokens.len();
                    let spans = if complete {
                        0..plan.count()
                    } else {
                        plan.touched(range.clone())
                    };
                    let run = plan
                        .weights(range, spans.clone(), &mut weights)
                        .and_then(|()| gathered.parts(spans.clone()))
                        .and_then(|(past, present)| {
                            let spans = ChunkSpans {
                                weights: &weights,
                                complete,
                                past,
                                present,
                            };
                            self.read_chunk(chunk, false, Some(spans), &mut cache, wanted, measures)
                        });
                    if run.is_ok() {
                        gathered.keep(spans);
                    }
                    run
                }
            };
            if outcome.is_err() {
                break;
            }
            if let Some(sum) = energy.as_deref_mut() {
                sum.add(&all_energies, pairs);
            }
            first = end;
        }
        self.cache = Some(cache);
        outcome
    }

    fn read_chunk(
        &mut self,
        tokens: &[i32],
        write: bool,
        spans: Option<ChunkSpans<'_>>,
        cache: &mut TurnCache,
        mut wanted: Option<&mut [f32]>,
        measures: Measures<'_>,
    ) -> Result<()> {
        let vocab = self.model.vocab();
        let past_memory = self.memory.front();
        let mut back = self.memory.take_back();
        let enough = self.enough.filter(|_| wanted.is_none());
        let steps = tokens.len() == 1 && spans.is_none() && !measures.any() && as_trained(self.strength);
        let outcome = match (&mut cache.kv, tokens) {
            (TurnKv::Pooled(place), &[token]) if steps => {
                // Tokens of one another's sessions are read in one run.
                let row = Row {
                    token,
                    write,
                    past_memory,
                    present_memory: back,
                    logits: std::mem::take(&mut self.spare_logits),
                    enough,
                    place: std::mem::take(place),
                    outcome: Outcome::Waiting,
                };
                let row = self
                    .model
                    .run_row(&mut self.seat, row, self.streaming)
                    .ok_or_else(lost)?;
                *place = row.place;
                back = row.present_memory;
                self.spare_logits = row.logits;
                match row.outcome {
                    Outcome::Run => match wanted {
                        Some(wanted) => self.spare_logits.all().map(|all| wanted.copy_from_slice(all)),
                        None => Ok(()),
                    },
                    Outcome::Failed(error) => Err(error),
                    Outcome::Waiting => Err(lost()),
                }
            }
            _ => {
                let outcome = self.model.run_chunk(
                    &mut self.seat,
                    Chunk {
                        tokens,
                        write,
                        spans,
                        past_memory: &past_memory,
                        present_memory: &mut back,
                        turn: cache,
                        strength: self.strength,
                        logits: match wanted.as_deref_mut() {
                            Some(all) => LogitsTo::All(all),
                            None => LogitsTo::Last(&mut self.spare_logits, enough),
                        },
                        measures,
                    },
                );
                if let Some(all) = wanted {
                    self.spare_logits.set(&all[all.len() - vocab..]);
                }
                outcome
            }
        };
        let outcome = outcome.and_then(|()| back.check());
        if outcome.is_ok() {
            self.memory.advance(back)?;
            cache.advance(tokens.len());
            self.turn.extend_from_slice(tokens);
            self.tokens_seen += tokens.len() as u64;
        } else {
            self.memory.give_back(back);
        }
        outcome
    }

    fn put_back(&mut self, before: Before) {
        self.memory.set_front(before.memory);
        match (before.cached, &mut self.cache) {
            (Some(len), Some(cache)) => cache.roll_back(len),
            (None, cache) => {
                if let Some(cache) = cache.take() {
                    self.model.return_cache(cache);
                }
            }
            (Some(_), None) => {}
        }
        self.turn.truncate(before.turn);
        self.tokens_seen = before.tokens_seen;
    }
}

fn lost() -> EngineError {
    EngineError::Session("a step of this session's model broke off; the session is as it was before the call, please report this".into())
}

impl Drop for Session {
    fn drop(&mut self) {
        self.rest();
        if let Some(cache) = self.cache.take() {
            self.model.return_cache(cache);
        }
    }
}
