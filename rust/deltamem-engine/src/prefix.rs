//! What many turns begin with, such as a system prompt, read once: its keys and values with an empty memory that it does not write. A turn that
//! begins with it copies them and goes on with its own memory, which is exact because what an empty memory reads is zero: the prefix
//! depends on nothing but its tokens. It knows one model's caches; it knows nothing of text.

use std::sync::Arc;

use crate::error::{EngineError, Result};
use crate::kv::KvCache;
use crate::model::Model;
use crate::session::{Interrupt, Session};
use crate::states::TurnStates;
use crate::turn::{TurnCache, TurnKv};

/// The beginning of turns, read.
#[derive(Debug)]
pub struct Prefix {
    model: Arc<Model>,
    tokens: Vec<i32>,
    kv: Arc<KvCache>,
    states: TurnStates,
    logits: Vec<f32>,
}

impl Prefix {
    /// Reads the tokens with an empty memory that they do not write.
    ///
    /// # Errors
    /// [`EngineError::Value`] without a token; as [`Session::feed`].
    pub fn new(model: Arc<Model>, tokens: Vec<i32>, interrupt: Interrupt<'_>) -> Result<Self> {
        if tokens.is_empty() {
            return Err(EngineError::Value(
                "a prefix needs at least one token; leave it out where a turn begins with nothing".into(),
            ));
        }
        let mut session = Session::new(Arc::clone(&model));
        let (cache, logits) = session.read_prefix(&tokens, interrupt)?;
        let TurnCache {
            kv: TurnKv::Own(read),
            states,
        } = &cache
        else {
            return Err(EngineError::Session(
                "a prefix was read into the pool; please report this".into(),
            ));
        };
        // A copy of just its rows: the buffers that it was read into go back to the others.
        let (kv, states) = (Arc::new(KvCache::copy_of(read)?), states.clone());
        model.return_cache(cache);
        Ok(Self {
            model,
            tokens,
            kv,
            states,
            logits,
        })
    }

    /// Its tokens.
    pub fn tokens(&self) -> &[i32] {
        &self.tokens
    }

    /// Bytes of its keys, values and other states.
    pub fn bytes(&self) -> usize {
        self.kv.bytes() + self.states.held()
    }

    /// The model that read it.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The logits behind its last token, float32 [vocab].
    pub(crate) fn logits(&self) -> &[f32] {
        &self.logits
    }

    pub(crate) fn check(&self, model: &Arc<Model>) -> Result<()> {
        if Arc::ptr_eq(&self.model, model) {
            return Ok(());
        }
        Err(EngineError::Value(
            "the prefix was read by another model than the session's; make it with the same Model".into(),
        ))
    }

    /// A turn's cache that begins with it.
    pub(crate) fn cache(&self, model: &Model) -> Result<TurnCache> {
        let states = self.states.clone();
        let kv = if model.pooled() {
            TurnKv::Pooled(model.slots.begun(&self.kv)?)
        } else {
            TurnKv::Own(KvCache::copy_of(&self.kv)?)
        };
        Ok(TurnCache { kv, states })
    }
}
