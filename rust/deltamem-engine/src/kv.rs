//! The KV cache of one turn: one buffer a layer for keys and one for values. Shared, they are [1, kv heads, capacity, head dim], bound as
//! past and as present of the same run, so that attention writes the new rows in place and nothing is copied from step to step. Where
//! the graph cannot do that there are two of each that take turns, past with exactly the rows that there are and present with the new
//! ones behind them. Both grow by doubling. Dropped at the end of a turn; it knows nothing of the memory that stays.

use std::ops::Range;

use crate::buffer::{Buffer, Groups, Home, Part, devices};
use crate::device::{DeviceBuffer, Rows};
use crate::error::{EngineError, Result};

/// The first capacity, in tokens. Most turns of a chat fit into it.
pub(crate) const FIRST_CAPACITY: usize = 256;

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
    /// Whether one buffer is past and present at once.
    pub(crate) shared: bool,
}

impl KvLayout {
    /// Bytes of one buffer at `capacity` tokens, if that is a number that the machine can address.
    pub(crate) fn buffer_bytes(&self, capacity: usize) -> Option<usize> {
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
    /// Where the buffers are made. Those that take turns are the host's.
    home: Home,
    buffers: Vec<Buffer>,
    /// Where the next run writes, when past and present are two.
    presents: Vec<Buffer>,
}

/// One of the cache's tensors in a run.
#[derive(Debug)]
pub(crate) enum KvTensor<'a> {
    /// Past and present at once.
    Shared(Part<'a>),
    /// Past, and present behind it in a buffer of its own.
    Separate(Part<'a>, Part<'a>),
}

impl<'a> KvTensor<'a> {
    /// A part of a device's buffer, past and present at once. Nobody else knows of that part while the tensor is there.
    pub(crate) fn device(buffer: &'a DeviceBuffer, bytes: Range<usize>) -> Self {
        Self::Shared(Part::Device {
            buffer,
            start: bytes.start,
            bytes: bytes.len(),
        })
    }
}

impl KvCache {
    /// An empty cache.
    pub(crate) fn new(layout: KvLayout, home: &Home) -> Result<Self> {
        let empty = |count| std::iter::repeat_with(Buffer::empty).take(count).collect();
        let mut cache = Self {
            layout,
            capacity: 0,
            len: 0,
            written: 0,
            home: home.clone().filter(|_| layout.shared),
            buffers: empty(layout.buffers),
            presents: empty(if layout.shared { 0 } else { layout.buffers }),
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
        self.buffers.iter().chain(&self.presents).map(Buffer::len).sum()
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
        let row = self.row();
        // Separate caches have exactly their rows, so heads lie one behind the other at any capacity.
        let (old_rows, new_rows) = if self.layout.shared {
            (self.capacity, capacity)
        } else {
            (self.len, self.len)
        };
        let (from, to) = (
            Groups {
                start: 0,
                rows: old_rows,
            },
            Groups {
                start: 0,
                rows: new_rows,
            },
        );
        let mut grown = Buffer::many_zeroed(self.buffers.len(), bytes, &self.home)?;
        if self.len > 0 {
            let (heads, len) = (self.layout.heads, self.len);
            Buffer::copy_rows(&mut grown, to, &self.buffers, from, heads, len, row)?;
        }
        let presents = Buffer::many_zeroed(self.presents.len(), bytes, &self.home)?;
        self.buffers = grown;
        self.presents = presents;
        self.capacity = capacity;
        self.written = self.len;
        Ok(())
    }

    /// The shapes of past and of present in a run of `tokens` tokens, for which there is room.
    pub(crate) fn shapes(&self, tokens: usize) -> [[usize; 4]; 2] {
        let rows = if self.layout.shared {
            [self.capacity, self.capacity]
        } else {
            [self.len, self.len + tokens]
        };
        rows.map(|rows| [1, self.layout.heads, rows, self.layout.head_dim])
    }

    /// The tensors of a run of `tokens` tokens, in the order key, value of each layer. The run may write them whether or not it
    /// succeeds.
    pub(crate) fn tensors_mut(&mut self, tokens: usize) -> Vec<KvTensor<'_>> {
        self.written = self.written.max(self.len + tokens);
        let bytes = self
            .shapes(tokens)
            .map(|shape| shape.iter().product::<usize>() * self.layout.element_bytes);
        if self.layout.shared {
            self.buffers
                .iter_mut()
                .map(|buffer| KvTensor::Shared(buffer.part(0..bytes[0])))
                .collect()
        } else {
            self.buffers
                .iter_mut()
                .zip(&mut self.presents)
                .map(|(past, present)| KvTensor::Separate(past.part(0..bytes[0]), present.part(0..bytes[1])))
                .collect()
        }
    }

