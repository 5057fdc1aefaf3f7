//! A card with what compiles for it: where kernels of any sizes are had. Whoever asks for the same sizes again gets the same kernels, for as long as
//! somebody has them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::cache::Key;
use crate::check::check;
use crate::{Cache, Compiler, Device, Driver, Kernels, Result, SOURCE, Sizes};

/// Which card, and what to open for it.
#[derive(Debug, Clone)]
pub struct Options {
    /// The card's number among those that the process sees.
    pub device: i32,
    /// The driver's library; none: the system's.
    pub driver: Option<PathBuf>,
    /// NVRTC's library; none: the system's, or the one that is open in this process.
    pub compiler: Option<PathBuf>,
    /// Where images are kept.
    pub cache: Cache,
    /// The kernels' text.
    pub source: String,
}

impl Options {
    /// A card with the system's libraries and the user's cache.
    pub fn of_device(device: i32) -> Self {
        Self {
            device,
            driver: None,
            compiler: None,
            cache: Cache::of_user(),
            source: SOURCE.into(),
        }
    }
}

/// A card, its compiler, and the kernels that were made for it.
#[derive(Debug)]
pub struct Machine {
    device: Arc<Device>,
    compiler: Compiler,
    target: String,
    cache: Cache,
    source: String,
    made: Mutex<HashMap<Sizes, Weak<Kernels>>>,
}

/// A card's number, and the library that plays it.
type Place = (i32, Option<PathBuf>);

/// The machines of this process.
static SHARED: Mutex<Vec<(Place, Weak<Machine>)>> = Mutex::new(Vec::new());

impl Machine {
    /// Opens the libraries and the card.
    ///
    /// # Errors
    /// [`crate::CudaError`] that names what is missing and what to do.
    pub fn open(options: Options) -> Result<Self> {
        let device = Driver::open(options.driver.as_deref())?.device(options.device)?;
        let compiler = Compiler::open(options.compiler.as_deref())?;
        Ok(Self {
            target: compiler.target(device.architecture())?,
            device,
            compiler,
            cache: options.cache,
            source: options.source,
            made: Mutex::new(HashMap::new()),
        })
    }

    /// The machine of a card for everybody in this process who uses it now. `library` plays both the driver and NVRTC, for tests.
    ///
    /// # Errors
    /// As [`Machine::open`].
    pub fn shared(device: i32, library: Option<&Path>) -> Result<Arc<Self>> {
        let mut shared = SHARED.lock();
        shared.retain(|(_, machine)| machine.strong_count() > 0);
        let path = library.map(Path::to_path_buf);
        let place = (device, path.clone());
        let found = shared.iter().find(|(other, _)| *other == place);
        let found = found.and_then(|(_, machine)| machine.upgrade());
        if let Some(machine) = found {
            return Ok(machine);
        }
        let machine = Arc::new(Self::open(Options {
            driver: path.clone(),
            compiler: path,
            ..Options::of_device(device)
        })?);
        shared.push((place, Arc::downgrade(&machine)));
        Ok(machine)
    }

    /// The kernels of these sizes: those that somebody has, else those on disk, else compiled. New ones are held against the rule on the card
    /// before anybody gets them.
    ///
    /// # Errors
    /// [`crate::CudaError::Size`] where there are none so large, [`crate::CudaError::Compiler`], [`crate::CudaError::Driver`], and
    /// [`crate::CudaError::Wrong`] where the card computes something else than the rule.
    pub fn kernels(&self, sizes: Sizes) -> Result<Arc<Kernels>> {
        sizes.check()?;
        // Held meanwhile: who asks for the same waits for it.
        let mut made = self.made.lock();
        if let Some(kernels) = made.get(&sizes).and_then(Weak::upgrade) {
            return Ok(kernels);
        }
        let options = sizes.options();
        let version = format!("{:?}", self.compiler.version());
        let key = Key::new(&[&self.source, &options.join("\0"), &version, &self.target]);
        let kept = self
            .cache
            .load(&key)
            .and_then(|image| self.checked(sizes, &image).ok());
        let kernels = if let Some(kernels) = kept {
            kernels
        } else {
            self.cache.forget(&key);
            let (image, _) = self.compiler.compile(&self.source, &self.target, &options)?;
            let kernels = self.checked(sizes, &image)?;
            self.cache.store(&key, &image);
            kernels
        };
        made.retain(|_, kernels| kernels.strong_count() > 0);
        made.insert(sizes, Arc::downgrade(&kernels));
        Ok(kernels)
    }

    /// The card.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The compiler and what it compiles for, in words.
    pub fn describe(&self) -> String {
        let (major, minor) = self.compiler.version();
        format!("NVRTC {major}.{minor} for {}", self.target)
    }

    fn checked(&self, sizes: Sizes, image: &[u8]) -> Result<Arc<Kernels>> {
        let kernels = Arc::new(Kernels::load(&self.device, sizes, image)?);
        check(&kernels)?;
        Ok(kernels)
    }
}
