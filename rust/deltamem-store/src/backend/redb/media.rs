//! Where a redb database's bytes lie: a file, its journal, and the file beside it that takes its place when the store is written anew.
//! Tests give a media of their own that fails, fills up, or loses its power.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

use crate::error::place_of;
use crate::transfer::sync_directory;

/// A main file, its journal, and a file that will take the main one's place.
pub trait Media: Debug + Send + Sync {
    /// What messages call it.
    fn place(&self) -> String;
    /// The main file, made if there is none. It locks itself where the system can.
    fn open(&self) -> io::Result<Box<dyn StorageBackend>>;
    /// The main file once more, to be read beside the open one, without a lock.
    fn view(&self) -> io::Result<Box<dyn StorageBackend>>;
    /// A new, empty file beside the main one; one that was left there is lost.
    fn open_side(&self) -> io::Result<Box<dyn StorageBackend>>;
    /// Puts the file beside in the main one's place. Both stay open as they are.
    fn promote(&self) -> io::Result<()>;
    /// Makes the last promotion survive a power cut.
    fn settle(&self) -> io::Result<()>;
    /// Removes the file beside, if there is one.
    fn discard_side(&self);
    /// The journal; if there is none it is made, and stays after a power cut, or there is none.
    fn journal(&self, make: bool) -> io::Result<Option<Box<dyn StorageBackend>>>;
    /// Removes the journal, if there is one.
    fn discard_journal(&self) -> io::Result<()>;
    /// The length of the main file and its journal.
    fn size(&self) -> io::Result<u64>;
    /// Which file the main one is; it changes with each promotion. `None` where the system does not say.
    fn identity(&self) -> Option<(u64, u64)>;
}

/// A path, and the same with `.journal` and `.new` behind it.
#[derive(Debug)]
pub(crate) struct FileMedia {
    path: PathBuf,
    read_only: bool,
}

impl FileMedia {
    pub(crate) fn new(path: &Path, read_only: bool) -> Self {
        Self {
            path: path.to_owned(),
            read_only,
        }
    }

    fn beside(&self, ending: &str) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(ending);
        name.into()
    }

    fn side(&self) -> PathBuf {
        self.beside(".new")
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    // What a memory holds is its owner's.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn backend(file: File) -> io::Result<FileBackend> {
    FileBackend::new(file).map_err(io::Error::other)
}

impl Media for FileMedia {
    fn place(&self) -> String {
        place_of(&self.path)
    }

    fn open(&self) -> io::Result<Box<dyn StorageBackend>> {
        if self.read_only {
            return Ok(Box::new(backend(File::open(&self.path)?)?));
        }
        let new = !self.path.exists();
        let file = options().open(&self.path)?;
        if new {
            sync_directory(&self.path)?;
        }
        Ok(Box::new(backend(file)?))
    }

    fn view(&self) -> io::Result<Box<dyn StorageBackend>> {
        Ok(Box::new(backend(File::open(&self.path)?)?))
    }

    fn open_side(&self) -> io::Result<Box<dyn StorageBackend>> {
        self.discard_side();
        Ok(Box::new(backend(options().open(self.side())?)?))
    }

    fn promote(&self) -> io::Result<()> {
        std::fs::rename(self.side(), &self.path)
    }

    fn settle(&self) -> io::Result<()> {
        sync_directory(&self.path)
    }

    fn discard_side(&self) {
        // Failing to remove it only leaves a file that the next rewriting removes.
        let _ = std::fs::remove_file(self.side());
    }

    fn journal(&self, make: bool) -> io::Result<Option<Box<dyn StorageBackend>>> {
        let path = self.beside(".journal");
        if make {
            let file = options().open(&path)?;
            sync_directory(&path)?;
            return Ok(Some(Box::new(backend(file)?)));
        }
        let opened = if self.read_only {
            File::open(&path)
        } else {
            OpenOptions::new().read(true).write(true).open(&path)
        };
        match opened {
            Ok(file) => Ok(Some(Box::new(backend(file)?))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn discard_journal(&self) -> io::Result<()> {
        match std::fs::remove_file(self.beside(".journal")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn size(&self) -> io::Result<u64> {
        let journal = std::fs::metadata(self.beside(".journal")).map_or(0, |found| found.len());
        Ok(std::fs::metadata(&self.path)?.len() + journal)
    }

    fn identity(&self) -> Option<(u64, u64)> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let found = std::fs::metadata(&self.path).ok()?;
            Some((found.dev(), found.ino()))
        }
        #[cfg(not(unix))]
        None
    }
}

/// The longest file that redb leaves while it makes one.
const NEWBORN: u64 = 4 << 20;
/// redb's header; everything behind it is zero until the magic number stands.
const HEADER: usize = 4096;

/// Whether these are the bytes of a database that was being made: no magic number yet, and nothing behind the header.
fn newborn(file: &dyn StorageBackend) -> io::Result<bool> {
    let length = file.len()?;
    if length == 0 || length > NEWBORN {
        return Ok(false);
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read(0, &mut bytes)?;
    let magic = &bytes[..bytes.len().min(9)];
    let behind = &bytes[bytes.len().min(HEADER)..];
    Ok(magic.iter().chain(behind).all(|byte| *byte == 0))
}

/// A storage as redb wants one, by value. redb writes the magic number of a new file last, and takes a file without it for somebody
/// else's; a process that was killed in between leaves such a file. It holds nothing yet, so a writer takes it for an empty one.
#[derive(Debug)]
pub(crate) struct Boxed {
    file: Box<dyn StorageBackend>,
    looked: AtomicBool,
}

impl Boxed {
    pub(crate) fn for_writing(file: Box<dyn StorageBackend>) -> Self {
        Self {
            file,
            looked: AtomicBool::new(false),
        }
    }

    pub(crate) fn for_reading(file: Box<dyn StorageBackend>) -> Self {
        Self {
            file,
            looked: AtomicBool::new(true),
        }
    }
}

impl StorageBackend for Boxed {
    fn len(&self) -> io::Result<u64> {
        // redb asks for the length after it has the lock and before anything else.
        if !self.looked.swap(true, Ordering::AcqRel) && newborn(&*self.file)? {
            self.file.set_len(0)?;
        }
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
