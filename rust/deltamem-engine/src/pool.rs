//! The KV caches of many turns in blocks of slots: one buffer a layer for keys and one for values, [slots, kv heads, capacity, head dim]. A
//! slot is one turn's cache. A run of one turn binds its slot's part of each buffer, a step of several turns binds the slots from the first to
//! the last of them, so that nothing is copied from step to step. An idle slot in between rides along with a token that is written behind
//! its rows, where nothing reads it. Blocks grow by doubling, in slots and in capacity. It knows rows and slots; it knows nothing of whose they
//! are, nor when anything runs. On a device it says what is to be done to slots, which others do beside the runs ([`crate::slots`]).

use std::ops::Range;
use std::sync::Arc;

use crate::buffer::{Buffer, Groups, Home, devices};
use crate::device::DeviceBuffer;
use crate::device::mover::{Doing, Fence, Trial};
use crate::error::{EngineError, Result};
use crate::kv::{FIRST_CAPACITY, KvCache, KvLayout, KvTensor};
use crate::turn::Pooled;

/// Idle slots that may ride along, step by step added up, before the stepping ones are brought together. Moving a turn once costs about what
/// so many idle rows do.
const RIDES: usize = 8;

/// Rows (slots times capacity) that a block without turns keeps.
const KEPT_ROWS: usize = 4096;

/// Rows that a block of windows of fixed sizes has from the start, as far as it may have the slots, and keeps: with every growth all windows of a
/// block lie elsewhere, and what was captured of them is lost.
const FIXED_ROWS: usize = 16_384;

/// Turns that may be moved at once to have a window of a fixed size, and steps in which the right to move one more is earned: so many for each
/// `MOVED_ROWS` of its cache, since moving a short turn costs less than a step that is not replayed and moving a long one more. Groups that change
/// with every step are not followed.
const MOVES: usize = 16;
const STEPS_A_MOVE: usize = 2;
const MOVED_ROWS: usize = 2048;

/// What slots are wiped with where a test wants to see that nobody reads it: bits of a number that is none.
const POISON: u8 = 0xFF;

/// Whose slot: what a turn holds. It stays the same when the slot moves.
pub(crate) type Key = usize;

/// The caches of all turns of a model whose graph can take many at once.
#[derive(Debug)]
pub(crate) struct KvPool {
    layout: KvLayout,
    home: Home,
    /// Slots that a block may have: the most rows of a step.
    most: usize,
    blocks: Vec<Block>,
    /// Where the slot of each key is; `None` for a key that is free.
    places: Vec<Option<Place>>,
    /// Whether windows are of few sizes in few places.
    fixed: bool,
    /// What the present run binds, on a device: nobody else touches it.
    flying: Vec<Stretch>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    block: usize,
    slot: usize,
}

#[derive(Debug, Default)]
struct Block {
    /// Rows of each slot.
    capacity: usize,
    slots: Vec<Slot>,
    buffers: Vec<Buffer>,
    /// Idle rows that have ridden along since the turns were last brought together.
    rides: usize,
    /// What was moved for windows of fixed sizes and is not earned yet, in steps.
    owed: usize,
}

/// Slots of a block that lie together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch {
    block: usize,
    first: usize,
    count: usize,
}

/// What is to be done to a slot before anybody's rows are read there, on a device. A run that has it in its window may come first.
#[derive(Debug, Clone, Default)]
enum Todo {
    #[default]
    Nothing,
    /// Another's rows are to go.
    Wipe,
    /// These rows are to come, with zeros behind them.
    Fill(Arc<KvCache>),
}

/// What is being done to a slot.
#[derive(Debug)]
struct Work {
    fence: Arc<Fence>,
    what: Todo,
}

/// Something to be done to a slot, claimed by whoever holds it: nobody else touches the slot until its fence.
#[derive(Debug)]
pub(crate) struct Job {
    what: Todo,
    buffers: Vec<Arc<DeviceBuffer>>,
    /// Where the slot lies in each of them, and how large it is.
    groups: Groups,
    bytes: usize,
    doing: Doing,
}

#[derive(Debug, Default)]
struct Slot {
    key: Option<Key>,
    /// Rows that may count for its turn: never fewer than do.
    len: usize,
    /// Rows that were ever written, which are wiped before somebody else gets the slot.
    written: usize,
    todo: Todo,
    work: Option<Work>,
    /// What a job in front of the turn's first run has met.
    error: Option<EngineError>,
    /// Whether its turn has not run yet.
    fresh: bool,
}

/// One row of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rider {
    /// The index of the turn among the keys asked for; `None` for an idle slot.
    pub(crate) of: Option<usize>,
    /// Rows in front of the new one.
    pub(crate) past: usize,
}

/// Turns whose slots lie in one block, and the slots from the first to the last of them.
#[derive(Debug)]
pub(crate) struct Window {
    block: usize,
    first: usize,
    /// One for each slot.
    pub(crate) riders: Vec<Rider>,
    /// Whether it is one of the few of fixed sizes: its name then, the same whenever it comes again and that of others in no step at once.
    pub(crate) fixed: Option<[usize; 2]>,
}

/// Slots that a window of a fixed size has.
#[derive(Debug, Clone, Copy)]
struct Frame {
    first: usize,
    size: usize,
}

impl Frame {
    fn has(self, slot: usize) -> bool {
        (self.first..self.first + self.size).contains(&slot)
    }
}

impl KvPool {
    /// A pool without a buffer. A step takes at most `most` turns.
    pub(crate) fn new(layout: KvLayout, most: usize, home: Home) -> Self {
        Self {
            layout,
            home,
            most: most.max(1),
            blocks: Vec::new(),
            places: Vec::new(),
            fixed: false,
            flying: Vec::new(),
        }
    }

    /// Whether windows are to be of few sizes in few places from here on, so that steps look the same although users come and go.
    pub(crate) fn fix(&mut self, fixed: bool) {
        self.fixed = fixed;
    }

    /// Makes room for `rows` rows in the slot of a turn, and gives it a slot if it has none yet. Returns the bytes that a cache of the turn's own
    /// would hold, which is what it takes of the pool's memory at most.
    pub(crate) fn reserve(&mut self, key: &mut Option<Key>, rows: usize) -> Result<usize> {
        let key = match *key {
            Some(key) => key,
            None => *key.insert(self.take()?),
        };
        let place = self.place(key)?;
        self.grow_capacity(place.block, rows)?;
        Ok(self.own_bytes(rows))
    }

    /// Bytes of a cache of so many rows.
    pub(crate) fn own_bytes(&self, rows: usize) -> usize {
        let capacity = rows
            .next_power_of_two()
            .max(FIRST_CAPACITY)
            .min(self.layout.context);
        self.layout.buffers * self.layout.heads * capacity * self.row()
    }

