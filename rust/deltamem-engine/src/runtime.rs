//! ONNX Runtime itself: opened once a process from a library's path, kept for good. It knows nothing of models.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::Environment;

use crate::error::{EngineError, Result};

/// The process's ONNX Runtime.
#[derive(Debug)]
pub struct Runtime {
    environment: Environment,
    library: PathBuf,
}

static RUNTIME: OnceLock<Runtime> = OnceLock::new();
static OPENING: Mutex<()> = Mutex::new(());

impl Runtime {
    /// Opens ONNX Runtime from the shared library at `library`, or returns the one that is open already.
    ///
    /// # Errors
    /// [`EngineError::Library`] when the file is no ONNX Runtime, is too old (the lowest is 1.31), or when the process has already opened
    /// another one.
    pub fn open(library: &Path) -> Result<&'static Self> {
        let _one_at_a_time = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = RUNTIME.get() {
            if open.library == library {
                return Ok(open);
            }
            return Err(EngineError::Library(format!(
                "this process already uses {}, and cannot use {} beside it; set one library before the first load",
                open.library.display(),
                library.display()
            )));
        }
        let environment = ort::init_from(library)
            .map_err(|error| {
                EngineError::Library(format!(
                    "{}: {error}; deltamem-rt needs ONNX Runtime 1.{} or later: pip install -U \"deltamem-rt[cpu]\" or \"deltamem-rt[cuda]\"",
                    library.display(),
                    ort::MINOR_VERSION
                ))
            })?
            .with_name("deltamem")
            .with_telemetry(false)
            .build()
            .map_err(|error| EngineError::Library(error.to_string()))?;
        Ok(RUNTIME.get_or_init(|| Self {
            environment,
            library: library.to_path_buf(),
        }))
    }

    /// The environment that sessions are made in.
    pub(crate) fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The library's path.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// ONNX Runtime's description of its own build.
    pub fn build_info(&self) -> &'static str {
        ort::info()
    }

    /// The execution providers that the library offers, best first.
    pub fn providers(&self) -> Vec<String> {
        available_providers()
    }
}

#[allow(unsafe_code)]
fn available_providers() -> Vec<String> {
    let mut names = std::ptr::null_mut();
    let mut count = 0;
    // SAFETY: both out-pointers are valid for the call; on success ONNX Runtime gives `count` NUL-terminated strings, which are
    // copied before they are handed back to it, once, with the same count.
    unsafe {
        let status = (ort::api().GetAvailableProviders)(&raw mut names, &raw mut count);
        if ort::Error::result_from_status(status).is_err() || names.is_null() {
            return Vec::new();
        }
        let list = (0..usize::try_from(count).unwrap_or(0))
            .map(|i| CStr::from_ptr(*names.add(i)).to_string_lossy().into_owned())
            .collect();
        let released = (ort::api().ReleaseAvailableProviders)(names, count);
        drop(ort::Error::result_from_status(released));
        list
    }
}
