//! The KV cache of one turn: one buffer a layer for keys and one for values, [1, kv heads, capacity, head dim], bound as past and as
//! present of the same run, so that attention writes the new rows in place and nothing is copied from step to step. It grows by
//! doubling. Dropped at the end of a turn; it knows nothing of the memory that stays.

use crate::error::{EngineError, Result};

/// The first capacity, in tokens. Most turns of a chat fit into it.
const FIRST_CAPACITY: usize = 256;

/// What the cache of one model looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KvLayout {
    /// Buffers: twice the number of attention layers (key, value, key, value, ...).
    pub(crate) buffers: usize,
    /// Key/value heads.
    pub(crate) heads: usize,
    /// Numbers in one head's row.
    pub(crate) head_dim: usize,
    /// Bytes of one number.
    pub(crate) element_bytes: usize,
    /// The most tokens that a turn may hold.
    pub(crate) context: usize,
}

impl KvLayout {
    /// Bytes of one buffer at `capacity` tokens, if that is a number that the machine can address.
    fn buffer_bytes(&self, capacity: usize) -> Option<usize> {
        self.heads
            .checked_mul(self.head_dim)?
            .checked_mul(self.element_bytes)?
            .checked_mul(capacity)
    }
}

/// The cache of one turn.
#[derive(Debug)]
pub(crate) struct KvCache {
    layout: KvLayout,
    capacity: usize,
    /// Tokens that count; rows behind them are never read.
    len: usize,
    /// The most rows that were ever written, which is what must be wiped before somebody else gets the buffers.
    written: usize,
    /// `u64` words, so that every element type is aligned.
    buffers: Vec<Vec<u64>>,
}

impl KvCache {
    /// An empty cache.
    pub(crate) fn new(layout: KvLayout) -> Result<Self> {
        let mut cache = Self {
            layout,
            capacity: 0,
            len: 0,
            written: 0,
            buffers: vec![Vec::new(); layout.buffers],
        };
        cache.reserve(1)?;
        Ok(cache)
    }

    /// Tokens in the cache.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Tokens that fit before it has to grow.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that the cache holds.
    pub(crate) fn bytes(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.len() * 8).sum()
    }

    /// Makes room for `more` tokens behind the present ones.
    pub(crate) fn reserve(&mut self, more: usize) -> Result<()> {
        let wanted = self.len.saturating_add(more);
        if wanted > self.layout.context {
            return Err(EngineError::ContextLength {
                tokens: more,
                position: self.len,
                context: self.layout.context,
            });
        }
        if wanted <= self.capacity {
            return Ok(());
        }
        let capacity = wanted
            .next_power_of_two()
            .max(FIRST_CAPACITY)
            .min(self.layout.context);
        let bytes = self.layout.buffer_bytes(capacity).ok_or_else(|| {
            EngineError::Session(format!(
                "a KV cache of {capacity} tokens is larger than this machine can address"
            ))
        })?;
        let row = self.layout.head_dim * self.layout.element_bytes;
        let (old_head, new_head, used) = (self.capacity * row, capacity * row, self.len * row);
        let mut grown = Vec::with_capacity(self.buffers.len());
        for old in &self.buffers {
            let mut new = zeroed_words(bytes.div_ceil(8))?;
            let (from, to) = (
                bytemuck::cast_slice::<u64, u8>(old),
                bytemuck::cast_slice_mut::<u64, u8>(&mut new),
            );
            for head in 0..self.layout.heads {
                to[head * new_head..][..used].copy_from_slice(&from[head * old_head..][..used]);
            }
            grown.push(new);
        }
        self.buffers = grown;
        self.capacity = capacity;
        self.written = self.len;
        Ok(())
    }

    /// The buffers, in the order key, value of each layer, as bytes: [1, heads, capacity, head dim] each.
    pub(crate) fn buffers_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let bytes = self.layout.buffer_bytes(self.capacity).unwrap_or(0);
        self.buffers
            .iter_mut()
            .map(move |buffer| &mut bytemuck::cast_slice_mut::<u64, u8>(buffer)[..bytes])
    }

    /// The shape of every buffer.
    pub(crate) fn shape(&self) -> [usize; 4] {
        [1, self.layout.heads, self.capacity, self.layout.head_dim]
    }

    /// Says that a run is about to write rows up to `len`, whether or not it succeeds.
    pub(crate) fn note_writing(&mut self, len: usize) {
        self.written = self.written.max(len);
    }

    /// Sets how many tokens count: more after a run, fewer to take a failed call back.
    pub(crate) fn set_len(&mut self, len: usize) {
        debug_assert!(len <= self.capacity);
        self.len = len;
    }

    /// Wipes every row that was written, so that the buffers can serve another session.
    pub(crate) fn wipe(&mut self) {
        let row = self.layout.head_dim * self.layout.element_bytes;
        let (head_bytes, used) = (self.capacity * row, self.written * row);
        for buffer in &mut self.buffers {
            let bytes = bytemuck::cast_slice_mut::<u64, u8>(buffer);
            for head in 0..self.layout.heads {
                bytes[head * head_bytes..][..used].fill(0);
            }
        }
        self.len = 0;
        self.written = 0;
    }
}