    /// What a run of one turn binds; there must be room for its rows up to `rows`.
    pub(crate) fn one(&mut self, key: Key, rows: usize) -> Result<Stretch> {
        let place = self.place(key)?;
        self.note(place, rows);
        let stretch = Stretch {
            block: place.block,
            first: place.slot,
            count: 1,
        };
        self.fly(stretch);
        Ok(stretch)
    }

    /// What the run of a window binds.
    pub(crate) fn many(&mut self, window: &Window) -> Stretch {
        for (offset, rider) in window.riders.iter().enumerate() {
            let slot = &mut self.blocks[window.block].slots[window.first + offset];
            slot.written = slot.written.max(rider.past + 1);
            if rider.of.is_some() {
                slot.len = slot.len.max(rider.past + 1);
            }
        }
        window.stretch()
    }

    /// The windows that hold these turns, of which each has the rows given and room for one more. Turns come down into free slots of earlier
    /// blocks, and change places with idle ones that have ridden along for long or have no room for it.
    pub(crate) fn windows(&mut self, turns: &[(Key, usize)]) -> Result<Vec<Window>> {
        for &(key, rows) in turns {
            if self.come_down(key, rows).is_err() {
                // No memory to be closer to the others: it stays where it is.
                break;
            }
        }
        while self.blocks.len() > 1 && self.blocks.last().is_some_and(Block::is_free) {
            self.blocks.pop();
        }
        let mut windows = Vec::new();
        for block in 0..self.blocks.len() {
            let mut window = self.window(block, turns)?;
            if self.fixed {
                if let Some(framed) = self.framed(block, &window, turns)? {
                    windows.push(framed);
                    continue;
                }
                // Some may have been moved before it was seen that not all can be.
                window = self.window(block, turns)?;
            }
            let riding = window.riders.iter().filter(|rider| rider.of.is_none()).count();
            if riding > 0 {
                let room = self.blocks[block].capacity;
                let full = window
                    .riders
                    .iter()
                    .any(|rider| rider.of.is_none() && rider.past >= room);
                let count = window.riders.len() - riding;
                let rides = &mut self.blocks[block].rides;
                *rides += riding;
                if full || *rides > RIDES || riding > count {
                    *rides = 0;
                    self.bring_together(block, &window, count)?;
                    window = self.window(block, turns)?;
                }
            }
            if !window.riders.is_empty() {
                windows.push(window);
            }
        }
        for window in &windows {
            self.fly(window.stretch());
        }
        Ok(windows)
    }

    /// Frees a turn's slot and wipes what was written there; on a device it says whether that is left to be done.
    pub(crate) fn release(&mut self, key: Key) -> bool {
        let Some(place) = self.places.get_mut(key).and_then(Option::take) else {
            return false;
        };
        self.blocks[place.block].slots[place.slot].leave();
        if self.home.is_none() && self.wipe(place).is_ok() {
            self.blocks[place.block].slots[place.slot] = Slot::default();
        }
        let block = &mut self.blocks[place.block];
        if block.is_free() {
            // What rode along may have left rows in slots that nobody had.
            let (slots, capacity) = (block.slots.len(), block.capacity);
            let kept = if self.fixed { FIXED_ROWS } else { KEPT_ROWS };
            let wiped = (place.block == 0 && slots * capacity <= kept)
                && (0..slots).all(|slot| self.wipe(Place { slot, ..place }).is_ok());
            if !wiped {
                self.blocks[place.block] = Block::default();
            }
        }
        self.any_left()
    }

    /// Puts another cache's rows at the beginning of a turn's slot; there must be room for them.
    pub(crate) fn fill(&mut self, key: Key, from: &KvCache) -> Result<()> {
        let place = self.place(key)?;
        self.note(place, from.len());
        let start = place.slot * self.slot_bytes(place.block);
        let block = &mut self.blocks[place.block];
        let rows = block.capacity;
        from.copy_rows(&mut block.buffers, Groups { start, rows })
    }

