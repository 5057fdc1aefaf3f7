//! Histories of the rule for tests: commits of some tokens each, one of which tells a fact, with everything that states alone do not tell.

use super::{dot, widen};
use crate::geometry::Geometry;
use crate::rule::{self, Gates, Tokens, UpdateMode};

/// A small stream of random numbers (`SplitMix64`).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Below `count`.
    pub fn below(&mut self, count: usize) -> usize {
        usize::try_from(self.next() % count as u64).unwrap_or(0)
    }

    /// Normal, mean 0 and variance 1.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A direction.
    pub fn unit(&mut self, rank: usize) -> Vec<f64> {
        let vector: Vec<f64> = (0..rank).map(|_| self.normal()).collect();
        let length = dot(&vector, &vector).sqrt();
        vector.iter().map(|x| x / length).collect()
    }
}

/// What histories are like.
#[derive(Debug, Clone, Copy)]
pub struct World {
    pub layers: usize,
    pub heads: usize,
    pub rank: usize,
    pub commits: usize,
    /// Tokens in a commit. One tells the fact, the others write random keys and values of half the size.
    pub tokens: usize,
    pub mode: UpdateMode,
    /// λ of every token, where the mode has one.
    pub decay: f64,
    /// β of the token that tells the fact.
    pub told: f64,
    /// The largest β of the others.
    pub other: f64,
    /// Whether β differs from row to row, by a factor of exp(N(0, 0.5²)).
    pub rows: bool,
}

/// The worlds that figures are given for.
pub fn small_worlds() -> [(&'static str, World); 5] {
    let world = World {
        layers: 2,
        heads: 1,
        rank: 32,
        commits: 14,
        tokens: 12,
        mode: UpdateMode::NoLambda,
        decay: 1.0,
        told: 0.9,
        other: 0.1,
        rows: false,
    };
    let small = World {
        layers: 4,
        heads: 2,
        rank: 16,
        mode: UpdateMode::Standard,
        ..world
    };
    [
        ("no_lambda, rank 32", world),
        (
            "standard, decay 0.999, rank 16",
            World {
                decay: 0.999,
                ..small
            },
        ),
        ("standard, decay 0.99, rank 16", World { decay: 0.99, ..small }),
        (
            "standard, decay 0.99, rank 16, gates per row",
            World {
                decay: 0.99,
                told: 0.6,
                rows: true,
                ..small
            },
        ),
        (
            "lambda_outside, decay 0.995, rank 8",
            World {
                layers: 12,
                heads: 1,
                rank: 8,
                mode: UpdateMode::LambdaOutside,
                decay: 0.995,
                tokens: 8,
                commits: 10,
                other: 0.05,
                ..world
            },
        ),
    ]
}

/// A fact: a key and a value for each layer and head.
pub struct Fact {
    /// [L, H, r], of length 1 per head.
    pub key: Vec<f32>,
    /// [L, H, r].
    pub value: Vec<f32>,
    /// A later commit told another value at the same key.
    pub overwritten: bool,
}

/// The tokens of one commit in one layer.
#[derive(Clone)]
struct Turn {
    k: Vec<f32>,
    v: Vec<f32>,
    keep: Vec<f32>,
    erase: Vec<f32>,
    write: Vec<f32>,
}

pub struct History {
    world: World,
    /// `S_0` to `S_n`.
    pub states: Vec<Vec<f32>>,
    /// Fact i is told in commit i + 1.
    pub facts: Vec<Fact>,
    /// [commit][layer].
    turns: Vec<Vec<Turn>>,
}

impl World {
    #[allow(clippy::unwrap_used)]
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.layers, self.heads, self.rank).unwrap()
    }

    pub fn history(&self, seed: u64) -> History {
        self.branch(seed, &vec![0.0; self.geometry().elements()], self.commits)
    }

    /// `commits` turns on top of a state. Every fourth fact overwrites an earlier one of the same branch.
    pub fn branch(&self, seed: u64, from: &[f32], commits: usize) -> History {
        let mut random = Random::new(seed.wrapping_mul(0x5851_F42D).wrapping_add(1));
        let width = self.layers * self.heads * self.rank;
        let mut history = History {
            world: *self,
            states: vec![from.to_vec()],
            facts: Vec::new(),
            turns: Vec::new(),
        };
        for commit in 0..commits {
            let standing: Vec<usize> = (0..commit).filter(|&at| !history.facts[at].overwritten).collect();
            let key = if commit % 4 == 3 {
                let old = standing[random.below(standing.len())];
                history.facts[old].overwritten = true;
                history.facts[old].key.clone()
            } else {
                self.keys(&mut random)
            };
            let value = (0..width).map(|_| super::round(random.normal())).collect();
            let fact = Fact {
                key,
                value,
                overwritten: false,
            };
            let turns = self.turns(&mut random, &fact);
            let mut state = history.states[commit].clone();
            self.run(&turns, &mut state);
            history.states.push(state);
            history.facts.push(fact);
            history.turns.push(turns);
        }
        history
    }

    fn keys(&self, random: &mut Random) -> Vec<f32> {
        let heads = 0..self.layers * self.heads;
        heads
            .flat_map(|_| random.unit(self.rank))
            .map(super::round)
            .collect()
    }

    fn turns(&self, random: &mut Random, fact: &Fact) -> Vec<Turn> {
        let width = self.heads * self.rank;
        let empty = Turn {
            k: vec![],
            v: vec![],
            keep: vec![],
            erase: vec![],
            write: vec![],
        };
        let mut turns = vec![empty; self.layers];
        let telling = random.below(self.tokens);
        for token in 0..self.tokens {
            let tells = token == telling;
            let key = if tells {
                fact.key.clone()
            } else {
                self.keys(random)
            };
            let beta = if tells {
                self.told
            } else {
                self.other * random.uniform()
            };
            for (layer, turn) in turns.iter_mut().enumerate() {
                turn.k.extend(&key[layer * width..][..width]);
                for at in 0..width {
                    let other = super::round(0.5 * random.normal());
                    turn.v.push(if tells {
                        fact.value[layer * width + at]
                    } else {
                        other
                    });
                    let factor = if self.rows {
                        (0.5 * random.normal()).exp()
                    } else {
                        1.0
                    };
                    let beta = (beta * factor).min(0.98);
                    let (keep, erase) = match self.mode {
                        UpdateMode::Standard => (self.decay, beta),
                        UpdateMode::LambdaOutside => (self.decay, self.decay * beta),
                        UpdateMode::NoLambda => (1.0, beta),
                    };
                    turn.keep.push(super::round(keep));
                    turn.erase.push(super::round(erase));
                    turn.write.push(super::round(beta));
                }
            }
        }
        turns
    }

    #[allow(clippy::unwrap_used)]
    fn run(&self, turns: &[Turn], state: &mut [f32]) {
        let mut reads = vec![0.0; self.tokens * self.heads * self.rank];
        let mask = vec![true; self.tokens];
        for (turn, state) in turns
            .iter()
            .zip(state.chunks_exact_mut(self.geometry().layer_elements()))
        {
            let tokens = Tokens {
                q: &turn.k,
                k: &turn.k,
                v: &turn.v,
                keep: &turn.keep,
                erase: &turn.erase,
                write: &turn.write,
                mask: &mask,
            };
            rule::scan(self.heads, self.rank, Gates::Row, &tokens, state, &mut reads).unwrap();
        }
    }

    /// S q of one token, [L, H, r].
    pub fn read(&self, state: &[f32], query: &[f32]) -> Vec<f64> {
        let (state, query) = (widen(state), widen(query));
        state
            .chunks_exact(self.rank * self.rank)
            .zip(query.chunks_exact(self.rank))
            .flat_map(|(block, query)| block.chunks_exact(self.rank).map(|row| dot(row, query)))
            .collect()
    }
}

