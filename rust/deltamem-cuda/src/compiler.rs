//! NVRTC, NVIDIA's compiler as a library: from the kernels' text to an image for one card. It is in the wheels that
//! `onnxruntime-gpu[cuda]` brings; the Python side opens it from there, so that its name alone finds it here.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;

use libloading::Library;

use crate::driver::{c_string, function, open_library};
use crate::{CudaError, Result};

const NAMES: &[&str] = if cfg!(windows) {
    &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
} else {
    &["libnvrtc.so.13", "libnvrtc.so.12"]
};

const HELP: &str = "it compiles the memory's own kernels: pip install \"onnxruntime-gpu[cuda,cudnn]\", which brings it, or put that of CUDA on \
                    the library path";

type Status = c_int;
type Program = *mut c_void;

/// NVRTC's library.
#[derive(Debug)]
pub struct Compiler {
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    log: Text,
    cubin: Text,
    ptx: Text,
    version: (i32, i32),
    architectures: Vec<u32>,
    // The functions lie in it. It is never closed: it has threads and exit handlers of its own, and others in the process use it.
    _library: ManuallyDrop<Library>,
}

/// A pair of functions: how long a text is, and the text.
#[derive(Debug, Clone, Copy)]
struct Text {
    size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
}

impl Compiler {
    /// Opens the library: the one at `path`, or the first of the system's.
    ///
    /// # Errors
    /// [`CudaError::Library`] when there is none or it is not one.
    #[allow(unsafe_code)]
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let library = open_library(path, NAMES, HELP)?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: each of these names has in NVRTC's documentation (since CUDA 11.2) the type that its place here has.
                unsafe { function(&library, NAMES[0], $name, HELP) }?
            };
        }
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status = function!("nvrtcVersion");
        let count: unsafe extern "C" fn(*mut c_int) -> Status = function!("nvrtcGetNumSupportedArchs");
        let supported: unsafe extern "C" fn(*mut c_int) -> Status = function!("nvrtcGetSupportedArchs");
        let mut compiler = Self {
            error_string: function!("nvrtcGetErrorString"),
            create: function!("nvrtcCreateProgram"),
            destroy: function!("nvrtcDestroyProgram"),
            compile: function!("nvrtcCompileProgram"),
            log: Text {
                size: function!("nvrtcGetProgramLogSize"),
                get: function!("nvrtcGetProgramLog"),
            },
            cubin: Text {
                size: function!("nvrtcGetCUBINSize"),
                get: function!("nvrtcGetCUBIN"),
            },
            ptx: Text {
                size: function!("nvrtcGetPTXSize"),
                get: function!("nvrtcGetPTX"),
            },
            version: (0, 0),
            architectures: Vec::new(),
            _library: ManuallyDrop::new(library),
        };
        let (mut major, mut minor, mut architectures) = (0, 0, 0);
        let mut found = Vec::new();
        // SAFETY: all out-pointers are valid, the last one for as many numbers as NVRTC has just said.
        unsafe {
            compiler.check("telling its version", version(&raw mut major, &raw mut minor))?;
            compiler.check("counting architectures", count(&raw mut architectures))?;
            found.resize(usize::try_from(architectures).unwrap_or(0), 0);
            compiler.check("naming architectures", supported(found.as_mut_ptr()))?;
        }
        compiler.version = (major, minor);
        compiler.architectures = found.into_iter().filter_map(|n| u32::try_from(n).ok()).collect();
        Ok(compiler)
    }

    /// Its version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// What it is told to compile for, so that a card of `architecture` takes it: code for that card where it knows the card, or for an
    /// older one of its generation, which runs on it as it is; else the newest older generation's intermediate code, which the driver finishes.
    ///
    /// # Errors
    /// [`CudaError::Compiler`] when the card is older than all that it knows.
    pub fn target(&self, architecture: u32) -> Result<String> {
        let known = self.architectures.iter().filter(|&&known| known <= architecture);
        known
            .max()
            .map(|known| {
                let code = if known / 10 == architecture / 10 { "sm" } else { "compute" };
                format!("{code}_{known}")
            })
            .ok_or_else(|| CudaError::Compiler {
                doing: "looking for the card's architecture",
                found: format!(
                    "found a card of compute capability {}.{}, expected one of {:?} or later, which NVRTC {}.{} knows",
                    architecture / 10,
                    architecture % 10,
                    self.architectures,
                    self.version.0,
                    self.version.1
                ),
            })
    }

    /// Compiles `source` for a target of [`Compiler::target`]'s. The image, and the compiler's log.
    ///
    /// # Errors
    /// [`CudaError::Compiler`] with its log when it does not take it.
    #[allow(unsafe_code)]
    pub fn compile(&self, source: &str, target: &str, options: &[String]) -> Result<(Vec<u8>, String)> {
        let source = c_string(source)?;
        let mut texts = vec![c_string(&format!("--gpu-architecture={target}"))?];
        for option in options {
            texts.push(c_string(option)?);
        }
        let options: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        let count = c_int::try_from(options.len()).unwrap_or(0);
        let mut program = Made {
            compiler: self,
            program: std::ptr::null_mut(),
        };
        // SAFETY: source, name and options are strings that live over the calls; the program is the one that NVRTC made in the first of them.
        unsafe {
            self.check(
                "taking the source",
                (self.create)(
                    &raw mut program.program,
                    source.as_ptr(),
                    c"kernels.cu".as_ptr(),
                    0,
                    std::ptr::null(),
                    std::ptr::null(),
                ),
            )?;
            let code = (self.compile)(program.program, count, options.as_ptr());
            let log = self
                .read(program.program, self.log, "reading its log")
                .map(|log| String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned())
                .unwrap_or_default();
            if let Err(CudaError::Compiler { doing, found }) = self.check("compiling the kernels", code) {
                return Err(CudaError::Compiler {
                    doing,
                    found: format!("{found}: {}", log.trim()),
                });
            }
            let what = if target.starts_with("sm_") {
                self.cubin
            } else {
                self.ptx
            };
            let mut image = self.read(program.program, what, "reading the image")?;
            // PTX is text, and the driver reads it up to a NUL byte.
            if !target.starts_with("sm_") && image.last() != Some(&0) {
                image.push(0);
            }
            Ok((image, log))
        }
    }

    /// # Safety
    /// The program is one of this library's, and alive.
    #[allow(unsafe_code)]
    unsafe fn read(&self, program: Program, what: Text, doing: &'static str) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: as above; as many bytes are there as NVRTC has just said.
        unsafe {
            self.check(doing, (what.size)(program, &raw mut size))?;
            let mut bytes = vec![0_u8; size];
            self.check(doing, (what.get)(program, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }

    #[allow(unsafe_code)]
    fn check(&self, doing: &'static str, code: Status) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: what comes back is none, or a string that stays for good.
        let found = unsafe {
            let text = (self.error_string)(code);
            if text.is_null() {
                format!("error {code}")
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        Err(CudaError::Compiler { doing, found })
    }
}

/// A program of NVRTC's, until it is read.
struct Made<'a> {
    compiler: &'a Compiler,
    program: Program,
}

impl Drop for Made<'_> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: NVRTC made it, and nobody has it any more.
            unsafe { (self.compiler.destroy)(&raw mut self.program) };
        }
    }
}
