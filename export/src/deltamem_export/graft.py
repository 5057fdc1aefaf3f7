"""Grafts δ-mem onto an ONNX decoder that onnxruntime-genai's builder wrote: the rule as a small island of
standard nodes around `com.microsoft.LinearAttention`, in float32 whatever the decoder's precision. It finds
the projections by the graph's structure and knows nothing of PyTorch modules, bundles or tokenizers. Twins of
the rule: `reference.py` (PyTorch) and `deltamem-core` (Rust).

What the operator computes per key/value head, with its own decay g and gate β', reading after the write:

    S ← e^g S;   S ← S + β' (v' − S k) kᵀ;   read = S q

The rule is that, with v' = λ v, g = log λ and β' = β/λ for `standard`; v' = v, g = log λ and β' = β for
`lambda_outside`; no g and β' = β for `no_lambda`. With x the logit of β and λ = 1 − β coupled: log λ =
−softplus(x), β/λ = e^x, λ = σ(−x), with nothing lost where β is close to 0 or 1. A read before the write is
had by one more step in front, which reads with the first query and writes nothing, while keys, values and
gates come one step later.

Layouts of the state. Gates per row: each row of S is a head of its own with values of width 1, H·r heads that
share H keys; the operator's state [B, H·r, r, 1] is the memory [B, H, r, r] as it lies. Gates per head: H
heads with values of width r; the operator's state is Sᵀ, so the memory is transposed on its way in and out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deltamem_export.adapter import DELTA_HEADS, Adapter, AdapterConfig
from deltamem_export.errors import ExportError

# Above this the logit of 1 − λ changes nothing: keep is below 1e-13 and β rounds to 1. Without a bound e^x
# overflows at 89.
GATE_LOGIT_MAX = 30.0
L2_EPSILON = 1e-6

_FLOAT = ir.DataType.FLOAT
_PROJECTIONS = frozenset({"MatMul", "MatMulNBits"})
# Between a projection and the attention there may be a bias, the split of a packed projection, norms of q and
# k, and RoPE.
_ON_THE_WAY = frozenset(
    {"Add", "Split", "Reshape", "SimplifiedLayerNormalization", "LayerNormalization", "RotaryEmbedding", "Transpose"}
)


@dataclass(frozen=True)
class GraphFacts:
    """What the manifest says of a grafted graph."""

    kv_layers: tuple[int, ...]
    kv_dtype: str
    shared_kv: bool
    position_ids: bool


@dataclass(frozen=True)
class _Site:
    """Where a correction enters: the value it is added to, and the slice of it that belongs to this head (all
    of it if None)."""

    value: ir.Value
    start: int | None = None


@dataclass(frozen=True)
class _Placed:
    """A correction in the grafted graph, for measuring: the names of its value and of what it was added to, and which part of the last
    axis of both is its own."""

    correction: str
    projection: str
    start: int
    width: int


@dataclass(frozen=True)
class _Attention:
    """One layer's attention as found in the graph."""

    node: ir.Node
    hidden: ir.Value
    sites: Mapping[str, _Site]


def graft(
    source: Path, target: Path, adapter: Adapter, layers: Sequence[int], head_dim: int, measured: Path | None = None
) -> GraphFacts:
    """Writes the grafted graph of `source` to `target` with its weights in `<target>.data` beside it.

    Args:
        source: a decoder by the builder, with external weights beside it.
        target: where the new graph goes; it must not be `source`.
        adapter: networks that fit the decoder (`Adapter.check_backbone`).
        layers: the layers that carry a memory, ascending; their order is the order of the memory's layer
        axis.
        head_dim: the width of one attention head, which the builder leaves open in the KV cache's shape.
        measured: where to write the same graph with the output `delta_energy`; it shares the weights' file.

    Raises:
        ExportError: the graph does not have the structure that the graft needs.
    """
    model = ir.load(source)
    corrections = _graft(model, adapter, layers)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if _name(value).startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], head_dim])
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=1024)
    facts = _facts(model)
    if measured is not None:
        # Read back, so that every weight is a reference into the file that has just been written.
        again = ir.load(target)
        _measure(again, adapter.config, corrections)
        ir.save(again, measured)
    return facts


# ---------------------------------------------------------------------- the parts of the graft


