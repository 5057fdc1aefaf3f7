//! What the tokens of a call write: each by itself, or the mean of each span of them. It checks what a caller says about spans and lays
//! out which spans a chunk of the call touches. It knows ids and ranges; text is cut in [`crate::text`], means are taken in the graph.

use std::borrow::Cow;
use std::ops::Range;

use crate::bundle::WriteGranularity;
use crate::error::{EngineError, Result};

/// What a caller says about the spans of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Spans<'a> {
    /// Nothing. A token bundle needs nothing; a span bundle refuses to guess.
    #[default]
    Unsaid,
    /// Each token writes by itself, on purpose.
    Token,
    /// For each token the id of the span that it belongs to, never falling among those from 0 on; -1: the token is not written.
    Ids(Cow<'a, [i32]>),
}

impl Spans<'_> {
    /// The same, borrowed.
    pub fn borrowed(&self) -> Spans<'_> {
        match self {
            Self::Unsaid => Spans::Unsaid,
            Self::Token => Spans::Token,
            Self::Ids(ids) => Spans::Ids(Cow::Borrowed(ids)),
        }
    }
}

/// What a call writes, checked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    /// Nothing: the tokens only read.
    Nothing,
    /// Each token.
    Tokens,
    /// The mean of each span.
    Spans(SpanPlan),
}

impl Writes {
    /// What `tokens` tokens write in a bundle of that granularity.
    ///
    /// # Errors
    /// [`EngineError::Value`] when the spans do not fit the tokens or the bundle, or are needed and were not given.
    pub(crate) fn new(
        spans: &Spans<'_>,
        granularity: WriteGranularity,
        tokens: usize,
        write: bool,
    ) -> Result<Self> {
        let plan = match (spans, granularity) {
            (Spans::Ids(_), WriteGranularity::Token) => {
                return Err(EngineError::Value(
                    "spans holds ids, and this bundle writes per token (its memory.write_granularity is token): leave spans out, or \
                     load a bundle whose adapter writes per message or sentence"
                        .into(),
                ));
            }
            (Spans::Ids(ids), _) => Self::Spans(SpanPlan::new(ids, tokens)?),
            (Spans::Token, _) | (Spans::Unsaid, WriteGranularity::Token) => Self::Tokens,
            (Spans::Unsaid, _) if !write => Self::Nothing,
            (Spans::Unsaid, _) => {
                return Err(EngineError::Value(format!(
                    "this bundle writes one mean a {}, and token ids do not say which token belongs to which: pass spans (int32 [T], the \
                     id of each token's span, ascending, -1 for none), or spans=\"token\" to write each token by itself, or write=False \
                     to read only",
                    granularity.as_str()
                )));
            }
        };
        Ok(if write { plan } else { Self::Nothing })
    }
}

/// The spans of one call, counted in the order of their ids.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SpanPlan {
    /// For each token of the call the number of its span, from 0 on; `None` for a token of no span.
    numbers: Vec<Option<usize>>,
    /// Tokens of each span.
    lengths: Vec<usize>,
}

impl SpanPlan {
    fn new(ids: &[i32], tokens: usize) -> Result<Self> {
        if ids.len() != tokens {
            return Err(EngineError::Value(format!(
                "spans holds {} ids for {tokens} tokens, expected one a token",
                ids.len()
            )));
        }
        let mut lengths: Vec<usize> = Vec::new();
        let mut numbers = Vec::with_capacity(ids.len());
        let mut last = -1;
        for (index, &id) in ids.iter().enumerate() {
            if id < -1 {
                return Err(EngineError::Value(format!(
                    "spans[{index}] is {id}, expected ids from 0 on, or -1 for a token that is not written"
                )));
            }
            if id == -1 {
                numbers.push(None);
                continue;
            }
            if id < last {
                return Err(EngineError::Value(format!(
                    "spans[{index}] is {id}, below the {last} in front of it: spans are written in ascending id and lie one behind the \
                     other, so ids must not fall"
                )));
            }
            if id > last {
                lengths.push(0);
                last = id;
            }
            numbers.push(Some(lengths.len() - 1));
            if let Some(length) = lengths.last_mut() {
                *length += 1;
            }
        }
        Ok(Self { numbers, lengths })
    }

