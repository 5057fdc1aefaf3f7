//! From logits to a token. A sampler owns a random stream that is the same on every machine: `ChaCha8` from a seed, `exp` from `libm`,
//! sums in f64 and in a fixed order, ties to the lowest id. It knows logits and ids; it knows nothing of text, sessions or graphs.
//!
//! The order is that of Hugging Face's processors and warpers: repetition penalty, temperature, top-k, top-p, min-p.

use deltamem_core::SamplerState;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// Logits are divided by it; 0 takes the most likely token. In [0, 100].
    pub temperature: f64,
    /// Only the most likely tokens whose probabilities just reach this sum stay. In (0, 1]; 1 is off.
    pub top_p: f64,
    /// Only this many of the most likely tokens stay; 0 is off.
    pub top_k: usize,
    /// Only tokens at least this share as likely as the most likely one stay. In [0, 1]; 0 is off.
    pub min_p: f64,
    /// Logits of recent tokens are divided (where positive) or multiplied (where negative) by it. In [0.01, 100]; 1 is off.
    pub repetition_penalty: f64,
    /// Where the random stream starts; `None` goes on with the sampler's own.
    pub seed: Option<u64>,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: None,
        }
    }
}

/// Why a token cannot be sampled.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// An option is outside its range.
    #[error("{option} is {value}, expected {expected}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: f64,
        /// Its range.
        expected: &'static str,
    },
    /// There are no logits, or more than ids.
    #[error(
        "there are {found} logits, expected 1 to 2147483647; the vocabulary and the graph do not belong together"
    )]
    Count {
        /// Logits found.
        found: usize,
    },
    /// A logit is NaN or +infinity.
    #[error(
        "the logit of token {token} is {value}, so no token can be chosen; the weights overflow or the bundle is broken \
         (`deltamem-export verify` checks a bundle)"
    )]
    NotANumber {
        /// The token's id.
        token: usize,
        /// Its logit.
        value: f32,
    },
    /// Every logit is -infinity.
    #[error(
        "every logit is -inf, so no token can be chosen; the bundle is broken (`deltamem-export verify` checks a bundle)"
    )]
    NothingLeft,
}

impl SamplingOptions {
    /// Checks that every option is within its range.
    ///
    /// # Errors
    /// [`SamplingError::Option`] names the first that is not.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let refuse = |option, value, expected| {
            Err(SamplingError::Option {
                option,
                value,
                expected,
            })
        };
        if !(0.0..=100.0).contains(&self.temperature) {
            return refuse(
                "temperature",
                self.temperature,
                "0 (the most likely token) to 100",
            );
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "more than 0, and at most 1 (off)");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "0 (off) to 1");
        }
        if !(0.01..=100.0).contains(&self.repetition_penalty) {
            return refuse(
                "repetition_penalty",
                self.repetition_penalty,
                "0.01 to 100, where 1 is off",
            );
        }
        Ok(())
    }
}

/// The most of the best logits that are brought from where all lie; for more than these, all are.
const MOST_BEST: usize = 256;

/// How many more are brought than can be chosen, so that few rows have nothing but equal ones at the border.
const BEYOND: usize = 7;

impl SamplingOptions {
    /// How many of the largest of `vocab` logits the choice depends on, where that is few: then [`Sampler::sample_best`] needs no others.
    pub(crate) fn depends_on(&self, vocab: usize) -> Option<usize> {
        if penalises(self) {
            return None;
        }
        let most = if self.temperature <= 0.0 { 1 } else { self.top_k };
        // With all words in play they are added up in the order of their ids.
        let few = most > 0 && most <= MOST_BEST && (most < vocab || self.temperature <= 0.0);
        few.then_some(most)
    }
}

/// How many of a row's largest logits to bring for a choice among `most` of them.
pub(crate) fn to_bring(most: usize, vocab: usize) -> usize {
    most.saturating_add(BEYOND).min(vocab)
}

fn penalises(options: &SamplingOptions) -> bool {
    (options.repetition_penalty - 1.0).abs() > 0.0
}

