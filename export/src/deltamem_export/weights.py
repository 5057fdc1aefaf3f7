"""What the weights of a built graph stand for, and that put into the PyTorch model, so that a comparison of the two
covers arithmetic alone and a mistake in the graph cannot hide behind the rounding of weights. fp32: the files' own;
fp16 and bf16: the files' rounded to 16 bits, and RoPE's tables and the numbers that a family multiplies with too;
int8 and int4: what the graph's blocks stand for, zero points, padded blocks and quantised embeddings included. It knows
nothing of tolerances.

Which parameter a quantised weight was made of is written on its node by `streaming.py` (`SOURCE`), from the memory
that the builder read; a graph without these notes is read by the names of its nodes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from deltamem_export.errors import ExportError
from deltamem_export.external import shape_of
from deltamem_export.precision import Precision

# On a node with a quantised weight, as JSON: [[name of a parameter, first row, row behind the last], ...], whose
# rows under each other are the weight.
SOURCE = "deltamem.source"
QUANTISED_OPS = frozenset({"MatMulNBits", "GatherBlockQuantized"})

Float32 = npt.NDArray[np.float32]
# How far blocks may be from the weights that they were made of, as root mean squares. In blocks of 256, rounding takes
# 0.11 (4 bits) and 0.007 (8 bits) of normally distributed weights, 0.25 and 0.017 of ones with heavy tails (Student's t,
# 3 degrees); another weight is off by 1.4.
FAR = {"int4": 0.4, "int8": 0.04}
# Norms that multiply by 1 + w, which is what the graph has rounded.
_ONE_MORE = re.compile(r"GemmaRMSNorm|NemotronLayerNorm1P")
# Norms that the builder leaves in float32, weights and all.
_WIDE = re.compile(r"Gemma[23]RMSNorm")
# Numbers that a decoder multiplies with or clips at, on a module or in its configuration.
_NUMBERS = ("embed_scale", "embedding_multiplier", "residual_multiplier", "clip_qkv", "logits_scaling")
_DIVIDED_BY = ("logits_scaling",)  # which the graph has as a factor
_SIXTEEN = {"fp16": torch.float16, "bf16": torch.bfloat16}


@contextlib.contextmanager
def weights_of(
    graph: Path,
    model: nn.Module,
    precision: Precision,
    within: Sequence[nn.Module] | None = None,
    far: bool = False,
) -> Iterator[None]:
    """While it lasts, the float32 model computes with what the graph's weights stand for; where `within` is given, only
    those of its modules do. `far`: blocks may be of other weights than the model's.

    Raises:
        ExportError: a quantised weight of the graph belongs to no parameter of the model, does not fit it, or is further
            from it than rounding to its bits explains.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    hooks = []
    numbers: list[tuple[Any, str, Any]] = []
    own = None if within is None else {id(module) for top in within for module in top.modules()}

    def put(module: nn.Module, name: str, value: torch.Tensor) -> None:
        kept.append((module, name, module.get_parameter(name)))
        setattr(module, name, nn.Parameter(value, requires_grad=False))

    try:
        if precision.arithmetic in _SIXTEEN:
            kind = _SIXTEEN[precision.arithmetic]
            for module in model.modules():
                if own is None or id(module) in own:
                    for name, parameter in list(module.named_parameters(recurse=False)):
                        norm = type(module).__name__
                        if _WIDE.fullmatch(norm):
                            continue
                        one = 1.0 if _ONE_MORE.fullmatch(norm) and name == "weight" else 0.0
                        put(module, name, (parameter + one).to(kind).float() - one)
                for holder in (module, getattr(module, "config", None)):
                    for name in _NUMBERS:
                        value = getattr(holder, name, None)
                        if isinstance(value, float | torch.Tensor) and not any(
                            holder is other and name == taken for other, taken, _ in numbers
                        ):
                            numbers.append((holder, name, value))
                            setattr(holder, name, _round_number(value, kind, inverse=name in _DIVIDED_BY))
                if type(module).__name__.endswith("RotaryEmbedding"):
                    hooks.append(module.register_forward_hook(lambda _m, _i, out: _rounded(out, kind)))
        if precision.quantised:

            def wanted(node: str, source: str | None) -> bool:
                return own is None or any(id(module) in own for module, *_ in _rows(model, node, source))

            for node, source, weight in stands_for(graph, wanted):
                rows = _rows(model, node, source)
                if sum(end - start for _, _, start, end in rows) != len(weight):
                    raise ExportError(f"{node}: the weight has {len(weight)} rows, which its parameters do not have")
                for (module, name, start, end), part in zip(
                    rows, torch.split(weight, [end - start for _, _, start, end in rows]), strict=True
                ):
                    parameter = module.get_parameter(name)
                    if tuple(parameter.shape[1:]) != tuple(part.shape[1:]):
                        raise ExportError(
                            f"{node}: the weight is {list(part.shape)}, the parameter {name} {list(parameter.shape)}"
                        )
                    if not far:
                        _near(node, name, part, parameter[start:end], FAR[precision.name])
                    if (start, end) != (0, len(parameter)):  # one of several in a packed parameter
                        whole = parameter.detach().clone()
                        whole[start:end] = part
                        part = whole
                    put(module, name, part)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for holder, name, value in numbers:
            setattr(holder, name, value)
        for module, name, parameter in reversed(kept):
            setattr(module, name, parameter)


