//! The memory's buffers: float32 [layers, heads, r, r], double and counted. A run reads the front buffer and writes a back one; only a
//! run that succeeded makes the back one the front. A buffer that anybody still holds is never written again, so a reader's view never
//! changes under it and may outlive the session. On a device the state stays there from run to run, and is copied to the host where somebody
//! asks for it. Nothing here knows how the state is computed.

use std::sync::{Arc, OnceLock};

use deltamem_core::Geometry;
use parking_lot::Mutex;

use crate::buffer::Home;
use crate::device::{DeviceBuffer, DeviceMemory};
use crate::error::{EngineError, Result};
use crate::fixed::Spot;

/// A state that nobody writes any more: float32, row-major [layers, heads, r, r].
pub type MemoryView = Arc<[f32]>;

/// How many back buffers are kept for reuse. Two turn over in a plain stream of runs; a third serves a transaction's first state.
const SPARES: usize = 3;

/// Bytes of one number.
const NUMBER: usize = size_of::<f32>();

/// What a graph's input on a device begins at a multiple of: kernels may read many numbers at once. ONNX Runtime's own allocations do.
const ALIGNED: usize = 256;

/// A state that nobody writes any more, where it lies.
#[derive(Debug, Clone)]
pub enum State {
    /// On the host.
    Host(MemoryView),
    /// On the device.
    Device(Arc<Resident>),
}

/// A state on the device: all of a buffer, or what one row of a step has written into the step's.
#[derive(Debug)]
pub struct Resident {
    spot: Arc<Spot>,
    elements: usize,
    copy: Arc<OnHost>,
}

/// The host's copy of a state, once somebody has asked for it, wherever the state lies on the device.
#[derive(Debug, Default)]
struct OnHost {
    view: OnceLock<MemoryView>,
    /// Held by whoever makes it.
    making: Mutex<()>,
}

/// A state as a run reads it, kept until the run is over.
#[derive(Debug)]
pub(crate) enum Readable {
    Host(MemoryView),
    /// On the device, from a byte on.
    Device(Arc<DeviceBuffer>, usize),
}