def _graft(model: ir.Model, adapter: Adapter, layers: Sequence[int]) -> list[dict[str, _Placed]]:
    """Grafts in place. Returns what was placed where, for each memory layer and delta head."""
    graph = model.graph
    config = adapter.config
    found = {i: _find_attention(graph, i) for i in layers}

    _input_ids_to_int32(graph)
    _gather_rows_before_lm_head(graph)
    island, states = _start_island(graph, config, len(layers))
    after = []
    placed = []
    for state, i in zip(states, layers, strict=True):
        nodes = _Nodes(graph, f"/deltamem/layers.{i}")
        attention = found[i]
        hidden = attention.hidden
        io_dtype = hidden.dtype or _FLOAT
        if io_dtype != _FLOAT:
            hidden = nodes("Cast", hidden, name="hidden", to=_FLOAT.value)
        tensors = {name: t.numpy() for name, t in adapter.layers[i].items()}
        reads, state = island.read_and_write(nodes, hidden, state, tensors)
        after.append(state)
        placed.append(_correct(nodes, config, tensors, reads, attention.sites, io_dtype))

    _end_island(graph, island, after)
    return placed


def build_island(config: AdapterConfig, tensors: Mapping[str, npt.NDArray[np.float32]]) -> ir.Model:
    """One layer's rule alone in a graph: hidden [B, T, D], write_mask [B, T], past_memory [B, 1, H, r, r] → reads [B, T, R],
    present_memory. The graft is made of the same parts; this one is for tests and measurements."""
    graph = ir.Graph((), (), nodes=(), opset_imports={"": 22, "com.microsoft": 1}, name="island")
    heads, rank = config.num_state_heads, config.rank
    hidden = _input(graph, "hidden", _FLOAT, ["batch_size", "sequence_length", tensors["memory_q_proj"].shape[1]])
    island, states = _start_island(graph, config, 1)
    reads, state = island.read_and_write(_Nodes(graph, "/deltamem/layer"), hidden, states[0], tensors)
    reads.name, reads.type = "reads", ir.TensorType(_FLOAT)
    reads.shape = ir.Shape(["batch_size", "sequence_length", heads * rank])
    graph.outputs.append(reads)
    _end_island(graph, island, [state])
    return ir.Model(graph, ir_version=10)


def _start_island(graph: ir.Graph, config: AdapterConfig, count: int) -> tuple[Island, list[ir.Value]]:
    """Adds the inputs write_mask and past_memory, and what all layers share; returns one state for each of `count` layers."""
    write_mask = _input(graph, "write_mask", _FLOAT, ["batch_size", "sequence_length"])
    shape: list[int | str] = ["batch_size", count, config.num_state_heads, config.rank, config.rank]
    memory = _input(graph, "past_memory", _FLOAT, shape)
    top = _Nodes(graph, "/deltamem")
    # One step more than there are tokens; the first writes nothing. [B, T + 1, 1]
    mask = top("Pad", write_mask, top.ints([0, 1, 0, 0]), name="mask/Pad")
    mask = top("Unsqueeze", mask, top.ints([2]), name="mask")
    minus_mask = top("Neg", mask, name="minus_mask") if config.state_update_mode != "no_lambda" else None
    island = Island(config, mask, minus_mask)
    return island, island.split_memory(top, memory, count)


def _end_island(graph: ir.Graph, island: Island, states: Sequence[ir.Value]) -> None:
    """Adds the output present_memory."""
    c = island.config
    present = island.join_memory(_Nodes(graph, "/deltamem"), states, len(states))
    present.name, present.type = "present_memory", ir.TensorType(_FLOAT)
    present.shape = ir.Shape(["batch_size", len(states), c.num_state_heads, c.rank, c.rank])
    graph.outputs.append(present)
    graph.sort()


