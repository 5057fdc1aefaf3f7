//! Products in blocks against the same sums spelled out, number by number.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::manual_midpoint,
    missing_docs
)]

use deltamem_kernel::{Bits, BlockShape, Blocks, BlocksError, IntegerInstructions, Pool, Rounded};
use proptest::prelude::*;

/// As many threads as tasks.
struct Threads;

impl Pool for Threads {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for n in 0..tasks {
                scope.spawn(move || task(n));
            }
        });
    }
}

/// One after another.
struct Alone;

impl Pool for Alone {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// Numbers that a seed decides, in [0, 1).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        f32::from(u16::try_from(self.0 >> 48).unwrap()) / 65_536.0
    }
}

struct Case {
    shape: BlockShape,
    weights: Vec<u8>,
    scales: Vec<f32>,
    x: Vec<f32>,
    rows: usize,
}

impl Case {
    fn new(shape: BlockShape, rows: usize, seed: u64) -> Self {
        let mut draws = Draws(seed);
        let blocks = shape.inner.div_ceil(shape.block);
        let bytes = blocks * shape.block / if shape.bits == Bits::Four { 2 } else { 1 };
        let weights = (0..shape.columns * bytes)
            .map(|_| (draws.next() * 256.0) as u8)
            .collect();
        let scales = (0..shape.columns * blocks).map(|_| draws.next() - 0.5).collect();
        let mut x: Vec<_> = (0..rows * shape.inner)
            .map(|_| (draws.next() - 0.5) * 8.0)
            .collect();
        if seed.is_multiple_of(3) {
            // A block of zeros has no scale.
            x[..shape.block.min(shape.inner)].fill(0.0);
        }
        Self {
            shape,
            weights,
            scales,
            x,
            rows,
        }
    }

    fn weight(&self, column: usize, n: usize) -> i32 {
        let padded = self.shape.inner.next_multiple_of(self.shape.block);
        match self.shape.bits {
            Bits::Four => {
                let byte = self.weights[(column * padded + n) / 2];
                i32::from(byte >> (4 * (n % 2)) & 15) - 8
            }
            Bits::Eight => i32::from(self.weights[column * padded + n]) - 128,
        }
    }

    /// Block after block: whole numbers, then one product and sum in float32, rounded once.
    fn expected(&self) -> Vec<f32> {
        let BlockShape {
            inner,
            columns,
            block,
            ..
        } = self.shape;
        let blocks = inner.div_ceil(block);
        let mut out = Vec::new();
        for x in self.x.chunks_exact(inner) {
            let rounded: Vec<_> = x
                .chunks(block)
                .map(|x| {
                    let largest = x.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
                    let scale = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                    let levels: Vec<_> = x.iter().map(|x| (x * scale).round_ties_even() as i32).collect();
                    (levels, largest / 127.0)
                })
                .collect();
            for column in 0..columns {
                let mut sum = 0.0_f32;
                for (n, (levels, own)) in rounded.iter().enumerate() {
                    let whole: i32 = levels
                        .iter()
                        .enumerate()
                        .map(|(i, level)| level * self.weight(column, n * block + i))
                        .sum();
                    sum = (whole as f32).mul_add(self.scales[column * blocks + n] * own, sum);
                }
                out.push(sum);
            }
        }
        out
    }

