//! What a layer carries inside a turn beside keys and values, such as the tail of a convolution. These states do not grow: a run reads
//! one copy and writes another, and a third keeps the one from before the call, so that a call taken back leaves them as they were.
//! It knows bytes and shapes; it knows nothing of what they mean.

use crate::buffer::zeroed_words;
use crate::bundle::TurnState;
use crate::error::Result;

/// The states of one turn.
#[derive(Debug, Default, Clone)]
pub(crate) struct TurnStates {
    /// Bytes of each.
    bytes: Vec<usize>,
    /// What the next run reads. `u64` words, so that every element type is aligned.
    front: Vec<Vec<u64>>,
    /// What the next run writes.
    back: Vec<Vec<u64>>,
    /// What was there before the call, once a run of it has moved on.
    before: Vec<Vec<u64>>,
    /// Whether a run of the present call has moved on.
    moved: bool,
}

impl TurnStates {
    /// Zeroed states of these shapes.
    pub(crate) fn zeroed(states: &[TurnState]) -> Result<Self> {
        // The manifest's check holds every product below 2^24 numbers.
        let bytes: Vec<usize> = states
            .iter()
            .map(|state| state.shape.iter().product::<usize>() * state.dtype.bytes())
            .collect();
        let buffers = || {
            bytes
                .iter()
                .map(|bytes| zeroed_words(bytes.div_ceil(8)))
                .collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            front: buffers()?,
            back: buffers()?,
            before: buffers()?,
            bytes,
            moved: false,
        })
    }

    /// A call begins: what is there now is what it may have to put back.
    pub(crate) fn begin(&mut self) {
        self.moved = false;
    }

    /// (read, written) by the next run, in the manifest's order.
    pub(crate) fn pairs_mut(&mut self) -> impl Iterator<Item = (&mut [u8], &mut [u8])> {
        self.front
            .iter_mut()
            .zip(&mut self.back)
            .zip(&self.bytes)
            .map(|((front, back), &bytes)| {
                (
                    &mut bytemuck::cast_slice_mut::<u64, u8>(front)[..bytes],
                    &mut bytemuck::cast_slice_mut::<u64, u8>(back)[..bytes],
                )
            })
    }

    /// A run has succeeded: what it wrote is what the next one reads.
    pub(crate) fn advance(&mut self) {
        std::mem::swap(&mut self.front, &mut self.back);
        if !self.moved {
            std::mem::swap(&mut self.back, &mut self.before);
            self.moved = true;
        }
    }

    /// The call is taken back.
    pub(crate) fn roll_back(&mut self) {
        if self.moved {
            std::mem::swap(&mut self.front, &mut self.before);
            self.moved = false;
        }
    }

    /// Zeros everywhere, for a new turn of whomever.
    pub(crate) fn wipe(&mut self) {
        for buffer in [&mut self.front, &mut self.back, &mut self.before]
            .into_iter()
            .flatten()
        {
            buffer.fill(0);
        }
        self.moved = false;
    }

    /// Bytes held.
    pub(crate) fn held(&self) -> usize {
        [&self.front, &self.back, &self.before]
            .into_iter()
            .flatten()
            .map(|buffer| buffer.len() * 8)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::bundle::ElementType;

    fn states() -> TurnStates {
        let state = |dtype, shape: &[usize]| TurnState {
            input: String::new(),
            output: String::new(),
            dtype,
            shape: shape.into(),
        };
        TurnStates::zeroed(&[
            state(ElementType::Float32, &[3, 2]),
            state(ElementType::Bfloat16, &[5]),
        ])
        .unwrap()
    }

    fn run(states: &mut TurnStates, value: u8) {
        for (_, written) in states.pairs_mut() {
            written.fill(value);
        }
        states.advance();
    }

    fn front(states: &mut TurnStates) -> Vec<u8> {
        states.pairs_mut().map(|(read, _)| read[0]).collect()
    }

    #[test]
    fn runs_go_on_from_each_other_and_a_call_taken_back_is_as_if_never_made() {
        let mut states = states();
        assert_eq!(
            states.pairs_mut().map(|(read, _)| read.len()).collect::<Vec<_>>(),
            [24, 10]
        );
        states.begin();
        run(&mut states, 1);
        run(&mut states, 2);
        assert_eq!(front(&mut states), [2, 2]);
        for runs in 0..5 {
            states.begin();
            for value in 0..runs {
                run(&mut states, 10 + value);
                assert_eq!(front(&mut states), [10 + value; 2]);
            }
            states.roll_back();
            assert_eq!(front(&mut states), [2, 2], "after {runs} runs taken back");
        }
        states.begin();
        run(&mut states, 3);
        assert_eq!(front(&mut states), [3, 3]);
    }

    #[test]
    fn wiped_states_are_zero_in_every_copy() {
        let mut states = states();
        states.begin();
        for value in 1..4 {
            run(&mut states, value);
        }
        states.wipe();
        for _ in 0..3 {
            assert!(
                states
                    .pairs_mut()
                    .all(|(a, b)| a.iter().chain(&*b).all(|&x| x == 0))
            );
            states.advance();
        }
        states.roll_back();
        assert_eq!(front(&mut states), [0, 0]);
        assert_eq!(states.held(), 3 * (24 + 16));
    }
}
