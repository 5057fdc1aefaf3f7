//! What a session's memory looks like, and what its last tokens do with it: the figures of the state, and where the bundle's graph measures
//! them, the size of the corrections and the gates. It knows one session at one moment; what healthy means, and what to do about it, is
//! known elsewhere.

use deltamem_core::health::Figures;

use crate::error::Result;
use crate::graph::Measures;
use crate::model::CHUNK_TOKENS;
use crate::session::{DeltaEnergy, Interrupt, Session};

/// A gate below this or above one minus this is saturated.
pub const SATURATED: f32 = 0.02;

/// What the last tokens did with the memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// How many tokens were read for it.
    pub tokens: usize,
    /// |correction| / |what it corrects|, [layers, delta heads].
    pub delta_ratio: Vec<f64>,
    /// β, and λ where it is not 1 − β; empty where the graph does not give them.
    pub gates: Vec<GateFigures>,
}

/// One gate over tokens, heads and rows, layer by layer.
#[derive(Debug, Clone, PartialEq)]
pub struct GateFigures {
    /// The mean, [layers].
    pub mean: Vec<f64>,
    /// The share of values below [`SATURATED`] or above 1 − [`SATURATED`], [layers].
    pub saturated: Vec<f64>,
}

impl Session {
    /// The sizes of the memory as it is.
    ///
    /// # Errors
    /// As [`Session::memory`].
    pub fn figures(&self) -> Result<Figures> {
        Ok(Figures::of(self.geometry(), &self.memory()?))
    }

    /// Reads the last tokens once more, in a turn of their own that writes nothing, and measures what the memory as it is does there. `None`
    /// when nothing was read yet or the bundle has no measured graph. The session stays as it is.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn measure(&self, interrupt: Interrupt<'_>) -> Result<Option<Measured>> {
        let manifest = self.model().manifest();
        let mut tokens = self.recent_tokens();
        tokens.drain(..tokens.len().saturating_sub(self.model().context_length()));
        if tokens.is_empty() || manifest.graph.measured_file.is_none() {
            return Ok(None);
        }
        let memory = &manifest.memory;
        let (layers, pairs) = (
            memory.layers.len(),
            memory.layers.len() * memory.delta_heads.len(),
        );
        let (kinds, width) = (memory.gate_kinds(), memory.gate_width());
        let per_token = if manifest.graph.gates {
            layers * kinds * width
        } else {
            0
        };
        let mut energy = DeltaEnergy::default();
        let mut energies = vec![0.0; tokens.len() * pairs * 2];
        let mut gates = vec![0.0; tokens.len() * per_token];
        {
            let mut energies = energies.chunks_mut(CHUNK_TOKENS * pairs * 2);
            let mut gates = gates.chunks_mut((CHUNK_TOKENS * per_token).max(1));
            self.read_aside(&tokens, interrupt, |read| {
                read(Measures {
                    energy: energies.next(),
                    gates: gates.next(),
                    ..Measures::default()
                })
            })?;
        }
        energy.add(&energies, pairs);
        let kinds = if per_token > 0 { kinds } else { 0 };
        let gates = (0..kinds)
            .map(|kind| {
                GateFigures::of(
                    &gates,
                    per_token,
                    |layer| (layer * kinds + kind) * width,
                    layers,
                    width,
                )
            })
            .collect();
        Ok(Some(Measured {
            tokens: tokens.len(),
            delta_ratio: energy.ratios(),
            gates,
        }))
    }
}

impl GateFigures {
    /// Over `gates` of `per_token` numbers a token, of which a layer's begin at `start(layer)`.
    fn of(
        gates: &[f32],
        per_token: usize,
        start: impl Fn(usize) -> usize,
        layers: usize,
        width: usize,
    ) -> Self {
        let of_layer = |layer: usize| {
            let first = start(layer);
            gates
                .chunks_exact(per_token)
                .flat_map(move |token| &token[first..first + width])
        };
        let share = |layer: usize, sum: f64| sum / of_layer(layer).count().max(1) as f64;
        let saturated = |gate: &&f32| **gate < SATURATED || **gate > 1.0 - SATURATED;
        Self {
            mean: (0..layers)
                .map(|layer| share(layer, of_layer(layer).map(|&gate| f64::from(gate)).sum()))
                .collect(),
            saturated: (0..layers)
                .map(|layer| share(layer, of_layer(layer).filter(saturated).count() as f64))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp)]
    use super::*;

    #[test]
    fn gates_are_counted_layer_by_layer_and_kind_by_kind() {
        // Two tokens, two layers, β and λ, two numbers each.
        let gates = [
            0.0, 1.0, 0.5, 0.5, /* layer 1 */ 0.25, 0.75, 1.0, 1.0, //
            0.01, 0.99, 0.5, 0.5, /* layer 1 */ 0.25, 0.75, 0.0, 0.5,
        ];
        let of = |kind: usize| GateFigures::of(&gates, 8, |layer| (layer * 2 + kind) * 2, 2, 2);
        assert!((of(0).mean[0] - 0.5).abs() < 1e-7);
        assert_eq!(of(0).mean[1], 0.5);
        assert_eq!(of(0).saturated, [1.0, 0.0]);
        assert_eq!(of(1).mean, [0.5, 0.625]);
        assert_eq!(of(1).saturated, [0.0, 0.75]);
    }
}