class Island:
    """The rule as nodes, for one adapter's settings."""

    def __init__(self, config: AdapterConfig, mask: ir.Value, minus_mask: ir.Value | None) -> None:
        """mask: [B, T + 1, 1] float32, 0 in the step before the first token; minus_mask: its negative, not
        needed by `no_lambda`."""
        self.config = config
        self.mask = mask
        self.minus_mask = minus_mask
        self.per_row = config.rankwise_gates

    def split_memory(self, nodes: _Nodes, memory: ir.Value, count: int) -> list[ir.Value]:
        """[B, L, H, r, r] → one state in the operator's layout for each of `count` layers."""
        c = self.config
        if self.per_row:
            kv_heads, width = c.num_state_heads * c.rank, 1
        else:
            kv_heads, width = c.num_state_heads, c.rank
            memory = nodes("Transpose", memory, name="past/Transpose", perm=[0, 1, 2, 4, 3])
        flat = nodes("Reshape", memory, nodes.ints([0, count * kv_heads, c.rank, width]), name="past")
        if count == 1:
            return [flat]
        return nodes.many("Split", flat, nodes.ints([kv_heads] * count), outputs=count, name="past/Split", axis=1)

    def join_memory(self, nodes: _Nodes, states: Sequence[ir.Value], count: int) -> ir.Value:
        """The inverse of `split_memory`."""
        c = self.config
        flat = states[0] if count == 1 else nodes("Concat", *states, name="present/Concat", axis=1)
        memory = nodes("Reshape", flat, nodes.ints([0, count, c.num_state_heads, c.rank, c.rank]), name="present")
        if not self.per_row:
            memory = nodes("Transpose", memory, name="present/Transpose", perm=[0, 1, 2, 4, 3])
        return memory

    def read_and_write(
        self, nodes: _Nodes, hidden: ir.Value, state: ir.Value, tensors: Mapping[str, npt.NDArray[np.float32]]
    ) -> tuple[ir.Value, ir.Value]:
        """hidden [B, T, D] float32, state in the operator's layout → reads [B, T, R] and the state after."""
        c = self.config
        heads, rank, width, gates = c.num_state_heads, c.rank, c.read_width, c.gate_width
        own_lambda = not c.couple_lambda and c.state_update_mode != "no_lambda"

        # All networks are one product, [B, T, q k | v β (−λ)]. λ's logit is negated, so that what is bounded
        # is 1 − λ in every mode.
        rows = [tensors["memory_q_proj"], tensors["memory_k_proj"], tensors["memory_v_proj"], tensors["beta_proj"]]
        bias = [tensors["beta_bias"]]
        if own_lambda:
            rows.append(-tensors["lambda_proj"])
            bias.append(-tensors["lambda_bias"])
        weight = nodes.floats(np.concatenate(rows).T, "networks")
        rest = width + gates * len(bias)
        proposal = nodes("MatMul", hidden, weight, name="networks/MatMul")
        qk, vg = nodes.many("Split", proposal, nodes.ints([2 * width, rest]), outputs=2, name="networks/Split", axis=-1)

        if c.normalize_qk:
            qk = nodes("Tanh", qk, name="qk/Tanh")
            qk = nodes("Reshape", qk, nodes.ints([0, 0, 2 * heads, rank]), name="qk/Reshape")
            length = nodes("ReduceL2", qk, nodes.ints([-1]), name="qk/ReduceL2", keepdims=1)
            length = nodes("Max", length, nodes.scalar(L2_EPSILON), name="qk/Max")
            qk = nodes("Div", qk, length, name="qk/Div")
            qk = nodes("Reshape", qk, nodes.ints([0, 0, 2 * width]), name="qk")
        q, k = nodes.many("Split", qk, nodes.ints([width, width]), outputs=2, name="qk/Split", axis=-1)
        # The extra step: behind the queries, in front of everything else. [B, T + 1, ..]
        q = nodes("Pad", q, nodes.ints([0, 0, 0, 0, 1, 0]), name="q")
        k = nodes("Pad", k, nodes.ints([0, 1, 0, 0, 0, 0]), name="k")
        vg = nodes("Pad", vg, nodes.ints([0, 1, 0, 0, 0, 0]), name="vg")
        v, x = nodes.many("Split", vg, nodes.ints([width, rest - width]), outputs=2, name="vg/Split", axis=-1)
        x = nodes("Add", x, nodes.floats(np.concatenate(bias), "gate_bias"), name="gates/Add")

        standard, coupled = c.state_update_mode == "standard", not own_lambda
        minus_log_odds = x  # of λ: the logit of 1 − λ
        if not coupled:
            x, minus_log_odds = nodes.many(
                "Split", x, nodes.ints([gates, gates]), outputs=2, name="gates/Split", axis=-1
            )
        if c.state_update_mode == "no_lambda":
            decay, gate = None, nodes("Sigmoid", x, name="beta")
        else:
            bounded = nodes("Min", minus_log_odds, nodes.scalar(GATE_LOGIT_MAX), name="gates/Min")
            decay = nodes("Softplus", bounded, name="decay/Softplus")
            assert self.minus_mask is not None
            decay = nodes("Mul", decay, self.minus_mask, name="decay")
            if standard:
                # Not σ: ONNX Runtime's is right to 1e-8, and what is left of it at λ = 1e-8 is divided by λ again.
                keep = nodes("Exp", decay, name="keep")
                if coupled:
                    gate = nodes("Exp", bounded, name="beta_over_lambda")
                else:
                    gate = nodes("Div", nodes("Sigmoid", x, name="beta"), keep, name="beta_over_lambda")
                if not self.per_row and heads > 1:
                    row_head = np.repeat(np.arange(heads, dtype=np.int64), rank)
                    keep = nodes("Gather", keep, nodes.ints(row_head.tolist()), name="keep/Gather", axis=2)
                v = nodes("Mul", v, keep, name="v")
            else:
                gate = nodes("Sigmoid", x, name="beta")
        gate = nodes("Mul", gate, self.mask, name="gate")

        read, state = nodes.many(
            "LinearAttention",
            q,
            k,
            v,
            state,
            decay,
            gate,
            outputs=2,
            name="LinearAttention",
            domain="com.microsoft",
            q_num_heads=heads,
            kv_num_heads=heads * rank if self.per_row else heads,
            update_rule="delta" if decay is None else "gated_delta",
            scale=1.0,
        )
        one = nodes.ints([1])
        reads = nodes("Slice", read, nodes.ints([0]), nodes.ints([-1]), one, name="reads")
        return reads, state


