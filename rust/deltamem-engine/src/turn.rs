//! What one turn carries from run to run and drops at its end: the KV cache, and the states of layers that are not attention.

use crate::bundle::TurnState;
use crate::error::Result;
use crate::kv::{KvCache, KvLayout};
use crate::states::TurnStates;

/// The buffers of one turn.
#[derive(Debug)]
pub(crate) struct TurnCache {
    /// Keys and values.
    pub(crate) kv: KvCache,
    /// Everything else.
    pub(crate) states: TurnStates,
}

impl TurnCache {
    /// The start of a turn: no tokens, states of zero.
    pub(crate) fn new(layout: KvLayout, states: &[TurnState]) -> Result<Self> {
        Ok(Self {
            kv: KvCache::new(layout)?,
            states: TurnStates::zeroed(states)?,
        })
    }

    /// Tokens in the turn.
    pub(crate) fn len(&self) -> usize {
        self.kv.len()
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.kv.bytes() + self.states.held()
    }

    /// A call begins, which may be taken back by [`TurnCache::roll_back`].
    pub(crate) fn begin(&mut self) {
        self.states.begin();
    }

    /// A run of `tokens` tokens has succeeded.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.kv.advance(tokens);
        self.states.advance();
    }

    /// Takes the present call back; the turn had `tokens` tokens before it.
    pub(crate) fn roll_back(&mut self, tokens: usize) {
        self.kv.truncate(tokens);
        self.states.roll_back();
    }

    /// Nothing of the turn is left in any buffer.
    pub(crate) fn wipe(&mut self) {
        self.kv.wipe();
        self.states.wipe();
    }
}