def distances(graph: Path, model: nn.Module) -> Iterator[tuple[str, float]]:
    """For each parameter that the graph has in blocks: its name, and how far the blocks are from it, as a share of its
    root mean square."""
    names = {id(module): name for name, module in model.named_modules()}
    for node, source, weight in stands_for(graph):
        rows = _rows(model, node, source)
        for (module, name, start, end), part in zip(
            rows, torch.split(weight, [e - s for *_, s, e in rows]), strict=True
        ):
            expected = module.get_parameter(name)[start:end].float()
            size, off = (float(t.pow(2).mean().sqrt()) for t in (expected, part - expected))
            yield f"{names[id(module)]}.{name}", off / max(size, 1e-9)


def _near(node: str, name: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    size, off = (float(t.float().pow(2).mean().sqrt()) for t in (expected, found - expected))
    if not off <= limit * size + 1e-9:
        raise ExportError(
            f"{node}: the blocks are off by {off:.3g} (root mean square) from {name}, whose weights are of size {size:.3g}; "
            f"rounding explains {limit * size:.3g} at most, so they are not of this weight"
        )


def _widened(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    """A bfloat16 constant as float32, made when it is written."""
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape_of(tensor)),
        name=name,
    )


def _round_number(value: Any, kind: torch.dtype, inverse: bool) -> Any:
    """A number that the graph has as a constant of its own type, as it is or one divided by it."""
    if inverse:
        return 1.0 / float(torch.as_tensor(1.0 / value).to(kind))
    rounded = torch.as_tensor(value).to(kind).to(torch.float32)
    return rounded if isinstance(value, torch.Tensor) else float(rounded)


def _rounded(tables: Any, kind: torch.dtype) -> Any:
    """RoPE's cosines and sines as a decoder of that type has them."""
    return tuple(t.to(kind).to(t.dtype) for t in tables) if isinstance(tables, tuple) else tables


def stands_for(
    graph: Path, wanted: Callable[[str, str | None], bool] = lambda _node, _source: True
) -> Iterator[tuple[str, str | None, torch.Tensor]]:
    """For each quantised weight of a graph that is wanted, one at a time: its node's name, the note `SOURCE` if there is
    one, and what the blocks stand for, float32: [out, in] of a product, [vocab, hidden] of embeddings.

    Raises:
        ExportError: blocks of a form that is not known.
    """
    for node in ir.load(graph).graph:
        name, source = str(node.name), node.metadata_props.get(SOURCE)
        if node.op_type in QUANTISED_OPS and wanted(name, source):
            values = _product(node) if node.op_type == "MatMulNBits" else _embeddings(node)
            yield name, source, torch.from_numpy(values)


def in_float32(graph: Path, folder: Path | None = None) -> Path:
    """The same graph beside it, or in `folder`, with bfloat16 widened to float32 everywhere, for processors without
    bfloat16: the same structure on the same (rounded) weights, in other arithmetic. Its weights take a file of their own."""
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == narrow:
            value.const_value = _widened(tensor, str(value.name))
            value.type = ir.TensorType(wide)
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.dtype == narrow:
            value.type = ir.TensorType(wide)
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if name == "to" and attribute.as_int() == narrow.value:
                node.attributes[name] = ir.AttrInt64(name, wide.value)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))
    path = (folder or graph.parent) / "check.onnx"
    ir.save(model, path, external_data="check.onnx.data", size_threshold_bytes=1024)
    return path


