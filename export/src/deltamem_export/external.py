"""Weights of an ONNX graph in one file beside it: written a slab at a time, and shared by the graphs that have the same
weights. It knows nothing of what the weights mean.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from blake3 import blake3

# Smaller weights stay in the graph's own file: ONNX Runtime reads shapes and other constants there.
INLINE_BYTES = 1024
# Larger ones begin at a page, as memory mapping likes it; the others at a line of the processor's cache.
_PAGED_BYTES = 1 << 16
_PAGE, _LINE = 4096, 64
_PIECE = 1 << 24


class DataFile:
    """A weights' file open for writing at its end. Every weight written becomes a reference into it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file

    @classmethod
    @contextlib.contextmanager
    def append(cls, path: Path) -> Iterator[DataFile]:
        """Opens `path` at its end; it is made if it is not there."""
        with path.open("ab") as file:
            yield cls(path, file)

    def write(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Iterable[int],
        parts: Iterable[npt.NDArray[Any]],
    ) -> ir.ExternalTensor:
        """Writes a weight from its parts, in the order that they come, and returns the reference to it.

        Raises:
            ValueError: the parts have not the bytes that dtype and shape ask for.
        """
        dims = list(shape)
        length = math.ceil(math.prod(dims) * dtype.itemsize)
        step = _PAGE if length >= _PAGED_BYTES else _LINE
        offset = -(-self._file.tell() // step) * step
        self._file.write(b"\0" * (offset - self._file.tell()))
        for part in parts:
            self._file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        written = self._file.tell() - offset
        if written != length:
            raise ValueError(f"{name}: {written} bytes were written, {dtype} {dims} takes {length}")
        return ir.ExternalTensor(
            self._path.name, offset, length, dtype, shape=ir.Shape(dims), name=name, base_dir=str(self._path.parent)
        )


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such.

    Raises:
        OSError: neither can be made.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def save_sharing(model: ir.Model, target: Path, weights: Path) -> None:
    """Saves a graph made from one whose weights lie in the file `weights`: that file becomes `<target>.data` without
    being copied (a second name for it, where the file system has such), and what is new is appended to it. References
    of other graphs into the file stay right.

    Raises:
        OSError: the files cannot be written.
    """
    data = target.with_name(f"{target.name}.data")
    link(weights, data)
    with DataFile.append(data) as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if isinstance(tensor, ir.ExternalTensor):
                if not os.path.samefile(tensor.path, weights):
                    raise ValueError(f"{value.name} lies in {tensor.path}, expected {weights}")
                value.const_value = ir.ExternalTensor(
                    data.name,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=ir.Shape(shape_of(tensor)),
                    name=str(value.name),
                    base_dir=str(data.parent),
                )
            elif tensor.nbytes >= INLINE_BYTES:
                raw = np.frombuffer(tensor.tobytes(), np.uint8)
                value.const_value = file.write(str(value.name), tensor.dtype, shape_of(tensor), [raw])
    ir.save(model, target)


@dataclass(frozen=True)
class Shared:
    """What came of `share_weights`: the files that the graphs read beside their own, the bytes that they read there, and the
    bytes of their own file."""

    files: frozenset[str]
    bytes: int
    own: int


def share_weights(graphs: Sequence[Path], data: Path, others: Sequence[Path]) -> Shared:
    """Makes graphs that have their weights in `data` read from the files of other graphs in the same directory what stands there bit for
    bit, of whatever type and shape; `data` keeps the rest, and is gone where nothing is left.

    Args:
        graphs: files of graphs; all of them read `data` alone.
        data: their weights.
        others: files of graphs whose weights may be read instead.

    Raises:
        OSError: the files cannot be written.
    """
    known: dict[tuple[int, str], tuple[str, int]] = {}
    for other in others:
        for tensor in _outside(ir.load(other)):
            known.setdefault(_content(tensor), (str(tensor.location), int(tensor.offset or 0)))
    models = [ir.load(graph) for graph in graphs]
    places: dict[int, tuple[str, int]] = {}
    rest = data.with_name(f"{data.name}.rest")
    taken, files = 0, set()
    with DataFile.append(rest) as file:
        for model in models:
            for tensor in _outside(model):
                offset = int(tensor.offset or 0)
                if offset in places:
                    continue
                place = known.get(_content(tensor))
                if place is None:
                    new = file.write(str(tensor.name), tensor.dtype, shape_of(tensor), _pieces(tensor))
                    place = (data.name, int(new.offset or 0))
                else:
                    taken += int(tensor.length or 0)
                    files.add(place[0])
                places[offset] = place
    for graph, model in zip(graphs, models, strict=True):
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                location, offset = places[int(tensor.offset or 0)]
                value.const_value = ir.ExternalTensor(
                    location,
                    offset,
                    tensor.length,
                    tensor.dtype,
                    shape=ir.Shape(shape_of(tensor)),
                    name=str(value.name),
                    base_dir=str(graph.parent),
                )
        graph.unlink()  # it may be a second name of a file elsewhere
        ir.save(model, graph)
    own = rest.stat().st_size
    data.unlink()
    if own:
        rest.rename(data)
    else:
        rest.unlink()
    return Shared(frozenset(files), taken, own)


def _outside(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


def _content(tensor: ir.ExternalTensor) -> tuple[int, str]:
    """Length and BLAKE3 of a weight's bytes."""
    hasher = blake3()
    for piece in _pieces(tensor):
        hasher.update(piece.data)
    return int(tensor.length or 0), str(hasher.hexdigest())


def _pieces(tensor: ir.ExternalTensor) -> Iterator[npt.NDArray[np.uint8]]:
    """A weight's bytes as they lie on disk, some at a time."""
    left = int(tensor.length or 0)
    with Path(tensor.path).open("rb") as file:
        file.seek(int(tensor.offset or 0))
        while left and (piece := file.read(min(left, _PIECE))):
            left -= len(piece)
            yield np.frombuffer(piece, np.uint8)


def shape_of(tensor: ir.TensorProtocol) -> list[int]:
    """A constant's shape, all of it known."""
    return [d for d in tensor.shape if isinstance(d, int)]
