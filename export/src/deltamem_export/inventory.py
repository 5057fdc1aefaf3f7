"""What a grafted graph consists of, without running it: that the memory's island is in float32 from edge to edge whatever the decoder
around it is in, with casts at its edge and nowhere else; in a fused graph, that each of the runtime's nodes takes the decoder's tensors in
one type and its own in float32. For graphs that the machine at hand cannot run, and cheap enough for all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from deltamem_export.errors import ExportError
from deltamem_export.nodes import name_of

_FLOAT = ir.DataType.FLOAT
_FLOATS = frozenset({_FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
# Inputs and outputs of the graph that are float32 in every precision (docs/bundle.md), where the graph has them.
_ALWAYS_FLOAT = frozenset(
    {"write_mask", "past_memory", "span_weights", "span_mask", "past_spans", "strength", "logits", "present_memory"}
    | {"present_spans", "delta_energy", "queries", "gates"}
)
_PREFIX = "/deltamem/"
# The runtime's node for CUDA (fused.py): which of its inputs and outputs are the decoder's. All others are the memory's.
_FUSED = "DeviceMemoryLayer"
_DECODERS = ({0, 6, 7, 8, 9}, {1, 2, 3, 4})
# Nodes of the graft that stand in the decoder, not in the island: the additions of corrections, and the wanted rows of logits.
_OUTSIDE = (f"{_PREFIX}logits/", f"{_PREFIX}input_ids")


@dataclass(frozen=True)
class Inventory:
    """Of a grafted graph: how many nodes of each kind its island has, and the names of its casts into the island and out of it."""

    nodes: Mapping[str, int]
    casts_in: tuple[str, ...]
    casts_out: tuple[str, ...]


def check_island(path: Path) -> Inventory:
    """Holds a grafted graph against the rule that the memory is float32.

    Args:
        path: the graph; its weights may be beside it, and are not read.

    Raises:
        ExportError: the graph is not valid ONNX; the memory, or a value inside the island, is in 16 bits; a cast stands inside it.
    """
    model = ir.load(path)
    try:
        onnx.checker.check_model(ir.to_proto(_without_weights(path)), full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name}: not a valid graph ({' '.join(str(error).split())[:300]})") from error
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        if name_of(value) in _ALWAYS_FLOAT and value.dtype != _FLOAT:
            raise ExportError(
                f"{path.name}: {value.name} is {value.dtype}, expected FLOAT: the memory's island is in float32"
            )

    types = {value: value.dtype for value in (*graph.inputs, *graph.initializers.values())}
    nodes: dict[str, int] = {}
    casts_in, casts_out = [], []
    for node in graph:
        name = str(node.name)
        inside = name.startswith(_PREFIX) and not name.startswith(_OUTSIDE)
        given = {types.get(v, v.dtype) for v in node.inputs if v is not None} & _FLOATS
        made = _type(node, types)
        if node.op_type == _FUSED:
            nodes[_FUSED] = nodes.get(_FUSED, 0) + 1
            _check_fused(path.name, node, types)
        elif _adds_a_correction(node):
            # A correction is added in the decoder's type.
            if len(given) > 1:
                raise ExportError(f"{path.name}: {name} adds {_said(given)}; a cast at the island's edge is missing")
        elif inside:
            nodes[node.op_type] = nodes.get(node.op_type, 0) + 1
            if node.op_type == "Cast":
                (casts_in if made == _FLOAT else casts_out).append(name)
                if not _at_the_edge(node, made):
                    raise ExportError(
                        f"{path.name}: {name} is a cast inside the island, expected casts at its edge only"
                    )
            # What is measured of a projection is cut out of it first and cast then.
            elif given - {_FLOAT} and not (node.op_type == "Slice" and name.startswith(f"{_PREFIX}energy/")):
                raise ExportError(
                    f"{path.name}: {name} takes {_said(given)}, expected FLOAT inside the memory's island"
                )
        for value in node.outputs:
            types[value] = value.dtype or made
    return Inventory(nodes, tuple(casts_in), tuple(casts_out))


def _check_fused(file: str, node: ir.Node, types: Mapping[ir.Value, ir.DataType | None]) -> None:
    """Holds one of the runtime's nodes against the types that its operator has."""
    decoders: set[ir.DataType] = set()
    for what, values, own in zip(("input", "output"), (node.inputs, node.outputs), _DECODERS, strict=True):
        for n, value in enumerate(values):
            if value is None or not value.name:
                continue
            found = types.get(value, value.dtype) or _FLOAT
            if n in own:
                decoders.add(found)
            elif found != _FLOAT:
                raise ExportError(f"{file}: {node.name}: {what} {n} is {found}, expected FLOAT: it is the memory's own")
    if len(decoders) != 1 or not decoders <= _FLOATS:
        raise ExportError(f"{file}: {node.name} takes the decoder's tensors as {_said(decoders)}, expected one type")


def _at_the_edge(cast: ir.Node, made: ir.DataType | None) -> bool:
    """Whether a cast brings the decoder's values in, or brings a correction, and nothing else, out."""
    if made == _FLOAT:
        source = cast.inputs[0]
        producer = source.producer() if source is not None else None
        return producer is None or not str(producer.name).startswith(_PREFIX) or producer.op_type in ("Slice", "Add")
    uses = cast.outputs[0].uses()
    return bool(uses) and all(_adds_a_correction(use.node) for use in uses)


def _adds_a_correction(node: ir.Node) -> bool:
    name = str(node.name)
    return node.op_type == "Add" and name.startswith(_PREFIX) and name.rsplit("/", 1)[1].startswith("delta_")


def _type(node: ir.Node, types: Mapping[ir.Value, ir.DataType | None]) -> ir.DataType | None:
    """What a node of the graft makes: all of its operators but these give the type of what they take first."""
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "Shape":
        return ir.DataType.INT64
    first = next((v for v in node.inputs if v is not None), None)
    return types.get(first, first.dtype) if first is not None else None


def _without_weights(path: Path) -> ir.Model:
    """The graph with large weights as further inputs, so that none is read, and with ONNX Runtime's own operators in its own domain, which
    the checker passes over."""
    model = ir.load(path)
    for name, value in list(model.graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor):
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
    for node in model.graph:
        if not node.domain and not onnx.defs.has(node.op_type):
            node.domain = "com.microsoft"
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    return model


def _said(types: set[ir.DataType]) -> str:
    return " and ".join(sorted(t.name for t in types))