/// Zeroed words; an allocation that the machine refuses is an error, not an abort.
fn zeroed_words(words: usize) -> Result<Vec<u64>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(words).map_err(|_| {
        EngineError::Session(format!(
            "no memory for a KV buffer of {} MiB; call end_turn() earlier, or use fewer sessions at once",
            words.saturating_mul(8) >> 20
        ))
    })?;
    buffer.resize(words, 0);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LAYOUT: KvLayout = KvLayout {
        buffers: 2,
        heads: 3,
        head_dim: 4,
        element_bytes: 2,
        context: 1000,
    };

    fn row(cache: &mut KvCache, buffer: usize, head: usize, token: usize) -> Vec<u8> {
        let capacity = cache.capacity();
        let bytes = cache.buffers_mut().nth(buffer).unwrap();
        bytes[(head * capacity + token) * 8..][..8].to_vec()
    }

    fn fill(cache: &mut KvCache, token: usize) {
        let capacity = cache.capacity();
        cache.note_writing(token + 1);
        for (b, bytes) in cache.buffers_mut().enumerate() {
            for head in 0..3 {
                bytes[(head * capacity + token) * 8..][..8]
                    .fill(u8::try_from((b * 50 + head * 17 + token) % 251 + 1).unwrap());
            }
        }
        cache.set_len(token + 1);
    }

    #[test]
    fn growing_keeps_every_row() {
        let mut cache = KvCache::new(LAYOUT).unwrap();
        for token in 0..700 {
            cache.reserve(1).unwrap();
            fill(&mut cache, token);
        }
        assert_eq!(cache.capacity(), 1000);
        for (buffer, head, token) in [(0, 0, 0), (0, 2, 255), (1, 1, 256), (1, 2, 511), (0, 1, 699)] {
            let expected = u8::try_from((buffer * 50 + head * 17 + token) % 251 + 1).unwrap();
            assert_eq!(
                row(&mut cache, buffer, head, token),
                [expected; 8],
                "buffer {buffer}, head {head}, token {token}"
            );
        }
    }

    #[test]
    fn a_wiped_cache_is_zero_everywhere_even_after_a_call_taken_back() {
        let mut cache = KvCache::new(LAYOUT).unwrap();
        for token in 0..40 {
            fill(&mut cache, token);
        }
        cache.set_len(3);
        cache.wipe();
        assert_eq!(cache.len(), 0);
        assert!(cache.buffers_mut().all(|bytes| bytes.iter().all(|&b| b == 0)));
    }

    #[test]
    fn the_context_is_a_limit_with_an_error_of_its_own() {
        let mut cache = KvCache::new(LAYOUT).unwrap();
        assert!(matches!(
            cache.reserve(1001),
            Err(EngineError::ContextLength {
                tokens: 1001,
                position: 0,
                context: 1000
            })
        ));
        cache.reserve(1000).unwrap();
    }
}