    /// Copies the rows of each buffer into another's groups of heads.
    pub(crate) fn copy_rows(&self, to: &mut [Buffer], groups: Groups) -> Result<()> {
        let from = Groups {
            start: 0,
            rows: self.shapes(0)[0][2],
        };
        let (heads, row) = (self.layout.heads, self.row());
        Buffer::copy_rows(to, groups, &self.buffers, from, heads, self.len, row)
    }

    /// Copies the rows of each buffer on a device into another's groups of heads, with zeros behind them. Nobody else knows of those groups then.
    pub(crate) fn fill(&self, to: &[&DeviceBuffer], groups: Groups) -> Result<()> {
        let rows = Rows {
            groups: self.layout.heads,
            from: self.shapes(0)[0][2],
            to: groups.rows,
            used: self.len,
            row: self.row(),
        };
        DeviceBuffer::rows_all(to, groups.start, &devices(&self.buffers), 0, rows)
    }

    /// A copy with the rows of another cache of the same model.
    pub(crate) fn copy_of(other: &Self) -> Result<Self> {
        let mut copy = Self::new(other.layout, &other.home)?;
        copy.reserve(other.len)?;
        copy.len = other.len;
        copy.written = other.len;
        let rows = copy.shapes(0)[0][2];
        other.copy_rows(&mut copy.buffers, Groups { start: 0, rows })?;
        Ok(copy)
    }

    /// A run of `tokens` tokens has succeeded: they count from here on.
    pub(crate) fn advance(&mut self, tokens: usize) {
        debug_assert!(self.len + tokens <= self.capacity);
        if !self.layout.shared {
            std::mem::swap(&mut self.buffers, &mut self.presents);
        }
        self.len += tokens;
    }

    /// Lets only the first `len` tokens count, to take a failed call back.
    pub(crate) fn truncate(&mut self, len: usize) {
        debug_assert!(len <= self.len);
        if !self.layout.shared && len < self.len {
            let (old_head, used) = (self.len * self.row(), len * self.row());
            for buffer in &mut self.buffers {
                let bytes = buffer.host_mut();
                for head in 1..self.layout.heads {
                    bytes.copy_within(head * old_head..head * old_head + used, head * used);
                }
            }
        }
        self.len = len;
    }

    /// Wipes every row that was written, so that the buffers can serve another session.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device fails; they can serve nobody then.
    pub(crate) fn wipe(&mut self) -> Result<()> {
        let (heads, row, written) = (self.layout.heads, self.row(), self.written);
        // Separate ones have exactly their rows.
        let rows = if self.layout.shared {
            self.capacity
        } else {
            written
        };
        for buffers in [&mut self.buffers, &mut self.presents] {
            Buffer::wipe(buffers, Groups { start: 0, rows }, heads, written, row)?;
        }
        self.len = 0;
        self.written = 0;
        Ok(())
    }

