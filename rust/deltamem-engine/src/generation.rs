//! One reply in the making: it samples a token, has the session read it, and gives text out in whole characters. All work happens
//! inside [`Generation::next`], so whoever stops asking stops the work. What the session is and how it reads is not known here.

use std::time::{Duration, Instant};

use crate::error::{EngineError, Result};
use crate::prefix::Prefix;
use crate::sampling::SamplingOptions;
use crate::session::{DeltaEnergy, Interrupt, Session};
use crate::spans::{Spans, Writes};
use crate::text::{StopScan, StopScanner, TextStream};

/// How a reply is made.
#[derive(Debug, Clone)]
pub struct GenerationOptions {
    /// The most tokens that are sampled, at least 1.
    pub max_new_tokens: usize,
    /// Temperature and its kin.
    pub sampling: SamplingOptions,
    /// Texts that end the reply; they are not part of it.
    pub stop: Vec<String>,
    /// Whether prompt and reply may write the memory.
    pub write: bool,
    /// Whether the turn ends with the reply (a chat's does).
    pub end_turn: bool,
    /// Whether the corrections' size is measured against what they correct.
    pub measure: bool,
    /// What the turn begins with, in front of the prompt.
    pub prefix: Option<std::sync::Arc<Prefix>>,
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model said so.
    Eos,
    /// One of the stop texts came.
    Stop,
    /// `max_new_tokens` were sampled.
    Length,
    /// The model's context is full.
    Context,
    /// The caller closed it.
    Closed,
}

impl FinishReason {
    /// The word for it: `eos`, `stop`, `length`, `context` or `closed`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::Closed => "closed",
        }
    }
}

/// What a reply took, so far.
#[derive(Debug, Clone, Default)]
pub struct GenerationStats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens sampled.
    pub tokens: usize,
    /// From the first call of `next` to the first sampled token.
    pub time_to_first_token: Option<Duration>,
    /// Time spent inside `next` after the first sampled token.
    pub decode_time: Duration,
    /// Why it ended; `None` while it goes on.
    pub finish_reason: Option<FinishReason>,
    /// The graph that it ran on: `blocks`, `fused` or `portable`.
    pub graph: &'static str,
    /// |corrections| / |what they correct| over all tokens read, when measured.
    pub delta_ratio: Option<f64>,
}

impl GenerationStats {
    /// Sampled tokens a second after the first one; `None` before the second one.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.decode_time.as_secs_f64();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }
}

/// One reply in the making.
#[derive(Debug)]
pub struct Generation {
    options: GenerationOptions,
    prompt: Vec<i32>,
    prompt_writes: Writes,
    eos: Vec<i32>,
    epoch: u64,
    prompt_read: bool,
    stream: Option<TextStream>,
    stops: StopScanner,
    text: String,
    token_ids: Vec<i32>,
    energy: DeltaEnergy,
    stats: GenerationStats,
    /// Set once the session was left in order.
    closed: bool,
}

impl Generation {
    /// Prepares a reply. Nothing is computed before the first [`Generation::next`]. `spans` is what the prompt writes; sampled tokens
    /// are written one by one.
    ///
    /// # Errors
    /// [`EngineError::Value`] for spans that do not fit the prompt, or that a span bundle needs for it;
    /// a [`SamplingError`](crate::sampling::SamplingError) for an option out of range; [`EngineError::Session`] when there is neither a
    /// prompt nor anything in the turn to go on from, or when stop texts are asked of a bundle without a tokenizer;
    /// [`EngineError::TokenOutOfRange`] and [`EngineError::ContextLength`] for the prompt.
    pub fn new(
        session: &mut Session,
        prompt: Vec<i32>,
        spans: &Spans<'_>,
        options: GenerationOptions,
        interrupt: Interrupt<'_>,
    ) -> Result<Self> {
        options.sampling.validate()?;
        if options.max_new_tokens == 0 {
            return Err(EngineError::Value(
                "max_new_tokens is 0, expected at least 1".into(),
            ));
        }
        if options.stop.iter().any(String::is_empty) {
            return Err(EngineError::Value(
                "stop holds an empty text, which would end every reply at once; leave it out".into(),
            ));
        }
        let model = std::sync::Arc::clone(session.model());
        model.check_tokens(&prompt)?;
        let prompt_writes = match spans {
            // There is nothing to write, so nothing has to be said about it.
            Spans::Unsaid if prompt.is_empty() => Writes::Nothing,
            spans => session.writes(spans, prompt.len(), options.write)?,
        };
        let stream = match model.text() {
            Ok(text) => Some(text.stream()),
            Err(error) if !options.stop.is_empty() => return Err(error),
            Err(_) => None,
        };
        session.settle(interrupt)?;
        let prefix = options.prefix.as_deref();
        if let Some(prefix) = prefix {
            prefix.check(&model)?;
        }
        if prompt.is_empty() && !session.has_logits() && prefix.is_none() {
            return Err(EngineError::Session(
                "there is nothing to go on from: the turn is empty and so is the prompt; pass a prompt, or feed() first".into(),
            ));
        }
        session.check_room(prompt.len() + prefix.map_or(0, |prefix| prefix.tokens().len()))?;
        if let Some(prefix) = prefix {
            session.begin(prefix, interrupt)?;
        }
        if let Some(seed) = options.sampling.seed {
            session.reseed(seed);
        }
        if options.end_turn {
            session.set_ends_turn();
        }
        Ok(Self {
            epoch: session.epoch(),
            eos: model.manifest().tokens.eos.clone(),
            stops: StopScanner::new(options.stop.clone()),
            stats: GenerationStats {
                prompt_tokens: prompt.len(),
                graph: if options.measure {
                    "portable"
                } else {
                    session.graph()
                },
                ..GenerationStats::default()
            },
            prompt,
            prompt_writes,
            prompt_read: false,
            stream,
            text: String::new(),
            token_ids: Vec::new(),
            energy: DeltaEnergy::default(),
            closed: false,
            options,
        })
    }

