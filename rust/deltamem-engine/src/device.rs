//! Memory on the device that a graph runs on. It is allocated by ONNX Runtime, and copied, wiped, rearranged and searched by small graphs of
//! its own ([`graphs`]), so that nothing here calls CUDA and the same code runs on the processor, where tests hold it against plain memory. Nothing
//! outside this file and [`crate::call`] has an address of it to follow. It knows bytes; it knows nothing of models, turns and states.

mod graphs;
pub(crate) mod mover;
pub(crate) mod provider;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CStr, CString};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::value::TensorElementType;

use self::mover::{Mover as Beside, Trial};
use self::provider::Provider;
use crate::buffer::zeroed_words;
use crate::call::{Call, Tensor};
use crate::error::{EngineError, Result};
use crate::runtime::Runtime;

/// What the small graphs count in: every size here is a multiple of it.
pub(crate) const WORD: usize = size_of::<i32>();

/// How many moves go on at once at most: one of the step that runs, one beside it, and one that somebody waits for. Each has small graphs, and so
/// streams, of its own.
const LANES: usize = 3;

/// Parts that are brought together in one run: a step that one user has joined has three, those in front of him, his own and those behind.
const TOGETHER: usize = 4;

/// What room on the host is a multiple of, so that what grows a little at a time seldom moves.
const PAGE: usize = 4096;

/// One device's memory. Its buffers keep it alive.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    /// First, so that its thread is gone before anything else is.
    beside: Beside,
    trial: Trial,
    provider: Provider,
    runtime: &'static Runtime,
    info: MemoryInfo<'static>,
    // Before the sessions: the allocators are those of the copying one, and must go first.
    allocator: Mutex<Allocator>,
    /// The host's memory that the device reads and writes by itself, where ONNX Runtime has any.
    pinned: Option<Mutex<Allocator>>,
    lanes: [parking_lot::Mutex<Moves>; LANES],
}

/// The sessions of the small graphs in one lane. The one that copies one part is there from the start in the first lane, the others are opened when
/// they are first needed.
#[derive(Debug, Default)]
struct Moves {
    of_parts: HashMap<(Move, usize), Mover>,
    best: Option<Session>,
}

/// What is done to parts of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Move {
    Copy,
    Zero,
    Rows,
}

/// One of these for so many parts at once.
#[derive(Debug)]
struct Mover {
    session: Session,
    from: Vec<CString>,
    to: Vec<CString>,
}

impl Mover {
    fn open(runtime: &Runtime, provider: Provider, kind: Move, parts: usize) -> Result<Self> {
        let graph = match kind {
            Move::Copy => graphs::copy,
            Move::Zero => graphs::zero,
            Move::Rows => graphs::rows,
        };
        // No name holds a NUL byte.
        let names =
            |of: fn(usize) -> String| (0..parts).map(move |part| CString::new(of(part)).unwrap_or_default());
        Ok(Self {
            session: provider.open_small(runtime, &graph(parts))?,
            from: names(graphs::from).collect(),
            to: names(graphs::to).collect(),
        })
    }
}

/// The best of rows of logits, as they came down.
#[derive(Debug)]
pub(crate) struct Best {
    /// How many of each row.
    pub(crate) count: usize,
    /// The logits, [rows, count].
    pub(crate) logits: Vec<f32>,
    /// Whose they are, [rows, count].
    pub(crate) ids: Vec<i64>,
    /// Whether anything in the row is NaN, so that it says nothing.
    pub(crate) wrong: Vec<bool>,
}

/// Bytes on the device, aligned for every element type. What is in them at first is anything.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    address: NonNull<u8>,
    bytes: usize,
    memory: Arc<DeviceMemory>,
}

