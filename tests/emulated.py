"""The card that the processor plays: the driver and the compiler of `rust/deltamem-cuda/tests/emulator.c` in the place of NVIDIA's, so that
the memory's own kernels, and all that launches them, run on a machine without one. And bundles whose graphs are for such a card."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

from deltamem_export import manifest
from deltamem_export.bundle import share_files
from deltamem_export.fused import add_fused

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "rust" / "deltamem-cuda" / "tests" / "emulator.c"
VARIABLE = "DELTAMEM_EMULATED_CARD"
"""Names the library that plays the driver and the compiler, where the processor plays the card; of no effect elsewhere."""

ON_DEVICE = "_device_on_cpu"


def library() -> Path:
    """The emulator, compiled once into the tree's build folder."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    made = ROOT / "target" / f"emulator-{digest}.so"
    if not made.exists():
        made.parent.mkdir(exist_ok=True)
        new = made.with_name(f"{made.name}.{os.getpid()}")
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(new), str(SOURCE), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        new.replace(made)  # another process may be at it too
    return made


def launches() -> int:
    """Kernels that the emulator has launched in this process."""
    count = ctypes.CDLL(str(library())).emulator_launches
    count.restype = ctypes.c_ulong
    return int(count())


def for_a_card(bundle: Path, target: Path) -> Path:
    """A bundle for the CPU, its files shared, said to be for CUDA and given the fused graph for it. In float32 the CPU has every kernel
    that its graphs need, so that all else of a card's way is held against goldens as closely as on the CPU."""
    found = manifest.read(bundle)
    target.mkdir()
    share_files(bundle, target, found)
    found["graph"]["device"] = "cuda"
    manifest.write(target, found)
    assert add_fused(target) == {"cuda": None}
    return target
