//! Numbers that begin with a cache line.

use deltamem_core::lanes::{spare, to_line};

/// Numbers from the beginning of a cache line on, so that no register is filled from two of them.
#[derive(Debug)]
pub(crate) struct Aligned<S> {
    all: Vec<S>,
    from: usize,
}

impl<S: Copy + Default> Aligned<S> {
    pub(crate) fn new(numbers: impl ExactSizeIterator<Item = S>) -> Self {
        let mut all: Vec<S> = Vec::with_capacity(numbers.len() + spare::<S>());
        let from = to_line(&all);
        all.resize(from, S::default());
        all.extend(numbers);
        Self { all, from }
    }

    pub(crate) fn zeros(count: usize) -> Self {
        let all = vec![S::default(); count + spare::<S>()];
        let from = to_line(&all);
        Self { all, from }
    }

    pub(crate) fn numbers_mut(&mut self) -> &mut [S] {
        &mut self.all[self.from..]
    }

    pub(crate) fn numbers(&self) -> &[S] {
        &self.all[self.from..]
    }
}
