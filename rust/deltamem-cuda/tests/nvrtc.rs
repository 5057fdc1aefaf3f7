//! The kernels' text through NVIDIA's own compiler, where there is one: no card is needed for that. Without one the test says so and ends.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod nvidia;

use deltamem_core::{Gates, UpdateMode};
use deltamem_cuda::{Compiler, Element, SOURCE, Sizes};

use crate::nvidia::nvrtc_in_wheels;

const RELEASED: Sizes = Sizes {
    heads: 1,
    rank: 8,
    mode: UpdateMode::Standard,
    gates: Gates::Row,
    own_lambda: false,
    normalize_qk: true,
    element: Element::Half,
};

/// The one in NVIDIA's wheels, or the system's.
fn compiler() -> Option<Compiler> {
    let mut libraries = nvrtc_in_wheels().into_iter();
    let found = libraries.find_map(|path| Compiler::open(Some(&path)).ok());
    found.or_else(|| Compiler::open(None).ok())
}

/// The numbers in front of a word, of each line that has it.
fn numbers(log: &str, word: &str) -> Vec<usize> {
    log.lines()
        .filter_map(|line| line.split_once(word))
        .filter_map(|(front, _)| front.split_whitespace().last()?.parse().ok())
        .collect()
}

#[test]
fn nvidias_compiler_takes_the_kernels_for_every_card_that_it_knows() {
    let Some(compiler) = compiler() else {
        eprintln!("skipped: no NVRTC here (it comes with onnxruntime-gpu[cuda] and with PyTorch for CUDA)");
        return;
    };
    println!("NVRTC {:?}", compiler.version());
    for architecture in [75, 80, 90, 100, 120] {
        let Ok(target) = compiler.target(architecture) else {
            println!("{architecture}: older than all that this NVRTC knows");
            continue;
        };
        let mut options = RELEASED.options();
        if target.starts_with("sm_") {
            options.push("--ptxas-options=-v".into());
        }
        let (image, log) = compiler.compile(SOURCE, &target, &options).unwrap();
        assert!(
            image.len() > 10_000,
            "{target}: an image of {} bytes",
            image.len()
        );
        if !target.starts_with("sm_") {
            continue;
        }
        assert!(image.starts_with(b"\x7fELF"), "{target}");
        let registers = numbers(&log, " registers");
        let shared = numbers(&log, " bytes smem");
        let spilled = numbers(&log, " bytes spill stores");
        println!(
            "{target}: {} bytes, registers {registers:?}, shared {shared:?}, spilled {spilled:?}",
            image.len()
        );
        // Eight kernels; a block's registers must be there at once, and its memory without being asked for.
        assert_eq!(registers.len(), 8, "{log}");
        assert!(registers.iter().all(|&n| n <= 128), "{log}");
        assert!(shared.iter().all(|&n| n <= 48 << 10), "{log}");
        assert!(spilled.iter().all(|&n| n <= 16), "{log}");
    }
}

#[test]
fn it_takes_every_kind_of_layer() {
    let Some(compiler) = compiler() else {
        eprintln!("skipped: no NVRTC here");
        return;
    };
    let Ok(target) = compiler.target(90) else {
        eprintln!("skipped: NVRTC {:?} is too old", compiler.version());
        return;
    };
    for sizes in [
        Sizes {
            rank: 5,
            heads: 3,
            mode: UpdateMode::LambdaOutside,
            gates: Gates::Head,
            element: Element::Brain,
            ..RELEASED
        },
        Sizes {
            rank: 16,
            heads: 2,
            mode: UpdateMode::NoLambda,
            normalize_qk: false,
            element: Element::Single,
            ..RELEASED
        },
        // The largest: what a block shares must fit.
        Sizes {
            rank: 64,
            heads: 16,
            own_lambda: true,
            ..RELEASED
        },
    ] {
        let (image, _) = compiler.compile(SOURCE, &target, &sizes.options()).unwrap();
        assert!(image.len() > 10_000);
    }
    // And it is asked: what is no program is refused, with the line.
    let wrong = SOURCE.replace("float total = 0.0f;", "float totals = 0.0f;");
    let error = compiler
        .compile(&wrong, &target, &RELEASED.options())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("kernels.cu(") && error.contains("total"),
        "{error}"
    );
}
