//! Where NVIDIA's libraries are that no system path leads to.

use std::path::{Path, PathBuf};

/// NVRTC in the wheels beside the Python that `PYO3_PYTHON` or `VIRTUAL_ENV` names, or in the project's `.venv`.
pub fn nvrtc_in_wheels() -> Vec<PathBuf> {
    let python = std::env::var_os("PYO3_PYTHON").map(PathBuf::from);
    let beside = python.as_deref().and_then(Path::parent).and_then(Path::parent);
    let folders = [
        beside.map(Path::to_path_buf),
        std::env::var_os("VIRTUAL_ENV").map(PathBuf::from),
        Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv")),
    ];
    let all = |folder: PathBuf| {
        std::fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
    };
    folders
        .into_iter()
        .flatten()
        .flat_map(|folder| all(folder.join("lib")))
        .flat_map(|python| all(python.join("site-packages").join("nvidia")))
        .flat_map(|wheel| all(wheel.join("lib")))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("libnvrtc.so.")
        })
        .collect()
}