impl Fact {
    /// A query for the fact: its key with noise of 0.3 of its length.
    pub fn asked(&self, world: &World, random: &mut Random) -> Vec<f32> {
        let mut query = self.key.clone();
        for head in query.chunks_exact_mut(world.rank) {
            for (q, noise) in head.iter_mut().zip(random.unit(world.rank)) {
                *q += super::round(0.3 * noise);
            }
        }
        crate::gates::l2_normalize(&mut query, world.rank);
        query
    }

    /// How close a read is to the value.
    pub fn cosine(&self, read: &[f64]) -> f64 {
        let value = widen(&self.value);
        dot(&value, read) / (dot(&value, &value) * dot(read, read)).sqrt()
    }
}

impl History {
    /// The terms that the gates give, `S_n = Σ C_i`: the history run with the values of commit i alone. The first is that of `S_0`.
    pub fn true_terms(&self) -> Vec<Vec<f32>> {
        (0..self.states.len())
            .map(|commit| {
                let zero = vec![0.0; self.states[0].len()];
                let mut state = if commit == 0 { self.states[0].clone() } else { zero };
                for (at, turns) in self.turns.iter().enumerate() {
                    let mut turns = turns.clone();
                    if at + 1 != commit {
                        for turn in &mut turns {
                            turn.v.fill(0.0);
                        }
                    }
                    self.world.run(&turns, &mut state);
                }
                state
            })
            .collect()
    }

    /// The last state of the same tokens without those of one commit.
    pub fn without(&self, commit: usize) -> Vec<f32> {
        let mut state = self.states[commit - 1].clone();
        for turns in &self.turns[commit..] {
            self.world.run(turns, &mut state);
        }
        state
    }
}