/// One session's random stream, and the room that sampling needs.
#[derive(Debug, Clone)]
pub struct Sampler {
    stream: ChaCha8Rng,
    /// The tokens still in play; kept from call to call so that no token allocates.
    candidates: Vec<Candidate>,
    /// Tokens under the repetition penalty, one bit each; all clear between calls.
    penalised: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    token: u32,
    /// The logit under penalty and temperature.
    logit: f64,
    /// exp(logit − the largest logit).
    weight: f64,
}

impl Sampler {
    /// A sampler whose stream starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self::from_key(key_of(seed))
    }

    /// A sampler with a stream of its own, which nobody can repeat unless its [`state`](Sampler::state) is kept.
    pub fn from_entropy() -> Self {
        use std::hash::{BuildHasher, RandomState};
        // The standard library keys its hash maps from the system's randomness: enough for a choice of words, and it cannot fail.
        let mut key = [0; 32];
        for word in key.chunks_exact_mut(8) {
            word.copy_from_slice(&RandomState::new().hash_one(0_u64).to_le_bytes());
        }
        Self::from_key(key)
    }

    /// A sampler that goes on where [`Sampler::state`] was taken.
    pub fn from_state(state: SamplerState) -> Self {
        let mut sampler = Self::from_key(state.seed);
        sampler
            .stream
            .set_word_pos(state.position % SamplerState::POSITIONS);
        sampler
    }

    fn from_key(key: [u8; 32]) -> Self {
        Self {
            stream: ChaCha8Rng::from_seed(key),
            candidates: Vec::new(),
            penalised: Vec::new(),
        }
    }

    /// Where the stream stands.
    pub fn state(&self) -> SamplerState {
        SamplerState {
            seed: self.stream.get_seed(),
            position: self.stream.get_word_pos() % SamplerState::POSITIONS,
        }
    }

    /// Starts the stream afresh from `seed`.
    pub fn reseed(&mut self, seed: u64) {
        self.stream = ChaCha8Rng::from_seed(key_of(seed));
    }

    /// Chooses the next token from `logits`, float32 of `[vocab]`. `recent` are the tokens under the repetition penalty, in any order and as
    /// often as they come; ids outside the vocabulary are ignored.
    ///
    /// A draw takes two words of the stream, whatever the options; the most likely token (temperature 0) takes none, so it leaves the
    /// stream where it was.
    ///
    /// # Errors
    /// [`SamplingError`]: an option out of range, no logits, a NaN or +inf among them, or nothing but -inf. The stream is untouched.
    pub fn sample(
        &mut self,
        options: &SamplingOptions,
        logits: &[f32],
        recent: &[i32],
    ) -> Result<i32, SamplingError> {
        options.validate()?;
        if logits.is_empty() || i32::try_from(logits.len()).is_err() {
            return Err(SamplingError::Count { found: logits.len() });
        }
        let penalises = penalises(options);
        let recent = if penalises { recent } else { &[] };
        self.mark(recent, logits.len());
        let chosen = self.choose(options, logits, penalises);
        self.unmark(recent);
        let token = chosen?;
        i32::try_from(token).map_err(|_| SamplingError::Count { found: logits.len() })
    }

    /// The same from the largest logits alone, in any order, (token, logit), none of them NaN: those of a row of `vocab` that has no larger
    /// ones besides. `None` where they do not say which token it is, and the whole row must be asked: the options need more, those at the
    /// border equal others that are not here, or the row is one of the errors. A token is the one that the row would give, bit for bit, and
    /// moves the stream as far.
    pub(crate) fn sample_best(
        &mut self,
        options: &SamplingOptions,
        best: &[(u32, f32)],
        vocab: usize,
    ) -> Option<i32> {
        let most = options.depends_on(vocab)?;
        options.validate().ok()?;
        self.candidates.clear();
        self.candidates
            .extend(best.iter().map(|&(token, logit)| Candidate {
                token,
                // As in `penalise`.
                logit: f64::from(logit) + 0.0,
                weight: 0.0,
            }));
        self.candidates.sort_unstable_by(best_first);
        let (first, last) = (*self.candidates.first()?, *self.candidates.last()?);
        if first.logit == f64::INFINITY || first.logit == f64::NEG_INFINITY {
            return None;
        }
        let all = self.candidates.len() == vocab || last.logit == f64::NEG_INFINITY;
        let border = self.candidates.get(most - 1).map_or(last, |&border| border);
        if !all && border.logit <= last.logit {
            return None;
        }
        if options.temperature <= 0.0 {
            return i32::try_from(first.token).ok();
        }
        self.candidates.truncate(most);
        self.candidates
            .retain(|candidate| candidate.logit > f64::NEG_INFINITY);
        self.weigh(options, first.logit);
        let total = self.cut(options);
        i32::try_from(self.draw(total)).ok()
    }

    fn choose(
        &mut self,
        options: &SamplingOptions,
        logits: &[f32],
        penalises: bool,
    ) -> Result<u32, SamplingError> {
        let best = match largest(logits) {
            Some(best) if !penalises => best,
            _ => self.best(options, logits)?,
        };
        if options.temperature <= 0.0 {
            return Ok(best.token);
        }
        self.collect(options, logits, best.logit);
        let total = self.cut(options);
        Ok(self.draw(total))
    }

    /// The most likely token under the penalty, the lowest id among equals. Says what is wrong where there is none.
    fn best(&self, options: &SamplingOptions, logits: &[f32]) -> Result<Candidate, SamplingError> {
        let mut best = Candidate {
            token: 0,
            logit: f64::NEG_INFINITY,
            weight: 0.0,
        };
        for (token, &value) in (0..).zip(logits) {
            if value.is_nan() || value == f32::INFINITY {
                return Err(SamplingError::NotANumber {
                    token: token as usize,
                    value,
                });
            }
            let logit = self.penalise(options, token, value);
            if logit > best.logit {
                best = Candidate {
                    token,
                    logit,
                    weight: 0.0,
                };
            }
        }
        if best.logit == f64::NEG_INFINITY {
            Err(SamplingError::NothingLeft)
        } else {
            Ok(best)
        }
    }

    /// Fills `candidates` with the tokens that top-k leaves, weighted by exp((logit − best) / temperature): in the order of their ids
    /// without top-k, best first with it.
    fn collect(&mut self, options: &SamplingOptions, logits: &[f32], best: f64) {
        self.candidates.clear();
        let k = if options.top_k == 0 {
            logits.len()
        } else {
            options.top_k.min(logits.len())
        };
        let selects = k < logits.len();
        // With top-k, twice k candidates are kept at most: the best k of them set the floor that later ones must pass.
        let room = k.saturating_mul(2);
        let mut floor = f64::NEG_INFINITY;
        for (token, &value) in (0..).zip(logits) {
            let logit = self.penalise(options, token, value);
            if logit <= floor {
                continue;
            }
            self.candidates.push(Candidate {
                token,
                logit,
                weight: 0.0,
            });
            if selects && self.candidates.len() == room {
                self.keep_best(k);
                floor = self
                    .candidates
                    .iter()
                    .fold(f64::INFINITY, |floor, candidate| floor.min(candidate.logit));
            }
        }
        if selects {
            self.keep_best(k);
            self.candidates.sort_unstable_by(best_first);
        }
        self.weigh(options, best);
    }

    /// Weights the candidates by exp((logit − best) / temperature).
    fn weigh(&mut self, options: &SamplingOptions, best: f64) {
        for candidate in &mut self.candidates {
            candidate.weight = libm::exp((candidate.logit - best) / options.temperature);
        }
    }

    fn keep_best(&mut self, k: usize) {
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k, best_first);
            self.candidates.truncate(k);
        }
    }

    /// Applies top-p and min-p; returns the sum of the weights that are left.
    fn cut(&mut self, options: &SamplingOptions) -> f64 {
        let candidates = &mut self.candidates;
        if options.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
            keep_nucleus(candidates, options.top_p, total);
        }
        if options.min_p > 0.0 {
            // The most likely token has weight 1.
            candidates.retain(|candidate| candidate.weight >= options.min_p);
        }
        candidates.iter().map(|candidate| candidate.weight).sum()
    }

    fn draw(&mut self, total: f64) -> u32 {
        // 53 bits, so that every value is exact; in [0, 1).
        let uniform = (self.stream.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let target = uniform * total;
        let (mut sum, mut chosen) = (0.0, 0);
        for candidate in &self.candidates {
            if candidate.weight > 0.0 {
                sum += candidate.weight;
                chosen = candidate.token;
                if target < sum {
                    break;
                }
            }
        }
        chosen
    }

    fn mark(&mut self, recent: &[i32], vocab: usize) {
        let words = vocab.div_ceil(64);
        if self.penalised.len() < words {
            self.penalised.resize(words, 0);
        }
        for (word, bit) in recent.iter().filter_map(|&token| place(token)) {
            if let Some(word) = self.penalised.get_mut(word) {
                *word |= bit;
            }
        }
    }

    fn unmark(&mut self, recent: &[i32]) {
        for (word, _) in recent.iter().filter_map(|&token| place(token)) {
            if let Some(word) = self.penalised.get_mut(word) {
                *word = 0;
            }
        }
    }

    fn penalise(&self, options: &SamplingOptions, token: u32, logit: f32) -> f64 {
        let logit = f64::from(logit);
        let token = token as usize;
        let penalised = if self.penalised[token / 64] >> (token % 64) & 1 == 0 {
            logit
        } else if logit > 0.0 {
            logit / options.repetition_penalty
        } else {
            logit * options.repetition_penalty
        };
        // -0 becomes 0, so that equal logits are equal in `best_first` too.
        penalised + 0.0
    }
}