    /// How many spans there are.
    pub(crate) fn count(&self) -> usize {
        self.lengths.len()
    }

    /// The spans that have a token among these.
    pub(crate) fn touched(&self, tokens: Range<usize>) -> Range<usize> {
        let mut spans = self.numbers[tokens].iter().flatten();
        match (spans.next(), spans.next_back()) {
            (Some(&first), last) => first..last.map_or(first, |&last| last) + 1,
            (None, _) => 0..0,
        }
    }

    /// The weights of a chunk's graph, [spans, tokens]: 1/length of the whole span for a token in it, 0 for others.
    ///
    /// # Errors
    /// [`EngineError::Session`] when there is no memory for them.
    pub(crate) fn weights(
        &self,
        tokens: Range<usize>,
        spans: Range<usize>,
        weights: &mut Vec<f32>,
    ) -> Result<()> {
        let width = tokens.len();
        resize_zeroed(weights, spans.len().saturating_mul(width))?;
        for (column, number) in self.numbers[tokens].iter().enumerate() {
            if let Some(number) = number
                && spans.contains(number)
            {
                weights[(number - spans.start) * width + column] = 1.0 / self.lengths[*number] as f32;
            }
        }
        Ok(())
    }
}

/// What the spans of one call have gathered so far, float32 [spans, layers, W], and room for what a chunk makes of it.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    sums: Vec<f32>,
    present: Vec<f32>,
    per_span: usize,
}

impl Gathered {
    /// Zeros for `spans` spans of `per_span` numbers.
    ///
    /// # Errors
    /// [`EngineError::Session`] when there is no memory for them.
    pub(crate) fn zeroed(spans: usize, per_span: usize) -> Result<Self> {
        let mut sums = Vec::new();
        resize_zeroed(&mut sums, spans.saturating_mul(per_span))?;
        Ok(Self {
            sums,
            present: Vec::new(),
            per_span,
        })
    }

    /// (past, present) of these spans for one run.
    ///
    /// # Errors
    /// [`EngineError::Session`] when there is no memory for them.
    pub(crate) fn parts(&mut self, spans: Range<usize>) -> Result<(&[f32], &mut [f32])> {
        let past = &self.sums[spans.start * self.per_span..spans.end * self.per_span];
        resize_zeroed(&mut self.present, past.len())?;
        Ok((past, &mut self.present))
    }

    /// Keeps what the run made of these spans.
    pub(crate) fn keep(&mut self, spans: Range<usize>) {
        self.sums[spans.start * self.per_span..spans.end * self.per_span].copy_from_slice(&self.present);
    }
}