// SAFETY: the address is never followed here; it is given to ONNX Runtime, which takes it on any thread. Who may write when is decided by
// borrows of the buffer, as for memory of the host.
#[allow(unsafe_code)]
unsafe impl Send for DeviceBuffer {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for DeviceBuffer {}

/// Bytes on the host for what goes to the device and comes from it step by step: such as the device reads and writes by itself while others go
/// on (pinned), where there are any; else plain ones, which are copied once more on their way and waited for. Aligned for every element type.
#[derive(Debug)]
pub(crate) enum Staging {
    Plain(Vec<u64>),
    Pinned {
        address: NonNull<u64>,
        words: usize,
        memory: Arc<DeviceMemory>,
    },
}

// SAFETY: memory of the host that nobody else has the address of, which is freed on any thread.
#[allow(unsafe_code)]
unsafe impl Send for Staging {}
// SAFETY: as above; it is written through exclusive borrows only.
#[allow(unsafe_code)]
unsafe impl Sync for Staging {}

/// Rows of groups that lie one behind the other, [groups, rows, row], of which the first `used` of each group are moved into groups of
/// `to` rows; the rows behind them become zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) groups: usize,
    /// Rows of a group where they come from, and where they go.
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) used: usize,
    /// Bytes of one row.
    pub(crate) row: usize,
}