    /// Bytes of all buffers.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.blocks
            .iter()
            .flat_map(|block| &block.buffers)
            .map(Buffer::len)
            .sum()
    }

    fn place(&self, key: Key) -> Result<Place> {
        self.places.get(key).copied().flatten().ok_or_else(|| {
            EngineError::Session("a turn has lost its place among the KV caches; please report this".into())
        })
    }

    fn note(&mut self, place: Place, rows: usize) {
        let slot = &mut self.blocks[place.block].slots[place.slot];
        slot.len = slot.len.max(rows);
        slot.written = slot.written.max(rows);
    }

    /// Bytes of one buffer's part of a slot.
    fn slot_bytes(&self, block: usize) -> usize {
        self.layout.heads * self.blocks[block].capacity * self.row()
    }

    /// Bytes of one head's row.
    fn row(&self) -> usize {
        self.layout.head_dim * self.layout.element_bytes
    }

    /// The bytes of slots that lie together in each of their block's buffers, and their shape.
    fn part(&self, stretch: Stretch) -> (Range<usize>, [usize; 4]) {
        let Stretch { block, first, count } = stretch;
        let bytes = self.slot_bytes(block);
        let capacity = self.blocks[block].capacity;
        let shape = [count, self.layout.heads, capacity, self.layout.head_dim];
        (first * bytes..(first + count) * bytes, shape)
    }

    /// Their tensors, and their shape.
    pub(crate) fn tensors(&mut self, stretch: Stretch) -> (Vec<KvTensor<'_>>, [usize; 4]) {
        let (bytes, shape) = self.part(stretch);
        let buffers = self.blocks[stretch.block].buffers.iter_mut();
        let tensors = buffers.map(|buffer| KvTensor::Shared(buffer.part(bytes.clone())));
        (tensors.collect(), shape)
    }

    /// The buffers that they lie in on a device, their bytes in each, and their shape.
    pub(crate) fn shared(&self, stretch: Stretch) -> (Vec<Arc<DeviceBuffer>>, Range<usize>, [usize; 4]) {
        let (bytes, shape) = self.part(stretch);
        let buffers = self.blocks[stretch.block].buffers.iter();
        (buffers.filter_map(Buffer::shared).collect(), bytes, shape)
    }

    /// The present run binds these, on a device.
    fn fly(&mut self, stretch: Stretch) {
        if self.home.is_some() {
            self.flying.push(stretch);
        }
    }

    /// The present run is over. Whether there is something to be done to any slot.
    pub(crate) fn land(&mut self) -> bool {
        self.flying.clear();
        self.any_left()
    }

    fn any_left(&self) -> bool {
        self.home.is_some()
            && self
                .blocks
                .iter()
                .flat_map(|block| &block.slots)
                .any(|slot| !matches!(slot.todo, Todo::Nothing))
    }

    fn flies(&self, place: Place) -> bool {
        self.flying
            .iter()
            .any(|one| one.block == place.block && (one.first..one.first + one.count).contains(&place.slot))
    }

    /// Gives a turn without a slot one of those that there are, if one has room for its rows and `tokens` more, and notes the prefix that its
    /// rows begin with. For threads that are not running: no other slot is touched.
    pub(crate) fn take_early(&mut self, turn: &mut Pooled, tokens: usize) {
        if turn.key.is_none() {
            let found = (0..self.blocks.len()).find_map(|block| {
                let roomy = self.blocks[block].capacity >= turn.len + tokens;
                let slot = roomy.then(|| self.free_now(block)).flatten()?;
                Some(Place { block, slot })
            });
            turn.key = found.map(|place| self.give(place));
        }
        if let Some(key) = turn.key {
            // A place that a turn has is never lost before it is given back.
            let _ = self.begins_with(key, &mut turn.prefix);
        }
    }

    fn begins_with(&mut self, key: Key, prefix: &mut Option<Arc<KvCache>>) -> Result<()> {
        let place = self.place(key)?;
        if let Some(prefix) = prefix.take() {
            self.note(place, prefix.len());
            self.blocks[place.block].slots[place.slot].todo = Todo::Fill(prefix);
        }
        Ok(())
    }

    fn slot_of(&mut self, key: Key) -> Option<(&mut Slot, Place)> {
        let place = self.place(key).ok()?;
        Some((&mut self.blocks[place.block].slots[place.slot], place))
    }

    /// What a job on a turn's slot has met, told once.
    pub(crate) fn error(&mut self, key: Key) -> Option<EngineError> {
        let (slot, _) = self.slot_of(key)?;
        slot.is_still();
        slot.error.take()
    }

    /// The fence of who works on a turn's slot.
    pub(crate) fn at_it(&mut self, key: Key) -> Option<Arc<Fence>> {
        let (slot, _) = self.slot_of(key)?;
        slot.is_still();
        slot.work.as_ref().map(|work| Arc::clone(&work.fence))
    }

    /// Whether nothing is left to do for a turn's slot.
    pub(crate) fn is_ready(&mut self, key: Key) -> bool {
        self.slot_of(key).is_some_and(|(slot, _)| slot.is_clean())
    }

    /// Something that is to be done to a turn's slot, or to any, and that can be done now.
    pub(crate) fn claim(&mut self, key: Option<Key>) -> Option<Job> {
        if let Some(key) = key {
            let place = self.place(key).ok()?;
            return self.may_claim(place).then(|| self.job(place));
        }
        for block in 0..self.blocks.len() {
            for slot in 0..self.blocks[block].slots.len() {
                let place = Place { block, slot };
                if self.may_claim(place) {
                    return Some(self.job(place));
                }
            }
        }
        None
    }

    fn may_claim(&mut self, place: Place) -> bool {
        let flies = self.flies(place);
        let slot = &mut self.blocks[place.block].slots[place.slot];
        !flies && slot.is_still() && !matches!(slot.todo, Todo::Nothing)
    }

    fn job(&mut self, place: Place) -> Job {
        let bytes = self.slot_bytes(place.block);
        let block = &mut self.blocks[place.block];
        let slot = &mut block.slots[place.slot];
        let (fence, what) = (Arc::new(Fence::default()), std::mem::take(&mut slot.todo));
        if matches!(what, Todo::Wipe) {
            slot.written = 0;
        }
        slot.work = Some(Work {
            fence: Arc::clone(&fence),
            what: what.clone(),
        });
        Job {
            what,
            buffers: block.buffers.iter().filter_map(Buffer::shared).collect(),
            groups: Groups {
                start: place.slot * bytes,
                rows: block.capacity,
            },
            bytes,
            doing: Doing(fence),
        }
    }

    /// Does what is left for a turn's slot, whose run is about to begin.
    ///
    /// # Errors
    /// [`EngineError::Device`] when that failed, or fails; the next call tries again.
    pub(crate) fn finish(&mut self, key: Key, prefix: &mut Option<Arc<KvCache>>) -> Result<()> {
        if self.home.is_none() {
            return Ok(());
        }
        self.begins_with(key, prefix)?;
        let place = self.place(key)?;
        let slot = &mut self.blocks[place.block].slots[place.slot];
        slot.settle();
        if let Some(error) = slot.error.take() {
            return Err(error);
        }
        self.clean(place)?;
        let slot = &mut self.blocks[place.block].slots[place.slot];
        if std::mem::take(&mut slot.fresh) && slot.len == 0 {
            self.examine(place)?;
        }
        Ok(())
    }

    /// Does what is left for a slot, here and now.
    fn clean(&mut self, place: Place) -> Result<()> {
        let slot = &mut self.blocks[place.block].slots[place.slot];
        if slot.settle() {
            return Ok(());
        }
        let done = self.job(place).does();
        let slot = &mut self.blocks[place.block].slots[place.slot];
        slot.settle();
        // It is told here.
        slot.error = None;
        done
    }

    /// Where a test has slots wiped with what nobody must see: whether this one was, but for the row that what rides along writes, which its turn
    /// writes before it reads it.
    fn examine(&self, place: Place) -> Result<()> {
        if !self.home.as_ref().is_some_and(|memory| memory.trial().poisons()) {
            return Ok(());
        }
        let (bytes, group) = (
            self.slot_bytes(place.block),
            self.slot_bytes(place.block) / self.layout.heads,
        );
        let mut found = vec![0_u32; bytes / size_of::<u32>()];
        for buffer in self.blocks[place.block].buffers.iter().filter_map(Buffer::shared) {
            let found: &mut [u8] = bytemuck::cast_slice_mut(&mut found);
            buffer.download(place.slot * bytes, found)?;
            let mut rows = found.chunks(group).flat_map(|head| &head[self.row()..]);
            if !rows.all(|&byte| byte == 0 || byte == POISON) {
                return Err(EngineError::Session(
                    "a slot is handed out with another turn's rows in it; please report this".into(),
                ));
            }
        }
        Ok(())
    }

    /// A free slot, the first there is.
    fn take(&mut self) -> Result<Key> {
        let mut block = 0;
        let slot = loop {
            if block == self.blocks.len() {
                self.blocks.push(Block::default());
            }
            if let Some(slot) = self.free_slot(block)? {
                break slot;
            }
            block += 1;
        };
        let place = Place { block, slot };
        self.wipe(place)?;
        Ok(self.give(place))
    }

    /// Gives a free slot to a new key.
    fn give(&mut self, place: Place) -> Key {
        let key = self
            .places
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.places.len());
        if key == self.places.len() {
            self.places.push(None);
        }
        self.places[key] = Some(place);
        let slot = &mut self.blocks[place.block].slots[place.slot];
        slot.key = Some(key);
        slot.len = 0;
        slot.error = None;
        slot.fresh = true;
        key
    }

    /// A free slot of those that a block has: on a device one that is wiped and is nowhere bound, if there is one.
    fn free_now(&mut self, block: usize) -> Option<usize> {
        let slots = 0..self.blocks[block].slots.len();
        if self.home.is_some() {
            for bound in [false, true] {
                let clean = slots.clone().find(|&slot| {
                    let flies = self.flies(Place { block, slot });
                    let slot = &mut self.blocks[block].slots[slot];
                    slot.key.is_none() && slot.is_clean() && flies == bound
                });
                if clean.is_some() {
                    return clean;
                }
            }
        }
        slots
            .into_iter()
            .find(|&slot| self.blocks[block].slots[slot].key.is_none())
    }

    /// The first free slot of a block, which gets more slots if it may.
    fn free_slot(&mut self, block: usize) -> Result<Option<usize>> {
        if let Some(slot) = self.free_now(block) {
            return Ok(Some(slot));
        }
        let count = self.blocks[block].slots.len();
        if count == self.most {
            return Ok(None);
        }
        let capacity = self.blocks[block]
            .capacity
            .max(FIRST_CAPACITY.min(self.layout.context));
        let doubled = (count * 2).clamp(1, self.most);
        let at_once = self.slots_at_once(block, capacity);
        // Without memory for all of them it grows as others do.
        if at_once <= doubled || self.resize(block, at_once, capacity).is_err() {
            self.resize(block, doubled, capacity)?;
        }
        Ok(Some(count))
    }

    /// Slots that a block of windows of fixed sizes has at least: the first block, which is nearly always the only one.
    fn slots_at_once(&self, block: usize, capacity: usize) -> usize {
        let slots = FIXED_ROWS / capacity.max(1);
        match slots.checked_ilog2() {
            Some(power) if self.fixed && block == 0 && slots < self.most => 1 << power,
            Some(_) if self.fixed && block == 0 => self.most,
            _ => 0,
        }
    }

    fn grow_capacity(&mut self, block: usize, rows: usize) -> Result<()> {
        let found = &self.blocks[block];
        if rows <= found.capacity {
            return Ok(());
        }
        let capacity = rows.next_power_of_two().min(self.layout.context).max(rows);
        let mut slots = found.slots.len();
        if self.fixed {
            // Those that were there from the start and nobody has need not grow with the others.
            let used = found.slots.iter().rposition(|slot| slot.key.is_some());
            let used = used.map_or(1, |last| last + 1).next_power_of_two();
            slots = slots.min(used.max(self.slots_at_once(block, capacity)));
        }
        self.resize(block, slots, capacity)
    }

    /// Gives a block buffers of another size, with the rows that were written.
    fn resize(&mut self, block: usize, slots: usize, capacity: usize) -> Result<()> {
        let bytes = self
            .layout
            .buffer_bytes(capacity)
            .and_then(|bytes| bytes.checked_mul(slots))
            .ok_or_else(|| {
                EngineError::Session(format!(
                    "{slots} KV caches of {capacity} tokens are larger than this machine can address"
                ))
            })?;
        let (row, heads) = (self.row(), self.layout.heads);
        let found = &mut self.blocks[block];
        for slot in &mut found.slots {
            slot.settle();
        }
        let mut grown = Buffer::many_zeroed(self.layout.buffers, bytes, &self.home)?;
        for (slot, held) in found.slots.iter().enumerate().filter(|(slot, held)| {
            *slot < slots && held.written > 0 && (held.key.is_some() || self.home.is_none())
        }) {
            let of = |rows: usize| Groups {
                start: slot * heads * rows * row,
                rows,
            };
            let (new, old) = (of(capacity), of(found.capacity));
            Buffer::copy_rows(&mut grown, new, &found.buffers, old, heads, held.written, row)?;
        }
        found.buffers = grown;
        found.capacity = capacity;
        if self.home.is_some() {
            // Nobody's rows have stayed behind.
            for slot in found.slots.iter_mut().filter(|slot| slot.key.is_none()) {
                *slot = Slot::default();
            }
        }
        found.slots.resize_with(slots, Slot::default);
        Ok(())
    }

    /// Wipes what was written in a slot. On a device that is done when its turn has left it ([`Slot::leave`]); what rides along later writes the first
    /// row only, which the next turn writes before it reads it.
    fn wipe(&mut self, place: Place) -> Result<()> {
        if self.home.is_some() {
            return Ok(());
        }
        let (row, heads, start) = (
            self.row(),
            self.layout.heads,
            place.slot * self.slot_bytes(place.block),
        );
        let block = &mut self.blocks[place.block];
        let (rows, used) = (block.capacity, block.slots[place.slot].written);
        Buffer::wipe(&mut block.buffers, Groups { start, rows }, heads, used, row)?;
        block.slots[place.slot].written = 0;
        Ok(())
    }

    /// Moves a turn into a free slot of an earlier block, if there is one.
    fn come_down(&mut self, key: Key, rows: usize) -> Result<()> {
        let from = self.place(key)?;
        for block in 0..from.block {
            let Some(slot) = self.free_slot(block)? else {
                continue;
            };
            let held = &mut self.blocks[from.block].slots[from.slot];
            held.settle();
            let len = held.len;
            self.grow_capacity(block, (rows + 1).max(len))?;
            let to = Place { block, slot };
            self.wipe(to)?;
            if len == 0 {
                self.clean(to)?;
            } else {
                // All of it is written over; what breaks off is nobody's.
                self.blocks[block].slots[slot].foul();
            }
            let (row, heads) = (self.row(), self.layout.heads);
            let (low, high) = self.blocks.split_at_mut(from.block);
            let (target, source) = (&mut low[block], &high[0]);
            let of = |slot: usize, rows: usize| Groups {
                start: slot * heads * rows * row,
                rows,
            };
            let (new_rows, old_rows) = (of(slot, target.capacity), of(from.slot, source.capacity));
            if len > 0 {
                let (new, old) = (&mut target.buffers, &source.buffers);
                Buffer::copy_rows(new, new_rows, old, old_rows, heads, len, row)?;
            }
            target.slots[slot] = Slot {
                key: Some(key),
                len,
                written: len,
                ..Slot::default()
            };
            self.places[key] = Some(to);
            self.blocks[from.block].slots[from.slot].leave();
            self.wipe(from)?;
            if self.home.is_none() {
                self.blocks[from.block].slots[from.slot] = Slot::default();
            }
            break;
        }
        Ok(())
    }

    /// The slots of a block from the first to the last of these turns; without a rider when none of them is there.
    fn window(&mut self, block: usize, turns: &[(Key, usize)]) -> Result<Window> {
        let mut here = Vec::with_capacity(turns.len());
        for (index, &(key, rows)) in turns.iter().enumerate() {
            let place = self.place(key)?;
            if place.block == block {
                here.push((place.slot, index, rows));
            }
        }
        here.sort_unstable();
        let first = here.first().map_or(0, |first| first.0);
        let mut riders = Vec::with_capacity(self.most);
        for (slot, index, past) in here {
            while first + riders.len() < slot {
                let idle = &mut self.blocks[block].slots[first + riders.len()];
                idle.settle();
                let past = idle.len;
                riders.push(Rider { of: None, past });
            }
            riders.push(Rider {
                of: Some(index),
                past,
            });
        }
        Ok(Window {
            block,
            first,
            riders,
            fixed: None,
        })
    }

    /// The window of a fixed size for the turns of this one, if there is one of at most twice as many slots: a power of two of them, or all that a
    /// step may have, from the block's first slot on or from its middle. From the first alone there would be fewest, but two groups that step by
    /// turns would have to change places in each step. Turns that are too far apart are moved, where that is earned or the window as it is
    /// takes more slots than twice its turns.
    fn framed(&mut self, block: usize, window: &Window, turns: &[(Key, usize)]) -> Result<Option<Window>> {
        let found = &mut self.blocks[block];
        let (slots, capacity) = (found.slots.len(), found.capacity);
        let mut steps = vec![false; slots];
        let mut count = 0;
        for (offset, rider) in window.riders.iter().enumerate() {
            steps[window.first + offset] = rider.of.is_some();
            count += usize::from(rider.of.is_some());
        }
        if count == 0 {
            return Ok(None);
        }
        found.owed = found.owed.saturating_sub(1);
        let full = |slot: usize| !steps[slot] && found.slots[slot].len >= capacity;
        let sizes = || {
            (0..)
                .map(|power| (1 << power).min(self.most))
                .skip_while(|&size| size < count)
        };
        let firsts = [0, slots / 2];
        let firsts = if slots > 1 { &firsts[..] } else { &firsts[..1] };
        let fits = |frame: &Frame| frame.first + frame.size <= slots && frame.size <= 2 * count;
        let frames = || {
            sizes()
                .take_while(|&size| size <= 2 * count)
                .take(2)
                .flat_map(|size| firsts.iter().map(move |&first| Frame { first, size }))
                .filter(fits)
        };
        let outside = |frame: &Frame| (0..slots).filter(|&slot| steps[slot] && !frame.has(slot)).count();
        let too_full = |frame: &Frame| (0..slots).filter(|&slot| frame.has(slot) && full(slot)).count();
        let as_it_is = frames().find(|frame| outside(frame) + too_full(frame) == 0);
        if let Some(frame) = as_it_is {
            return Ok(Some(self.window_of(block, frame, turns)?));
        }
        // The fewest moves; others that have the slots would have to move back.
        let others = |frame: &Frame| {
            (0..slots)
                .filter(|&slot| frame.has(slot) && !steps[slot] && found.slots[slot].key.is_some())
                .count()
        };
        let moves = |frame: &Frame| outside(frame) + too_full(frame);
        let Some(frame) = frames().min_by_key(|frame| (moves(frame), frame.size, others(frame))) else {
            return Ok(None);
        };
        let cost = moves(&frame) * STEPS_A_MOVE * capacity.div_ceil(MOVED_ROWS).max(1);
        let wide = window.riders.len() > 2 * count;
        if found.owed > 0 && found.owed + cost > MOVES * STEPS_A_MOVE && !wide {
            return Ok(None);
        }
        found.owed += cost;
        // A device without memory to move them has it for the step as it is.
        if !self.move_into(block, frame, &mut steps).unwrap_or(false) {
            return Ok(None);
        }
        Ok(Some(self.window_of(block, frame, turns)?))
    }

    /// Has the stepping turns of a block, and no full ones beside them, in this frame. Returns whether there was room for it.
    fn move_into(&mut self, block: usize, frame: Frame, steps: &mut [bool]) -> Result<bool> {
        // Those that nobody has go first: who is moved out may step by the next step again, and come back.
        let mut inside: Vec<usize> = (frame.first..frame.first + frame.size).collect();
        inside.sort_by_key(|&slot| self.blocks[block].slots[slot].key.is_some());
        for slot in inside {
            let (slots, capacity) = (&self.blocks[block].slots, self.blocks[block].capacity);
            let full = |slot: usize| slots[slot].len >= capacity;
            if steps[slot] {
                continue;
            }
            let outside = || (0..slots.len()).rev().filter(|&other| !frame.has(other));
            let other = outside().find(|&other| steps[other]).or_else(|| {
                // A full one makes room for one that may ride along.
                full(slot).then(|| outside().find(|&other| !full(other)))?
            });
            match other {
                Some(other) => {
                    self.swap(block, slot, other)?;
                    steps.swap(slot, other);
                }
                None if full(slot) => return Ok(false),
                None => {}
            }
        }
        Ok((0..steps.len()).all(|slot| !steps[slot] || frame.has(slot)))
    }

    /// The window of a frame that has all of these turns which are in the block.
    fn window_of(&mut self, block: usize, frame: Frame, turns: &[(Key, usize)]) -> Result<Window> {
        let slots = &mut self.blocks[block].slots[frame.first..][..frame.size];
        let mut riders: Vec<Rider> = slots
            .iter_mut()
            .map(|slot| {
                slot.settle();
                Rider {
                    of: None,
                    past: slot.len,
                }
            })
            .collect();
        for (index, &(key, past)) in turns.iter().enumerate() {
            let place = self.place(key)?;
            if place.block == block
                && let Some(rider) = place
                    .slot
                    .checked_sub(frame.first)
                    .and_then(|row| riders.get_mut(row))
            {
                *rider = Rider {
                    of: Some(index),
                    past,
                };
            }
        }
        Ok(Window {
            block,
            first: frame.first,
            riders,
            fixed: Some([block, usize::from(frame.first > 0)]),
        })
    }

    /// Puts the `count` turns of a window into the block's first slots.
    fn bring_together(&mut self, block: usize, window: &Window, count: usize) -> Result<()> {
        let mut steps: Vec<bool> = vec![false; self.blocks[block].slots.len()];
        for (offset, rider) in window.riders.iter().enumerate() {
            steps[window.first + offset] = rider.of.is_some();
        }
        for slot in 0..count {
            if !steps[slot]
                && let Some(last) = steps.iter().rposition(|&stepping| stepping)
                && last > slot
            {
                self.swap(block, slot, last)?;
                steps.swap(slot, last);
            }
        }
        Ok(())
    }

    /// Has two slots of a block change places.
    fn swap(&mut self, block: usize, a: usize, b: usize) -> Result<()> {
        let (a, b) = (a.min(b), a.max(b));
        let (row, heads) = (self.row(), self.layout.heads);
        let slot_bytes = self.slot_bytes(block);
        let block = &mut self.blocks[block];
        for slot in [a, b] {
            block.slots[slot].settle();
        }
        let used = block.slots[a].written.max(block.slots[b].written);
        let of = |slot: usize| Groups {
            start: slot * slot_bytes,
            rows: block.capacity,
        };
        if self.home.is_some() && block.slots[a].key.is_none() {
            // Nobody's rows need not come back.
            block.slots[a].foul();
            let buffers = devices(&block.buffers);
            DeviceBuffer::copy_all(&buffers, of(a).start, &buffers, of(b).start, slot_bytes)?;
        } else {
            Buffer::swap_rows(&mut block.buffers, of(a), of(b), heads, used, row)?;
        }
        block.slots.swap(a, b);
        for slot in [a, b] {
            if let Some(key) = block.slots[slot].key
                && let Some(place) = &mut self.places[key]
            {
                place.slot = slot;
            }
        }
        Ok(())
    }
}

