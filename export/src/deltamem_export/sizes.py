"""How much memory and disk an export takes, told before any work: from the headers of the backbone's safetensors files
alone. The figures are upper bounds within a few per cent, measured on models of 0.6 and 4 B parameters (docs/precision.md).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from deltamem_export.errors import ExportError
from deltamem_export.precision import Precision

GIB = 1 << 30
# PyTorch, transformers and ONNX Runtime loaded, with the slabs of `streaming.py`.
_BASE_MEMORY = int(1.2 * GIB)
# Graphs, the adapter, tokenizer files.
_BASE_DISK = 64 << 20
# A model in ONNX Runtime, over the size of its files: packed copies of what the kernels want in another order.
_RUNNING = 1.3
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Needs:
    """Bytes that an export takes: of memory that cannot be given back (the backbone's own mapped files not counted), and
    of disk where the bundle is made."""

    memory: int
    disk: int


def estimate(directory: Path, config: PretrainedConfig, precision: Precision, check: bool) -> Needs:
    """What exporting the backbone in `directory` takes, with a comparison that takes one layer at a time if `check`; one of
    whole models is chosen only where it fits as well.

    Raises:
        ExportError: a damaged safetensors file.
    """
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    weights, largest, has_head, table = 0, 0, False, (0, 0)
    for name, shape in _tensors(directory):
        numbers = math.prod(shape)
        largest = max(largest, numbers)
        has_head = has_head or name.startswith("lm_head.")
        if name.endswith(("embed_tokens.weight", "wte.weight")):
            table = (shape[0], shape[1])
            weights += precision.embedding_bytes(*table)
        elif len(shape) < 2:
            weights += numbers * 4
        else:
            weights += precision.weight_bytes(numbers // shape[-1], shape[-1])
    if not has_head:  # tied: the builder writes the table a second time, the other way round
        weights += precision.weight_bytes(*table)
    heads = getattr(text, "num_attention_heads", 1)
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    tables = getattr(text, "max_position_embeddings", 0) * head * (4 if precision.arithmetic == "fp32" else 2)
    weights += tables  # of RoPE

    disk = weights + _BASE_DISK
    memory = _BASE_MEMORY + (8 * largest / precision.block_size if precision.quantised else 0)
    if not any(directory.glob("*.safetensors")):  # read, not mapped
        memory += sum(path.stat().st_size for path in directory.glob("*.bin"))
    if check:
        memory += 4 * 4 * largest
        if precision.name == "bf16":  # compared as float32, in a file of its own
            disk += 2 * weights
    if precision.kv == "int8":
        memory = max(memory, _BASE_MEMORY + _RUNNING * weights * (2 if precision.name == "fp16" else 1))
    return Needs(int(memory), int(disk))


def refuse_too_large(needs: Needs, free_memory: int, target: Path, what: str) -> str:
    """One line that tells what is needed and what there is.

    Raises:
        ExportError: the machine has less memory or disk free than that.
    """
    disk = shutil.disk_usage(target.parent).free
    line = (
        f"needs about {needs.memory / GIB:.1f} GiB of memory and {needs.disk / GIB:.1f} GiB of disk; "
        f"{free_memory / GIB:.1f} and {disk / GIB:.1f} GiB are free"
    )
    if needs.memory > free_memory:
        raise ExportError(f"{what}: {line}. Close other programs, take a larger machine, or try --no-check")
    if needs.disk > disk:
        raise ExportError(f"{what}: {line} at {target.parent}. Make room, or choose another --out or --precision")
    return line


def _tensors(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in the folder's safetensors files, from their headers."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER, path.stat().st_size):
                raise ExportError(f"{path}: says that its header has {length} bytes; the file is damaged")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise ExportError(f"{path}: its header is not JSON ({error}); the file is damaged") from error
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, tuple(int(d) for d in entry["shape"])
