//! The few functions of NVIDIA's driver that are needed here, opened by name at run time: a card's own context, compiled modules, launches, and for
//! the check of the kernels a little memory. It knows no ONNX Runtime; the context is the one that CUDA's runtime library shares with
//! everybody in the process, so that addresses and streams of the CUDA provider are valid in it.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::Arc;

use libloading::Library;

use crate::{CudaError, Result};

/// The driver's library, which comes with the card's driver and never in a wheel.
const NAMES: &[&str] = if cfg!(windows) {
    &["nvcuda.dll"]
} else {
    &["libcuda.so.1"]
};

const HELP: &str = "install the driver of the card, or load with device='cpu'";

type Status = c_int;
/// Handles of the driver's are kept as numbers: they are never followed here.
type Handle = usize;

const COMPUTE_MAJOR: c_int = 75;
const COMPUTE_MINOR: c_int = 76;

/// The driver's library.
#[derive(Debug)]
pub struct Driver {
    init: unsafe extern "C" fn(c_uint) -> Status,
    error_string: unsafe extern "C" fn(Status, *mut *const c_char) -> Status,
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> Status,
    device_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Status,
    context_retain: unsafe extern "C" fn(*mut Handle, c_int) -> Status,
    context_release: unsafe extern "C" fn(c_int) -> Status,
    context_current: unsafe extern "C" fn(*mut Handle) -> Status,
    context_enter: unsafe extern "C" fn(Handle) -> Status,
    module_load: unsafe extern "C" fn(*mut Handle, *const c_void) -> Status,
    module_unload: unsafe extern "C" fn(Handle) -> Status,
    module_function: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> Status,
    #[allow(clippy::type_complexity)] // as the driver has it
    launch: unsafe extern "C" fn(
        Handle,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        Handle,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> Status,
    allocate: unsafe extern "C" fn(*mut u64, usize) -> Status,
    free: unsafe extern "C" fn(u64) -> Status,
    upload: unsafe extern "C" fn(u64, *const c_void, usize) -> Status,
    download: unsafe extern "C" fn(*mut c_void, u64, usize) -> Status,
    synchronize: unsafe extern "C" fn(Handle) -> Status,
    // The functions lie in it. It is never closed: it has threads and exit handlers of its own, and others in the process use it.
    _library: ManuallyDrop<Library>,
}

/// A card, and the context that the process shares on it.
#[derive(Debug)]
pub struct Device {
    driver: Arc<Driver>,
    ordinal: c_int,
    context: Handle,
    architecture: u32,
}

/// A card's context as that of this thread.
pub(crate) struct Entered<'a> {
    device: &'a Device,
    before: Handle,
}

/// Compiled kernels on a card.
#[derive(Debug)]
pub(crate) struct Module {
    device: Arc<Device>,
    handle: Handle,
}

/// One kernel of a module's. It must not outlive it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Function(Handle);