impl DeviceMemory {
    /// The memory of the provider's device. The small graph that copies runs once, so that a device which does not answer is found here.
    ///
    /// # Errors
    /// [`EngineError::Device`] with what is missing and what to do.
    pub(crate) fn open(runtime: &'static Runtime, provider: Provider) -> Result<Arc<Self>> {
        let copy = Mover::open(runtime, provider, Move::Copy, 1)?;
        let (device, id) = match provider {
            Provider::Cuda { id, .. } => (AllocationDevice::CUDA, id),
            Provider::Host => (AllocationDevice::CPU, 0),
        };
        let info = MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default)
            .map_err(EngineError::onnx("describing the device's memory"))?;
        let allocator = Allocator::new(&copy.session, info.to_owned())
            .map_err(EngineError::onnx("asking for the device's memory"))
            .map_err(|error| provider.explain(error))?;
        let pinned = match provider {
            Provider::Cuda { .. } => MemoryInfo::new(
                AllocationDevice::CUDA_PINNED,
                id,
                AllocatorType::Device,
                MemoryType::CPUOutput,
            ),
            // Where the processor plays the device all of its memory is.
            Provider::Host => Ok(info.to_owned()),
        };
        let pinned = pinned.and_then(|info| Allocator::new(&copy.session, info)).ok();
        let memory = Arc::new(Self {
            provider,
            runtime,
            info,
            allocator: Mutex::new(allocator),
            pinned: pinned.map(Mutex::new),
            lanes: [
                Moves {
                    of_parts: HashMap::from([((Move::Copy, 1), copy)]),
                    best: None,
                },
                Moves::default(),
                Moves::default(),
            ]
            .map(parking_lot::Mutex::new),
            beside: Beside::default(),
            trial: Trial::default(),
        });
        let sent = [7_u8; 8];
        let buffer = memory.allocate(sent.len())?;
        buffer.upload(0, &sent)?;
        let mut back = [0; 8];
        buffer.download(0, &mut back)?;
        if back != sent {
            return Err(EngineError::Device(format!(
                "{provider}: what was written to the device's memory did not come back; check the card and its driver with nvidia-smi"
            )));
        }
        Ok(memory)
    }

    /// Who runs on this device.
    pub(crate) fn provider(&self) -> Provider {
        self.provider
    }

    /// ONNX Runtime's description of this memory.
    pub(crate) fn info(&self) -> &MemoryInfo<'static> {
        &self.info
    }

    /// So many bytes, with anything in them.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device has no more.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<DeviceBuffer> {
        let allocator = self.allocator.lock().unwrap_or_else(PoisonError::into_inner);
        // A block of nothing has no address.
        let block = allocator
            .alloc::<u8>(bytes.max(WORD))
            .map_err(EngineError::onnx("taking memory of the device"))
            .map_err(|error| self.provider.explain(error))?
            .into_raw();
        let address = NonNull::new(block.cast()).ok_or_else(|| {
            EngineError::Device(format!("{} gave no memory for {bytes} bytes", self.provider))
        })?;
        drop(allocator);
        Ok(DeviceBuffer {
            address,
            bytes,
            memory: Arc::clone(self),
        })
    }

    /// At least `bytes` bytes of the host for what moves step by step, all zero. The host's own where the device has none, or no more.
    pub(crate) fn staging(self: &Arc<Self>, bytes: usize) -> Result<Staging> {
        let words = bytes.div_ceil(size_of::<u64>());
        if words > 0
            && let Some(pinned) = &self.pinned
        {
            let address = pinned
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .alloc::<u64>(words)
                .map(|block| block.into_raw().cast::<u64>());
            if let Some(address) = address.ok().and_then(NonNull::new) {
                return Ok(Staging::zeroed(address, words, Arc::clone(self)));
            }
        }
        zeroed_words(words).map(Staging::Plain)
    }

    /// What is kept in `kept` for what moves step by step, or something larger in its place.
    pub(crate) fn room<'s>(
        self: &Arc<Self>,
        kept: &'s mut Option<Staging>,
        bytes: usize,
    ) -> Result<&'s mut Staging> {
        if kept.as_ref().is_none_or(|staging| staging.len() < bytes) {
            *kept = Some(self.staging(bytes.next_multiple_of(PAGE))?);
        }
        kept.as_mut().ok_or_else(|| in_words(bytes))
    }

    /// Has `job` done beside the runs, on a thread of its own, when those before it are done.
    pub(crate) fn ask(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) {
        let memory = Arc::downgrade(self);
        self.beside.ask(Box::new(move || {
            if let Some(memory) = memory.upgrade() {
                memory.trial.job_comes();
                job();
            }
        }));
    }

    /// What a test has happen here.
    pub(crate) fn trial(&self) -> &Trial {
        &self.trial
    }

    /// A lane that nobody uses, or the first that comes free.
    fn lane(&self) -> parking_lot::MutexGuard<'_, Moves> {
        self.lanes
            .iter()
            .find_map(parking_lot::Mutex::try_lock)
            .unwrap_or_else(|| self.lanes[0].lock())
    }

    /// Does `work` while nobody else allocates, frees or moves anything here, beside the runs either: calls that CUDA forbids while a run is
    /// captured. Whoever holds a lane takes no other lock of this memory, so that nobody waits in a circle.
    pub(crate) fn quietly<T>(&self, work: impl FnOnce() -> T) -> T {
        let _lanes = self.lanes.each_ref().map(|lane| lane.lock());
        let _allocator = self.allocator.lock().unwrap_or_else(PoisonError::into_inner);
        let _pinned = self
            .pinned
            .as_ref()
            .map(|pinned| pinned.lock().unwrap_or_else(PoisonError::into_inner));
        work()
    }

    /// Has something done to parts of memory, all at once: each of `to` is made of its `from`, if it is made of any, and of `more`.
    fn work<'a>(
        &self,
        kind: Move,
        from: &[Tensor<'a>],
        more: &[(&'static CStr, Tensor<'a>)],
        to: &mut [Tensor<'a>],
    ) -> Result<()> {
        self.trial.moves()?;
        let mut moves = self.lane();
        let graph = match moves.of_parts.entry((kind, to.len())) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(new) => new.insert(Mover::open(self.runtime, self.provider, kind, to.len())?),
        };
        let mut call = Call::default();
        for (name, part) in graph.from.iter().zip(from) {
            call.input(name, part);
        }
        for (name, tensor) in more {
            call.input(name, tensor);
        }
        for (name, part) in graph.to.iter().zip(to) {
            call.output(name, part);
        }
        call.run(&mut graph.session)
            .map_err(|error| self.provider.explain(error))
    }
}

