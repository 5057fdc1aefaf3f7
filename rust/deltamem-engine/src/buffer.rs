//! Where the numbers of a run lie: in the host's memory, or in that of the device which the graph runs on. Rows of keys and values are moved,
//! wiped and handed to a run by the same words in both; on the host these are plain slices. It knows bytes and rows; it knows nothing of turns.

use std::ops::Range;
use std::sync::Arc;

use ort::value::TensorElementType;

use crate::call::Tensor;
use crate::device::{DeviceBuffer, DeviceMemory, Rows};
use crate::error::{EngineError, Result};

/// Where buffers are made: on a device, or, without one, on the host.
pub(crate) type Home = Option<Arc<DeviceMemory>>;

/// Bytes that are aligned for every element type. A device's may be shared by those who each know of another part: a run of some slots, and what is
/// done to others beside it.
#[derive(Debug)]
pub(crate) enum Buffer {
    /// `u64` words, for the alignment.
    Host(Vec<u64>),
    /// The device's.
    Device(Arc<DeviceBuffer>),
}

/// A part of a buffer that a run may read and write.
#[derive(Debug)]
pub(crate) enum Part<'a> {
    /// Of the host's memory.
    Host(&'a mut [u8]),
    /// Of a device's: so many bytes from `start` on.
    Device {
        buffer: &'a DeviceBuffer,
        start: usize,
        bytes: usize,
    },
}

/// Groups of rows in a buffer, [groups, rows, row], from a byte on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups {
    /// The first group's first byte.
    pub(crate) start: usize,
    /// Rows of each group.
    pub(crate) rows: usize,
}

impl Buffer {
    /// No bytes.
    pub(crate) fn empty() -> Self {
        Self::Host(Vec::new())
    }