    /// The text given out so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The tokens sampled so far, without the one that ended the reply (eos).
    pub fn token_ids(&self) -> &[i32] {
        &self.token_ids
    }

    /// What it took so far.
    pub fn stats(&self) -> GenerationStats {
        GenerationStats {
            delta_ratio: self.energy.ratio(),
            ..self.stats.clone()
        }
    }

    /// The next piece of text: whole characters, never empty when the bundle has a tokenizer; without one, an empty piece a token.
    /// `None` when the reply is over; by then the session has read all of it, except the eos token.
    ///
    /// # Errors
    /// [`EngineError::Session`] when the session was moved on by another call since; otherwise as [`Session::feed`].
    pub fn next(&mut self, session: &mut Session, interrupt: Interrupt<'_>) -> Result<Option<String>> {
        if self.closed {
            return Ok(None);
        }
        if session.epoch() != self.epoch {
            self.finish(FinishReason::Closed);
            self.closed = true;
            return Err(EngineError::Session(
                "this reply was ended by a later call on its session (feed, generate, chat, end_turn, restore, ...); read it to its end \
                 first, or start a new one"
                    .into(),
            ));
        }
        loop {
            if self.stats.finish_reason.is_some() {
                self.leave_in_order(session, interrupt)?;
                return Ok(None);
            }
            let piece = self.step(session, interrupt)?;
            if !piece.is_empty()
                || (self.stream.is_none() && self.stats.finish_reason != Some(FinishReason::Eos))
            {
                self.text.push_str(&piece);
                return Ok(Some(piece));
            }
        }
    }

    /// Ends the reply here. The session reads what was given out, and a chat's turn ends.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn close(&mut self, session: &mut Session, interrupt: Interrupt<'_>) -> Result<()> {
        if self.closed {
            return Ok(());
        }
        self.finish(FinishReason::Closed);
        if session.epoch() == self.epoch {
            self.leave_in_order(session, interrupt)?;
        }
        self.closed = true;
        Ok(())
    }

    /// Samples one token and returns the text that is certain by now.
    fn step(&mut self, session: &mut Session, interrupt: Interrupt<'_>) -> Result<String> {
        let started = Instant::now();
        let energy = self.options.measure.then_some(&mut self.energy);
        // What this reply's options need; whoever goes on from here with others has all of them.
        session.set_enough(Some(&self.options.sampling));
        let read = if self.prompt_read {
            session.stream();
            session.read_pending(energy, interrupt)
        } else {
            session.read(&self.prompt, &self.prompt_writes, None, energy, interrupt)
        };
        session.set_enough(None);
        read?;
        self.prompt_read = true;
        if session.position() >= session.model().context_length() {
            self.finish(FinishReason::Context);
            return Ok(self.flush());
        }
        let token = session.sample(&self.options.sampling)?;
        let elapsed = started.elapsed();
        self.stats.tokens += 1;
        match self.stats.time_to_first_token {
            None => self.stats.time_to_first_token = Some(elapsed),
            Some(_) => self.stats.decode_time += elapsed,
        }
        if self.eos.contains(&token) {
            // It is not read, so a later reply in this turn may go on from the same logits.
            if !self.options.end_turn {
                session.keep_logits()?;
            }
            self.finish(FinishReason::Eos);
            return Ok(self.flush());
        }
        self.token_ids.push(token);
        session.set_pending(token, self.options.write);
        let mut piece = String::new();
        if let Some(stream) = &mut self.stream
            && let Some(characters) = stream.push(token)?
        {
            match self.stops.push(&characters) {
                StopScan::Text(certain) => piece = certain,
                StopScan::Stopped(before) => {
                    self.finish(FinishReason::Stop);
                    return Ok(before);
                }
            }
        }
        if self.stats.tokens == self.options.max_new_tokens {
            self.finish(FinishReason::Length);
            piece.push_str(&self.flush());
        }
        Ok(piece)
    }

    /// The text that was held back: an unfinished character, the beginning of a stop text that did not come.
    fn flush(&mut self) -> String {
        let rest = self.stream.as_mut().map(TextStream::finish).unwrap_or_default();
        match self.stops.push(&rest) {
            StopScan::Text(certain) => certain + &self.stops.finish(),
            StopScan::Stopped(before) => before,
        }
    }

    fn finish(&mut self, reason: FinishReason) {
        self.stats.finish_reason.get_or_insert(reason);
    }

    /// Has the session read the last token that was given out, and ends a chat's turn.
    fn leave_in_order(&mut self, session: &mut Session, interrupt: Interrupt<'_>) -> Result<()> {
        let energy = self.options.measure.then_some(&mut self.energy);
        session.read_pending(energy, interrupt)?;
        session.rest();
        if self.options.end_turn {
            session.close_turn();
        }
        self.closed = true;
        Ok(())
    }
}