impl Staging {
    #[allow(unsafe_code)]
    fn zeroed(address: NonNull<u64>, words: usize, memory: Arc<DeviceMemory>) -> Self {
        // SAFETY: the block was allocated for so many words a moment ago, at an address that is aligned for them as all of the host's allocations
        // are, and nobody else has it.
        unsafe { address.write_bytes(0, words) };
        Self::Pinned {
            address,
            words,
            memory,
        }
    }

    /// All of it.
    #[allow(unsafe_code)]
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        match self {
            Self::Plain(words) => words,
            // SAFETY: `words` words at `address` belong to this value, are initialised since it was made, and are borrowed as exclusively as it.
            Self::Pinned { address, words, .. } => unsafe {
                std::slice::from_raw_parts_mut(address.as_ptr(), *words)
            },
        }
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Plain(words) => size_of_val(words.as_slice()),
            Self::Pinned { words, .. } => words * size_of::<u64>(),
        }
    }

    /// The first `count` numbers of it.
    pub(crate) fn floats_mut(&mut self, count: usize) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(self.words_mut())[..count]
    }
}

impl Drop for Staging {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Self::Pinned { address, memory, .. } = self
            && let Some(pinned) = &memory.pinned
        {
            let pinned = pinned.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the address came from this allocator in `DeviceMemory::staging` and is given back once; a run that used it is over, as
            // it borrowed it.
            unsafe { pinned.free(address.as_ptr()) }
        }
    }
}

impl DeviceBuffer {
    /// Where it lies on the device.
    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// The memory that it is of.
    pub(crate) fn memory(&self) -> &Arc<DeviceMemory> {
        &self.memory
    }

    // Whoever has a part written, by these or by a run, is the only one who knows of that part then: nothing here follows an address.

    /// Writes `bytes` from `start` on.
    pub(crate) fn upload(&self, start: usize, bytes: &[u8]) -> Result<()> {
        let words: &[i32] = bytemuck::try_cast_slice(bytes).map_err(|_| in_words(bytes.len()))?;
        let from = Tensor::input(words, &[words.len()])?;
        let to = Tensor::words(self, start, &[words.len()])?;
        self.memory.work(Move::Copy, &[from], &[], &mut [to])
    }

    /// Reads what is there from `start` on.
    pub(crate) fn download(&self, start: usize, bytes: &mut [u8]) -> Result<()> {
        let count = bytes.len();
        let words: &mut [i32] = bytemuck::try_cast_slice_mut(bytes).map_err(|_| in_words(count))?;
        let shape = [words.len()];
        let from = Tensor::words(self, start, &shape)?;
        let to = Tensor::output(words, &shape)?;
        self.memory.work(Move::Copy, &[from], &[], &mut [to])
    }

    /// Copies `bytes` bytes of another buffer.
    pub(crate) fn copy(&self, start: usize, other: &Self, other_start: usize, bytes: usize) -> Result<()> {
        Self::copy_all(&[self], start, &[other], other_start, bytes)
    }

    /// Brings parts of other buffers together here: where each goes, whose it is, where it begins there and its bytes. A few of them in one run.
    pub(crate) fn gather(&self, parts: &[(usize, &Self, usize, usize)]) -> Result<()> {
        for parts in parts.chunks(TOGETHER) {
            if let [(start, other, other_start, bytes)] = *parts {
                self.copy(start, other, other_start, bytes)?;
                continue;
            }
            // The graph has so many parts: what is left of them copies a word to where nobody looks.
            let nowhere = self.memory.allocate(TOGETHER * WORD)?;
            let (mut from, mut to) = (Vec::new(), Vec::new());
            for &(start, other, other_start, bytes) in parts {
                let shape = [in_whole_words(bytes)?];
                from.push(Tensor::words(other, other_start, &shape)?);
                to.push(Tensor::words(self, start, &shape)?);
            }
            for spare in parts.len()..TOGETHER {
                from.push(Tensor::words(parts[0].1, parts[0].2, &[1])?);
                to.push(Tensor::words(&nowhere, spare * WORD, &[1])?);
            }
            self.memory.work(Move::Copy, &from, &[], &mut to)?;
        }
        Ok(())
    }

