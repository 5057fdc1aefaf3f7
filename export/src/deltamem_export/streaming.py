"""From a built decoder in memory to its files with no second copy of the weights: what the builder would gather into
one large message is quantised, converted and written a slab at a time, so that memory goes with the largest slab
and not with the model. The blocks are made by ONNX Runtime's own quantiser, given slabs of a weight's outputs; blocks lie
along the inputs, so any cut gives the same bytes. It knows nothing of memories.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import (  # type: ignore[import-untyped]
    DefaultWeightOnlyQuantizer,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
)
from torch import nn

from deltamem_export.errors import ExportError
from deltamem_export.external import INLINE_BYTES, DataFile
from deltamem_export.weights import SOURCE

SLAB_BYTES = 1 << 26

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
_LAYER = re.compile(r"layers\.(\d+)\.")


class Joined:
    """Weights under each other, [N, K] (or [K, N] once transposed), put together only where they are written."""

    def __init__(self, parts: Sequence[torch.Tensor], transposed: bool = False) -> None:
        self.parts = tuple(parts)
        self.transposed = transposed
        rows, columns = sum(len(p) for p in self.parts), int(self.parts[0].shape[1])
        self.shape = torch.Size((columns, rows) if transposed else (rows, columns))

    @property
    def T(self) -> Joined:
        return Joined(self.parts, not self.transposed)

    def joined(self) -> torch.Tensor:
        whole = torch.cat(self.parts)
        return whole.T if self.transposed else whole


class _Packed:
    """What the builder takes for a packed projection: something with a weight."""

    def __init__(self, *matmuls: Any) -> None:
        self.weight = Joined([m.weight for m in matmuls])


def streamed(model_class: type[Any]) -> type[Any]:
    """The builder's class, which then remembers what each weight was made of, and joins packed ones when they are written."""

    class Streamed(model_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.sources: dict[str, torch.Tensor | Joined] = {}
            super().__init__(*args, **kwargs)

        def make_packed_matmul_float_class(self, q_matmul: Any, k_matmul: Any, v_matmul: Any, **_: Any) -> Any:
            return _Packed(q_matmul, k_matmul, v_matmul)

        def make_initializer(self, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False) -> None:
            if isinstance(tensor, torch.Tensor | Joined) and to in _TORCH and not raw and len(tensor.shape) == 2:
                self.sources[name] = tensor
            if isinstance(tensor, Joined):
                value = self.make_value(name, to, ir.Shape(list(tensor.shape)))
                value.const_value = ir.LazyTensor(
                    lambda: ir.tensor(tensor.joined().to(_TORCH[to]), name=name),
                    dtype=to,
                    shape=ir.Shape(list(tensor.shape)),
                    name=name,
                )
                self.model.graph.register_initializer(value)
            else:
                super().make_initializer(tensor, name, to=to, raw=raw)

    return Streamed


def save_streaming(made: Any, model: nn.Module, target: Path, say: Callable[[str], None]) -> None:
    """Writes a built decoder to `target`, its weights to `<target>.data`, quantised if it was built so.

    Args:
        made: an instance of a `streamed` class after `make_model`.
        model: the PyTorch model that it read.
        target: the graph's file.
        say: gets a line for every eighth of the layers.

    Raises:
        ExportError: a weight that was to be quantised cannot be.
        OSError: the files cannot be written.
    """
    data = target.with_name(f"{target.name}.data")
    data.unlink(missing_ok=True)
    graph = made.model.graph
    graph.sort()
    progress = _Progress(say, int(made.num_layers))
    owners = _Owners(model)
    quantise = made.onnx_dtype in (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8)
    with DataFile.append(data) as file:
        for node in list(graph) if quantise else []:
            if str(node.name) in made.quant_attrs["nodes_to_exclude"]:
                continue
            if node.op_type not in made.quant_attrs["op_types_to_quantize"]:
                continue
            name = _weight_name(node)
            if name not in made.sources:
                continue
            progress.reached(name)
            source = made.sources.pop(name)
            new = (_quantise_gather if node.op_type == "Gather" else _quantise_product)(made, node, source, file)
            owner = owners.of(source, embedding=node.op_type == "Gather")
            if owner is not None:
                new.metadata_props[SOURCE] = json.dumps(owner)
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < INLINE_BYTES:
                continue
            progress.reached(name)
            if name in made.sources:
                dims = [int(d) for d in tensor.shape]
                parts = _converted(made.sources.pop(name), _TORCH[tensor.dtype])
            else:
                dims, parts = [int(d) for d in tensor.shape], iter([np.frombuffer(tensor.tobytes(), np.uint8)])
            value.const_value = file.write(name, tensor.dtype, dims, parts)
    ir.save(made.model, target)


# ---------------------------------------------------------------------- floats


def _converted(source: torch.Tensor | Joined, dtype: torch.dtype) -> Iterator[npt.NDArray[np.uint8]]:
    """A weight's bytes in another type, some rows at a time."""
    rows = max(1, SLAB_BYTES // max(1, int(source.shape[1]) * dtype.itemsize))
    for start in range(0, int(source.shape[0]), rows):
        part = _slice(source, start, start + rows).to(dtype).contiguous()
        yield part.view(-1).view(torch.uint8).numpy()


def _slice(source: torch.Tensor | Joined, start: int, end: int) -> torch.Tensor:
    """Rows of a weight, [end - start, columns]."""
    if isinstance(source, torch.Tensor):
        return source.detach()[start:end]
    if source.transposed:
        return torch.cat([part.detach().T[start:end] for part in source.parts], dim=1)
    found, at = [], 0
    for part in source.parts:
        found.append(part.detach()[max(0, start - at) : max(0, end - at)])
        at += len(part)
    return torch.cat(found)


# ---------------------------------------------------------------------- blocks


def _quantise_product(made: Any, node: ir.Node, source: torch.Tensor | Joined, file: DataFile) -> ir.Node:
    """Puts MatMulNBits in the place of a MatMul with the constant weight `source`, [K, N]."""
    weight = source.T  # [N, K], as the parameters lie
    outputs, inputs = int(weight.shape[0]), int(weight.shape[1])
    bits = made.int4_customized_weight_config.get(node.name, {}).get("bits", made.quant_attrs["bits"])
    blocks = -(-inputs // made.quant_attrs["matmul_block_size"])
    zero_points = not made.quant_attrs["is_symmetric"] or made.quantization_algo == "k_quant"
    if bits == 4 and blocks % 2 and zero_points and made.quantization_algo != "default":
        raise ExportError(
            f"{node.name}: {inputs} inputs are {blocks} blocks, and ONNX Runtime's {made.quantization_algo} stores zero "
            "points for an even number only; choose another block size or the algorithm default"
        )
    rows = max(1, SLAB_BYTES // (4 * inputs))
    rest: list[list[npt.NDArray[Any]]] = []
    attributes: dict[str, Any] = {}

    def slab(start: int) -> npt.NDArray[np.uint8]:
        found, arrays = _blocks(made, _slice(weight, start, start + rows).float().T.numpy(), bits)
        attributes.update(found)
        rest.append([a.reshape(-1) for a in arrays[1:]])
        return arrays[0]

    first = slab(0)
    name = _weight_name(node)
    shape = [outputs, *first.shape[1:]]
    tensors = [
        file.write(
            f"{name}_Q{bits}",
            ir.DataType.UINT8,
            shape,
            (first if start == 0 else slab(start) for start in range(0, outputs, rows)),
        )
    ]
    scales = np.concatenate([found[0] for found in rest]).reshape(outputs, -1)
    tensors.append(_scales(made, f"{name}_scales", scales, file))
    if len(rest[0]) > 1:
        zeros = np.concatenate([found[1] for found in rest]).reshape(outputs, -1)
        tensors.append(file.write(f"{name}_zero_points", ir.DataType.UINT8, zeros.shape, [zeros]))
    attributes |= {"K": inputs, "N": outputs}
    return _replace(made, node, "MatMulNBits", f"{node.name}_Q{bits}", [node.inputs[0], *tensors], attributes)


def _blocks(made: Any, weight: npt.NDArray[np.float32], bits: int) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """The attributes of MatMulNBits and its packed levels [N, blocks, bytes], scales and perhaps zero points, as ONNX
    Runtime's quantiser makes them of one weight, [K, N]."""
    # As a message and not as a graph of objects: those refer to each other in circles, and slabs would pile up.
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", width])
        for name, width in zip("xy", weight.shape, strict=True)
    ]
    constant = onnx.numpy_helper.from_array(np.ascontiguousarray(weight), "w")
    graph = onnx.helper.make_graph([product], "one", ends[:1], ends[1:], [constant])
    algorithm = {"default": None, "rtn": RTNWeightOnlyQuantConfig, "k_quant": KQuantWeightOnlyQuantConfig}[
        made.quantization_algo
    ]
    quantiser = MatMulNBitsQuantizer(
        model=onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)]),
        bits=bits,
        block_size=made.quant_attrs["matmul_block_size"],
        is_symmetric=made.quant_attrs["is_symmetric"],
        accuracy_level=made.quant_attrs["accuracy_level"],
        op_types_to_quantize=("MatMul",),
        algo_config=algorithm(customized_weight_config={"product": {"bits": bits}}) if algorithm else None,
    )
    with _quiet():
        quantiser.process()
    result = quantiser.model.model.graph
    node = result.node[0]
    if node.op_type != "MatMulNBits":
        raise ExportError(f"ONNX Runtime's quantiser left a weight of {list(weight.shape)} as it is")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in result.initializer}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return attributes, [found[name] for name in node.input[1:] if name]


