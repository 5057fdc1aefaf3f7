//! The shape of a memory: layers, heads, rank. A [`Geometry`] that exists is within the limits, so whoever holds one may compute sizes
//! and allocate. It knows nothing of what the numbers mean.

/// The most layers that may carry a memory.
pub const MAX_LAYERS: usize = 1024;
/// The most state heads in a layer.
pub const MAX_HEADS: usize = 256;
/// The largest rank of a state.
pub const MAX_RANK: usize = 128;
/// The most bytes that one memory may take: 1 GiB.
pub const MAX_BYTES: usize = 1 << 30;

/// The shape of one user's memory, float32 [layers, heads, rank, rank].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    layers: usize,
    heads: usize,
    rank: usize,
}

/// Why a shape is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// A size is zero or over its limit.
    #[error(
        "memory geometry: {name} is {found}, expected 1 to {max}; the file is damaged or not a δ-mem memory"
    )]
    OutOfRange {
        /// Which size: `layers`, `heads` or `rank`.
        name: &'static str,
        /// The size found.
        found: usize,
        /// The largest that is allowed.
        max: usize,
    },
    /// Each size is allowed, all of them together are not.
    #[error(
        "memory geometry: {layers} layers x {heads} heads x {rank} x {rank} float32 is more than the {MAX_BYTES} bytes that one memory \
         may take; lower the rank or the number of heads"
    )]
    TooLarge {
        /// Layers found.
        layers: usize,
        /// Heads found.
        heads: usize,
        /// Rank found.
        rank: usize,
    },
}

impl Geometry {
    /// A geometry of `layers` ≤ 1,024, `heads` ≤ 256, `rank` ≤ 128, none of them 0, and at most 1 GiB in all.
    ///
    /// # Errors
    /// [`GeometryError`] names the size that is out of range.
    pub fn new(layers: usize, heads: usize, rank: usize) -> Result<Self, GeometryError> {
        for (name, found, max) in [
            ("layers", layers, MAX_LAYERS),
            ("heads", heads, MAX_HEADS),
            ("rank", rank, MAX_RANK),
        ] {
            if found == 0 || found > max {
                return Err(GeometryError::OutOfRange { name, found, max });
            }
        }
        let bytes = [layers, heads, rank, rank]
            .into_iter()
            .try_fold(size_of::<f32>(), usize::checked_mul);
        match bytes {
            Some(bytes) if bytes <= MAX_BYTES => Ok(Self { layers, heads, rank }),
            _ => Err(GeometryError::TooLarge { layers, heads, rank }),
        }
    }

    /// Layers that carry a memory, L.
    pub const fn layers(&self) -> usize {
        self.layers
    }

    /// State heads in a layer, H.
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// The rank r of each state.
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// [layers, heads, rank, rank].
    pub const fn shape(&self) -> [usize; 4] {
        [self.layers, self.heads, self.rank, self.rank]
    }

    /// Numbers in one layer's states, H·r·r.
    pub const fn layer_elements(&self) -> usize {
        self.heads * self.rank * self.rank
    }

    /// Numbers in the whole memory, L·H·r·r. [`Geometry::new`] has checked that this does not overflow.
    pub const fn elements(&self) -> usize {
        self.layers * self.layer_elements()
    }

    /// Bytes of the whole memory as float32.
    pub const fn bytes(&self) -> usize {
        self.elements() * size_of::<f32>()
    }
}

impl std::fmt::Display for Geometry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} layers x {} heads x {} x {}",
            self.layers, self.heads, self.rank, self.rank
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_are_those_of_the_shape() {
        let geometry = Geometry::new(36, 2, 8).unwrap();
        assert_eq!(geometry.shape(), [36, 2, 8, 8]);
        assert_eq!(geometry.elements(), geometry.shape().iter().product::<usize>());
        assert_eq!(geometry.bytes(), 36 * 2 * 8 * 8 * 4);
        assert_eq!(geometry.to_string(), "36 layers x 2 heads x 8 x 8");
    }

    #[test]
    fn a_size_of_zero_or_over_its_limit_is_refused_by_name() {
        let huge = usize::MAX;
        for (layers, heads, rank, wrong) in [
            (0, 1, 8, "layers"),
            (1025, 1, 8, "layers"),
            (huge, huge, huge, "layers"),
            (1, 0, 8, "heads"),
            (1, 257, 8, "heads"),
            (1, 1, 0, "rank"),
            (1, 1, 129, "rank"),
        ] {
            let error = Geometry::new(layers, heads, rank).unwrap_err();
            assert!(
                matches!(error, GeometryError::OutOfRange { name, .. } if name == wrong),
                "{error}"
            );
            assert!(error.to_string().contains(wrong));
        }
    }

    #[test]
    fn a_memory_over_a_gibibyte_is_refused() {
        assert!(matches!(
            Geometry::new(1024, 256, 128),
            Err(GeometryError::TooLarge { .. })
        ));
        assert_eq!(Geometry::new(1024, 16, 128).unwrap().bytes(), MAX_BYTES);
    }
}