    /// Bytes of one head's row.
    fn row(&self) -> usize {
        self.layout.head_dim * self.layout.element_bytes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Both kinds, of 2-byte and of 1-byte numbers.
    fn layouts() -> Vec<KvLayout> {
        [(true, 2), (true, 1), (false, 2), (false, 1)]
            .map(|(shared, element_bytes)| KvLayout {
                buffers: 2,
                heads: 3,
                head_dim: 4,
                element_bytes,
                context: 1000,
                shared,
            })
            .into()
    }

    fn mark(buffer: usize, head: usize, token: usize) -> u8 {
        u8::try_from((buffer * 50 + head * 17 + token) % 251 + 1).unwrap()
    }

    /// What attention does: past stays, the new rows go behind it.
    fn run(cache: &mut KvCache, tokens: usize) {
        let (len, row, heads) = (cache.len, cache.row(), cache.layout.heads);
        let [past_rows, rows] = cache.shapes(tokens).map(|shape| shape[2]);
        for (b, tensor) in cache.tensors_mut(tokens).into_iter().enumerate() {
            let present = match tensor {
                KvTensor::Shared(both) => both.host(),
                KvTensor::Separate(past, present) => {
                    let (past, present) = (past.host(), present.host());
                    for head in 0..heads {
                        present[head * rows * row..][..past_rows * row]
                            .copy_from_slice(&past[head * past_rows * row..][..past_rows * row]);
                    }
                    present
                }
            };
            for head in 0..heads {
                for token in len..len + tokens {
                    present[(head * rows + token) * row..][..row].fill(mark(b, head, token));
                }
            }
        }
    }

    fn feed(cache: &mut KvCache, tokens: usize) {
        cache.reserve(tokens).unwrap();
        run(cache, tokens);
        cache.advance(tokens);
    }

    fn assert_all_rows(cache: &mut KvCache) {
        let (len, row) = (cache.len, cache.row());
        let rows = cache.shapes(0)[0][2];
        for (b, tensor) in cache.tensors_mut(0).into_iter().enumerate() {
            let (KvTensor::Shared(past) | KvTensor::Separate(past, _)) = tensor;
            let past = past.host();
            for head in 0..3 {
                for token in 0..len {
                    assert_eq!(
                        past[(head * rows + token) * row..][..row],
                        vec![mark(b, head, token); row],
                        "buffer {b}, head {head}, token {token} of {len}"
                    );
                }
            }
        }
    }

    #[test]
    fn growing_keeps_every_row() {
        for layout in layouts() {
            let mut cache = KvCache::new(layout, &None).unwrap();
            for _ in 0..700 {
                feed(&mut cache, 1);
            }
            assert_eq!((cache.capacity(), cache.len()), (1000, 700));
            assert_all_rows(&mut cache);
        }
    }

    #[test]
    fn a_call_taken_back_leaves_the_rows_from_before() {
        for layout in layouts() {
            let mut cache = KvCache::new(layout, &None).unwrap();
            feed(&mut cache, 37);
            // One that fails in its first run, in its third, and one that grew the buffers before it failed.
            for (good, bad) in [(0, 5), (20, 9), (300, 1)] {
                cache.reserve(good.max(1)).unwrap();
                if good > 0 {
                    feed(&mut cache, good / 2);
                    feed(&mut cache, good - good / 2);
                }
                cache.reserve(bad).unwrap();
                run(&mut cache, bad);
                cache.truncate(37);
                assert_all_rows(&mut cache);
            }
            feed(&mut cache, 3);
            assert_eq!(cache.len(), 40);
            assert_all_rows(&mut cache);
        }
    }

    #[test]
    fn a_turn_in_separate_caches_has_exactly_its_rows_and_does_not_allocate_each_step() {
        let mut cache = KvCache::new(layouts()[2], &None).unwrap();
        let mut seen = std::collections::HashSet::new();
        for token in 0..256 {
            cache.reserve(1).unwrap();
            assert_eq!(cache.shapes(1), [[1, 3, token, 4], [1, 3, token + 1, 4]]);
            seen.insert(cache.buffers[0].host_mut().as_ptr());
            feed(&mut cache, 1);
        }
        assert_eq!(seen.len(), 2);
        assert_eq!(cache.bytes(), 4 * 256 * 3 * 4 * 2);
    }

    #[test]
    fn a_wiped_cache_is_zero_everywhere_even_after_a_call_taken_back() {
        for layout in layouts() {
            let mut cache = KvCache::new(layout, &None).unwrap();
            for _ in 0..40 {
                feed(&mut cache, 1);
            }
            cache.truncate(3);
            run(&mut cache, 50);
            cache.wipe().unwrap();
            assert_eq!(cache.len(), 0);
            assert!(
                cache
                    .buffers
                    .iter_mut()
                    .chain(&mut cache.presents)
                    .all(|buffer| buffer.host_mut().iter().all(|&byte| byte == 0))
            );
        }
    }

    #[test]
    fn the_context_is_a_limit_with_an_error_of_its_own() {
        for layout in layouts() {
            let mut cache = KvCache::new(layout, &None).unwrap();
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
}