/// Numbers that a run reads.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Numbers<'a> {
    Host(&'a [f32]),
    /// The device's, from a byte on.
    Device(&'a DeviceBuffer, usize),
}

/// Numbers that a run writes.
#[derive(Debug)]
pub(crate) enum NumbersMut<'a> {
    Host(&'a mut [f32]),
    /// All of a device's buffer.
    Device(&'a mut DeviceBuffer),
    /// The first rows of a device's buffer that others hold too; nobody holds what is in those.
    Rows(&'a DeviceBuffer),
}

/// Where a run writes the state after it.
#[derive(Debug)]
pub(crate) enum Back {
    /// A buffer that nobody else holds.
    Host(MemoryView),
    /// On the device; none before the run, which makes its buffer.
    Device(Option<Arc<Resident>>),
}

impl Resident {
    /// What a run has written into a part of a buffer.
    pub(crate) fn new(buffer: Arc<DeviceBuffer>, start: usize, elements: usize) -> Self {
        Self::at(Arc::new(Spot::new(buffer, start, elements * NUMBER)), elements)
    }

    /// What a run has left there.
    pub(crate) fn at(spot: Arc<Spot>, elements: usize) -> Self {
        Self {
            spot,
            elements,
            copy: Arc::default(),
        }
    }

    /// Where it lies.
    pub(crate) fn spot(&self) -> &Arc<Spot> {
        &self.spot
    }

    /// Its address on the device. Of a state that [`MemoryBuffers::settled`] has given it stays valid as long as this does, and what is there
    /// does not change.
    pub fn address(&self) -> *mut std::ffi::c_void {
        let (buffer, start) = self.spot.place();
        buffer.address().as_ptr().wrapping_add(start).cast()
    }

    /// The card that it lies on; none where a test has the processor play the device.
    pub fn card(&self) -> Option<i32> {
        self.spot.place().0.memory().provider().card()
    }

    /// The same on the host: copied once, through memory that the device writes by itself where there is any.
    fn host(&self) -> Result<MemoryView> {
        if let Some(view) = self.copy.view.get() {
            return Ok(Arc::clone(view));
        }
        // One that is on its way is waited for, and not asked for again.
        let _making = self.copy.making.lock();
        if let Some(view) = self.copy.view.get() {
            return Ok(Arc::clone(view));
        }
        let memory = Arc::clone(self.spot.place().0.memory());
        let mut staging = memory.staging(self.elements * NUMBER)?;
        let numbers = staging.floats_mut(self.elements);
        self.spot
            .read(|buffer, start| buffer.download(start, bytemuck::cast_slice_mut(numbers)))?;
        // On the host this is seen behind each run.
        if !numbers.iter().all(|value| value.is_finite()) {
            return Err(not_finite());
        }
        Ok(Arc::clone(
            self.copy.view.get_or_init(|| MemoryView::from(&*numbers)),
        ))
    }

    /// The same in a buffer of its own, so that a step's buffer does not live for one of its rows.
    fn alone(self: &Arc<Self>) -> Result<Arc<Self>> {
        let bytes = self.elements * NUMBER;
        if self.spot.is_alone() {
            return Ok(Arc::clone(self));
        }
        let own = self.spot.read(|buffer, start| {
            let own = buffer.memory().allocate(bytes)?;
            own.copy(0, buffer, start, bytes)?;
            Ok(own)
        })?;
        Ok(Arc::new(Self {
            copy: Arc::clone(&self.copy),
            ..Self::new(Arc::new(own), 0, self.elements)
        }))
    }
}

impl State {
    /// The same where a run may read it: one that begins in the middle of a step's buffer at no aligned address is copied.
    pub(crate) fn aligned(&self) -> Result<Readable> {
        let state = match self {
            Self::Host(view) => return Ok(Readable::Host(Arc::clone(view))),
            Self::Device(state) if state.spot.place().1.is_multiple_of(ALIGNED) => state,
            Self::Device(state) => &state.alone()?,
        };
        let (buffer, start) = state.spot.place();
        Ok(Readable::Device(buffer, start))
    }

    /// The same where runs leave it: put there if it came from the host.
    pub(crate) fn settled(&self, home: &Home) -> Result<Self> {
        let (Self::Host(view), Some(memory)) = (self, home) else {
            return Ok(self.clone());
        };
        let buffer = memory.allocate(view.len() * NUMBER)?;
        buffer.upload(0, bytemuck::cast_slice(view))?;
        let state = Resident::new(Arc::new(buffer), 0, view.len());
        // What was just sent there need not be fetched.
        let _ = state.copy.view.set(Arc::clone(view));
        Ok(Self::Device(Arc::new(state)))
    }

    /// The state on the host: as it is, or copied from the device once.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device fails; [`EngineError::NotFinite`] for a state of a device that holds NaN or infinite numbers.
    pub fn host(&self) -> Result<MemoryView> {
        match self {
            Self::Host(view) => Ok(Arc::clone(view)),
            Self::Device(state) => state.host(),
        }
    }
}

impl Readable {
    /// What the run reads.
    pub(crate) fn numbers(&self) -> Numbers<'_> {
        match self {
            Self::Host(view) => Numbers::Host(view),
            Self::Device(buffer, start) => Numbers::Device(buffer, *start),
        }
    }
}

impl Back {
    /// Has a run write it.
    pub(crate) fn write(
        &mut self,
        memory: &Home,
        elements: usize,
        run: impl FnOnce(NumbersMut<'_>) -> Result<()>,
    ) -> Result<()> {
        match (self, memory) {
            (Self::Host(view), _) => run(NumbersMut::Host(Arc::get_mut(view).ok_or_else(held)?)),
            (Self::Device(state), Some(memory)) => {
                let mut buffer = memory.allocate(elements * NUMBER)?;
                run(NumbersMut::Device(&mut buffer))?;
                *state = Some(Arc::new(Resident::new(Arc::new(buffer), 0, elements)));
                Ok(())
            }
            (Self::Device(_), None) => Err(held()),
        }
    }

    /// Checks what a run has written. What lies on a device is looked at when it is copied to the host.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Host(view) if !view.iter().all(|value| value.is_finite()) => Err(not_finite()),
            _ => Ok(()),
        }
    }
}

/// Where the present state is.
#[derive(Debug)]
enum Front {
    Here(State),
    /// On its way out of a step's buffer, on a device: here as it lies, and as it will lie once it has moved.
    Leaving(Arc<Mutex<State>>),
}

/// The front buffer and the spare ones behind it.
#[derive(Debug)]
pub(crate) struct MemoryBuffers {
    front: Front,
    spares: Vec<MemoryView>,
    elements: usize,
    home: Home,
}

impl MemoryBuffers {
    /// A zeroed memory. Runs leave it on the device, if there is one.
    pub(crate) fn zeroed(geometry: &Geometry, home: Home) -> Self {
        Self {
            front: Front::Here(State::Host(vec![0.0; geometry.elements()].into())),
            spares: Vec::with_capacity(SPARES),
            elements: geometry.elements(),
            home,
        }
    }

    /// The present state. Holding it keeps it: later runs write elsewhere.
    pub(crate) fn front(&self) -> State {
        match &self.front {
            Front::Here(state) => state.clone(),
            Front::Leaving(state) => state.lock().clone(),
        }
    }

    /// The present state where runs leave it, and where it stays: put there if it came from the host.
    pub(crate) fn settled(&mut self) -> Result<State> {
        let state = self.front().settled(&self.home)?;
        if let State::Device(state) = &state {
            state.spot.pin()?;
        }
        self.front = Front::Here(state.clone());
        Ok(state)
    }

    /// Takes a place that a run may write.
    pub(crate) fn take_back(&mut self) -> Back {
        if self.home.is_some() {
            return Back::Device(None);
        }
        let free = self
            .spares
            .iter_mut()
            .position(|spare| Arc::get_mut(spare).is_some());
        Back::Host(match free {
            Some(index) => self.spares.swap_remove(index),
            None => vec![0.0; self.elements].into(),
        })
    }

    /// Keeps a buffer for later runs. Those of a device go back to its own pool.
    pub(crate) fn give_back(&mut self, back: Back) {
        if let Back::Host(buffer) = back {
            self.keep(buffer);
        }
    }

    fn keep(&mut self, buffer: MemoryView) {
        if self.spares.len() == SPARES {
            // A spare that a reader holds will not come free soon: let the reader have it.
            match self
                .spares
                .iter_mut()
                .position(|spare| Arc::get_mut(spare).is_none())
            {
                Some(held) => drop(self.spares.swap_remove(held)),
                None => return,
            }
        }
        self.spares.push(buffer);
    }

    /// Frees what a session between turns does not need: it holds its state and nothing else. On a device the state moves out of the step's buffer
    /// beside the runs, and to the host as well where `asked` says that somebody will ask for it.
    pub(crate) fn leave_turn(&mut self, asked: bool) {
        self.spares.clear();
        let (Front::Here(state @ State::Device(held)), Some(memory)) = (&self.front, &self.home) else {
            return;
        };
        let moves = !held.spot.is_alone();
        if !moves && (!asked || held.copy.view.get().is_some()) {
            return;
        }
        let leaving = Arc::new(Mutex::new(state.clone()));
        // Whoever needs the state in the meantime reads it where it lies; if nobody holds it any more, nothing is done.
        let weak = Arc::downgrade(&leaving);
        memory.ask(move || {
            let state = weak.upgrade().map(|leaving| leaving.lock().clone());
            let Some(State::Device(state)) = state else { return };
            if state.spot.place().0.memory().trial().job_begins().is_err() {
                return;
            }
            if asked {
                // Whoever asks then is told what is wrong.
                let _ = state.host();
            }
            // Without room for a copy the step's buffer stays with it.
            if let (Ok(alone), Some(leaving)) = (state.alone(), weak.upgrade()) {
                *leaving.lock() = State::Device(alone);
            }
        });
        self.front = Front::Leaving(leaving);
    }

    /// Makes what a run has written the front; the old front becomes a spare.
    pub(crate) fn advance(&mut self, back: Back) -> Result<()> {
        match back {
            Back::Host(view) => self.set_front(State::Host(view)),
            Back::Device(Some(state)) => self.set_front(State::Device(state)),
            Back::Device(None) => return Err(held()),
        }
        Ok(())
    }

    /// Makes `state` the front; the old front becomes a spare.
    pub(crate) fn set_front(&mut self, state: State) {
        if let Front::Here(State::Host(old)) = std::mem::replace(&mut self.front, Front::Here(state))
            && self.home.is_none()
        {
            self.keep(old);
        }
    }
}

/// The states of a step's rows, one behind the other in one buffer: as they lie, if they do, or brought together.
pub(crate) enum Gathered {
    Lying(Arc<DeviceBuffer>, usize),
    Brought(DeviceBuffer),
}

impl Gathered {
    /// Of rows in the order of a step; `None` is a row that stands for nobody, whose state may be anything and is thrown away.
    pub(crate) fn of(memory: &Arc<DeviceMemory>, rows: &[Option<&State>], elements: usize) -> Result<Self> {
        let bytes = elements * NUMBER;
        if let Some(lying) = lying(rows, bytes) {
            return Ok(lying);
        }
        let brought = memory.allocate(rows.len() * bytes)?;
        let mut parts = Vec::new();
        let mut row = 0;
        while row < rows.len() {
            let start = row * bytes;
            match rows[row] {
                None => brought.zero(start, bytes)?,
                Some(State::Host(view)) => brought.upload(start, bytemuck::cast_slice(view))?,
                Some(State::Device(state)) => {
                    // Those that lie one behind the other are copied at once, with what is between them.
                    let (buffer, first) = state.spot.place();
                    let follows = |behind: usize| match rows.get(row + behind) {
                        Some(Some(State::Device(next))) => next.spot.lies(&buffer, first + behind * bytes),
                        Some(None) => first + (behind + 1) * bytes <= buffer.len(),
                        _ => false,
                    };
                    let behind = (1..rows.len() - row)
                        .take_while(|&behind| follows(behind))
                        .count();
                    parts.push((start, buffer, first, (1 + behind) * bytes));
                    row += behind;
                }
            }
            row += 1;
        }
        let parts: Vec<_> = parts
            .iter()
            .map(|(start, buffer, first, bytes)| (*start, &**buffer, *first, *bytes))
            .collect();
        brought.gather(&parts)?;
        Ok(Self::Brought(brought))
    }

    /// What the run reads.
    pub(crate) fn numbers(&self) -> Numbers<'_> {
        match self {
            Self::Lying(buffer, start) => Numbers::Device(buffer, *start),
            Self::Brought(buffer) => Numbers::Device(buffer, 0),
        }
    }
}

