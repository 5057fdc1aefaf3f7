"""Reading an ONNX decoder: where each layer's attention, its projections and the lm_head are, found by which node feeds
which. Names count for inputs and outputs alone. It changes nothing and knows nothing of memories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from deltamem_export.errors import ExportError
from deltamem_export.nodes import int_attribute, name_of

_FLOAT = ir.DataType.FLOAT
# What a cache or another state may be kept as, under the manifest's names.
_KINDS = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8",
}
# What the nodes' names say where an attention is in standard operators.
PLAIN = "/plain"
PROJECTIONS = frozenset({"MatMul", "MatMulNBits"})
# Between a projection and the attention there may be a bias, the split of a packed projection, a clip, norms of q and k
# (in float32 where the rest is 16 bits wide), and RoPE.
_ON_THE_WAY = frozenset(
    {
        "Add",
        "Cast",
        "Clip",
        "Split",
        "Reshape",
        "SimplifiedLayerNormalization",
        "LayerNormalization",
        "RotaryEmbedding",
        "Transpose",
    }
)


@dataclass(frozen=True)
class StateFacts:
    """What a layer carries inside a turn besides a KV cache: the names of an input and an output, and the shape behind
    the batch axis."""

    input: str
    output: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphFacts:
    """What the manifest says of a grafted graph."""

    kv_layers: tuple[int, ...]
    kv_dtype: str
    shared_kv: bool
    position_ids: bool
    states: tuple[StateFacts, ...] = ()
    span_width: int | None = None  # W, where writes are of spans
    strength: bool = False  # whether the measured graph has the input `strength`
    gates: bool = False  # and the output `gates`


@dataclass(frozen=True)
class Site:
    """Where a correction enters: the value it is added to, and the slice of it that belongs to this head (all
    of it if None)."""

    value: ir.Value
    start: int | None = None


@dataclass(frozen=True)
class Attention:
    """One layer's attention as found in the graph."""

    hidden: ir.Value
    sites: Mapping[str, Site]


FindAttentions = Callable[[ir.Graph, Sequence[int]], Mapping[int, Attention]]


def find_attentions(graph: ir.Graph, layers: Sequence[int]) -> dict[int, Attention]:
    """The attention of each of `layers` in a graph that the builder wrote."""
    return {i: find_attention(graph, i) for i in layers}


def find_attention(graph: ir.Graph, i: int) -> Attention:
    """The attention of layer i is the node that takes past_key_values.{i}.key, or those that `plain.py` put in its place."""
    past = next((v for v in graph.inputs if v.name == f"past_key_values.{i}.key"), None)
    node = next((use.node for use in past.uses() if use.node.op_type == "GroupQueryAttention"), None) if past else None
    taken = _taken(node) if node is not None else _taken_in_plain(graph, past)
    if taken is None:
        raise ExportError(
            f"the built graph has no GroupQueryAttention on past_key_values.{i}.key; it cannot be grafted"
        )

    sites: dict[str, Site] = {}
    hidden = []
    packed = taken.packed
    start = 0
    for p, value in zip("qkv", taken.values, strict=True):
        site, projection = _climb(value, i, p)
        hidden.append(projection.inputs[0])
        sites[p] = Site(site, start if packed else None)
        if packed:
            q, kv = taken.heads, taken.kv_heads
            width = site.shape[-1] if site.shape is not None else None
            if not isinstance(width, int):
                raise ExportError(
                    f"layer {i}: the packed projection {name_of(site)} has no known width; it cannot be grafted"
                )
            head = width // (q + 2 * kv)
            start += head * (q if p == "q" else kv)
    if any(value is not hidden[0] for value in hidden) or hidden[0] is None:
        raise ExportError(f"layer {i}: q, k and v are not projected from one value; the built graph cannot be grafted")
    sites["o"] = Site(_descend(taken.output, i))
    return Attention(hidden[0], sites)


@dataclass(frozen=True)
class _Taken:
    """What an attention takes for q, k and v, one packed value or three, and what it gives."""

    values: tuple[ir.Value | None, ...]
    packed: bool
    heads: int
    kv_heads: int
    output: ir.Value


def _taken(node: ir.Node) -> _Taken:
    packed = node.inputs[1] is None
    values = (node.inputs[0],) * 3 if packed else tuple(node.inputs[:3])
    return _Taken(
        values, packed, int_attribute(node, "num_heads"), int_attribute(node, "kv_num_heads"), node.outputs[0]
    )


