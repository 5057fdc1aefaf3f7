//! The turns' slots as many threads use them. On the host one lock stands for the pool's rows as well as for what is known of them, and a run
//! holds it. On a device it is held to look and to note only, and the rows are worked on beside the runs: a slot that was given back is wiped, and
//! one that begins with a prefix is filled, by the mover or by the session that is about to use it, whoever comes first.
//!
//! Who may touch a slot's rows on a device, each of these decided under the lock:
//! * a run those of its windows, from when they are arranged until it is over ([`Bound`]; one run at a time, as [`crate::schedule`] has it);
//! * a job those of a slot that flies in no such window, from when it is claimed until its fence ([`KvPool::claim`]);
//! * a run waits for the jobs on the slots of its windows that are begun. What is not begun is put off: the slot rides as it is, and nobody reads it.
//!   A turn whose slot is not ready has it made ready in front of its first run, outside of the schedule where that can be.
//!
//! So nobody writes where another reads or writes, a slot is handed out wiped only, and no step waits for a job that has not begun.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::buffer::Home;
use crate::device::DeviceBuffer;
use crate::error::{EngineError, Result};
use crate::kv::{KvCache, KvTensor};
use crate::pool::{Key, KvPool, Stretch, Window};
use crate::turn::{Pooled, TurnTensors};

/// The slots of a model's turns.
#[derive(Debug)]
pub(crate) struct Slots {
    home: Home,
    pool: Arc<Mutex<KvPool>>,
    /// Those that were given back while somebody was running, on the host.
    released: Mutex<Vec<Key>>,
    any_released: AtomicBool,
}

/// The slots while somebody runs. What a run binds is this one's until it is let go of.
#[derive(Debug)]
pub(crate) enum Bound<'s> {
    /// The host's.
    Host(&'s Slots, MutexGuard<'s, KvPool>),
    /// A device's, and the buffers of the present run.
    Device(&'s Slots, Vec<Arc<DeviceBuffer>>),
}

impl Slots {
    pub(crate) fn new(pool: KvPool, home: Home) -> Self {
        Self {
            home,
            pool: Arc::new(Mutex::new(pool)),
            released: Mutex::new(Vec::new()),
            any_released: AtomicBool::new(false),
        }
    }

