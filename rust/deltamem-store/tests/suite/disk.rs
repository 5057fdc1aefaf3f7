//! A disk in memory that fails where it is told to: the n-th write or sync fails, it is full, or the power goes and what was not synced
//! is there in part, sector by sector.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use deltamem_store::backend::redb::Media;
use parking_lot::Mutex;
use redb::StorageBackend;

const SECTOR: usize = 512;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    None,
    /// This write fails, once.
    Write(u64),
    /// This sync fails, once; what it should have synced is not.
    Sync(u64),
    /// At this operation of any kind the power goes.
    Power(u64),
}

#[derive(Debug, Clone, Default)]
struct File {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors written since the last sync, and whether the length changed.
    dirty: BTreeSet<usize>,
}

#[derive(Debug)]
struct State {
    files: Vec<File>,
    /// Which file is the main one, now and after a power cut.
    main: usize,
    durable_main: usize,
    side: Option<usize>,
    /// The journal's file, now and, when it was removed since the directory was synced, after a power cut.
    journal: Option<usize>,
    durable_journal: Option<usize>,
    trouble: Trouble,
    operations: u64,
    writes: u64,
    syncs: u64,
    out: bool,
    /// Bytes of all files together that there is room for.
    capacity: u64,
    /// How long a sync takes.
    slow: Duration,
}

/// The disk; clones are the same one.
#[derive(Debug, Clone)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub fn new() -> Self {
        Self::of(Vec::new())
    }

    /// A disk whose main file has these bytes.
    pub fn of(bytes: Vec<u8>) -> Self {
        let file = File {
            live: bytes.clone(),
            durable: bytes,
            dirty: BTreeSet::new(),
        };
        Self(Arc::new(Mutex::new(State {
            files: vec![file],
            main: 0,
            durable_main: 0,
            side: None,
            journal: None,
            durable_journal: None,
            trouble: Trouble::None,
            operations: 0,
            writes: 0,
            syncs: 0,
            out: false,
            capacity: u64::MAX,
            slow: Duration::ZERO,
        })))
    }

    pub fn expect(&self, trouble: Trouble) {
        self.0.lock().trouble = trouble;
    }

    pub fn room(&self, capacity: u64) {
        self.0.lock().capacity = capacity;
    }

    pub fn slow(&self, sync: Duration) {
        self.0.lock().slow = sync;
    }

    /// Operations, writes and syncs so far.
    pub fn counts(&self) -> (u64, u64, u64) {
        let state = self.0.lock();
        (state.operations, state.writes, state.syncs)
    }

    /// Whether the trouble came.
    pub fn out(&self) -> bool {
        self.0.lock().out
    }

    pub fn used(&self) -> u64 {
        let state = self.0.lock();
        state.files.iter().map(|file| file.live.len() as u64).sum()
    }

    /// What is on the platter after the power went: everything synced, and of what was not, the sectors that `survives` picks.
    pub fn after_power_cut(&self, mut survives: impl FnMut() -> bool) -> Self {
        let state = self.0.lock();
        // A rename that was not synced may be there or not.
        let main = if survives() {
            state.main
        } else {
            state.durable_main
        };
        let journal = if survives() {
            state.journal
        } else {
            state.durable_journal
        };
        let mut image = |number: usize| state.files[number].after_power_cut(&mut survives);
        let left = Self::of(image(main));
        if let Some(journal) = journal {
            let bytes = image(journal);
            let mut state = left.0.lock();
            state.files.push(File {
                durable: bytes.clone(),
                live: bytes,
                dirty: BTreeSet::new(),
            });
            (state.journal, state.durable_journal) = (Some(1), Some(1));
        }
        left
    }
}

impl File {
    fn after_power_cut(&self, survives: &mut impl FnMut() -> bool) -> Vec<u8> {
        let mut image = self.durable.clone();
        if self.live.len() != image.len() && survives() {
            image.resize(self.live.len(), 0);
        }
        for sector in &self.dirty {
            let start = sector * SECTOR;
            let end = (start + SECTOR).min(image.len()).min(self.live.len());
            if start < end && survives() {
                image[start..end].copy_from_slice(&self.live[start..end]);
            }
        }
        image
    }
}