    /// Copies `bytes` bytes between many, in the same place of each. Two may be the same where the parts do not overlap.
    pub(crate) fn copy_all(
        to: &[&Self],
        start: usize,
        from: &[&Self],
        from_start: usize,
        bytes: usize,
    ) -> Result<()> {
        let Some(first) = to.first() else {
            return Ok(());
        };
        let shape = [in_whole_words(bytes)?];
        let from = from
            .iter()
            .map(|buffer| Tensor::words(buffer, from_start, &shape))
            .collect::<Result<Vec<_>>>()?;
        let mut to = to
            .iter()
            .map(|buffer| Tensor::words(buffer, start, &shape))
            .collect::<Result<Vec<_>>>()?;
        first.memory.work(Move::Copy, &from, &[], &mut to)
    }

    /// Has two parts that do not overlap change places, in each of these. On an error they are as they were, as far as the device does anything.
    pub(crate) fn swap_all(buffers: &[&Self], a: usize, b: usize, bytes: usize) -> Result<()> {
        let aside = buffers
            .iter()
            .map(|buffer| buffer.memory.allocate(bytes))
            .collect::<Result<Vec<_>>>()?;
        let aside: Vec<_> = aside.iter().collect();
        Self::copy_all(&aside, 0, buffers, a, bytes)?;
        Self::copy_all(buffers, a, buffers, b, bytes).inspect_err(|_| {
            // What was there first is what is told of.
            let _ = Self::copy_all(buffers, a, &aside, 0, bytes);
        })?;
        Self::copy_all(buffers, b, &aside, 0, bytes).inspect_err(|_| {
            let _ = Self::copy_all(buffers, b, buffers, a, bytes);
            let _ = Self::copy_all(buffers, a, &aside, 0, bytes);
        })
    }

    /// Writes zeros over `bytes` bytes.
    pub(crate) fn zero(&self, start: usize, bytes: usize) -> Result<()> {
        Self::zero_all(&[self], start, bytes)
    }

    /// The same in each of these.
    pub(crate) fn zero_all(buffers: &[&Self], start: usize, bytes: usize) -> Result<()> {
        let Some(memory) = buffers
            .first()
            .map(|buffer| Arc::clone(&buffer.memory))
            .filter(|_| bytes > 0)
        else {
            return Ok(());
        };
        let words = in_whole_words(bytes)?;
        let size = [i64::try_from(words).unwrap_or(i64::MAX)];
        let size = Tensor::input(&size, &[1])?;
        let mut to = buffers
            .iter()
            .map(|buffer| Tensor::words(buffer, start, &[words]))
            .collect::<Result<Vec<_>>>()?;
        memory.work(Move::Zero, &[], &[(graphs::SIZE, size)], &mut to)
    }

