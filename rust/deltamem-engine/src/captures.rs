//! Steps that a card replays: CUDA graphs, captured by ONNX Runtime. A capture holds every address and shape of its run, so a step is given an
//! id by all of them and has no other; what is not small lies still by itself (keys, values), or comes to the same few places step by step
//! (states, logits), and the small inputs are brought into a buffer of their own in front of each step, because a replay copies nothing from the
//! host. What ONNX Runtime asks of it stands in docs/cuda.md. It knows addresses and bytes; it knows nothing of what they mean.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use crate::call::{As, Worker};
use crate::device::{DeviceBuffer, DeviceMemory, Staging};
use crate::error::Result;
use crate::memory::held;

/// The most captures of one graph. Nothing frees one before its session, and each takes memory of the card; steps beyond them run as ever. Those
/// of all windows of 64 slots are 26 for one capacity of the cache, of which half are met.
const MOST: usize = 128;

/// How often a step must have looked the same before it is captured: groups of sessions that met by chance would take all that there may be.
const SIGHTS: u32 = 2;

/// The most kinds of steps that are counted; beyond them counting begins again.
const COUNTED: usize = 4096;

/// What each part of the small inputs begins at a multiple of, as ONNX Runtime's own allocations do.
const ALIGNED: usize = 256;

/// The captures of one graph.
#[derive(Debug)]
pub(crate) struct Captures {
    memory: Arc<DeviceMemory>,
    /// ONNX Runtime keeps a thread's captures for that thread, so all runs are made on one.
    worker: Worker,
    ids: Ids,
    /// The small inputs: one buffer for each size that they take together, which stays where it is.
    inputs: HashMap<usize, Arc<DeviceBuffer>>,
    packed: Option<Staging>,
    /// Whether nothing is captured any more.
    off: bool,
}

/// Which steps are captured, by all of their addresses and shapes.
#[derive(Debug, Default)]
struct Ids {
    given: HashMap<Vec<usize>, i32>,
    /// How often each of those without an id was seen.
    sights: HashMap<Vec<usize>, u32>,
}

/// Where the small inputs of a step lie.
pub(crate) struct Packed {
    pub(crate) buffer: Arc<DeviceBuffer>,
    /// The first byte of each.
    pub(crate) starts: Vec<usize>,
}

impl Captures {
    pub(crate) fn new(memory: Arc<DeviceMemory>) -> Result<Self> {
        Ok(Self {
            memory,
            worker: Worker::new()?,
            ids: Ids::default(),
            inputs: HashMap::new(),
            packed: None,
            off: false,
        })
    }

    /// Where runs are made.
    pub(crate) fn worker(&self) -> &Worker {
        &self.worker
    }

    /// The device's memory.
    pub(crate) fn memory(&self) -> &Arc<DeviceMemory> {
        &self.memory
    }

    /// Whether steps are captured.
    pub(crate) fn on(&self) -> bool {
        !self.off
    }

    /// How many there are, or are about to be.
    pub(crate) fn count(&self) -> usize {
        self.ids.given.len()
    }

    /// Brings the small inputs of a step to the device, in one copy, to where those of its like always are.
    pub(crate) fn bring(&mut self, parts: &[&[u8]]) -> Result<Packed> {
        let mut starts = Vec::with_capacity(parts.len());
        let mut bytes = 0;
        for part in parts {
            starts.push(bytes);
            bytes += part.len().next_multiple_of(ALIGNED);
        }
        let packed = self.memory.room(&mut self.packed, bytes)?;
        let packed = &mut bytemuck::cast_slice_mut::<u64, u8>(packed.words_mut())[..bytes];
        for (part, &start) in parts.iter().zip(&starts) {
            packed[start..][..part.len()].copy_from_slice(part);
        }
        let buffer = match self.inputs.entry(bytes) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(new) => new.insert(Arc::new(self.memory.allocate(bytes)?)),
        };
        // The run before is over, and with it what it held.
        Arc::get_mut(buffer).ok_or_else(held)?.upload(0, packed)?;
        Ok(Packed {
            buffer: Arc::clone(buffer),
            starts,
        })
    }

    /// How a step with these addresses and shapes is run, and whether it is captured now.
    pub(crate) fn like(&mut self, key: Vec<usize>) -> (As, bool) {
        if self.off {
            return (As::Itself, false);
        }
        self.ids.like(key)
    }

    /// A capture went wrong: nothing is captured from here on.
    pub(crate) fn give_up(&mut self) {
        self.off = true;
        self.ids = Ids::default();
    }
}

impl Ids {
    fn like(&mut self, key: Vec<usize>) -> (As, bool) {
        if let Some(&id) = self.given.get(&key) {
            return (As::Captured(id), false);
        }
        let Some(id) = i32::try_from(self.given.len() + 1)
            .ok()
            .filter(|_| self.given.len() < MOST)
        else {
            return (As::Itself, false);
        };
        if self.sights.len() >= COUNTED {
            self.sights.clear();
        }
        let sights = self.sights.get(&key).copied().unwrap_or(0);
        if sights < SIGHTS {
            self.sights.insert(key, sights + 1);
            return (As::Itself, false);
        }
        self.sights.remove(&key);
        self.given.insert(key, id);
        (As::Captured(id), true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_again_is_captured_once_under_an_id_of_its_own() {
        let mut ids = Ids::default();
        for key in [7, 8] {
            for _ in 0..SIGHTS {
                assert_eq!(ids.like(vec![1, key]), (As::Itself, false));
            }
        }
        let (first, captures) = ids.like(vec![1, 7]);
        assert!(matches!(first, As::Captured(_)) && captures);
        assert_eq!(ids.like(vec![1, 7]), (first, false));
        let (second, captures) = ids.like(vec![1, 8]);
        assert!(matches!(second, As::Captured(_)) && captures && second != first);
        // An order is part of it.
        assert_eq!(ids.like(vec![7, 1]), (As::Itself, false));
    }

    #[test]
    fn chance_meetings_take_no_ids_and_there_is_a_limit() {
        let mut ids = Ids::default();
        for key in 0..10 * COUNTED {
            assert_eq!(ids.like(vec![key]), (As::Itself, false));
        }
        assert!(ids.sights.len() <= COUNTED);
        let captured = |ids: &mut Ids, key: usize| {
            (0..=SIGHTS).any(|_| matches!(ids.like(vec![key]), (As::Captured(_), true)))
        };
        assert_eq!((0..2 * MOST).filter(|&key| captured(&mut ids, key)).count(), MOST);
        // Those that have an id keep it.
        assert!(matches!(ids.like(vec![0]), (As::Captured(1), false)));
    }
}
