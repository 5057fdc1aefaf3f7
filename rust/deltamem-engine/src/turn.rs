//! What one turn carries from run to run and drops at its end: the KV cache, in buffers of its own or in a slot among those of others, and the
//! states of layers that are not attention.

use std::sync::Arc;

use crate::buffer::Home;
use crate::bundle::TurnState;
use crate::error::Result;
use crate::kv::{KvCache, KvLayout, KvTensor};
use crate::pool::Key;
use crate::slots::Bound;
use crate::states::TurnStates;

/// The buffers of one turn.
#[derive(Debug)]
pub(crate) struct TurnCache {
    /// Keys and values.
    pub(crate) kv: TurnKv,
    /// Everything else.
    pub(crate) states: TurnStates,
}

/// Keys and values of one turn.
#[derive(Debug)]
pub(crate) enum TurnKv {
    /// In buffers of its own.
    Own(KvCache),
    /// In the model's pool.
    Pooled(Pooled),
}

/// A turn's place in the model's pool.
#[derive(Debug, Default)]
pub(crate) struct Pooled {
    /// The slot; none before the first run.
    pub(crate) key: Option<Key>,
    /// Tokens that count.
    pub(crate) len: usize,
    /// Bytes that a cache of its own would hold.
    pub(crate) bytes: usize,
    /// What its rows begin with, where it has no slot to put it yet.
    pub(crate) prefix: Option<Arc<KvCache>>,
    /// Whether nothing is left to do to the slot.
    pub(crate) ready: bool,
}

/// The tensors of a run that the turn brings: the caches in the order key, value of each layer, the shapes of past and of present, and what
/// is read and written of the states.
#[derive(Debug)]
pub(crate) struct TurnTensors<'a> {
    pub(crate) kv: Vec<KvTensor<'a>>,
    pub(crate) shapes: [[usize; 4]; 2],
    pub(crate) states: Vec<(&'a mut [u8], &'a mut [u8])>,
}

impl TurnCache {
    /// The start of a turn in buffers of its own: no tokens, states of zero.
    pub(crate) fn new(layout: KvLayout, states: &[TurnState], home: &Home) -> Result<Self> {
        Ok(Self {
            kv: TurnKv::Own(KvCache::new(layout, home)?),
            states: TurnStates::zeroed(states)?,
        })
    }

    /// The start of a turn that will have a slot; the model has no states beside keys and values.
    pub(crate) fn pooled() -> Self {
        Self {
            kv: TurnKv::Pooled(Pooled::default()),
            states: TurnStates::default(),
        }
    }

    /// Tokens in the turn.
    pub(crate) fn len(&self) -> usize {
        match &self.kv {
            TurnKv::Own(kv) => kv.len(),
            TurnKv::Pooled(place) => place.len,
        }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        match &self.kv {
            TurnKv::Own(kv) => kv.bytes() + self.states.held(),
            TurnKv::Pooled(place) => place.bytes,
        }
    }

    /// What a run of `tokens` tokens binds, with room for them.
    pub(crate) fn tensors<'a>(
        &'a mut self,
        slots: &'a mut Bound<'_>,
        tokens: usize,
    ) -> Result<TurnTensors<'a>> {
        let (kv, shapes) = match &mut self.kv {
            TurnKv::Own(kv) => {
                kv.reserve(tokens)?;
                let shapes = kv.shapes(tokens);
                (kv.tensors_mut(tokens), shapes)
            }
            TurnKv::Pooled(place) => {
                let found = slots.one(place, tokens)?;
                (found.kv, found.shapes)
            }
        };
        Ok(TurnTensors {
            kv,
            shapes,
            states: self.states.pairs_mut().collect(),
        })
    }

    /// A call begins, which may be taken back by [`TurnCache::roll_back`].
    pub(crate) fn begin(&mut self) {
        self.states.begin();
    }

    /// A run of `tokens` tokens has succeeded.
    pub(crate) fn advance(&mut self, tokens: usize) {
        match &mut self.kv {
            TurnKv::Own(kv) => kv.advance(tokens),
            TurnKv::Pooled(place) => place.len += tokens,
        }
        self.states.advance();
    }

    /// Takes the present call back; the turn had `tokens` tokens before it.
    pub(crate) fn roll_back(&mut self, tokens: usize) {
        match &mut self.kv {
            TurnKv::Own(kv) => kv.truncate(tokens),
            // Rows behind them are written again before they are read.
            TurnKv::Pooled(place) => place.len = tokens,
        }
        self.states.roll_back();
    }
}