    /// At least `bytes` zeroed bytes. On the host they take memory where they are written; an allocation that is refused is an error, not an
    /// abort.
    pub(crate) fn zeroed(bytes: usize, home: &Home) -> Result<Self> {
        match home {
            None => Ok(Self::Host(zeroed_words(bytes.div_ceil(8))?)),
            Some(memory) => {
                // What others left there is not read, and is nobody's business.
                let buffer = memory.allocate(bytes.next_multiple_of(8))?;
                buffer.zero(0, buffer.len())?;
                Ok(Self::Device(Arc::new(buffer)))
            }
        }
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Host(words) => words.len() * 8,
            Self::Device(buffer) => buffer.len(),
        }
    }

    /// The host's bytes; none of a device's.
    pub(crate) fn host_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Host(words) => bytemuck::cast_slice_mut(words),
            Self::Device(_) => &mut [],
        }
    }

    /// A part that a run may write.
    pub(crate) fn part(&mut self, range: Range<usize>) -> Part<'_> {
        match self {
            Self::Host(words) => Part::Host(&mut bytemuck::cast_slice_mut::<u64, u8>(words)[range]),
            Self::Device(buffer) => Part::Device {
                start: range.start,
                bytes: range.len(),
                buffer,
            },
        }
    }

    /// As many as `count`, each of at least `bytes` zeroed bytes.
    pub(crate) fn many_zeroed(count: usize, bytes: usize, home: &Home) -> Result<Vec<Self>> {
        let Some(memory) = home else {
            return (0..count).map(|_| Self::zeroed(bytes, home)).collect();
        };
        let bytes = bytes.next_multiple_of(8);
        let buffers = (0..count)
            .map(|_| {
                memory
                    .allocate(bytes)
                    .map(|buffer| Self::Device(Arc::new(buffer)))
            })
            .collect::<Result<Vec<_>>>()?;
        DeviceBuffer::zero_all(&devices(&buffers), 0, bytes)?;
        Ok(buffers)
    }

    /// Writes zeros over the first `used` rows of `count` groups of each; on a device over all of them, which is one operation there for all.
    pub(crate) fn wipe(
        buffers: &mut [Self],
        groups: Groups,
        count: usize,
        used: usize,
        row: usize,
    ) -> Result<()> {
        let size = groups.rows * row;
        for buffer in &mut *buffers {
            if let Self::Host(words) = buffer {
                let bytes = bytemuck::cast_slice_mut::<u64, u8>(words);
                for group in 0..count {
                    bytes[groups.start + group * size..][..used * row].fill(0);
                }
            }
        }
        if used == 0 {
            return Ok(());
        }
        DeviceBuffer::zero_all(&devices(buffers), groups.start, count * size)
    }

    /// Copies the first `used` rows of `count` groups of other buffers into groups of these. Rows behind them stay on the host, where they
    /// are zero, and are zeroed on a device.
    pub(crate) fn copy_rows(
        buffers: &mut [Self],
        to: Groups,
        others: &[Self],
        from: Groups,
        count: usize,
        used: usize,
        row: usize,
    ) -> Result<()> {
        for (buffer, other) in buffers.iter_mut().zip(others) {
            match (buffer, other) {
                (Self::Host(words), Self::Host(others)) => {
                    let (bytes, others) = (
                        bytemuck::cast_slice_mut::<u64, u8>(words),
                        bytemuck::cast_slice::<u64, u8>(others),
                    );
                    for group in 0..count {
                        bytes[to.start + group * to.rows * row..][..used * row]
                            .copy_from_slice(&others[from.start + group * from.rows * row..][..used * row]);
                    }
                }
                (Self::Device(_), Self::Device(_)) => {}
                _ => {
                    return Err(EngineError::Session(
                        "keys and values of one model lie on the host and on a device; please report this"
                            .into(),
                    ));
                }
            }
        }
        DeviceBuffer::rows_all(
            &devices(buffers),
            to.start,
            &devices(others),
            from.start,
            Rows {
                groups: count,
                from: from.rows,
                to: to.rows,
                used,
                row,
            },
        )
    }

    /// Has the first `used` rows of `count` groups change places with those of `count` others behind them, in each of these.
    pub(crate) fn swap_rows(
        buffers: &mut [Self],
        low: Groups,
        high: Groups,
        count: usize,
        used: usize,
        row: usize,
    ) -> Result<()> {
        let size = low.rows * row;
        for buffer in &mut *buffers {
            if let Self::Host(words) = buffer {
                let (lows, highs) = bytemuck::cast_slice_mut::<u64, u8>(words).split_at_mut(high.start);
                for group in 0..count {
                    let at = group * size;
                    lows[low.start + at..][..used * row].swap_with_slice(&mut highs[at..][..used * row]);
                }
            }
        }
        DeviceBuffer::swap_all(&devices(buffers), low.start, high.start, count * size)
    }

    /// The device's, which may be held while others use other parts of it.
    pub(crate) fn shared(&self) -> Option<Arc<DeviceBuffer>> {
        match self {
            Self::Host(_) => None,
            Self::Device(buffer) => Some(Arc::clone(buffer)),
        }
    }
}

/// Those of them that are the device's: all, or none.
pub(crate) fn devices(buffers: &[Buffer]) -> Vec<&DeviceBuffer> {
    buffers
        .iter()
        .filter_map(|buffer| match buffer {
            Buffer::Host(_) => None,
            Buffer::Device(buffer) => Some(&**buffer),
        })
        .collect()
}

impl<'a> Part<'a> {
    /// The host's bytes.
    #[cfg(test)]
    pub(crate) fn host(self) -> &'a mut [u8] {
        match self {
            Self::Host(bytes) => bytes,
            Self::Device { .. } => &mut [],
        }
    }

    /// As a tensor.
    pub(crate) fn tensor(
        self,
        shape: &[usize],
        element: TensorElementType,
        element_bytes: usize,
    ) -> Result<Tensor<'a>> {
        match self {
            Self::Host(bytes) => Tensor::bytes(bytes, shape, element, element_bytes),
            Self::Device { buffer, start, bytes } => {
                Tensor::device(buffer, start, bytes, shape, element, element_bytes)
            }
        }
    }
}

/// Zeroed words, which take memory where they are written; an allocation that the machine refuses is an error, not an abort.
pub(crate) fn zeroed_words(words: usize) -> Result<Vec<u64>> {
    bytemuck::allocation::try_zeroed_vec(words).map_err(|()| {
        EngineError::Session(format!(
            "no memory for a turn's buffer of {} MiB; call end_turn() earlier, or use fewer sessions at once",
            words.saturating_mul(8) >> 20
        ))
    })
}