/// Memory on a card, for checks: a session's own comes from ONNX Runtime.
#[derive(Debug)]
pub struct Buffer {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Driver {
    /// Opens the driver's library: the one at `path`, or the system's.
    ///
    /// # Errors
    /// [`CudaError::Library`] when there is none or it is not one, [`CudaError::Driver`] when it does not start.
    #[allow(unsafe_code)]
    pub fn open(path: Option<&Path>) -> Result<Arc<Self>> {
        let library = open_library(path, NAMES, HELP)?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: each of these names has in the driver's documentation (and in every driver since CUDA 4) the type that its field has.
                unsafe { function(&library, NAMES[0], $name, HELP) }?
            };
        }
        let driver = Self {
            init: function!("cuInit"),
            error_string: function!("cuGetErrorString"),
            device_get: function!("cuDeviceGet"),
            device_attribute: function!("cuDeviceGetAttribute"),
            context_retain: function!("cuDevicePrimaryCtxRetain"),
            context_release: function!("cuDevicePrimaryCtxRelease_v2"),
            context_current: function!("cuCtxGetCurrent"),
            context_enter: function!("cuCtxSetCurrent"),
            module_load: function!("cuModuleLoadData"),
            module_unload: function!("cuModuleUnload"),
            module_function: function!("cuModuleGetFunction"),
            launch: function!("cuLaunchKernel"),
            allocate: function!("cuMemAlloc_v2"),
            free: function!("cuMemFree_v2"),
            upload: function!("cuMemcpyHtoD_v2"),
            download: function!("cuMemcpyDtoH_v2"),
            synchronize: function!("cuStreamSynchronize"),
            _library: ManuallyDrop::new(library),
        };
        // SAFETY: 0 is the only flag there is.
        driver.check("starting", unsafe { (driver.init)(0) })?;
        Ok(Arc::new(driver))
    }

    /// The card of a number, among those that the process sees.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when there is none or it does not answer.
    #[allow(unsafe_code)]
    pub fn device(self: &Arc<Self>, number: i32) -> Result<Arc<Device>> {
        let (mut ordinal, mut major, mut minor, mut context) = (0, 0, 0, 0);
        // SAFETY: all out-pointers are valid; the ordinal is the driver's own by the second call.
        unsafe {
            self.check(
                "looking for the card",
                (self.device_get)(&raw mut ordinal, number),
            )?;
            for (found, what) in [(&mut major, COMPUTE_MAJOR), (&mut minor, COMPUTE_MINOR)] {
                self.check(
                    "asking what the card is",
                    (self.device_attribute)(found, what, ordinal),
                )?;
            }
            self.check(
                "opening the card",
                (self.context_retain)(&raw mut context, ordinal),
            )?;
        }
        Ok(Arc::new(Device {
            driver: Arc::clone(self),
            ordinal,
            context,
            architecture: u32::try_from(major * 10 + minor).unwrap_or(0),
        }))
    }

    #[allow(unsafe_code)]
    fn check(&self, doing: &'static str, code: Status) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: the out-pointer is valid; what comes back is none, or a string that stays for good.
        let found = unsafe {
            (self.error_string)(code, &raw mut text);
            if text.is_null() {
                "an error without a name".into()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        Err(CudaError::Driver { doing, found, code })
    }
}

impl Device {
    /// The compute capability, ten times the first number and the second: 90 is 9.0.
    pub fn architecture(&self) -> u32 {
        self.architecture
    }

    /// Makes the card's context that of this thread, until what comes back is dropped: others in the process go by it too. In a run of ONNX
    /// Runtime's it is so already.
    #[allow(unsafe_code)]
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        let mut before = 0;
        // SAFETY: the out-pointer is valid, and the context is held since the device was opened.
        let code = unsafe {
            let code = (self.driver.context_current)(&raw mut before);
            if code == 0 && before != self.context {
                (self.driver.context_enter)(self.context)
            } else {
                code
            }
        };
        self.driver.check("entering the card's context", code)?;
        Ok(Entered { device: self, before })
    }

    /// Loads what the compiler made.
    #[allow(unsafe_code)]
    pub(crate) fn load(self: &Arc<Self>, image: &[u8]) -> Result<Module> {
        let _entered = self.enter()?;
        let mut handle = 0;
        // SAFETY: the image is whole, as the compiler made it or as its hash says, and it says itself how long it is; behind PTX, which is
        // text, stands the NUL byte that `Compiler` leaves there.
        let code = unsafe { (self.driver.module_load)(&raw mut handle, image.as_ptr().cast()) };
        self.driver.check("loading the kernels", code)?;
        Ok(Module {
            device: Arc::clone(self),
            handle,
        })
    }

    /// So many bytes on the card, with anything in them.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when it has no more.
    #[allow(unsafe_code)]
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let _entered = self.enter()?;
        let mut address = 0;
        // SAFETY: the out-pointer is valid. A block of nothing is refused by the driver, so there is always something.
        let code = unsafe { (self.driver.allocate)(&raw mut address, bytes.max(1)) };
        self.driver.check("taking memory of the card", code)?;
        Ok(Buffer {
            device: Arc::clone(self),
            address,
            bytes,
        })
    }

    /// Memory on the card with numbers in it. `T` is one of those that the kernels have: no padding, any bits valid.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn with<T: Plain>(self: &Arc<Self>, numbers: &[T]) -> Result<Buffer> {
        let mut buffer = self.allocate(size_of_val(numbers))?;
        buffer.upload(numbers)?;
        Ok(buffer)
    }

    /// Waits for a stream, given as its handle; 0 is the default one.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when something that ran there failed.
    #[allow(unsafe_code)]
    pub fn synchronize(&self, stream: usize) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the stream is 0 or the caller's own handle; a wrong one is refused by the driver.
        let code = unsafe { (self.driver.synchronize)(stream) };
        self.driver.check("waiting for the card", code)
    }

    /// Starts a kernel with one argument, which is copied.
    ///
    /// # Safety
    /// `argument` is of the type that the kernel takes, every address in it is one of this card's (of as many numbers as the kernel reads or
    /// writes there), the function's module lives until the kernel is done, and `stream` is 0 or a stream of this card's context.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn launch<T>(
        &self,
        function: Function,
        blocks: u32,
        threads: u32,
        stream: usize,
        argument: &T,
    ) -> Result<()> {
        let mut arguments = [std::ptr::from_ref(argument).cast_mut().cast::<c_void>()];
        // SAFETY: as above; the driver copies the argument and writes nothing to it.
        let code = unsafe {
            (self.driver.launch)(
                function.0,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                stream,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.driver.check("starting a kernel", code)
    }
}

impl Drop for Entered<'_> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.before != self.device.context {
            // SAFETY: it was this thread's a moment ago; none is one too.
            unsafe { (self.device.driver.context_enter)(self.before) };
        }
    }
}

impl Drop for Device {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: it was retained once, when the device was opened. At a process's end the driver may be gone already, and says so.
        unsafe { (self.driver.context_release)(self.ordinal) };
    }
}