def _quantise_gather(made: Any, node: ir.Node, source: torch.Tensor | Joined, file: DataFile) -> ir.Node:
    """Puts GatherBlockQuantized in the place of a Gather from the constant table `source`, [vocab, hidden]."""
    block, symmetric = made.quant_attrs["matmul_block_size"], made.quant_attrs["is_symmetric"]
    vocab, hidden = (int(d) for d in source.shape)
    blocks = -(-hidden // block)
    # Whole bytes to a slab, whatever the width: two rows at least.
    rows = max(2, SLAB_BYTES // (4 * hidden) // 2 * 2)
    rest: list[tuple[npt.NDArray[Any], npt.NDArray[Any] | None]] = []

    def slabs() -> Iterator[npt.NDArray[np.uint8]]:
        for start in range(0, vocab, rows):
            table = _slice(source, start, start + rows).float().numpy()
            packed, scales, zeros = DefaultWeightOnlyQuantizer.quantize_ndarray(table, 1, block, symmetric)
            rest.append((scales, zeros))
            yield packed

    name = _weight_name(node)
    kind = ir.DataType.INT4 if symmetric else ir.DataType.UINT4
    tensors = [file.write(f"{name}_Q4", kind, [vocab, hidden], slabs())]
    scales = np.concatenate([found[0] for found in rest])
    tensors.append(_scales(made, f"{name}_scales", scales.reshape(vocab, blocks), file))
    if not symmetric:
        zeros = [found[1] for found in rest if found[1] is not None]
        tensors.append(file.write(f"{name}_zero_points", kind, [vocab, blocks], zeros))
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block}
    data, *others = tensors
    return _replace(made, node, "GatherBlockQuantized", f"{node.name}_Q4", [data, node.inputs[1], *others], attributes)


def _scales(made: Any, name: str, scales: npt.NDArray[np.float32], file: DataFile) -> ir.ExternalTensor:
    """Scales in the type of the activations that they meet."""
    values = torch.from_numpy(np.ascontiguousarray(scales)).to(_TORCH[made.io_dtype])
    raw = values.view(torch.uint8).numpy()
    return file.write(name, made.io_dtype, scales.shape, [raw])


def _replace(
    made: Any, node: ir.Node, op: str, name: str, inputs: Sequence[Any], attributes: dict[str, Any]
) -> ir.Node:
    """Puts a new node in the place of one, under the same output; tensors among the inputs become initialisers."""
    graph = made.model.graph
    values = []
    for given in inputs:
        if isinstance(given, ir.ExternalTensor):
            value = ir.Value(name=given.name, shape=given.shape, type=ir.TensorType(given.dtype), const_value=given)
            graph.register_initializer(value)
            given = value
        values.append(given)
    new = ir.node(op, values, attributes=attributes, domain="com.microsoft", name=name)
    old = next(v for v in node.inputs if v is not None and v.const_value is not None)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
    if not old.uses():
        del graph.initializers[old.name]
    graph.opset_imports.setdefault("com.microsoft", 1)
    return new


def _weight_name(node: ir.Node) -> str:
    at = 0 if node.op_type == "Gather" else 1
    value = node.inputs[at] if len(node.inputs) > at else None
    return str(value.name) if value is not None else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantisers' progress bars and several lines for each weight."""
    loggers = [logging.getLogger(n) for n in ("neural_compressor", "onnxruntime.quantization.matmul_nbits_quantizer")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


# ---------------------------------------------------------------------- whose weights they are, and how far


class _Owners:
    """Finds the parameters, and the rows of them, that a weight is a view of, by where it lies in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._found: list[tuple[int, int, int, bool, str]] = []  # first byte, bytes a row, rows, embedding, name
        for path, module in model.named_modules(remove_duplicate=False):
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                if p.ndim == 2 and p.is_contiguous():
                    full = f"{path}.{name}" if path else name
                    row = p.shape[1] * p.itemsize
                    self._found.append((p.data_ptr(), row, len(p), isinstance(module, nn.Embedding), full))

    def of(self, source: torch.Tensor | Joined, embedding: bool) -> list[list[str | int]] | None:
        """[[name, first row, row behind the last], ...], or None where the weight is no view of parameters."""
        if isinstance(source, torch.Tensor):
            parts: Sequence[torch.Tensor] = [source if embedding else source.T]
        else:
            parts = source.parts
        rows: list[list[str | int]] = []
        for part in parts:
            row, address = part.shape[1] * part.itemsize, part.data_ptr()
            for first, width, count, kind, name in self._found:
                start, odd = divmod(address - first, width)
                if width == row and 0 <= start < count and not odd and part.is_contiguous() and kind == embedding:
                    rows.append([name, start, start + len(part)])
                    break
            else:
                return None
        return rows


class _Progress:
    """A line for every eighth of the layers, as their first weights are written."""

    def __init__(self, say: Callable[[str], None], layers: int) -> None:
        self._say, self._layers = say, layers
        self._step = max(1, -(-layers // 8))
        self._said = -1

    def reached(self, weight: str) -> None:
        found = _LAYER.search(weight)
        if found is None or not self._said < int(found[1]) < self._layers:
            return
        layer = int(found[1])
        if layer // self._step > self._said // self._step or self._said < 0:
            self._say(f"writing layer {layer + 1} of {self._layers}")
            self._said = layer