def _correct(
    nodes: _Nodes,
    config: AdapterConfig,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    reads: ir.Value,
    sites: Mapping[str, _Site],
    io_dtype: ir.DataType,
) -> dict[str, _Placed]:
    """Adds every correction of a layer: one product for all delta heads, then one addition for each value
    that is corrected."""
    used = config.delta_heads
    weights = {p: tensors[f"delta_{p}_proj"] * np.float32(_scale(config, tensors, p)) for p in used}  # [out, R]
    # Heads that share a packed projection make one addition; columns of zeros stand for the parts between
    # that are not corrected.
    groups: dict[str, list[str]] = {}
    for p in used:
        groups.setdefault(_name(sites[p].value), []).append(p)

    columns, widths = [], []
    spans: dict[str, tuple[int, int]] = {}
    for group in groups.values():
        value = sites[group[0]].value
        if len(group) == 1 and sites[group[0]].start is None:
            block = weights[group[0]]
            spans[group[0]] = (0, block.shape[0])
        else:
            packed = max(_start(sites[p]) + weights[p].shape[0] for p in group)
            total = value.shape[-1] if value.shape is not None else None
            block = np.zeros((max(packed, int(total) if isinstance(total, int) else 0), config.read_width), np.float32)
            for p in group:
                start = _start(sites[p])
                block[start : start + weights[p].shape[0]] = weights[p]
                spans[p] = (start, weights[p].shape[0])
        columns.append(block)
        widths.append(block.shape[0])

    product = nodes("MatMul", reads, nodes.floats(np.concatenate(columns).T, "corrections"), name="corrections/MatMul")
    parts = (
        [product]
        if len(widths) == 1
        else nodes.many("Split", product, nodes.ints(widths), outputs=len(widths), name="corrections/Split", axis=-1)
    )
    placed = {}
    for part, group in zip(parts, groups.values(), strict=True):
        if group == ["o"] and config.delta_o_rmsnorm:
            part = nodes(
                "SimplifiedLayerNormalization",
                part,
                nodes.floats(tensors["delta_o_rmsnorm_weight"], "delta_o_rmsnorm_weight"),
                name="delta_o_rmsnorm",
                axis=-1,
                epsilon=config.delta_o_rmsnorm_eps,
                stash_type=1,
            )
        label = "".join(group)
        correction = part
        if io_dtype != _FLOAT:
            correction = nodes("Cast", part, name=f"delta_{label}/Cast", to=io_dtype.value)
        value = sites[group[0]].value
        corrected = nodes("Add", value, correction, name=f"delta_{label}")
        corrected.shape, corrected.type = value.shape, value.type
        add = corrected.producer()
        for use in tuple(value.uses()):
            if use.node is not add:
                use.node.replace_input_with(use.idx, corrected)
        for p in group:
            placed[p] = _Placed(_name(part), _name(value), *spans[p])
    return placed