    fn multiply(&self, instructions: IntegerInstructions, pool: &dyn Pool) -> Vec<f32> {
        let matrix = Blocks::pack(&self.weights, &self.scales, self.shape, instructions).unwrap();
        let mut out = vec![f32::NAN; self.rows * self.shape.columns];
        matrix
            .multiply(&self.x, &mut out, &mut Rounded::default(), pool)
            .unwrap();
        out
    }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

fn shapes() -> impl Strategy<Value = BlockShape> {
    (1..400_usize, 1..100_usize, 5..9_u32, any::<bool>()).prop_map(|(inner, columns, block, four)| {
        BlockShape {
            inner,
            columns,
            block: 1 << block,
            bits: if four { Bits::Four } else { Bits::Eight },
        }
    })
}

proptest! {
    #[test]
    fn a_product_is_its_sums_bit_for_bit_with_every_set_of_instructions(
        shape in shapes(), rows in 1..20_usize, seed in any::<u64>(),
    ) {
        let case = Case::new(shape, rows, seed);
        let expected = case.expected();
        for instructions in IntegerInstructions::available() {
            prop_assert_eq!(bits(&case.multiply(instructions, &Threads)), bits(&expected), "{}", instructions);
        }
    }

    #[test]
    fn a_row_is_the_same_among_others_and_alone(shape in shapes(), rows in 2..30_usize, seed in any::<u64>()) {
        let case = Case::new(shape, rows, seed);
        for instructions in IntegerInstructions::available() {
            let together = case.multiply(instructions, &Alone);
            for (row, expected) in together.chunks_exact(shape.columns).enumerate() {
                let x = case.x[row * shape.inner..][..shape.inner].to_vec();
                let alone = Case { x, rows: 1, weights: case.weights.clone(), scales: case.scales.clone(), shape };
                prop_assert_eq!(bits(&alone.multiply(instructions, &Alone)), bits(expected));
            }
        }
    }
}

#[test]
fn large_products_are_shared_out_and_stay_the_same() {
    for bits_of in [Bits::Four, Bits::Eight] {
        let shape = BlockShape {
            inner: 704,
            columns: 1_000,
            block: 64,
            bits: bits_of,
        };
        let case = Case::new(shape, 37, 5);
        let expected = case.expected();
        for instructions in IntegerInstructions::available() {
            assert_eq!(bits(&case.multiply(instructions, &Threads)), bits(&expected));
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let Some(instructions) = IntegerInstructions::best() else {
        return;
    };
    let shape = BlockShape {
        inner: 64,
        columns: 3,
        block: 32,
        bits: Bits::Four,
    };
    let (weights, scales) = (vec![0; 96], vec![0.0; 6]);
    let packed = |weights: &[u8], scales: &[f32], shape| Blocks::pack(weights, scales, shape, instructions);
    let odd = packed(&weights, &scales, BlockShape { block: 48, ..shape });
    assert_eq!(odd.unwrap_err(), BlocksError::Block(48));
    let none = packed(&weights, &scales, BlockShape { columns: 0, ..shape });
    assert_eq!(
        none.unwrap_err(),
        BlocksError::Empty {
            inner: 64,
            columns: 0
        }
    );
    let short = packed(&weights[..95], &scales, shape).unwrap_err();
    assert_eq!(short.to_string(), "the weights holds 95 numbers, expected 96");
    assert!(packed(&weights, &scales[..5], shape).is_err());
    let matrix = packed(&weights, &scales, shape).unwrap();
    let mut out = [7.0; 6];
    let run = |x: &[f32], out: &mut [f32]| matrix.multiply(x, out, &mut Rounded::default(), &Alone);
    assert_eq!(
        run(&[0.0; 100], &mut out),
        Err(BlocksError::Rows {
            found: 100,
            inner: 64
        })
    );
    assert!(run(&[0.0; 128], &mut out[..5]).is_err());
    assert!(out.iter().all(|x| (x - 7.0).abs() < 1e-9));
    assert_eq!(run(&[0.0; 128], &mut out), Ok(()));
    assert!(out.iter().all(|x| x.abs() < 1e-9));
}

#[test]
fn what_is_not_finite_is_not_rounded_away() {
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let shape = BlockShape {
            inner: 100,
            columns: 40,
            block: 32,
            bits: Bits::Four,
        };
        let mut case = Case::new(shape, 3, 1);
        let whole = case.expected();
        case.x[177] = odd;
        for instructions in IntegerInstructions::available() {
            let found = case.multiply(instructions, &Alone);
            assert!(found[40..80].iter().all(|x| x.is_nan()), "{odd}");
            assert_eq!(bits(&found[..40]), bits(&whole[..40]));
            assert_eq!(bits(&found[80..]), bits(&whole[80..]));
        }
    }
}

/// `cargo test --release -p deltamem-kernel --test blocks -- --ignored --nocapture`
#[test]
#[ignore = "prints timings, checks nothing"]
fn how_fast_products_are() {
    for (bits_of, block) in [(Bits::Four, 32), (Bits::Four, 128), (Bits::Eight, 32)] {
        let shape = BlockShape {
            inner: 1024,
            columns: 3072,
            block,
            bits: bits_of,
        };
        for instructions in IntegerInstructions::available() {
            for rows in [1, 2, 4, 16, 128, 512] {
                let case = Case::new(shape, rows, 1);
                let matrix = Blocks::pack(&case.weights, &case.scales, shape, instructions).unwrap();
                let (mut out, mut rounded) = (vec![0.0; rows * shape.columns], Rounded::default());
                let mut best = f64::MAX;
                for _ in 0..if rows < 64 { 200 } else { 10 } {
                    let began = std::time::Instant::now();
                    matrix.multiply(&case.x, &mut out, &mut rounded, &Alone).unwrap();
                    best = best.min(began.elapsed().as_secs_f64());
                }
                let operations = 2.0 * (rows * shape.inner * shape.columns) as f64;
                println!(
                    "{bits_of:?}/{block} {instructions} {rows} rows: {:.1} us, {:.0} G/s",
                    best * 1e6,
                    operations / best / 1e9
                );
            }
        }
    }
}

#[test]
#[ignore = "prints timings, checks nothing"]
fn how_fast_single_rows_come_from_memory() {
    let shape = BlockShape {
        inner: 1024,
        columns: 3072,
        block: 32,
        bits: Bits::Four,
    };
    let case = Case::new(shape, 1, 1);
    let instructions = IntegerInstructions::best().unwrap();
    let all: Vec<_> = (0..150)
        .map(|_| Blocks::pack(&case.weights, &case.scales, shape, instructions).unwrap())
        .collect();
    for threads in [1, 2] {
        for _ in 0..5 {
            let began = std::time::Instant::now();
            std::thread::scope(|scope| {
                for own in all.chunks(150 / threads) {
                    let case = &case;
                    scope.spawn(move || {
                        let (mut out, mut rounded) = (vec![0.0; shape.columns], Rounded::default());
                        for matrix in own {
                            matrix.multiply(&case.x, &mut out, &mut rounded, &Alone).unwrap();
                        }
                    });
                }
            });
            let t = began.elapsed().as_secs_f64();
            println!(
                "{threads} threads: {:.1} us each, {:.1} GB/s",
                t / 150.0 * 1e6,
                150.0 * (1024.0 * 3072.0 * 0.625) / t / 1e9
            );
        }
    }
}