fn resize_zeroed(buffer: &mut Vec<f32>, length: usize) -> Result<()> {
    buffer.clear();
    buffer.try_reserve(length).map_err(|_| {
        EngineError::Session(format!(
            "no memory for {} MiB of spans; feed the text in several calls",
            length.saturating_mul(4) >> 20
        ))
    })?;
    buffer.resize(length, 0.0);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use proptest::prelude::*;

    use super::*;

    fn plan(ids: &[i32]) -> SpanPlan {
        SpanPlan::new(ids, ids.len()).unwrap()
    }

    fn refused(spans: &Spans<'_>, granularity: WriteGranularity, tokens: usize, write: bool) -> String {
        match Writes::new(spans, granularity, tokens, write) {
            Err(EngineError::Value(message)) => message,
            other => format!("no value error but {other:?}"),
        }
    }

    fn ids(ids: &[i32]) -> Spans<'_> {
        Spans::Ids(Cow::Borrowed(ids))
    }

    #[test]
    fn what_a_call_writes_follows_from_the_bundle_and_the_caller() {
        use WriteGranularity::{Message, Sentence, Token};
        for (spans, granularity, write, expected) in [
            (Spans::Unsaid, Token, true, Writes::Tokens),
            (Spans::Token, Token, true, Writes::Tokens),
            (Spans::Unsaid, Token, false, Writes::Nothing),
            (Spans::Token, Message, true, Writes::Tokens),
            (Spans::Token, Sentence, false, Writes::Nothing),
            (Spans::Unsaid, Sentence, false, Writes::Nothing),
            (ids(&[0, 0]), Message, false, Writes::Nothing),
            (ids(&[4, 4]), Message, true, Writes::Spans(plan(&[0, 0]))),
        ] {
            assert_eq!(
                Writes::new(&spans, granularity, 2, write).unwrap(),
                expected,
                "{spans:?}"
            );
        }
        for tokens in [0, 1, 2] {
            let message = refused(&Spans::Unsaid, Sentence, tokens, true);
            for way in [
                "one mean a sentence",
                "pass spans",
                "spans=\"token\"",
                "write=False",
            ] {
                assert!(message.contains(way), "{message}");
            }
        }
        for write in [true, false] {
            assert!(refused(&ids(&[0, 0]), Token, 2, write).contains("writes per token"));
            assert!(refused(&ids(&[0]), Message, 2, write).contains("1 ids for 2 tokens"));
            assert!(refused(&ids(&[0, -2]), Message, 2, write).contains("spans[1] is -2"));
            assert!(refused(&ids(&[3, -1, 2]), Message, 3, write).contains("spans[2] is 2, below the 3"));
        }
    }

    proptest! {
        #[test]
        fn the_weights_of_all_chunks_together_take_the_mean_of_each_span(
            steps in prop::collection::vec((0..3_i32, any::<bool>()), 1..80),
            chunk in 1..20_usize,
        ) {
            let mut id = 0;
            let ids: Vec<i32> = steps.iter().map(|&(step, none)| { id += step; if none { -1 } else { id } }).collect();
            let plan = plan(&ids);
            let mut distinct: Vec<i32> = ids.iter().copied().filter(|&id| id >= 0).collect();
            distinct.dedup();
            prop_assert_eq!(plan.count(), distinct.len());
            let mut sums = vec![vec![0.0_f32; ids.len()]; plan.count()];
            let mut weights = Vec::new();
            for first in (0..ids.len()).step_by(chunk) {
                let tokens = first..(first + chunk).min(ids.len());
                let touched = plan.touched(tokens.clone());
                plan.weights(tokens.clone(), touched.clone(), &mut weights).unwrap();
                for (row, span) in weights.chunks(tokens.len()).zip(touched.clone()) {
                    prop_assert!(row.iter().any(|&w| w > 0.0));
                    sums[span][tokens.clone()].copy_from_slice(row);
                }
                // All spans of the call, as in its last chunk: the same rows, and zeros for the others.
                let mut all = Vec::new();
                plan.weights(tokens.clone(), 0..plan.count(), &mut all).unwrap();
                for (span, row) in all.chunks(tokens.len()).enumerate() {
                    prop_assert_eq!(row, &sums[span][tokens.clone()]);
                    prop_assert!(touched.contains(&span) || row.iter().all(|&w| w == 0.0));
                }
            }
            for (weights, id) in sums.iter().zip(distinct) {
                let length = ids.iter().filter(|&&other| other == id).count();
                for (&weight, &other) in weights.iter().zip(&ids) {
                    prop_assert_eq!(weight, if other == id { 1.0 / length as f32 } else { 0.0 });
                }
            }
        }
    }

    #[test]
    fn what_is_gathered_is_kept_span_by_span() {
        let mut gathered = Gathered::zeroed(3, 2).unwrap();
        for (spans, value) in [(0..2, 1.0), (1..3, 2.0), (0..0, 9.0)] {
            let (past, present) = gathered.parts(spans.clone()).unwrap();
            for (present, past) in present.iter_mut().zip(past) {
                *present = past + value;
            }
            gathered.keep(spans);
        }
        assert_eq!(gathered.parts(0..3).unwrap().0, [1.0, 1.0, 3.0, 3.0, 2.0, 2.0]);
    }
}
