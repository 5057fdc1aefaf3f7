//! The Python classes and the mapping of errors, nothing else: every method checks its arguments, lets the GIL go, and calls the engine
//! once. What a class does is written in its docstring, which is the documentation that `help()` shows.

// Docstrings are written for Python's readers, and PyO3 hands arguments over by value and `self` to every method.
#![allow(
    clippy::doc_markdown,
    clippy::needless_pass_by_value,
    clippy::unused_self,
    clippy::too_many_arguments
)]

mod dlpack;
mod errors;
mod generation;
mod geometry;
mod health;
mod history;
mod keeping;
mod model;
mod proof;
mod records;
mod session;
mod snapshot;
mod store;
mod tokens;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

/// What this machine and this build offer, for `deltamem doctor`.
#[pyfunction]
#[pyo3(signature = (library=None))]
fn doctor(py: Python<'_>, library: Option<std::path::PathBuf>) -> PyResult<Bound<'_, PyDict>> {
    let report = PyDict::new(py);
    report.set_item("version", env!("CARGO_PKG_VERSION"))?;
    report.set_item(
        "threads",
        std::thread::available_parallelism().map_or(1, usize::from),
    )?;
    report.set_item("cpu_features", PyList::new(py, cpu_features())?)?;
    report.set_item("kernel", deltamem_engine::kernel_instructions())?;
    report.set_item(
        "products",
        deltamem_engine::product_instructions().unwrap_or("ONNX Runtime's"),
    )?;
    if let Some(library) = library {
        let runtime = deltamem_engine::Runtime::open(&library).map_err(errors::to_python)?;
        report.set_item("ort_library", runtime.library())?;
        report.set_item("ort_build", runtime.build_info())?;
        report.set_item("providers", runtime.providers())?;
        // Asking a card takes a while, so the lock is let go.
        let (ready, said) = match py.detach(|| deltamem_engine::examine_cuda(runtime)) {
            Ok(said) => (true, said),
            Err(error) => (false, error.to_string()),
        };
        report.set_item("cuda", ready)?;
        report.set_item("cuda_says", said)?;
        if ready {
            let (ready, said) = match py.detach(deltamem_engine::examine_kernels) {
                Ok(said) => (true, said),
                Err(error) => (false, error.to_string()),
            };
            report.set_item("card_kernels", ready)?;
            report.set_item("card_kernels_say", said)?;
        }
    }
    Ok(report)
}

/// The vector extensions that this processor has, of those that matter here.
fn cpu_features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! probe {
            ($($feature:tt),*) => { $(if std::arch::is_x86_feature_detected!($feature) { found.push($feature); })* };
        }
        probe!(
            "sse4.2",
            "avx",
            "f16c",
            "fma",
            "avx2",
            "avx512f",
            "avx512bw",
            "avx512vnni",
            "avx512bf16"
        );
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! probe {
            ($($feature:tt),*) => { $(if std::arch::is_aarch64_feature_detected!($feature) { found.push($feature); })* };
        }
        probe!("neon", "fp16", "dotprod", "i8mm", "bf16", "sve");
    }
    found
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<model::Model>()?;
    module.add_class::<model::ModelStats>()?;
    module.add_class::<model::Prefix>()?;
    module.add_class::<geometry::Geometry>()?;
    module.add_class::<session::Session>()?;
    module.add_class::<generation::Generation>()?;
    module.add_class::<generation::GenerationStats>()?;
    module.add_class::<snapshot::Snapshot>()?;
    module.add_class::<dlpack::MemoryTensor>()?;
    module.add_class::<store::Store>()?;
    module.add_function(wrap_pyfunction!(doctor, module)?)?;
    module.add_function(wrap_pyfunction!(proof::scan, module)?)?;
    Ok(())
}