impl State {
    fn operate(&mut self) -> io::Result<()> {
        self.operations += 1;
        if self.trouble == Trouble::Power(self.operations) {
            self.out = true;
        }
        if self.out {
            Err(io::Error::other("the power is out"))
        } else {
            Ok(())
        }
    }

    fn write(&mut self) -> io::Result<()> {
        self.operate()?;
        self.writes += 1;
        if self.trouble == Trouble::Write(self.writes) {
            return Err(io::Error::other("this write fails"));
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.operate()?;
        self.syncs += 1;
        if self.trouble == Trouble::Sync(self.syncs) {
            return Err(io::Error::other("this sync fails"));
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Handle {
    disk: Disk,
    file: usize,
}

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().files[self.file].live.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.disk.0.lock();
        let start = usize::try_from(offset).unwrap();
        let bytes = state.files[self.file]
            .live
            .get(start..start + out.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.write()?;
        let others: u64 = state
            .files
            .iter()
            .enumerate()
            .filter(|(number, _)| *number != self.file)
            .map(|(_, file)| file.live.len() as u64)
            .sum();
        let file = &state.files[self.file];
        if len > file.live.len() as u64 && others + len > state.capacity {
            return Err(io::ErrorKind::StorageFull.into());
        }
        state.files[self.file]
            .live
            .resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let slow = self.disk.0.lock().slow;
        std::thread::sleep(slow);
        let mut state = self.disk.0.lock();
        state.sync()?;
        let file = &mut state.files[self.file];
        file.durable = file.live.clone();
        file.dirty.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.write()?;
        let file = &mut state.files[self.file];
        let start = usize::try_from(offset).unwrap();
        let end = start + data.len();
        if end > file.live.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.live[start..end].copy_from_slice(data);
        for sector in start / SECTOR..end.div_ceil(SECTOR) {
            file.dirty.insert(sector);
        }
        Ok(())
    }
}

impl Media for Disk {
    fn place(&self) -> String {
        "the disk of the test".into()
    }

    fn open(&self) -> io::Result<Box<dyn StorageBackend>> {
        let state = self.0.lock();
        if state.out {
            return Err(io::Error::other("the power is out"));
        }
        Ok(Box::new(Handle {
            disk: self.clone(),
            file: state.main,
        }))
    }

    fn view(&self) -> io::Result<Box<dyn StorageBackend>> {
        self.open()
    }

    fn open_side(&self) -> io::Result<Box<dyn StorageBackend>> {
        self.discard_side();
        let mut state = self.0.lock();
        state.operate()?;
        state.files.push(File::default());
        let file = state.files.len() - 1;
        state.side = Some(file);
        Ok(Box::new(Handle {
            disk: self.clone(),
            file,
        }))
    }

    fn promote(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.write()?;
        state.main = state.side.take().unwrap();
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.sync()?;
        let old = state.durable_main;
        state.durable_main = state.main;
        state.durable_journal = state.journal;
        if old != state.main {
            state.files[old] = File::default();
        }
        Ok(())
    }

    fn discard_side(&self) {
        let mut state = self.0.lock();
        if let Some(side) = state.side.take() {
            state.files[side] = File::default();
        }
    }

    fn journal(&self, make: bool) -> io::Result<Option<Box<dyn StorageBackend>>> {
        let mut state = self.0.lock();
        if state.out {
            return Err(io::Error::other("the power is out"));
        }
        if make && state.journal.is_none() {
            state.write()?;
            state.files.push(File::default());
            state.journal = Some(state.files.len() - 1);
            // The directory is synced; if that fails it is there, and not for sure.
            state.sync()?;
            state.durable_journal = state.journal;
        }
        let handle = |file| Handle {
            disk: self.clone(),
            file,
        };
        Ok(state
            .journal
            .map(|file| Box::new(handle(file)) as Box<dyn StorageBackend>))
    }

    fn discard_journal(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.write()?;
        state.journal = None;
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        let state = self.0.lock();
        let files = [Some(state.main), state.journal];
        let length = |number: usize| state.files[number].live.len() as u64;
        Ok(files.into_iter().flatten().map(length).sum())
    }

    fn identity(&self) -> Option<(u64, u64)> {
        None
    }
}
