//! The memory's buffers: float32 [layers, heads, r, r], double and counted. A run reads the front buffer and writes a back one; only a
//! run that succeeded makes the back one the front. A buffer that anybody still holds is never written again, so a reader's view never
//! changes under it and may outlive the session. Nothing here knows how the state is computed.

use std::sync::Arc;

use deltamem_core::Geometry;

/// A state that nobody writes any more: float32, row-major [layers, heads, r, r].
pub type MemoryView = Arc<[f32]>;

/// How many back buffers are kept for reuse. Two turn over in a plain stream of runs; a third serves a transaction's first state.
const SPARES: usize = 3;

/// The front buffer and the spare ones behind it.
#[derive(Debug)]
pub(crate) struct MemoryBuffers {
    front: MemoryView,
    spares: Vec<MemoryView>,
}

impl MemoryBuffers {
    /// A zeroed memory.
    pub(crate) fn zeroed(geometry: &Geometry) -> Self {
        Self {
            front: vec![0.0; geometry.elements()].into(),
            spares: Vec::with_capacity(SPARES),
        }
    }

    /// The present state. Holding it keeps it: later runs write elsewhere.
    pub(crate) fn front(&self) -> &MemoryView {
        &self.front
    }

    /// Takes a buffer that nobody else holds, to be written by a run.
    pub(crate) fn take_back(&mut self) -> MemoryView {
        let free = self
            .spares
            .iter_mut()
            .position(|spare| Arc::get_mut(spare).is_some());
        match free {
            Some(index) => self.spares.swap_remove(index),
            None => vec![0.0; self.front.len()].into(),
        }
    }

    /// Keeps a buffer for later runs.
    pub(crate) fn give_back(&mut self, buffer: MemoryView) {
        if self.spares.len() == SPARES {
            // A spare that a reader holds will not come free soon: let the reader have it.
            match self
                .spares
                .iter_mut()
                .position(|spare| Arc::get_mut(spare).is_none())
            {
                Some(held) => drop(self.spares.swap_remove(held)),
                None => return,
            }
        }
        self.spares.push(buffer);
    }

    /// Frees the spare buffers: a session between turns holds its state and nothing else.
    pub(crate) fn free_spares(&mut self) {
        self.spares.clear();
    }

    /// Makes `state` the front; the old front becomes a spare.
    pub(crate) fn set_front(&mut self, state: MemoryView) {
        let old = std::mem::replace(&mut self.front, state);
        self.give_back(old);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn buffers() -> MemoryBuffers {
        MemoryBuffers::zeroed(&Geometry::new(1, 1, 2).unwrap())
    }

    fn write(buffers: &mut MemoryBuffers, value: f32) {
        let mut back = buffers.take_back();
        Arc::get_mut(&mut back).unwrap().fill(value);
        buffers.set_front(back);
    }

    #[test]
    fn a_held_view_never_changes() {
        let mut memory = buffers();
        write(&mut memory, 1.0);
        let held = Arc::clone(memory.front());
        for value in 2..50_u8 {
            write(&mut memory, f32::from(value));
        }
        assert_eq!(&held[..], &[1.0; 4]);
        assert_eq!(&memory.front()[..], &[49.0; 4]);
    }

    #[test]
    fn a_stream_of_runs_turns_over_two_buffers() {
        let mut memory = buffers();
        let mut seen = std::collections::HashSet::new();
        for value in 0..100_u8 {
            write(&mut memory, f32::from(value));
            seen.insert(memory.front().as_ptr() as usize);
        }
        assert!(seen.len() <= 2, "{} buffers were used", seen.len());
    }

    #[test]
    fn many_held_views_do_not_pile_up_as_spares() {
        let mut memory = buffers();
        let mut held = Vec::new();
        for value in 0..20_u8 {
            write(&mut memory, f32::from(value));
            held.push(Arc::clone(memory.front()));
        }
        assert!(memory.spares.len() <= SPARES);
        for (value, view) in held.iter().enumerate() {
            assert!((view[0] - value as f32).abs() < f32::EPSILON);
        }
    }
}
