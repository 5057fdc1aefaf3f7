//! The kernels and all that starts them, without a card: see `emulator.c`.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod emulator;

use deltamem_core::{Gates, UpdateMode};
use deltamem_cuda::{Element, Sizes};

use crate::emulator::machine;

#[test]
fn first() {
    let sizes = Sizes {
        heads: 1,
        rank: 8,
        mode: UpdateMode::Standard,
        gates: Gates::Row,
        own_lambda: false,
        normalize_qk: true,
        element: Element::Single,
    };
    machine().kernels(sizes).unwrap();
}