def _measure(model: ir.Model, config: AdapterConfig, placed: Sequence[Mapping[str, _Placed]]) -> None:
    """Adds the output `delta_energy`, [B, T, L, D, 2]: the sums of squares of each correction and of what it
    corrects."""
    graph = model.graph
    values = {v.name: v for node in graph for v in node.outputs}
    sums = []
    for number, layer in enumerate(placed):
        for p in config.delta_heads:
            nodes = _Nodes(graph, f"/deltamem/energy/{number}/{p}")
            own = layer[p]
            start, end = nodes.ints([own.start]), nodes.ints([own.start + own.width])
            for label, name in (("correction", own.correction), ("projection", own.projection)):
                part = nodes("Slice", values[name], start, end, nodes.ints([-1]), name=f"{label}/Slice")
                part = nodes("Cast", part, name=f"{label}/Cast", to=_FLOAT.value)
                sums.append(nodes("ReduceSumSquare", part, nodes.ints([-1]), name=label, keepdims=1))
    top = _Nodes(graph, "/deltamem/energy")
    joined = top("Concat", *sums, name="Concat", axis=-1)
    shape = [len(placed), len(config.delta_heads), 2]
    energy = top("Reshape", joined, top.ints([0, 0, *shape]), name="Reshape")
    energy.name = "delta_energy"
    energy.shape = ir.Shape(["batch_size", "sequence_length", *shape])
    energy.type = ir.TensorType(_FLOAT)
    graph.outputs.append(energy)
    graph.sort()


# ---------------------------------------------------------------------- reading the builder's graph


def _find_attention(graph: ir.Graph, i: int) -> _Attention:
    """The attention of layer i is the node that takes past_key_values.{i}.key."""
    past = next((v for v in graph.inputs if v.name == f"past_key_values.{i}.key"), None)
    node = next((use.node for use in past.uses() if use.node.op_type == "GroupQueryAttention"), None) if past else None
    if node is None:
        raise ExportError(
            f"the built graph has no GroupQueryAttention on past_key_values.{i}.key; it cannot be grafted"
        )

    sites: dict[str, _Site] = {}
    hidden = []
    packed = node.inputs[1] is None
    start = 0
    for at, p in enumerate("qkv"):
        value = node.inputs[0] if packed else node.inputs[at]
        site, projection = _climb(value, i, p)
        hidden.append(projection.inputs[0])
        sites[p] = _Site(site, start if packed else None)
        if packed:
            kv = _int_attribute(node, "kv_num_heads")
            q = _int_attribute(node, "num_heads")
            width = site.shape[-1] if site.shape is not None else None
            if not isinstance(width, int):
                raise ExportError(
                    f"layer {i}: the packed projection {_name(site)} has no known width; it cannot be grafted"
                )
            head = width // (q + 2 * kv)
            start += head * (q if p == "q" else kv)
    if any(value is not hidden[0] for value in hidden) or hidden[0] is None:
        raise ExportError(f"layer {i}: q, k and v are not projected from one value; the built graph cannot be grafted")
    sites["o"] = _Site(_descend(node.outputs[0], i))
    return _Attention(node, hidden[0], sites)


def _climb(value: ir.Value | None, i: int, p: str) -> tuple[ir.Value, ir.Node]:
    """From an input of the attention up to its projection. The site is the projection's output: after its
    bias, after the split of a packed one, before norms and RoPE."""
    path: list[ir.Value] = []
    while value is not None:
        producer = value.producer()
        path.append(value)
        if producer is None:
            break
        if producer.op_type in _PROJECTIONS:
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
        if node.op_type in _PROJECTIONS:
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


def _input_ids_to_int32(graph: ir.Graph) -> None:
    for value in graph.inputs:
        if value.name == "input_ids":
            for use in value.uses():
                if use.node.op_type not in ("Gather", "GatherBlockQuantized", "Shape"):
                    raise ExportError(f"input_ids feeds {use.node.op_type}, which the graft does not know with int32")
            value.type = ir.TensorType(ir.DataType.INT32)
            return
    raise ExportError("the built graph has no input input_ids")


