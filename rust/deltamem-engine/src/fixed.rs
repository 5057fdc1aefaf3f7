//! Rows on a device that stay where they are, because a captured step knows its numbers by their addresses: the states of a window of slots,
//! which two buffers take turns to hold, and its logits. A run writes the same rows again and again, so what somebody still holds of one is
//! brought elsewhere first, and the holder's [`Spot`] says where. It knows rows and who holds them; it knows nothing of slots and tokens.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::device::{DeviceBuffer, DeviceMemory};
use crate::error::Result;
use crate::memory::State;

/// Where numbers on a device lie that nobody writes any more. They may be moved; what they are never changes.
///
/// Whoever runs the graph moves them and writes the rows that they have left, one at a time; everybody else reads with the lock held.
#[derive(Debug)]
pub(crate) struct Spot {
    place: Mutex<Place>,
    bytes: usize,
}

#[derive(Debug)]
struct Place {
    buffer: Arc<DeviceBuffer>,
    start: usize,
    /// Whether it is a row that is written again one day.
    fixed: bool,
    /// Whether somebody outside has the address.
    pinned: bool,
}

impl Spot {
    /// Numbers in a buffer that is never written again.
    pub(crate) fn new(buffer: Arc<DeviceBuffer>, start: usize, bytes: usize) -> Self {
        Self {
            place: Mutex::new(Place {
                buffer,
                start,
                fixed: false,
                pinned: false,
            }),
            bytes,
        }
    }

    /// Where they are: for whoever runs the graph, who alone writes again what they leave, and to compare.
    pub(crate) fn place(&self) -> (Arc<DeviceBuffer>, usize) {
        let place = self.place.lock();
        (Arc::clone(&place.buffer), place.start)
    }

    /// Reads them, while nobody moves them.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&DeviceBuffer, usize) -> Result<T>) -> Result<T> {
        let place = self.place.lock();
        read(&place.buffer, place.start)
    }

    /// Whether they have a buffer to themselves.
    pub(crate) fn is_alone(&self) -> bool {
        let place = self.place.lock();
        !place.fixed && place.buffer.len() == self.bytes
    }

    /// From here on they stay where they are: somebody outside is given the address.
    pub(crate) fn pin(&self) -> Result<()> {
        let mut place = self.place.lock();
        if place.fixed {
            place.leave(self.bytes)?;
        }
        place.pinned = true;
        Ok(())
    }

    /// Brings them elsewhere if they are here.
    fn leave(&self, buffer: &Arc<DeviceBuffer>, start: usize) -> Result<()> {
        let mut place = self.place.lock();
        if place.lies(buffer, start) {
            place.leave(self.bytes)?;
        }
        Ok(())
    }

    /// Whether they are there.
    pub(crate) fn lies(&self, buffer: &Arc<DeviceBuffer>, start: usize) -> bool {
        self.place.lock().lies(buffer, start)
    }

    /// The same numbers are in this row too: it is theirs from here on, unless they must stay where they are.
    fn settle(&self, buffer: &Arc<DeviceBuffer>, start: usize) {
        let mut place = self.place.lock();
        if !place.pinned {
            *place = Place {
                buffer: Arc::clone(buffer),
                start,
                fixed: true,
                pinned: false,
            };
        }
    }
}

impl Place {
    fn lies(&self, buffer: &Arc<DeviceBuffer>, start: usize) -> bool {
        Arc::ptr_eq(&self.buffer, buffer) && self.start == start
    }

    /// Copies them into a buffer of their own.
    fn leave(&mut self, bytes: usize) -> Result<()> {
        let own = self.buffer.memory().allocate(bytes)?;
        own.copy(0, &self.buffer, self.start, bytes)?;
        self.buffer = Arc::new(own);
        self.start = 0;
        self.fixed = false;
        Ok(())
    }
}

/// Rows that are written again and again where they are.
#[derive(Debug)]
pub(crate) struct FixedRows {
    buffer: Arc<DeviceBuffer>,
    /// Bytes of one.
    row: usize,
    /// Whose numbers were left in each, as far as anybody still holds them and they have not moved.
    tenants: Vec<Weak<Spot>>,
}

impl FixedRows {
    fn new(memory: &Arc<DeviceMemory>, rows: usize, row: usize) -> Result<Self> {
        let buffer = memory.allocate(rows * row)?;
        buffer.zero(0, rows * row)?;
        Ok(Self {
            buffer: Arc::new(buffer),
            row,
            tenants: std::iter::repeat_with(Weak::new).take(rows).collect(),
        })
    }

    /// Has the first `rows` rows hold nothing that anybody holds.
    fn vacate(&mut self, rows: usize) -> Result<()> {
        (0..rows).try_for_each(|row| self.vacate_row(row))
    }

    fn vacate_row(&mut self, row: usize) -> Result<()> {
        if let Some(spot) = self.tenants[row].upgrade() {
            spot.leave(&self.buffer, row * self.row)?;
        }
        self.tenants[row] = Weak::new();
        Ok(())
    }

    /// What a run has written into a row belongs to whoever holds this.
    pub(crate) fn lease(&mut self, row: usize) -> Arc<Spot> {
        let spot = Arc::new(Spot {
            place: Mutex::new(Place {
                buffer: Arc::clone(&self.buffer),
                start: row * self.row,
                fixed: true,
                pinned: false,
            }),
            bytes: self.row,
        });
        self.tenants[row] = Arc::downgrade(&spot);
        spot
    }

