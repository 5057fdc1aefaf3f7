//! The mathematics of memory as a stream of edits: what a change did ([`diff`]), two changes put together ([`merge`]), whose writes a read
//! consists of ([`blame`]), and a history without one of its changes ([`redact`]). All of it sees states alone, float32 [L, H, r, r],
//! S[i, j] with i the value row and j the key column, and computes in f64. It knows no commit, no store, no gate and no token; who walks a
//! history calls it state by state.
//!
//! What a commit leaves of an older state. A turn of tokens maps each row of S linearly, s ← s M + w, where M is the product of the tokens'
//! keep − erase · k kᵀ and w what they wrote. States tell S before and S after, not M. [`survival`] estimates M from the two, and
//! [`blame`] and [`redact`] rest on it where they say so.

pub mod blame;
pub mod diff;
pub mod merge;
pub mod redact;
#[cfg(test)]
mod simulation;
mod survival;
mod svd;

use crate::geometry::Geometry;

/// Why an array is no state of the geometry, or no queries for it.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// An array has the wrong length.
    #[error(
        "{name} holds {found} numbers, expected {expected} for a memory of {geometry}; states of two models cannot be compared"
    )]
    Length {
        /// The array's name.
        name: &'static str,
        /// Its length.
        found: usize,
        /// The length that the geometry asks for.
        expected: usize,
        /// The geometry.
        geometry: Geometry,
    },
    /// An array holds a number that is infinite or none at all.
    #[error(
        "{name}[{index}] is {value}, expected finite numbers; the memory was damaged before it came here"
    )]
    NotFinite {
        /// The array's name.
        name: &'static str,
        /// Where, counted in the flat array.
        index: usize,
        /// The number.
        value: f32,
    },
}

/// Checks that `state` is float32 [L, H, r, r] of `geometry` and finite.
fn check_state(geometry: Geometry, name: &'static str, state: &[f32]) -> Result<(), StateError> {
    let (found, expected) = (state.len(), geometry.elements());
    if found != expected {
        return Err(StateError::Length {
            name,
            found,
            expected,
            geometry,
        });
    }
    check_finite(name, state)
}

fn check_finite(name: &'static str, values: &[f32]) -> Result<(), StateError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(StateError::NotFinite {
            name,
            index,
            value: values[index],
        }),
        None => Ok(()),
    }
}

/// after − before, number by number in f64.
fn difference(before: &[f32], after: &[f32]) -> Vec<f64> {
    before
        .iter()
        .zip(after)
        .map(|(&before, &after)| f64::from(after) - f64::from(before))
        .collect()
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// One rounding from f64 to f32.
#[allow(clippy::cast_possible_truncation)]
const fn round(value: f64) -> f32 {
    value as f32
}

/// Whether two states have the same bits: 0.0 is not −0.0 here.
fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// The singular values of a square matrix, the largest first, for tests of what computes them otherwise.
#[cfg(test)]
pub(crate) fn singular_values(matrix: &[f64], rank: usize) -> Vec<f64> {
    svd::Svd::of(matrix, rank).values
}
