"""Finds ONNX Runtime's shared library inside the installed `onnxruntime` or `onnxruntime-gpu` wheel.

It never imports those packages: Python's own module would load a second copy of the runtime, and takes half a second. Nothing here
opens the library; the Rust engine does. What the library's CUDA provider needs in turn is opened here, where the wheels that hold it can be
found.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from pathlib import Path

from .errors import OnnxRuntimeNotFoundError

__all__ = ["ENVIRONMENT_VARIABLE", "LOWEST", "LibraryInfo", "find_library", "may_use_cuda", "open_cuda_libraries"]

ENVIRONMENT_VARIABLE = "DELTAMEM_ORT_LIBRARY"
"""Names the shared library itself, and goes before every search."""

LOWEST = (1, 31)
"""The lowest ONNX Runtime that has the C interface the engine is built for."""

INSTALL = 'pip install "deltamem-rt[cpu]" (any machine) or pip install "deltamem-rt[cuda]" (NVIDIA)'

_DISTRIBUTIONS = ("onnxruntime-gpu", "onnxruntime")
_PATTERNS = (
    "libonnxruntime.so.*",
    "libonnxruntime.*.dylib",
    "libonnxruntime.so",
    "libonnxruntime.dylib",
    "onnxruntime.dll",
)


# What the provider links against, each behind what it needs itself, and cuDNN, which it opens when it needs it.
_CUDA_LIBRARIES = ("cudart", "nvrtc", "nvJitLink", "cublasLt", "cublas", "curand", "cufft", "cudnn")


@dataclass(frozen=True)
class LibraryInfo:
    """Where ONNX Runtime is.

    `path` is the shared library; `version` is the version that its file name or its distribution gives, None when neither does;
    `distribution` is the wheel it came with, None when `DELTAMEM_ORT_LIBRARY` named it.
    """

    path: Path
    version: str | None
    distribution: str | None


def find_library() -> LibraryInfo:
    """Finds the library to load.

    `DELTAMEM_ORT_LIBRARY` goes first, then the installed wheel. Raises OnnxRuntimeNotFoundError when there is none, when the variable
    names no file, or when what is installed is older than 1.31.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise OnnxRuntimeNotFoundError(
                f"{ENVIRONMENT_VARIABLE} names {named}, which is no file; unset it, or name the shared library of ONNX Runtime"
            )
        return _new_enough(LibraryInfo(path.resolve(), _version_in_name(path), None))

    for folder in _package_folders():
        for pattern in _PATTERNS:
            # Sorted, so that the choice does not depend on the file system where an upgrade has left two behind.
            for path in sorted((folder / "capi").glob(pattern), key=_sort_key, reverse=True):
                distribution, version = _distribution(folder)
                return _new_enough(LibraryInfo(path, _version_in_name(path) or version, distribution))
    raise OnnxRuntimeNotFoundError(f"no ONNX Runtime is installed: {INSTALL}")


def has_cuda_provider(library: Path) -> bool:
    """Whether the CUDA provider lies beside the library."""
    return any(library.parent.glob("*onnxruntime_providers_cuda*"))


def may_use_cuda(library: Path, bundle: Path) -> bool:
    """Whether `device="auto"` may end on a card: the provider is there, and the bundle names CUDA or is in 16 bits.

    It looks no closer, and decides nothing: the engine reads the manifest and asks the card.
    """
    if not has_cuda_provider(library):
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        manifest = json.loads((bundle / "deltamem.json").read_text(encoding="utf-8"))
        graphs = [manifest.get("graph") or {}, *(manifest.get("graphs") or [])]
        return manifest.get("precision") in ("fp16", "bf16") or any(graph.get("device") == "cuda" for graph in graphs)
    return False


def open_cuda_libraries(library: Path) -> list[Path]:
    """Opens the CUDA libraries that lie in NVIDIA's wheels, so that the provider finds them without a library path.

    Returns those that were opened. One that is missing or does not open is no error here: it may be on the system's own path, and if it is
    not, the provider says which it is.
    """
    if not has_cuda_provider(library):
        return []
    opened = []
    for name in _CUDA_LIBRARIES:
        for path in _in_nvidia_wheels(name):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))
                opened.append(path)
                break
    return opened


def _in_nvidia_wheels(name: str) -> list[Path]:
    """Where a library of that name lies in NVIDIA's wheels, newest first: `nvidia/cu13/lib`, in older ones `nvidia/cublas/lib`."""
    spec = PathFinder.find_spec("nvidia")
    folders = [] if spec is None else [Path(location) for location in spec.submodule_search_locations or ()]
    found = [
        path
        for folder in folders
        for pattern in (f"*/lib/lib{name}.so.*", f"*/bin/{name}64_*.dll")
        for path in folder.glob(pattern)
    ]
    # A library's name ends with its version: libcublas.so.13, cublas64_13.dll.
    return sorted(found, key=lambda path: _numbers(path.name)[-1:], reverse=True)


def _package_folders() -> list[Path]:
    spec = PathFinder.find_spec("onnxruntime")
    if spec is None or spec.submodule_search_locations is None:
        return []
    return [Path(location) for location in spec.submodule_search_locations]


def _version_in_name(path: Path) -> str | None:
    found = re.search(r"\d+\.\d+(\.\d+)*", path.name)
    return found.group() if found else None


def _sort_key(path: Path) -> tuple[int, ...]:
    return _numbers(_version_in_name(path) or "0")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _distribution(folder: Path) -> tuple[str | None, str | None]:
    """Name and version of the wheel that `folder` came with.

    The two wheels install over each other. Where both are registered, the CUDA provider's library tells which one lies there.
    """
    cuda = has_cuda_provider(folder / "capi" / "library")
    for name in _DISTRIBUTIONS if cuda else reversed(_DISTRIBUTIONS):
        try:
            return name, distribution_version(name)
        except PackageNotFoundError:
            continue
    return None, None


def _new_enough(info: LibraryInfo) -> LibraryInfo:
    if info.version is not None and _numbers(info.version)[:2] < LOWEST:
        lowest = ".".join(str(part) for part in LOWEST)
        raise OnnxRuntimeNotFoundError(
            f"ONNX Runtime {info.version} at {info.path} is too old, and {lowest} or later is needed: upgrade with {INSTALL}"
        )
    return info