impl Slot {
    /// Whether nobody works on it. What was done is noted: what failed is still to be done.
    fn is_still(&mut self) -> bool {
        let Some(work) = self.work.take_if(|work| work.fence.is_over()) else {
            return self.work.is_none();
        };
        if let (Some(error), Todo::Nothing) = (work.fence.error(), &self.todo) {
            if matches!(work.what, Todo::Fill(_)) {
                self.error = Some(error);
            }
            self.todo = work.what;
        }
        true
    }

    /// Waits for who works on it. Whether nothing is to be done then.
    fn settle(&mut self) -> bool {
        if let Some(work) = &self.work {
            work.fence.wait();
        }
        self.is_clean()
    }

    /// What nobody needs is written over from here on.
    fn foul(&mut self) {
        self.settle();
        (self.todo, self.written) = (Todo::Wipe, 1);
    }

    /// Whether nothing is done to it and nothing is to be done.
    fn is_clean(&mut self) -> bool {
        self.is_still() && matches!(self.todo, Todo::Nothing)
    }

    /// Its turn is over.
    fn leave(&mut self) {
        self.key = None;
        self.len = 0;
        self.error = None;
        self.todo = if self.written > 0 || self.work.is_some() {
            Todo::Wipe
        } else {
            Todo::Nothing
        };
    }
}