    /// Moves rows of other buffers, from their `other_start` on, into the parts of these that begin at `start`.
    pub(crate) fn rows_all(
        buffers: &[&Self],
        start: usize,
        others: &[&Self],
        other_start: usize,
        rows: Rows,
    ) -> Result<()> {
        let Rows {
            groups,
            from: from_rows,
            to: to_rows,
            used,
            row,
        } = rows;
        debug_assert!(used <= from_rows && used <= to_rows);
        let Some(memory) = buffers.first().map(|buffer| Arc::clone(&buffer.memory)) else {
            return Ok(());
        };
        let of = |rows: usize| groups * rows * row;
        if used == 0 {
            return Self::zero_all(buffers, start, of(to_rows));
        }
        if from_rows == to_rows {
            return Self::copy_all(buffers, start, others, other_start, of(to_rows));
        }
        let words = in_whole_words(row)?;
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let take = [number(used)];
        let size = [number(groups), number(to_rows - used), number(words)];
        let more = [
            (graphs::TAKE, Tensor::input(&take, &[1])?),
            (graphs::SIZE, Tensor::input(&size, &[3])?),
        ];
        let from = others
            .iter()
            .map(|other| Tensor::words(other, other_start, &[groups, from_rows, words]))
            .collect::<Result<Vec<_>>>()?;
        let mut to = buffers
            .iter()
            .map(|buffer| Tensor::words(buffer, start, &[groups, to_rows, words]))
            .collect::<Result<Vec<_>>>()?;
        memory.work(Move::Rows, &from, &more, &mut to)
    }
}

impl DeviceBuffer {
    /// The `count` largest numbers of each of the first `rows` rows, float32 [rows, words], and whose they are. Which of those that equal the
    /// last are among them is anybody's guess. They come down through `staging`.
    pub(crate) fn best(
        &self,
        rows: usize,
        words: usize,
        count: usize,
        staging: &mut Option<Staging>,
    ) -> Result<Best> {
        let number = size_of::<f32>();
        let shape = [rows, count];
        let logits = Tensor::device(
            self,
            0,
            rows * words * number,
            &[rows, words],
            TensorElementType::Float32,
            number,
        )?;
        let wanted = [i64::try_from(count).unwrap_or(i64::MAX)];
        let wanted = Tensor::input(&wanted, &[1])?;
        let memory = &self.memory;
        // Ids first, which are the longest numbers.
        let room = rows * count * size_of::<i64>() + (rows * count + rows) * number;
        let staging = memory.room(staging, room)?;
        memory.trial.moves()?;
        let mut moves = memory.lane();
        let (ids, floats) = staging.words_mut().split_at_mut(rows * count);
        let ids: &mut [i64] = bytemuck::cast_slice_mut(ids);
        let (values, floats) = bytemuck::cast_slice_mut::<u64, f32>(floats).split_at_mut(rows * count);
        let wrong = &mut floats[..rows];
        let mut to_values = Tensor::output(values, &shape)?;
        let mut to_ids = Tensor::output(ids, &shape)?;
        let mut to_wrong = Tensor::output(wrong, &[rows])?;
        let session = match &mut moves.best {
            Some(session) => session,
            none => none.insert(memory.provider.open_small(memory.runtime, &graphs::best())?),
        };
        let mut call = Call::default();
        call.input(graphs::LOGITS, &logits);
        call.input(graphs::COUNT, &wanted);
        call.output(graphs::VALUES, &mut to_values);
        call.output(graphs::IDS, &mut to_ids);
        call.output(graphs::WRONG, &mut to_wrong);
        call.run(session)
            .map_err(|error| memory.provider.explain(error))?;
        drop((to_values, to_ids, to_wrong));
        Ok(Best {
            count,
            logits: values.to_vec(),
            ids: ids.to_vec(),
            wrong: wrong.iter().map(|&mark| mark > 0.0).collect(),
        })
    }
}

impl Drop for DeviceBuffer {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let allocator = self
            .memory
            .allocator
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the address came from this allocator in `DeviceMemory::allocate` and is given back once. No run is in flight on it:
        // a run borrows its tensors, and ONNX Runtime waits for the device before it returns.
        unsafe { allocator.free(self.address.as_ptr()) }
    }
}

fn in_whole_words(bytes: usize) -> Result<usize> {
    if bytes.is_multiple_of(WORD) {
        Ok(bytes / WORD)
    } else {
        Err(in_words(bytes))
    }
}

fn in_words(bytes: usize) -> EngineError {
    EngineError::Device(format!(
        "{bytes} bytes are moved on the device, expected a multiple of {WORD} at an address that is one; please report this"
    ))
}