impl Module {
    /// The kernel of a name.
    #[allow(unsafe_code)]
    pub(crate) fn function(&self, name: &CStr) -> Result<Function> {
        let _entered = self.device.enter()?;
        let mut handle = 0;
        // SAFETY: the module is loaded, the name ends with NUL, the out-pointer is valid.
        let code =
            unsafe { (self.device.driver.module_function)(&raw mut handle, self.handle, name.as_ptr()) };
        self.device.driver.check("looking for a kernel", code)?;
        Ok(Function(handle))
    }

    /// The card that it is on.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Drop for Module {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Ok(_entered) = self.device.enter() {
            // SAFETY: it was loaded once, and nobody has its functions any more: a session's runs are over when its kernels go.
            unsafe { (self.device.driver.module_unload)(self.handle) };
        }
    }
}

/// Numbers whose bytes can be copied as they are.
pub trait Plain: Copy + Default + sealed::Sealed {}

impl Plain for f32 {}
impl Plain for u16 {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for u16 {}
}

impl Buffer {
    /// Where it lies on the card.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Writes numbers from its start on.
    ///
    /// # Errors
    /// [`CudaError::Call`] when they are too many, [`CudaError::Driver`] when the card fails.
    #[allow(unsafe_code)]
    pub fn upload<T: Plain>(&mut self, numbers: &[T]) -> Result<()> {
        self.fits(size_of_val(numbers))?;
        let _entered = self.device.enter()?;
        // SAFETY: so many bytes are there on both sides, as was just seen.
        let code = unsafe {
            (self.device.driver.upload)(self.address, numbers.as_ptr().cast(), size_of_val(numbers))
        };
        self.device.driver.check("copying to the card", code)
    }

    /// Reads `count` numbers from its start on, behind everything that runs on the default stream.
    ///
    /// # Errors
    /// As [`Buffer::upload`].
    #[allow(unsafe_code)]
    pub fn download<T: Plain>(&self, count: usize) -> Result<Vec<T>> {
        let mut numbers = vec![T::default(); count];
        self.fits(size_of_val(numbers.as_slice()))?;
        let _entered = self.device.enter()?;
        // SAFETY: so many bytes are there on both sides, as was just seen, and any bits are a number.
        let code = unsafe {
            (self.device.driver.download)(
                numbers.as_mut_ptr().cast(),
                self.address,
                size_of_val(numbers.as_slice()),
            )
        };
        self.device.driver.check("copying from the card", code)?;
        Ok(numbers)
    }

    fn fits(&self, bytes: usize) -> Result<()> {
        if bytes <= self.bytes {
            return Ok(());
        }
        Err(CudaError::Call(format!(
            "a copy of {bytes} bytes does not fit the {} bytes of its memory",
            self.bytes
        )))
    }
}

impl Drop for Buffer {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Ok(_entered) = self.device.enter() {
            // SAFETY: it was allocated once, at this address; the driver waits for what runs before it frees.
            unsafe { (self.device.driver.free)(self.address) };
        }
    }
}

/// Opens the library at `path`, or the first of `names` that the system finds or that is open in this process already.
#[allow(unsafe_code)]
pub(crate) fn open_library(path: Option<&Path>, names: &[&str], help: &'static str) -> Result<Library> {
    let open = |name: &std::ffi::OsStr| {
        // SAFETY: NVIDIA's libraries do nothing that others could see when they are opened; a path is the caller's own choice.
        unsafe { Library::new(name) }.map_err(|error| {
            let (library, found) = (name.to_string_lossy().into_owned(), said(&error));
            // The system begins with the name as well.
            let found = found.trim_start_matches(&format!("{library}: ")).to_owned();
            CudaError::Library { library, found, help }
        })
    };
    if let Some(path) = path {
        return open(path.as_os_str());
    }
    let mut first = None;
    for name in names {
        match open(name.as_ref()) {
            Ok(library) => return Ok(library),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or_else(|| CudaError::Call("no library was named".into())))
}

/// The system's own words, which the error itself leaves to its source.
fn said(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// A function of a library's.
///
/// # Safety
/// `F` is the type of a pointer to the function that the library has under that name. It must not be called once the library is closed.
#[allow(unsafe_code)]
pub(crate) unsafe fn function<F: Copy>(
    library: &Library,
    file: &str,
    name: &str,
    help: &'static str,
) -> Result<F> {
    const { assert!(size_of::<F>() == size_of::<*const c_void>()) };
    let address = address(library, file, name, help)?;
    // SAFETY: as above; both are an address.
    Ok(unsafe { std::mem::transmute_copy::<*const c_void, F>(&address) })
}

/// Where a function lies. Apart from its type, so that it is compiled once.
#[allow(unsafe_code)]
fn address(library: &Library, file: &str, name: &str, help: &'static str) -> Result<*const c_void> {
    // SAFETY: it is only an address here.
    let found = unsafe { library.get::<*const c_void>(name) };
    found.map(|found| *found).map_err(|error| CudaError::Library {
        library: file.into(),
        found: format!("it has no {name} ({})", said(&error)),
        help,
    })
}

/// Text for the driver or the compiler.
pub(crate) fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| CudaError::Call(format!("{text:?} has a NUL byte in it")))
}