def _taken_in_plain(graph: ir.Graph, past: ir.Value | None) -> _Taken | None:
    """The same of an attention in standard operators, by the names that `plain.py` gives them."""
    joins = [str(use.node.name) for use in past.uses() if use.node.op_type == "Concat"] if past is not None else []
    prefix = next((name.removesuffix("/k/Concat") for name in joins if name.endswith(f"{PLAIN}/k/Concat")), None)
    if prefix is None:
        return None
    own = {str(node.name).removeprefix(f"{prefix}/"): node for node in graph if str(node.name).startswith(f"{prefix}/")}
    parts = [own[f"{p}/Reshape"] for p in "qkv"]
    sizes = parts[0].inputs[1]
    assert sizes is not None
    assert sizes.const_value is not None
    _, _, kv_heads, group, _ = (int(n) for n in sizes.const_value.numpy())
    split = own.get("Split")
    values = (split.inputs[0],) * 3 if split is not None else tuple(node.inputs[0] for node in parts)
    return _Taken(values, split is not None, kv_heads * group, kv_heads, own["out"].outputs[0])


def _climb(value: ir.Value | None, i: int, p: str) -> tuple[ir.Value, ir.Node]:
    """From an input of the attention up to its projection. The site is the projection's output: after its
    bias, after the split of a packed one, before norms and RoPE."""
    path: list[ir.Value] = []
    while value is not None:
        producer = value.producer()
        path.append(value)
        if producer is None:
            break
        if producer.op_type in PROJECTIONS:
            return _site(path), producer
        if producer.op_type not in _ON_THE_WAY:
            break
        value = producer.inputs[0]
    raise ExportError(
        f"layer {i}: no projection was found above the attention's {p} input; the built graph cannot be grafted"
    )


def _site(path: Sequence[ir.Value]) -> ir.Value:
    """path: from the attention's input up to the projection's output. The bias and the split come first on
    the way down."""
    site = path[-1]
    for value in reversed(path[:-1]):
        producer = value.producer()
        assert producer is not None
        if producer.op_type == "Split" or (producer.op_type == "Add" and _is_bias(producer)):
            site = value
        else:
            break
    return site


def _descend(value: ir.Value, i: int) -> ir.Value:
    """From the attention's output down to o_proj's, after its bias."""
    for _ in range(4):
        nodes = [use.node for use in value.uses()]
        if len(nodes) != 1:
            break
        node = nodes[0]
        if node.op_type in PROJECTIONS:
            out = node.outputs[0]
            after = [use.node for use in out.uses()]
            return after[0].outputs[0] if len(after) == 1 and after[0].op_type == "Add" and _is_bias(after[0]) else out
        if node.op_type not in ("Reshape", "Transpose", "Cast"):
            break
        value = node.outputs[0]
    raise ExportError(f"layer {i}: no o_proj was found below the attention; the built graph cannot be grafted")


def _is_bias(node: ir.Node) -> bool:
    other = node.inputs[1]
    return other is not None and other.is_initializer() and other.shape is not None and len(other.shape) == 1


def read_facts(model: ir.Model) -> GraphFacts:
    inputs = {name_of(v): v for v in model.graph.inputs}
    prefix, suffix = "past_key_values.", ".key"
    layers = sorted(int(n[len(prefix) : -len(suffix)]) for n in inputs if n.startswith(prefix) and n.endswith(suffix))
    dtype = inputs[f"{prefix}{layers[0]}{suffix}"].dtype
    kv_dtype = _KINDS.get(dtype or _FLOAT)
    if kv_dtype is None:
        raise ExportError(
            f"the built graph keeps its KV cache as {dtype}, expected one of {', '.join(_KINDS.values())}"
        )
    attention = {n.op_type for n in model.graph if n.op_type in ("GroupQueryAttention", "MultiHeadAttention")}
    states = _states(model)
    return GraphFacts(
        tuple(layers), kv_dtype, attention == {"GroupQueryAttention"}, "position_ids" in inputs, states=states
    )


def _states(model: ir.Model) -> tuple[StateFacts, ...]:
    """Inputs past.{i}.<what> with their outputs present.{i}.<what>."""
    outputs = {name_of(v): v for v in model.graph.outputs}
    found = []
    for value in model.graph.inputs:
        name = name_of(value)
        if not name.startswith("past."):
            continue
        after = outputs.get(f"present.{name.removeprefix('past.')}")
        dims = list(value.shape)[1:] if value.shape is not None else []
        sizes = tuple(d for d in dims if isinstance(d, int))
        dtype = _KINDS.get(value.dtype or _FLOAT)
        if after is None or after.dtype != value.dtype or len(sizes) != len(dims) or not dtype:
            raise ExportError(
                f"the built graph carries {name} as {value.dtype} {value.shape}, expected a float type, known sizes and an "
                f"output present.{name.removeprefix('past.')} of the same type"
            )
        found.append(StateFacts(name, name_of(after), dtype, sizes))
    return tuple(found)