impl Job {
    /// Does it, on whatever thread, and says so by its fence.
    pub(crate) fn does(self) -> Result<()> {
        let done = self.work();
        let outcome = match &done {
            Ok(()) => Ok(()),
            Err(error) => Err(error.again()),
        };
        self.doing.ends(outcome);
        done
    }

    fn work(&self) -> Result<()> {
        let buffers: Vec<&DeviceBuffer> = self.buffers.iter().map(|buffer| &**buffer).collect();
        let Some(trial) = buffers.first().map(|buffer| buffer.memory().trial()) else {
            return Ok(());
        };
        let first = buffers[0].address().addr().get() + self.groups.start;
        let addresses = first..first + self.bytes;
        trial.touches(false, &addresses);
        let done = trial.job_begins().and_then(|()| self.moves(&buffers, trial));
        trial.leaves(false, &addresses);
        done
    }

    fn moves(&self, buffers: &[&DeviceBuffer], trial: &Trial) -> Result<()> {
        match &self.what {
            Todo::Nothing => Ok(()),
            Todo::Wipe if trial.poisons() => {
                let poison = vec![u32::from_ne_bytes([POISON; 4]); self.bytes / size_of::<u32>()];
                buffers
                    .iter()
                    .try_for_each(|buffer| buffer.upload(self.groups.start, bytemuck::cast_slice(&poison)))
            }
            Todo::Wipe => DeviceBuffer::zero_all(buffers, self.groups.start, self.bytes),
            Todo::Fill(prefix) => prefix.fill(buffers, self.groups),
        }
    }
}

