//! The card that the processor plays, compiled once for a test's process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use deltamem_cuda::{Cache, Machine, Options, SOURCE};

/// Compiles the emulator into `folder` with further options.
pub fn build(folder: &Path, options: &[&str]) -> PathBuf {
    let library = folder.join("emulator.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator.c");
    let done = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"])
        .args(options)
        .arg("-o")
        .args([&library, &source])
        .args(["-ldl", "-lpthread"])
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    library
}

/// What opens an emulator.
pub fn options(library: &Path, cache: Cache) -> Options {
    Options {
        device: 0,
        driver: Some(library.into()),
        compiler: Some(library.into()),
        cache,
        source: SOURCE.into(),
    }
}

/// A folder inside of another.
pub fn scratch(folder: &Path, name: &str) -> PathBuf {
    let own = folder.join(name);
    std::fs::create_dir(&own).unwrap();
    own
}

/// One of the emulator's counters.
#[allow(unsafe_code)]
pub fn counted(library: &Path, name: &str) -> u64 {
    // SAFETY: the emulator's counters take nothing and return an unsigned long.
    unsafe {
        let library = libloading::Library::new(library).unwrap();
        library
            .get::<unsafe extern "C" fn() -> std::ffi::c_ulong>(name)
            .unwrap()()
    }
}

/// Has the emulator go on behind a kernel that failed, as a new process would.
#[allow(unsafe_code)]
pub fn mend(library: &Path) {
    // SAFETY: it takes and returns nothing.
    unsafe {
        let library = libloading::Library::new(library).unwrap();
        library.get::<unsafe extern "C" fn()>("emulator_mend").unwrap()();
    }
}

/// The one that most tests share.
pub fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        std::fs::create_dir_all(&folder).unwrap();
        Machine::open(options(&build(&folder, &[]), Cache::default())).unwrap()
    })
}