# ---------------------------------------------------------------------- blocks


def _product(node: ir.Node) -> Float32:
    """MatMulNBits: blocks along K of every output, the last one padded. [N, K]"""
    bits, k, n, block = (node.attributes[a].as_int() for a in ("bits", "K", "N", "block_size"))
    if bits not in (4, 8) or node.attributes.get("weight_prepacked") is not None:
        raise ExportError(f"{node.name}: {bits} bits in a layout that is not checked; expected plain blocks of 4 or 8")
    blocks = -(-k // block)
    levels = _levels(_array(node, 1), bits, n * blocks, block).reshape(n, blocks, block)
    scales = _array(node, 2).astype(np.float32).reshape(n, blocks, 1)
    zero: Any = np.float32(1 << (bits - 1))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        points = _array(node, 3)
        if np.issubdtype(points.dtype, np.floating) or points.dtype == ml_dtypes.bfloat16:
            zero = points.astype(np.float32).reshape(n, blocks, 1)
        else:  # packed: a row of an odd number of blocks ends in half a byte of padding
            per_row = points.size // n * 8 // bits
            zero = _levels(points, bits, n, per_row)[:, :blocks].reshape(n, blocks, 1)
    return np.ascontiguousarray(((levels - zero) * scales).reshape(n, -1)[:, :k])


def _embeddings(node: ir.Node) -> Float32:
    """GatherBlockQuantized with blocks along the last axis of a [vocab, hidden] table."""
    axis, block = (node.attributes[a].as_int() for a in ("quantize_axis", "block_size"))
    data = node.inputs[0]
    if axis not in (1, -1) or data is None or data.const_value is None:
        raise ExportError(f"{node.name}: quantised along axis {axis} of a computed table, which is not checked")
    kind = data.const_value.dtype
    if kind not in (ir.DataType.INT4, ir.DataType.UINT4):
        raise ExportError(f"{node.name}: embeddings of type {kind}, expected INT4 or UINT4")
    levels = _array(node, 0).astype(np.float32)  # [vocab, hidden]
    hidden = levels.shape[1]
    scales = _array(node, 2).astype(np.float32)  # [vocab, blocks]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zeros = _array(node, 3).astype(np.float32)
    else:
        zeros = np.full_like(scales, 8.0 if kind == ir.DataType.UINT4 else 0.0)
    return np.ascontiguousarray(
        (levels - zeros.repeat(block, axis=1)[:, :hidden]) * scales.repeat(block, axis=1)[:, :hidden]
    )


def _levels(packed: npt.NDArray[Any], bits: int, rows: int, width: int) -> Float32:
    """[rows, width] unsigned levels; of two in a byte the first is the lower half."""
    flat = packed.reshape(rows, -1).view(np.uint8)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(rows, -1)
    return flat[:, :width].astype(np.float32)


def _array(node: ir.Node, at: int) -> npt.NDArray[Any]:
    value = node.inputs[at]
    if value is None or value.const_value is None:
        raise ExportError(f"{node.name}: input {at} of a quantised product is no constant")
    return value.const_value.numpy()


# ---------------------------------------------------------------------- whose weights they are


def _rows(model: nn.Module, node: str, source: str | None) -> list[tuple[nn.Module, str, int, int]]:
    """The parameters, and which rows of each, that a node's weight is made of, in order."""
    if source is not None:
        found = []
        for name, start, end in json.loads(source):
            path, _, own = str(name).rpartition(".")
            found.append((model.get_submodule(path), own, int(start), int(end)))
        return found
    return [(module, "weight", 0, len(module.get_parameter("weight"))) for module in _by_name(model, node)]


def _by_name(model: nn.Module, node: str) -> list[nn.Module]:
    """/model/layers.0/attn/qkv_proj/MatMul_Q4 → q_proj, k_proj and v_proj of that layer."""
    path = node.strip("/").rsplit("/", 1)[0].replace("/", ".").replace(".attn.", ".self_attn.")
    try:
        if path.endswith(".qkv_proj"):
            return [model.get_submodule(path.replace("qkv_proj", f"{p}_proj")) for p in "qkv"]
        return [model.get_submodule(path)]
    except AttributeError:
        raise ExportError(f"the built graph has {node}, for which {type(model).__name__} has no module") from None