/// The rows' states as they lie, if they are one behind the other. A row that stands for nobody may read what lies in between.
fn lying(rows: &[Option<&State>], bytes: usize) -> Option<Gathered> {
    let mut found: Option<(Arc<DeviceBuffer>, usize)> = None;
    for (index, row) in rows.iter().enumerate() {
        let Some(state) = row else { continue };
        let State::Device(state) = state else {
            return None;
        };
        let (buffer, start) = state.spot.place();
        let base = start.checked_sub(index * bytes)?;
        match &found {
            None => found = Some((buffer, base)),
            Some((first, from)) if Arc::ptr_eq(&buffer, first) && *from == base => {}
            Some(_) => return None,
        }
    }
    found
        .filter(|(buffer, base)| base.is_multiple_of(ALIGNED) && base + rows.len() * bytes <= buffer.len())
        .map(|(buffer, base)| Gathered::Lying(buffer, base))
}

fn not_finite() -> EngineError {
    EngineError::NotFinite(
        "the new state holds NaN or infinite numbers; check the adapter's weights (deltamem-export inspect)"
            .into(),
    )
}

/// A bug: a buffer that a run is to write has another holder.
pub(crate) fn held() -> EngineError {
    EngineError::Session("a memory buffer is held where none should be; please report this".into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn buffers() -> MemoryBuffers {
        MemoryBuffers::zeroed(&Geometry::new(1, 1, 2).unwrap(), None)
    }

    fn write(buffers: &mut MemoryBuffers, value: f32) {
        let mut back = buffers.take_back();
        back.write(&None, 4, |numbers| match numbers {
            NumbersMut::Host(numbers) => {
                numbers.fill(value);
                Ok(())
            }
            NumbersMut::Device(_) | NumbersMut::Rows(_) => Err(held()),
        })
        .unwrap();
        buffers.advance(back).unwrap();
    }

    #[test]
    fn a_held_view_never_changes() {
        let mut memory = buffers();
        write(&mut memory, 1.0);
        let held = memory.front().host().unwrap();
        for value in 2..50_u8 {
            write(&mut memory, f32::from(value));
        }
        assert_eq!(&held[..], &[1.0; 4]);
        assert_eq!(&memory.front().host().unwrap()[..], &[49.0; 4]);
    }

    #[test]
    fn a_stream_of_runs_turns_over_two_buffers() {
        let mut memory = buffers();
        let mut seen = std::collections::HashSet::new();
        for value in 0..100_u8 {
            write(&mut memory, f32::from(value));
            seen.insert(memory.front().host().unwrap().as_ptr() as usize);
        }
        assert!(seen.len() <= 2, "{} buffers were used", seen.len());
    }

    #[test]
    fn many_held_views_do_not_pile_up_as_spares() {
        let mut memory = buffers();
        let mut held = Vec::new();
        for value in 0..20_u8 {
            write(&mut memory, f32::from(value));
            held.push(memory.front().host().unwrap());
        }
        assert!(memory.spares.len() <= SPARES);
        for (value, view) in held.iter().enumerate() {
            assert!((view[0] - value as f32).abs() < f32::EPSILON);
        }
    }
}