/// The largest logit, the lowest id among equals; nothing if one is not a number or infinite, or all are negatively so. As [`Sampler::best`]
/// without a penalty, many at a time: of a vocabulary of 150,000 a plain loop takes as long as a layer.
fn largest(logits: &[f32]) -> Option<Candidate> {
    const LANES: usize = 32;
    let mut most = [f32::NEG_INFINITY; LANES];
    let mut wrong = [false; LANES];
    let (whole, rest) = logits.as_chunks::<LANES>();
    let mut see = |logits: &[f32]| {
        for ((most, wrong), &logit) in most.iter_mut().zip(&mut wrong).zip(logits) {
            *most = if logit > *most { logit } else { *most };
            *wrong |= logit.is_nan() || logit == f32::INFINITY;
        }
    };
    for lanes in whole {
        see(lanes);
    }
    see(rest);
    let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if most == f32::NEG_INFINITY || wrong.contains(&true) {
        return None;
    }
    let token = logits.iter().position(|&logit| logit >= most)?;
    Some(Candidate {
        token: u32::try_from(token).ok()?,
        logit: f64::from(most) + 0.0,
        weight: 0.0,
    })
}

/// Keeps the fewest tokens, best first, whose weights reach `top_p` of `total`.
fn keep_nucleus(candidates: &mut Vec<Candidate>, top_p: f64, total: f64) {
    // All tokens below this weight together have less than 1 − top_p, so none of them is in the nucleus. Halved, so that rounding
    // cannot take one that belongs.
    let negligible = (1.0 - top_p) * total / candidates.len() as f64 / 2.0;
    candidates.retain(|candidate| candidate.weight >= negligible);
    // The nucleus is mostly small: sort only as many of the best as it takes.
    let (mut sorted, mut more, mut sum) = (0, 64, 0.0);
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let next = if more < rest.len() {
            rest.select_nth_unstable_by(more, best_first);
            &mut rest[..more]
        } else {
            rest
        };
        next.sort_unstable_by(best_first);
        for candidate in next.iter() {
            sum += candidate.weight;
            sorted += 1;
            if sum >= top_p * total {
                candidates.truncate(sorted);
                return;
            }
        }
        more = sorted * 3;
    }
}

/// The word and bit of a token in the set of penalised tokens.
fn place(token: i32) -> Option<(usize, u64)> {
    let token = usize::try_from(token).ok()?;
    Some((token / 64, 1 << (token % 64)))
}

/// The most likely first, the lowest id first among equals.
fn best_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// The stream's key for a seed: BLAKE3, so that near seeds give unrelated streams, and no library's seeding can change it.
fn key_of(seed: u64) -> [u8; 32] {
    blake3::derive_key("deltamem_rt 2026 sampling stream", &seed.to_le_bytes())
}

#[cfg(test)]
mod tests;
