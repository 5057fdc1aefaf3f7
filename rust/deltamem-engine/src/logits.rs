//! The logits behind a session's last token: all of them on the host, or, where they were made on a device and a choice needs few, the best of
//! them, while the rest stays where it is until somebody asks. Nothing here knows how a token is chosen.

use std::sync::Arc;

use crate::device::Best;
use crate::error::Result;
use crate::fixed::Spot;

/// What came down of a token's logits.
#[derive(Debug, Default)]
pub(crate) struct Logits {
    /// All, float32 [vocab]; empty where they are on the device, or there are none.
    all: Vec<f32>,
    /// Those that stayed on the device.
    away: Option<Away>,
}

/// Logits on the device.
#[derive(Debug)]
struct Away {
    /// The largest, (token, logit).
    best: Vec<(u32, f32)>,
    /// The row; none once nobody can ask for it any more.
    row: Option<Arc<Spot>>,
    vocab: usize,
}

impl Logits {
    /// Whether there are any.
    pub(crate) fn any(&self) -> bool {
        self.away.is_some() || !self.all.is_empty()
    }

    /// Where a run on the host, or a copy, puts all of them.
    pub(crate) fn room(&mut self, vocab: usize) -> &mut [f32] {
        self.away = None;
        self.all.resize(vocab, 0.0);
        &mut self.all
    }

    /// Takes these.
    pub(crate) fn set(&mut self, all: &[f32]) {
        self.away = None;
        all.clone_into(&mut self.all);
    }

    /// All that are on the host, given away.
    pub(crate) fn take(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.all)
    }

    /// Notes logits on the device with the best of them, row `row` of `best`. Where something in it is NaN there is no best.
    pub(crate) fn stay(&mut self, spot: Arc<Spot>, row: usize, vocab: usize, best: &Best) {
        self.all.clear();
        let range = row * best.count..(row + 1) * best.count;
        let largest = if best.wrong[row] {
            Vec::new()
        } else {
            let ids = best.ids[range.clone()]
                .iter()
                .map(|&id| u32::try_from(id).unwrap_or(u32::MAX));
            ids.zip(best.logits[range].iter().copied()).collect()
        };
        self.away = Some(Away {
            best: largest,
            row: Some(spot),
            vocab,
        });
    }

    /// The largest ones and the size of the vocabulary, where the others are on the device.
    pub(crate) fn best(&self) -> Option<(&[(u32, f32)], usize)> {
        self.away.as_ref().map(|away| (away.best.as_slice(), away.vocab))
    }

    /// All of them: brought from the device, if they are there.
    pub(crate) fn all(&mut self) -> Result<&[f32]> {
        if let Some(Away {
            row: Some(spot),
            vocab,
            ..
        }) = &self.away
        {
            self.all.resize(*vocab, 0.0);
            spot.read(|buffer, start| buffer.download(start, bytemuck::cast_slice_mut(&mut self.all)))?;
            self.away = None;
        }
        Ok(&self.all)
    }

    /// The token was chosen and the next one will be read before another choice: what is on the device may go.
    pub(crate) fn let_go(&mut self) {
        if let Some(away) = &mut self.away {
            away.row = None;
        }
    }
}