def _gather_rows_before_lm_head(graph: ir.Graph) -> None:
    """Logits of wanted rows only: the hidden rows are gathered before the largest product of the graph."""
    at = next((n for n, v in enumerate(graph.outputs) if v.name == "logits"), None)
    if at is None:
        raise ExportError("the built graph has no output logits")
    logits = graph.outputs[at]
    node = logits.producer()
    while node is not None and node.op_type not in _PROJECTIONS:
        first = node.inputs[0]
        node = first.producer() if first is not None else None
    hidden = node.inputs[0] if node is not None else None
    if node is None or hidden is None or hidden.shape is None:
        raise ExportError("no lm_head was found above logits; the built graph cannot be grafted")
    vocabulary = logits.shape[-1] if logits.shape is not None else "vocabulary"
    rows = _input(graph, "logits_rows", ir.DataType.INT64, ["rows"])
    nodes = _Nodes(graph, "/deltamem/logits")
    width = hidden.shape[-1]
    if not isinstance(width, int):
        raise ExportError("the lm_head's input has no known width; the built graph cannot be grafted")
    flat = nodes("Reshape", hidden, nodes.ints([-1, width]), name="hidden")
    node.replace_input_with(0, nodes("Gather", flat, rows, name="rows", axis=0))
    # What the builder noted of shapes on the way no longer holds.
    value: ir.Value | None = node.outputs[0]
    while value is not None and value is not logits:
        value.shape = None
        uses = tuple(value.uses())
        value = uses[0].node.outputs[0] if uses else None
    if logits.dtype != _FLOAT:
        logits.name = "/deltamem/logits/narrow"
        logits.shape = ir.Shape(["rows", vocabulary])
        logits = nodes("Cast", logits, name="Cast", to=_FLOAT.value)
        logits.name = "logits"
        graph.outputs[at] = logits
    logits.shape = ir.Shape(["rows", vocabulary])
    logits.type = ir.TensorType(_FLOAT)


def _facts(model: ir.Model) -> GraphFacts:
    inputs = {_name(v): v for v in model.graph.inputs}
    prefix, suffix = "past_key_values.", ".key"
    layers = sorted(int(n[len(prefix) : -len(suffix)]) for n in inputs if n.startswith(prefix) and n.endswith(suffix))
    dtype = inputs[f"{prefix}{layers[0]}{suffix}"].dtype
    kv_dtype = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}.get(dtype or _FLOAT)
    if kv_dtype is None:
        raise ExportError(f"the built graph keeps its KV cache as {dtype}, expected float32 or float16")
    attention = {n.op_type for n in model.graph if n.op_type in ("GroupQueryAttention", "MultiHeadAttention")}
    return GraphFacts(tuple(layers), kv_dtype, attention == {"GroupQueryAttention"}, "position_ids" in inputs)


# ---------------------------------------------------------------------- making nodes


class _Nodes:
    """Appends nodes to a graph under one prefix; `graph.sort()` puts them in order at the end."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix

    def __call__(self, op: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:
        return self.many(op, *inputs, outputs=1, name=name, domain=domain, **attributes)[0]

    def many(
        self, op: str, *inputs: ir.Value | None, outputs: int, name: str, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        full = f"{self.prefix}/{name}"
        made = [ir.Value(name=full if outputs == 1 else f"{full}/{n}") for n in range(outputs)]
        node = ir.node(op, inputs, attributes=attributes, domain=domain, outputs=made, name=full)
        self.graph.append(node)
        return made

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """A shared int64 constant, one for each distinct list."""
        return self._shared(np.array(numbers, np.int64), "i_" + "_".join(map(str, numbers)))

    def scalar(self, number: float) -> ir.Value:
        return self._shared(np.array(number, np.float32), f"f_{number!r}")

    def floats(self, array: npt.NDArray[np.float32], name: str) -> ir.Value:
        """A weight of this prefix."""
        full = f"{self.prefix}/{name}".lstrip("/").replace("/", ".")
        return self._register(np.ascontiguousarray(array, dtype=np.float32), full)

    def _shared(self, array: npt.NDArray[Any], label: str) -> ir.Value:
        name = f"deltamem.constants.{label}"
        return self.graph.initializers.get(name) or self._register(array, name)

    def _register(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def _scale(config: AdapterConfig, tensors: Mapping[str, npt.NDArray[np.float32]], head: str) -> float:
    """(alpha/r) · scale, in float64 until it meets the weights."""
    if not config.trainable_delta_scale:
        return config.scaling
    raw = tensors["delta_scale_raw"].astype(np.float64)
    chosen = raw[DELTA_HEADS.index(head) if config.delta_scale_granularity == "head" else 0]
    return float(config.scaling * config.delta_scale_max / (1.0 + np.exp(-chosen)))


def _start(site: _Site) -> int:
    return site.start or 0


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _int_attribute(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())