impl Window {
    fn stretch(&self) -> Stretch {
        Stretch {
            block: self.block,
            first: self.first,
            count: self.riders.len(),
        }
    }
}

impl Block {
    fn is_free(&self) -> bool {
        self.slots.iter().all(|slot| slot.key.is_none())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const HEADS: usize = 2;
    const CONTEXT: usize = 700;

    fn layout() -> KvLayout {
        KvLayout {
            buffers: 2,
            heads: HEADS,
            head_dim: 4,
            element_bytes: 2,
            context: CONTEXT,
            shared: true,
        }
    }

    /// A turn as its session knows it.
    #[derive(Debug)]
    struct Turn {
        key: Option<Key>,
        len: usize,
        name: usize,
    }

    fn mark(turn: usize, buffer: usize, head: usize, row: usize) -> u8 {
        u8::try_from((turn * 83 + buffer * 50 + head * 17 + row) % 251 + 1).unwrap()
    }

    /// What attention does: writes `count` rows behind those of each row of the batch.
    fn write(tensors: Vec<KvTensor<'_>>, shape: [usize; 4], rows: &[(Option<usize>, usize)], count: usize) {
        let [batch, heads, capacity, _] = shape;
        assert_eq!((batch, heads), (rows.len(), HEADS));
        for (b, tensor) in tensors.into_iter().enumerate() {
            let KvTensor::Shared(part) = tensor else { panic!() };
            let bytes = part.host();
            assert_eq!(bytes.len(), batch * heads * capacity * 8);
            for (index, &(turn, past)) in rows.iter().enumerate() {
                assert!(past + count <= capacity, "no room for row {past} of {capacity}");
                for head in 0..heads {
                    for row in past..past + count {
                        let value = turn.map_or(255, |turn| mark(turn, b, head, row));
                        bytes[((index * heads + head) * capacity + row) * 8..][..8].fill(value);
                    }
                }
            }
        }
    }

    fn check(pool: &mut KvPool, turns: &[Turn]) {
        for turn in turns {
            let Some(key) = turn.key else { continue };
            let stretch = pool.one(key, turn.len).unwrap();
            let (tensors, [_, heads, capacity, _]) = pool.tensors(stretch);
            for (b, tensor) in tensors.into_iter().enumerate() {
                let KvTensor::Shared(part) = tensor else { panic!() };
                let bytes = part.host();
                for head in 0..heads {
                    for row in 0..turn.len {
                        assert_eq!(
                            bytes[(head * capacity + row) * 8..][..8],
                            [mark(turn.name, b, head, row); 8],
                            "turn {}, buffer {b}, head {head}, row {row} of {}",
                            turn.name,
                            turn.len
                        );
                    }
                }
            }
        }
    }

    fn chunk(pool: &mut KvPool, turn: &mut Turn, count: usize) {
        pool.reserve(&mut turn.key, turn.len + count).unwrap();
        let stretch = pool.one(turn.key.unwrap(), turn.len + count).unwrap();
        let (tensors, shape) = pool.tensors(stretch);
        write(tensors, shape, &[(Some(turn.name), turn.len)], count);
        turn.len += count;
    }

    /// Returns how many rows the step had, idle ones too.
    fn step(pool: &mut KvPool, turns: &mut [Turn], of: &[usize]) -> usize {
        let mut keys = Vec::new();
        for &index in of {
            let turn = &mut turns[index];
            pool.reserve(&mut turn.key, turn.len + 1).unwrap();
            keys.push((turn.key.unwrap(), turn.len));
        }
        let windows = pool.windows(&keys).unwrap();
        let mut seen: Vec<usize> = windows
            .iter()
            .flat_map(|window| window.riders.iter().filter_map(|rider| rider.of))
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..of.len()).collect::<Vec<_>>());
        let names: Vec<_> = windows.iter().filter_map(|window| window.fixed).collect();
        assert!(
            (1..names.len()).all(|last| !names[..last].contains(&names[last])),
            "{names:?}"
        );
        let mut all = 0;
        for window in windows {
            if window.fixed.is_some() {
                let (size, half) = (window.riders.len(), pool.blocks[window.block].slots.len() / 2);
                let count = window.riders.iter().filter(|rider| rider.of.is_some()).count();
                assert!(size.is_power_of_two() || size == pool.most, "{size} slots");
                assert!(size <= 2 * count, "{size} slots for {count} turns");
                assert!(window.first == 0 || window.first == half);
            }
            let rows: Vec<_> = window
                .riders
                .iter()
                .map(|rider| (rider.of.map(|of_| turns[of[of_]].name), rider.past))
                .collect();
            all += rows.len();
            assert!(rows.len() <= pool.most);
            let stretch = pool.many(&window);
            let (tensors, shape) = pool.tensors(stretch);
            write(tensors, shape, &rows, 1);
        }
        for &index in of {
            turns[index].len += 1;
        }
        all
    }

    #[derive(Debug, Clone)]
    enum Move {
        Begin(usize),
        Chunk(usize, usize),
        Step(Vec<bool>),
        TakeBack(usize, usize),
        End(usize),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let turn = 0..12_usize;
        prop::collection::vec(
            prop_oneof![
                3 => (1..40_usize).prop_map(Move::Begin),
                2 => (turn.clone(), 1..300_usize).prop_map(|(turn, count)| Move::Chunk(turn, count)),
                6 => prop::collection::vec(any::<bool>(), 12).prop_map(Move::Step),
                1 => (turn.clone(), 0..30_usize).prop_map(|(turn, count)| Move::TakeBack(turn, count)),
                2 => turn.prop_map(Move::End),
            ],
            1..60,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_turn_keeps_its_rows_whatever_the_others_do(moves in moves(), most in 1..9_usize, fixed in any::<bool>()) {
            let mut pool = KvPool::new(layout(), most, None);
            pool.fix(fixed);
            let (mut turns, mut names) = (Vec::<Turn>::new(), 0);
            for one in moves {
                let count = turns.len().max(1);
                match one {
                    Move::Begin(tokens) if turns.len() < 12 => {
                        turns.push(Turn { key: None, len: 0, name: names });
                        names += 1;
                        chunk(&mut pool, turns.last_mut().unwrap(), tokens);
                    }
                    Move::Chunk(turn, tokens) => {
                        if let Some(turn) = turns.get_mut(turn % count) {
                            let tokens = tokens.min(CONTEXT - turn.len);
                            chunk(&mut pool, turn, tokens);
                        }
                    }
                    Move::Step(who) => {
                        let of: Vec<usize> =
                            (0..turns.len()).filter(|&i| who[i] && turns[i].len < CONTEXT).collect();
                        for of in of.chunks(most) {
                            step(&mut pool, &mut turns, of);
                        }
                    }
                    Move::TakeBack(turn, tokens) => {
                        if let Some(turn) = turns.get_mut(turn % count) {
                            turn.len -= tokens.min(turn.len);
                        }
                    }
                    Move::End(turn) if !turns.is_empty() => {
                        let turn = turns.swap_remove(turn % count);
                        if let Some(key) = turn.key {
                            pool.release(key);
                        }
                    }
                    Move::Begin(_) | Move::End(_) => {}
                }
                check(&mut pool, &turns);
            }
            for turn in turns {
                pool.release(turn.key.unwrap());
            }
            prop_assert!(pool.blocks.iter_mut().flat_map(|block| &mut block.buffers).all(|buffer| buffer.host_mut().iter().all(|&byte| byte == 0)));
            prop_assert!(pool.places.iter().all(Option::is_none));
        }
    }

    fn begun(pool: &mut KvPool, count: usize, tokens: usize) -> Vec<Turn> {
        let mut turns = Vec::new();
        for name in 0..count {
            turns.push(Turn {
                key: None,
                len: 0,
                name,
            });
            chunk(pool, &mut turns[name], tokens);
        }
        turns
    }

    #[test]
    fn turns_that_step_together_lie_together_after_a_few_steps() {
        let mut pool = KvPool::new(layout(), 16, None);
        let mut turns = begun(&mut pool, 16, 5);
        // Half of them stop, every second one, and stay in the middle of their turns.
        let of: Vec<usize> = (0..16).step_by(2).collect();
        let widths: Vec<usize> = (0..6).map(|_| step(&mut pool, &mut turns, &of)).collect();
        assert_eq!(widths.last(), Some(&8), "{widths:?}");
        check(&mut pool, &turns);
        // The other half steps: neither has to move again.
        let of: Vec<usize> = (1..16).step_by(2).collect();
        assert_eq!(step(&mut pool, &mut turns, &of), 8);
        check(&mut pool, &turns);
    }

    #[test]
    fn a_full_turn_does_not_ride_along() {
        for fixed in [false, true] {
            let mut pool = KvPool::new(layout(), 4, None);
            pool.fix(fixed);
            let mut turns = begun(&mut pool, 3, 5);
            let full = CONTEXT - turns[1].len;
            chunk(&mut pool, &mut turns[1], full);
            step(&mut pool, &mut turns, &[0, 2]);
            check(&mut pool, &turns);
            // Three slots are left for the two, and a window of four for three would have the full one.
            chunk(&mut pool, &mut turns[0], 3);
            turns.extend([3, 4].map(|name| Turn {
                key: None,
                len: 0,
                name,
            }));
            step(&mut pool, &mut turns, &[0, 2, 3]);
            step(&mut pool, &mut turns, &[0, 2, 3, 4]);
            check(&mut pool, &turns);
        }
    }

    #[test]
    fn turns_that_were_moved_in_vain_are_found_where_they_are() {
        let mut pool = KvPool::new(layout(), 8, None);
        pool.fix(true);
        let mut turns = begun(&mut pool, 8, 5);
        for full in [2, 3, 4, 5, 7] {
            let count = CONTEXT - turns[full].len;
            chunk(&mut pool, &mut turns[full], count);
        }
        // One of the full ones can be moved out of any four slots, and the next cannot.
        assert_eq!(frames(&mut pool, &mut turns, &[0, 1, 6]), [None]);
        check(&mut pool, &turns);
    }

    /// The windows of a step: their places and sizes, if they are of fixed ones.
    fn frames(pool: &mut KvPool, turns: &mut [Turn], of: &[usize]) -> Vec<Option<(usize, usize)>> {
        let mut keys = Vec::new();
        for &index in of {
            let turn = &mut turns[index];
            pool.reserve(&mut turn.key, turn.len + 1).unwrap();
            keys.push((turn.key.unwrap(), turn.len));
        }
        let windows = pool.windows(&keys).unwrap();
        let frames = windows
            .iter()
            .map(|window| window.fixed.map(|_| (window.first, window.riders.len())))
            .collect();
        step(pool, turns, of);
        frames
    }

    #[test]
    fn there_are_few_windows_of_fixed_sizes_however_turns_come_and_go() {
        let mut pool = KvPool::new(layout(), 64, None);
        pool.fix(true);
        let mut turns = begun(&mut pool, 10, 5);
        let (mut seen, mut free, mut name) = (HashSet::new(), 0, 10);
        for round in 0..600_usize {
            // Like a queue: up to 50 come, then they leave.
            if round % 100 < 50 && turns.len() < 60 {
                turns.push(Turn {
                    key: None,
                    len: 0,
                    name,
                });
                chunk(&mut pool, turns.last_mut().unwrap(), 1 + round % 7);
                name += 1;
            } else if turns.len() > 3 {
                let gone = turns.remove(round * 7 % turns.len());
                pool.release(gone.key.unwrap());
            }
            // Now and then somebody is late.
            let of: Vec<usize> = (0..turns.len())
                .filter(|index| (round + index) % 23 != 0)
                .collect();
            for frame in frames(&mut pool, &mut turns, &of) {
                match frame {
                    Some(frame) => drop(seen.insert(frame)),
                    None => free += 1,
                }
            }
            check(&mut pool, &turns);
        }
        assert!(
            free <= 30,
            "{free} of 600 steps were in no window of a fixed size"
        );
        // From the first slot on one of each size, and some from the middle.
        assert!(seen.len() <= 13 && seen.contains(&(0, 64)), "{seen:?}");
    }

    #[test]
    fn two_groups_that_step_by_turns_stay_where_they_are() {
        let mut pool = KvPool::new(layout(), 16, None);
        pool.fix(true);
        let mut turns = begun(&mut pool, 10, 5);
        let (one, other) = ([0, 2, 4, 5, 6, 8], [1, 3, 7, 9]);
        let mut last = Vec::new();
        for round in 0..20 {
            last = vec![
                frames(&mut pool, &mut turns, &one),
                frames(&mut pool, &mut turns, &other),
            ];
            if round == 2 {
                pool.blocks[0].owed = 0;
            }
        }
        assert_eq!(last, [[Some((0, 8))], [Some((8, 4))]]);
        assert_eq!(pool.blocks[0].owed, 0, "nothing was moved any more");
        check(&mut pool, &turns);
    }

    #[test]
    fn windows_of_fixed_sizes_lie_where_they_lay() {
        let mut pool = KvPool::new(layout(), 16, None);
        pool.fix(true);
        let mut at = HashSet::new();
        for round in 0..5 {
            let mut turns = begun(&mut pool, 3 + 2 * round, 5);
            let all: Vec<usize> = (0..turns.len()).collect();
            step(&mut pool, &mut turns, &all);
            at.insert(pool.blocks[0].buffers[0].host_mut().as_ptr() as usize);
            for turn in turns {
                pool.release(turn.key.unwrap());
            }
        }
        assert_eq!(at.len(), 1);
        // A long turn has no company in its length that nobody asked for.
        let mut pool = KvPool::new(
            KvLayout {
                context: 1 << 16,
                ..layout()
            },
            16,
            None,
        );
        pool.fix(true);
        let turns = begun(&mut pool, 1, 1 << 15);
        assert_eq!(pool.blocks[0].slots.len(), 1);
        check(&mut pool, &turns);
    }

    #[test]
    fn a_step_allocates_nothing_and_buffers_grow_by_doubling() {
        let mut pool = KvPool::new(layout(), 4, None);
        let mut turns = begun(&mut pool, 4, 1);
        let mut sizes = vec![pool.bytes()];
        let mut at = Vec::new();
        for _ in 0..600 {
            step(&mut pool, &mut turns, &[0, 1, 2, 3]);
            at.push(pool.blocks[0].buffers[0].host_mut().as_ptr() as usize);
            sizes.push(pool.bytes());
        }
        sizes.dedup();
        at.dedup();
        let row = 2 * 4 * HEADS * 4 * 2;
        assert_eq!(sizes, [256 * row, 512 * row, 700 * row]);
        assert_eq!(at.len(), 3);
        check(&mut pool, &turns);
    }

    #[test]
    fn a_slot_of_one_is_another_ones_only_after_it_was_wiped() {
        let mut pool = KvPool::new(layout(), 2, None);
        let mut turns = begun(&mut pool, 2, 50);
        pool.release(turns[0].key.unwrap());
        let mut key = None;
        pool.reserve(&mut key, 60).unwrap();
        let stretch = pool.one(key.unwrap(), 0).unwrap();
        let (tensors, _) = pool.tensors(stretch);
        for tensor in tensors {
            let KvTensor::Shared(part) = tensor else { panic!() };
            let bytes = part.host();
            assert!(bytes.iter().all(|&byte| byte == 0));
        }
        turns.remove(0);
        check(&mut pool, &turns);
    }

    #[test]
    fn many_turns_free_their_memory_when_the_last_one_ends() {
        let mut pool = KvPool::new(layout(), 4, None);
        let turns = begun(&mut pool, 10, 600);
        assert!(pool.blocks.len() == 3);
        for turn in turns {
            pool.release(turn.key.unwrap());
        }
        assert!(
            pool.bytes() <= KEPT_ROWS * 2 * HEADS * 8,
            "{} bytes",
            pool.bytes()
        );
    }
}