    /// For a run, or several one after another.
    pub(crate) fn bind(&self) -> Bound<'_> {
        if self.home.is_some() {
            return Bound::Device(self, Vec::new());
        }
        let mut pool = self.pool.lock();
        self.clear_released(&mut pool);
        Bound::Host(self, pool)
    }

    /// Takes a turn's slot back. It is wiped now, by whoever runs when that run is done, or on a device beside the runs.
    pub(crate) fn give_back(&self, key: Key) {
        if self.home.is_some() {
            let left = self.pool.lock().release(key);
            if left {
                self.ask();
            }
            return;
        }
        self.released.lock().push(key);
        self.any_released.store(true, Ordering::Release);
        if let Some(mut pool) = self.pool.try_lock() {
            self.clear_released(&mut pool);
        }
    }

    /// A turn that begins with the rows of a prefix. On a device they are on their way.
    pub(crate) fn begun(&self, prefix: &Arc<KvCache>) -> Result<Pooled> {
        let mut place = Pooled {
            len: prefix.len(),
            ..Pooled::default()
        };
        let mut pool = self.pool.lock();
        if self.home.is_some() {
            place.bytes = pool.own_bytes(place.len);
            place.prefix = Some(Arc::clone(prefix));
            pool.take_early(&mut place, 0);
            drop(pool);
            self.ask();
            return Ok(place);
        }
        let filled = pool.reserve(&mut place.key, place.len).and_then(|bytes| {
            place.bytes = bytes;
            place.key.map_or(Ok(()), |key| pool.fill(key, prefix))
        });
        match (filled, place.key) {
            (Ok(()), _) => Ok(place),
            (Err(error), key) => {
                if let Some(key) = key {
                    pool.release(key);
                }
                Err(error)
            }
        }
    }

    /// Makes a turn's slot ready for `tokens` more tokens before its run is asked for, as far as that needs no other slot to move: here, or by
    /// waiting for who is at it.
    ///
    /// # Errors
    /// [`EngineError::Device`] when that failed, or fails; the next call tries again.
    pub(crate) fn ready(&self, place: &mut Pooled, tokens: usize) -> Result<()> {
        while !place.ready && self.home.is_some() {
            let mut pool = self.pool.lock();
            pool.take_early(place, tokens);
            let Some(key) = place.key else {
                return Ok(());
            };
            if let Some(error) = pool.error(key) {
                return Err(error);
            }
            if let Some(fence) = pool.at_it(key) {
                drop(pool);
                fence.wait();
            } else if let Some(job) = pool.claim(Some(key)) {
                drop(pool);
                // Told here, and not once more by the slot.
                job.does().inspect_err(|_| drop(self.pool.lock().error(key)))?;
            } else {
                place.ready = pool.is_ready(key);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Has the mover look for what is left to do.
    fn ask(&self) {
        let Some(memory) = &self.home else { return };
        let pool = Arc::downgrade(&self.pool);
        memory.ask(move || {
            // The lock is not held while a job is done. One that failed is tried again when somebody asks next, or needs the slot.
            let next = || pool.upgrade().and_then(|pool| pool.lock().claim(None));
            while next().is_some_and(|job| job.does().is_ok()) {}
        });
    }

    fn clear_released(&self, pool: &mut KvPool) {
        if self.any_released.swap(false, Ordering::Acquire) {
            for key in self.released.lock().drain(..) {
                pool.release(key);
            }
        }
    }
}

impl Bound<'_> {
    /// Looks, notes, and moves slots where others have to.
    pub(crate) fn with<T>(&mut self, work: impl FnOnce(&mut KvPool) -> T) -> T {
        match self {
            Self::Host(_, pool) => work(pool),
            Self::Device(slots, _) => work(&mut slots.pool.lock()),
        }
    }

    /// What a run of `tokens` tokens of one turn binds, with room for them.
    pub(crate) fn one(&mut self, place: &mut Pooled, tokens: usize) -> Result<TurnTensors<'_>> {
        let rows = place.len + tokens;
        let stretch = self.with(|pool| {
            place.bytes = pool.reserve(&mut place.key, rows)?;
            let key = place.key.ok_or_else(|| {
                EngineError::Session("a turn has no place among the KV caches; please report this".into())
            })?;
            pool.finish(key, &mut place.prefix)?;
            place.ready = true;
            pool.one(key, rows)
        })?;
        let (kv, shape) = self.tensors(stretch);
        Ok(TurnTensors {
            kv,
            shapes: [shape, shape],
            states: Vec::new(),
        })
    }

    /// The tensors of a window that flies, and their shape.
    pub(crate) fn many(&mut self, window: &Window) -> (Vec<KvTensor<'_>>, [usize; 4]) {
        let stretch = self.with(|pool| pool.many(window));
        self.tensors(stretch)
    }

    fn tensors(&mut self, stretch: Stretch) -> (Vec<KvTensor<'_>>, [usize; 4]) {
        match self {
            Self::Host(_, pool) => pool.tensors(stretch),
            Self::Device(slots, held) => {
                let (bytes, shape);
                (*held, bytes, shape) = slots.pool.lock().shared(stretch);
                if let Some(buffer) = held.first() {
                    let first = buffer.address().addr().get();
                    let addresses = first + bytes.start..first + bytes.end;
                    buffer.memory().trial().touches(true, &addresses);
                }
                let tensors = held.iter().map(|buffer| KvTensor::device(buffer, bytes.clone()));
                (tensors.collect(), shape)
            }
        }
    }
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        match self {
            Self::Host(slots, pool) => slots.clear_released(pool),
            Self::Device(slots, held) => {
                if let Some(buffer) = held.first() {
                    buffer.memory().trial().leaves(true, &(0..0));
                }
                if slots.pool.lock().land() {
                    slots.ask();
                }
            }
        }
    }
}