    /// Whether the row holds this state.
    fn holds(&self, row: usize, state: &State) -> bool {
        match state {
            State::Host(_) => false,
            State::Device(state) => state.spot().lies(&self.buffer, row * self.row),
        }
    }

    /// Has each row hold the state given for it; those that do already stay, and those that lie one behind the other come in one copy. A row
    /// that is given none may hold anything.
    fn bring(&mut self, states: &[Option<&State>]) -> Result<()> {
        let missing: Vec<(usize, &State)> = states
            .iter()
            .enumerate()
            .filter_map(|(row, state)| {
                state
                    .filter(|state| !self.holds(row, state))
                    .map(|state| (row, state))
            })
            .collect();
        // First all of them, since one may have to go where another is.
        for &(row, _) in &missing {
            self.vacate_row(row)?;
        }
        let mut first = 0;
        while first < missing.len() {
            let (row, state) = missing[first];
            let State::Device(resident) = state else {
                if let State::Host(view) = state {
                    self.buffer.upload(row * self.row, bytemuck::cast_slice(view))?;
                }
                first += 1;
                continue;
            };
            let (buffer, start) = resident.spot().place();
            let follows = |&(behind, &(next, state)): &(usize, &(usize, &State))| match state {
                State::Device(state) => {
                    next == row + behind && state.spot().lies(&buffer, start + behind * self.row)
                }
                State::Host(_) => false,
            };
            let count = missing[first..]
                .iter()
                .enumerate()
                .take_while(follows)
                .count()
                .max(1);
            self.buffer
                .copy(row * self.row, &buffer, start, count * self.row)?;
            for &(row, state) in &missing[first..first + count] {
                if let State::Device(state) = state {
                    state.spot().settle(&self.buffer, row * self.row);
                    self.tenants[row] = Arc::downgrade(state.spot());
                }
            }
            first += count;
        }
        Ok(())
    }
}

/// The states of a window's rows: read from one, written to the other.
#[derive(Debug)]
struct Pair {
    rows: [FixedRows; 2],
    /// Which was written last.
    last: usize,
}

/// What captured steps of many sessions read and write where it always lies. What a window is to its step says its name; each has a pair of
/// its own, and all have the same logits, of which one step at a time is in use.
#[derive(Debug)]
pub(crate) struct FixedSteps {
    memory: Arc<DeviceMemory>,
    most: usize,
    /// Bytes of a state, and of a row of logits.
    state: usize,
    logits_row: usize,
    logits: Option<FixedRows>,
    pairs: HashMap<[usize; 2], Pair>,
}

/// The buffers that a step reads and writes.
pub(crate) struct StepBuffers {
    pub(crate) past: Arc<DeviceBuffer>,
    pub(crate) present: Arc<DeviceBuffer>,
    pub(crate) logits: Arc<DeviceBuffer>,
}

impl FixedSteps {
    /// For steps of at most `most` rows.
    pub(crate) fn new(memory: Arc<DeviceMemory>, most: usize, state: usize, logits_row: usize) -> Self {
        Self {
            memory,
            most,
            state,
            logits_row,
            logits: None,
            pairs: HashMap::new(),
        }
    }

    /// Prepares a step of the window of this name: its states are brought to where it reads them, and what it will write over is held by
    /// nobody. On an error every state is what it was.
    pub(crate) fn before(&mut self, window: [usize; 2], states: &[Option<&State>]) -> Result<StepBuffers> {
        let logits = match &mut self.logits {
            Some(logits) => logits,
            none => none.insert(FixedRows::new(&self.memory, self.most, self.logits_row)?),
        };
        logits.vacate(states.len())?;
        if !self.pairs.contains_key(&window) {
            let rows = || FixedRows::new(&self.memory, self.most, self.state);
            let pair = Pair {
                rows: [rows()?, rows()?],
                last: 0,
            };
            self.pairs.insert(window, pair);
        }
        let pair = self.pairs.get_mut(&window).ok_or_else(crate::memory::held)?;
        let there = |rows: &FixedRows| {
            let states = states.iter().enumerate();
            states
                .filter_map(|(row, state)| state.map(|state| rows.holds(row, state)))
                .filter(|&holds| holds)
                .count()
        };
        // The step before has left them in the one that it wrote, unless most were not in it.
        let other = 1 - pair.last;
        if there(&pair.rows[other]) > there(&pair.rows[pair.last]) {
            pair.last = other;
        }
        let (one, two) = pair.rows.split_at_mut(1);
        let (past, present) = if pair.last == 0 {
            (&mut one[0], &mut two[0])
        } else {
            (&mut two[0], &mut one[0])
        };
        past.bring(states)?;
        present.vacate(states.len())?;
        Ok(StepBuffers {
            past: Arc::clone(&past.buffer),
            present: Arc::clone(&present.buffer),
            logits: Arc::clone(&logits.buffer),
        })
    }

    /// The rows of logits.
    pub(crate) fn logits(&mut self) -> Option<&mut FixedRows> {
        self.logits.as_mut()
    }

    /// The step of this window has run: the rows of the states that it wrote, which the next one reads.
    pub(crate) fn after(&mut self, window: [usize; 2]) -> Option<&mut FixedRows> {
        let pair = self.pairs.get_mut(&window)?;
        pair.last = 1 - pair.last;
        Some(&mut pair.rows[pair.last])
    }
}
