"""Where a decoder ONNX that the user brings has its projections: read from a small mapping of names, or found by the weights,
which are the backbone's own. It changes nothing but the names of inputs and outputs, and knows nothing of memories.

A mapping is JSON; every part of it may be missing, and what is missing is found:

    {"layers": {"0": {"hidden": "value", "q": "value", "k": "value", "v": "value", "o": "value"}},
     "names": {"the graph's name of an input or output": "the name that docs/bundle.md gives it"}}

A value is named as the graph names it: `hidden` is what the projections of the attention multiply, `q`, `k`, `v` and `o` are
their products. Of a packed projection {"value": "value", "start": 64} says where the part begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import ShapeInferencePass
from torch import nn

from deltamem_export.adapter import DELTA_HEADS
from deltamem_export.decoder import Projection, attentions, projections
from deltamem_export.errors import ExportError, first_line
from deltamem_export.nodes import name_of
from deltamem_export.structure import Attention, FindAttentions, Site

_Product = tuple[ir.Node, npt.NDArray[Any]]
# From here on reductions take their axes as an input.
MIN_OPSET = 18
_THROUGH = frozenset({"Transpose", "Cast", "Identity"})


@dataclass(frozen=True)
class GraphMapping:
    """What a mapping file says.

    Attributes:
        layers: layer → "hidden", "q", "k", "v" or "o" → (value's name, where the part begins or None).
        names: the graph's name of an input or output → ours.
    """

    layers: Mapping[int, Mapping[str, tuple[str, int | None]]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GraphMapping:
        """Reads a mapping file.

        Raises:
            FileNotFoundError: no such file.
            ExportError: not JSON, or something else than this module describes; names the place.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ExportError(f"{path}: not JSON ({error})") from error
        if not isinstance(data, dict) or not data.keys() <= {"layers", "names"}:
            raise ExportError(f'{path}: expected an object with "layers" and "names" and nothing else')
        layers, names = data.get("layers", {}), data.get("names", {})
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ExportError(f"{path}: names: expected strings to strings")
        if not isinstance(layers, dict):
            raise ExportError(f"{path}: layers: expected an object with layer numbers as keys")
        found = {}
        for key, values in layers.items():
            if (
                not str(key).isdecimal()
                or not isinstance(values, dict)
                or not values.keys() <= {"hidden", *DELTA_HEADS}
            ):
                raise ExportError(
                    f"{path}: layers: {key}: expected a layer number with hidden, q, k, v, o and nothing else"
                )
            found[int(key)] = {part: _place(path, key, part, value) for part, value in values.items()}
        return cls(found, names)

    def to_json(self) -> str:
        """The file's text."""
        layers = {
            str(i): {
                part: name if start is None else {"value": name, "start": start}
                for part, (name, start) in parts.items()
            }
            for i, parts in self.layers.items()
        }
        return json.dumps({"layers": layers, "names": dict(self.names)}, indent=2)


def bring(onnx: Path, work: Path, model: nn.Module, mapping: GraphMapping) -> tuple[Path, FindAttentions]:
    """Takes a decoder in.

    Args:
        onnx: the user's graph, with or without external weights. Inputs `input_ids`, `attention_mask`, perhaps
            `position_ids`, and `past_key_values.{i}.key` and `.value` [batch, kv heads, past, head dim]; outputs `logits` and
            `present.{i}.key` and `.value`. Other names go into the mapping.
        work: an existing directory for a copy of it.
        model: the backbone that the graph was exported from.
        mapping: what the user says of it.

    Returns:
        The copy, its inputs and outputs named as ours, and what finds the attention of its layers.

    Raises:
        ExportError: the graph cannot be read, or its inputs and outputs are not those.
    """
    if not onnx.is_file():
        raise FileNotFoundError(f"{onnx}: no such file")
    try:
        made = ShapeInferencePass()(ir.load(onnx)).model
    except (OSError, ValueError, RuntimeError, DecodeError) as error:
        raise ExportError(f"{onnx}: cannot be read as ONNX ({first_line(error)})") from error
    graph = made.graph
    opset = graph.opset_imports.get("", 1)
    if opset < MIN_OPSET:
        raise ExportError(
            f"{onnx}: is of opset {opset}, the memory's nodes need {MIN_OPSET}; export it with opset_version={MIN_OPSET} or later, or "
            "convert it with onnx.version_converter"
        )
    graph.opset_imports.setdefault("com.microsoft", 1)
    _rename(graph, mapping.names)
    _check_ends(onnx, graph)
    copy = work / "brought.onnx"
    ir.save(made, copy, external_data=f"{copy.name}.data", size_threshold_bytes=1024)
    own = {i: projections(attention) for i, attention in enumerate(attentions(model)) if attention is not None}

    def find(graph: ir.Graph, layers: Sequence[int]) -> dict[int, Attention]:
        return _find_by_weights(graph, {i: own[i] for i in layers}, mapping)

    return copy, find


def _rename(graph: ir.Graph, names: Mapping[str, str]) -> None:
    ends = {name_of(value): value for value in (*graph.inputs, *graph.outputs)}
    for theirs, ours in names.items():
        if theirs not in ends:
            raise ExportError(f"mapping: names: the graph has no input or output {theirs!r}; it has {', '.join(ends)}")
        ends[theirs].name = ours


def _check_ends(onnx: Path, graph: ir.Graph) -> None:
    """What a decoder must take and give. A past that its present does not follow, or a switch between two ways through the
    graph, is not one."""
    inputs, outputs = ([name_of(value) for value in values] for values in (graph.inputs, graph.outputs))
    pasts = [name for name in inputs if name.startswith("past_key_values.")]
    presents = [name.replace("past_key_values.", "present.") for name in pasts]
    for kind, found, needed, allowed in (
        ("input", inputs, ["input_ids", "attention_mask"], ["position_ids", *pasts]),
        ("output", outputs, ["logits", *presents], []),
    ):
        missing = [name for name in needed if name not in found]
        strange = [name for name in found if name not in (*needed, *allowed)]
        if missing or strange or not pasts:
            raise ExportError(
                f"{onnx}: {kind}s {', '.join(found)}: "
                + "; ".join(
                    [
                        *([f"missing {', '.join(missing)}"] if missing else []),
                        *([f"not known {', '.join(strange)}"] if strange else []),
                        *([] if pasts else ["no past_key_values.{i}.key, so it has no KV cache"]),
                    ]
                )
                + '. A decoder with other names needs a mapping with "names" (docs/export.md)'
            )


def _find_by_weights(
    graph: ir.Graph, own: Mapping[int, Mapping[str, Projection]], mapping: GraphMapping
) -> dict[int, Attention]:
    """The attention of each layer: what the mapping names, and for the rest the products whose constant is the weight."""
    values = {v.name: v for v in (*graph.inputs, *(o for node in graph for o in node.outputs))}
    products = _products(graph)
    found = {}
    for i, parts in own.items():
        said = mapping.layers.get(i, {})
        sites = {}
        hidden: dict[str, ir.Value] = {}
        for p, projection in parts.items():
            if p in said:
                name, start = said[p]
                sites[p] = Site(_named(values, i, p, name), start)
                continue
            node = _product_of(products, i, p, projection)
            sites[p] = Site(node.outputs[0], projection.start)
            if p != "o" and node.inputs[0] is not None:
                hidden[name_of(node.inputs[0])] = node.inputs[0]
        if "hidden" in said:
            source = _named(values, i, "hidden", said["hidden"][0])
        elif len(hidden) == 1:
            (source,) = hidden.values()
        else:
            raise ExportError(
                f"layer {i}: q, k and v multiply {', '.join(hidden) or 'nothing that was found'}, expected one value; "
                'name it as "hidden" in the mapping'
            )
        found[i] = Attention(source, sites)
    return found


def mapping_of(found: Mapping[int, Attention]) -> GraphMapping:
    """The mapping that says what was found."""
    layers = {}
    for i, attention in found.items():
        parts: dict[str, tuple[str, int | None]] = {"hidden": (name_of(attention.hidden), None)}
        parts |= {p: (name_of(site.value), site.start) for p, site in attention.sites.items()}
        layers[i] = parts
    return GraphMapping(layers)


def _place(path: str | os.PathLike[str], layer: str, part: str, value: Any) -> tuple[str, int | None]:
    if isinstance(value, str):
        return value, None
    if isinstance(value, dict) and value.keys() == {"value", "start"} and part != "hidden":
        name, start = value["value"], value["start"]
        if isinstance(name, str) and isinstance(start, int) and start >= 0:
            return name, start
    raise ExportError(
        f'{path}: layers: {layer}: {part}: found {json.dumps(value)}, expected a value\'s name or {{"value": name, "start": number}}'
    )


def _named(values: Mapping[str | None, ir.Value], i: int, part: str, name: str) -> ir.Value:
    if name not in values:
        raise ExportError(f"mapping: layers: {i}: {part}: the graph has no value {name!r}")
    return values[name]


def _products(graph: ir.Graph) -> list[_Product]:
    """Every product with a constant matrix: its node and the matrix as [out, in]."""
    found = []
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        matrix = _constant(node.inputs[1])
        if matrix is None or matrix.ndim != 2:
            continue
        transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
        found.append((node, matrix if transposed else matrix.T))
    return found


def _constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """What a value always is, through a transposition or a cast in front; None where it depends on the input."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    if node.op_type not in _THROUGH:
        return None
    inner = _constant(node.inputs[0])
    if inner is None or node.op_type != "Transpose" or inner.ndim != 2:
        return inner
    return inner.T


def _product_of(products: Sequence[_Product], i: int, p: str, projection: Projection) -> ir.Node:
    weight = projection.weight.detach().float().numpy()

    def same(matrix: npt.NDArray[Any]) -> bool:
        # The first row tells almost all of them apart, without reading the rest of a large file.
        return matrix.shape == weight.shape and all(
            np.array_equal(matrix[rows], weight[rows].astype(matrix.dtype)) for rows in (slice(1), slice(None))
        )

    found = [node for node, matrix in products if same(matrix)]
    if len(found) == 1:
        return found[0]
    raise ExportError(
        f"layer {i}: {len(found) or 'no'} product{'s' if len(found) > 1 else ''} of the graph with the weight of {p}, "
        f"{list(weight.shape)}, expected one. If the graph was exported from this backbone, unquantised, name the product in a mapping"
    )
