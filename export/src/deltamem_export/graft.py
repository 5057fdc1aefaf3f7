"""Grafts δ-mem onto an ONNX decoder: per layer the rule (`island.py`) on the attention's input, and its corrections onto
the projections that `structure.py` found. It knows nothing of PyTorch modules, bundles or tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deltamem_export.adapter import DELTA_HEADS, Adapter, AdapterConfig
from deltamem_export.errors import ExportError
from deltamem_export.external import save_sharing
from deltamem_export.island import Island
from deltamem_export.nodes import Nodes, add_input, name_of
from deltamem_export.structure import PROJECTIONS, FindAttentions, GraphFacts, Site, find_attentions, read_facts

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Placed:
    """A correction in the grafted graph, for measuring: the names of its value and of what it was added to, and which part of the last
    axis of both is its own."""

    correction: str
    projection: str
    start: int
    width: int


def graft(
    source: Path,
    target: Path,
    adapter: Adapter,
    layers: Sequence[int],
    head_dim: int,
    measured: Path | None = None,
    find: FindAttentions = find_attentions,
) -> GraphFacts:
    """Writes the grafted graph of `source` to `target` with its weights in `<target>.data` beside it.

    Args:
        source: a decoder by the builder, with external weights beside it.
        target: where the new graph goes; it must not be `source`.
        adapter: networks that fit the decoder (`Adapter.check_backbone`).
        layers: the layers that carry a memory, ascending; their order is the order of the memory's layer
        axis.
        head_dim: the width of one attention head, which the builder leaves open in the KV cache's shape.
        measured: where to write the same graph with the input `strength` and the outputs `delta_energy`, `queries` and `gates`; it
            shares the weights' file.
        find: finds the attentions in the graph; for a graph of the builder's if not given.

    Raises:
        ExportError: the graph does not have the structure that the graft needs.
    """
    model = ir.load(source)
    placed = _graft(model, adapter, layers, find)
    for value in (*model.graph.inputs, *model.graph.outputs):
        own_cache = name_of(value).startswith(("past_key_values.", "present.")) and name_of(value).endswith(
            (".key", ".value")
        )
        if own_cache and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], head_dim])
    save_sharing(model, target, source.with_name(f"{source.name}.data"))
    facts = read_facts(model)
    if adapter.config.writes_spans:
        facts = replace(facts, span_width=adapter.config.proposal_width)
    if measured is not None:
        # Read back, so that every weight is a reference into the file that has just been written.
        again = ir.load(target)
        _measure(again, adapter.config, placed)
        ir.save(again, measured)
        facts = replace(facts, strength=True, gates=True)
    return facts


def read_placed(bundle: Path, found: Mapping[str, Any]) -> list[dict[str, Placed]]:
    """Where the corrections of an exported bundle are, layer by layer, as its measured graph knows them.

    Args:
        bundle: its directory.
        found: its manifest.

    Raises:
        ExportError: the graph is not that of a graft.
    """
    file = found["graph"]["measured_file"]
    names = {v.name: v for node in ir.load(bundle / file).graph for v in node.outputs}

    def cut(number: int, head: str, label: str) -> tuple[ir.Value, int, int]:
        """What a slice of the graph is cut out of, and where."""
        made = names.get(f"/deltamem/energy/{number}/{head}/{label}/Slice")
        node = made.producer() if made is not None else None
        value, start, end = (node.inputs[:3] if node is not None else None) or (None, None, None)
        constants = [v.const_value for v in (start, end) if v is not None and v.const_value is not None]
        if value is None or len(constants) != 2:
            raise ExportError(f"{file}: does not say where the correction {head} is; export the bundle again")
        first, last = (int(constant.numpy()[0]) for constant in constants)
        return value, first, last - first

    def place(number: int, head: str) -> Placed:
        correction, start, width = cut(number, head, "correction")
        projection, *_ = cut(number, head, "projection")
        return Placed(name_of(correction), name_of(projection), start, width)

    memory = found["memory"]
    return [{p: place(number, p) for p in memory["delta_heads"]} for number in range(len(memory["layers"]))]


def measure_again(bundle: Path, found: Mapping[str, Any], target: Path) -> None:
    """Writes the measured graph of an exported bundle anew, from its graph and from what its old measured graph knows of the corrections.

    Args:
        bundle: its directory.
        found: its manifest.
        target: where the graph goes; beside the same file of weights.

    Raises:
        ExportError: the graphs are not those of a graft.
    """
    memory, files = found["memory"], found["graph"]
    graph = ir.load(bundle / files["file"])
    config = AdapterConfig(
        rank=memory["rank"],
        alpha=memory["alpha"],
        num_state_heads=memory["heads"],
        couple_lambda=memory["couple_lambda"],
        state_update_mode=memory["update_mode"],
        rankwise_gates=memory["gates"] == "row",
        memory_write_granularity="token" if files.get("span_width") is None else f"{memory['write_granularity']}_mean",
        delta_heads=tuple(memory["delta_heads"]),
    )
    grafted = _Grafted(
        read_placed(bundle, found),
        [f"/deltamem/layers.{i}/qk/Split/0" for i in memory["layers"]],
        [f"/deltamem/layers.{i}/gates/Add" for i in memory["layers"]],
    )
    _measure(graph, config, grafted)
    ir.save(graph, target)


@dataclass(frozen=True)
class _Grafted:
    """What was placed where, layer by layer: each delta head's correction, and the names of the queries and of the gates' logits."""

    corrections: list[dict[str, Placed]]
    queries: list[str]
    gates: list[str]


def _graft(model: ir.Model, adapter: Adapter, layers: Sequence[int], find: FindAttentions) -> _Grafted:
    """Grafts in place."""
    graph = model.graph
    config = adapter.config
    found = find(graph, layers)

    _input_ids_to_int32(graph)
    _gather_rows_before_lm_head(graph)
    island = Island(graph, config, len(layers))
    placed = []
    for at, i in enumerate(layers):
        nodes = Nodes(graph, f"/deltamem/layers.{i}")
        attention = found[i]
        hidden = attention.hidden
        io_dtype = hidden.dtype or _FLOAT
        if io_dtype != _FLOAT:
            hidden = nodes("Cast", hidden, name="hidden", to=_FLOAT.value)
        tensors = {name: t.numpy() for name, t in adapter.layers[i].items()}
        reads = island.read_and_write(nodes, at, hidden, tensors)
        placed.append(_correct(nodes, config, tensors, reads, attention.sites, io_dtype))

    island.end()
    return _Grafted(placed, [name_of(q) for q in island.queries], [name_of(x) for x in island.gates])


def _correct(
    nodes: Nodes,
    config: AdapterConfig,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    reads: ir.Value,
    sites: Mapping[str, Site],
    io_dtype: ir.DataType,
) -> dict[str, Placed]:
    """Adds every correction of a layer: one product for all delta heads, then one addition for each value
    that is corrected."""
    used = config.delta_heads
    weights = {p: tensors[f"delta_{p}_proj"] * np.float32(_scale(config, tensors, p)) for p in used}  # [out, R]
    # Heads that share a packed projection make one addition; columns of zeros stand for the parts between
    # that are not corrected.
    groups: dict[str, list[str]] = {}
    for p in used:
        groups.setdefault(name_of(sites[p].value), []).append(p)

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
    parts = nodes.split(product, widths, name="corrections/Split")
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
            placed[p] = Placed(name_of(part), name_of(value), *spans[p])
    return placed


def _measure(model: ir.Model, config: AdapterConfig, grafted: _Grafted) -> None:
    """Adds the input `strength`, [B, T], that each token's corrections are multiplied by, and the outputs `delta_energy`,
    [B, T, L, D, 2], the sums of squares of each correction and of what it corrects, `queries`, [B, T, L, H, r], what each token reads the
    memory with, and `gates`, [B, T, L, 1 or 2, G], each token's β, and λ where it is its own."""
    graph = model.graph
    placed = grafted.corrections
    values = {v.name: v for node in graph for v in node.outputs}
    _strengthen(graph, values, placed)
    sums = []
    for number, layer in enumerate(placed):
        for p in config.delta_heads:
            nodes = Nodes(graph, f"/deltamem/energy/{number}/{p}")
            own = layer[p]
            start, end = nodes.ints([own.start]), nodes.ints([own.start + own.width])
            for label, name in (("correction", own.correction), ("projection", own.projection)):
                part = nodes("Slice", values[name], start, end, nodes.ints([-1]), name=f"{label}/Slice")
                part = nodes("Cast", part, name=f"{label}/Cast", to=_FLOAT.value)
                sums.append(nodes("ReduceSumSquare", part, nodes.ints([-1]), name=label, keepdims=1))
    _add_output(graph, "delta_energy", sums, [len(placed), len(config.delta_heads), 2])

    reads = [values[name] for name in grafted.queries]
    nodes = Nodes(graph, "/deltamem/queries")
    zero, one = nodes.ints([0]), nodes.ints([1])
    if config.writes_spans:  # behind the tokens stand the spans, which read nothing
        tokens = values["/deltamem/tokens"]
        reads = [nodes("Slice", q, zero, tokens, one, name=f"{n}") for n, q in enumerate(reads)]
    _add_output(graph, "queries", reads, [len(placed), config.num_state_heads, config.rank])

    nodes = Nodes(graph, "/deltamem/gates")
    end = nodes.ints([np.iinfo(np.int64).max])
    if config.writes_spans:
        end = nodes("Add", values["/deltamem/tokens"], one, name="end")
    kinds = 1 if config.couple_lambda or config.state_update_mode == "no_lambda" else 2
    # The second logit is that of 1 − λ.
    signs = nodes.floats(np.repeat(np.array([1.0, -1.0][:kinds], np.float32), config.gate_width), "signs")
    gates = []
    for n, name in enumerate(grafted.gates):
        logits = nodes("Slice", values[name], one, end, one, name=f"{n}/Slice")
        gates.append(nodes("Sigmoid", nodes("Mul", logits, signs, name=f"{n}/Mul"), name=f"{n}/Sigmoid"))
    _add_output(graph, "gates", gates, [len(placed), kinds, config.gate_width])
    graph.sort()


def _strengthen(graph: ir.Graph, values: dict[str | None, ir.Value], placed: Sequence[Mapping[str, Placed]]) -> None:
    """Multiplies every correction by the input `strength` where it was made, in float32 and behind its norm, so that 1 leaves its
    bits. `values` has the products in the corrections' places afterwards."""
    nodes = Nodes(graph, "/deltamem/strength")
    strength = add_input(graph, "strength", _FLOAT, ["batch_size", "sequence_length"])
    strength = nodes("Unsqueeze", strength, nodes.ints([2]), name="Unsqueeze")
    for name in dict.fromkeys(own.correction for layer in placed for own in layer.values()):
        correction = values[name]
        uses = tuple(correction.uses())
        scaled = nodes("Mul", correction, strength, name=name.lstrip("/"))
        scaled.shape, scaled.type = correction.shape, correction.type
        for use in uses:
            use.node.replace_input_with(use.idx, scaled)
        values[name] = scaled


def _add_output(graph: ir.Graph, name: str, parts: Sequence[ir.Value], shape: Sequence[int]) -> None:
    """The parts [B, T, ...] side by side, as the output [B, T, *shape]."""
    nodes = Nodes(graph, f"/deltamem/{name}")
    value = nodes("Reshape", nodes.concat(parts, name="Concat"), nodes.ints([0, 0, *shape]), name="Reshape")
    value.name, value.type = name, ir.TensorType(_FLOAT)
    value.shape = ir.Shape(["batch_size", "sequence_length", *shape])
    graph.outputs.append(value)


def _input_ids_to_int32(graph: ir.Graph) -> None:
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    if ids is None:
        raise ExportError("the graph has no input input_ids")
    strange = [use for use in ids.uses() if use.node.op_type not in ("Gather", "GatherBlockQuantized", "Shape")]
    if strange:
        wide = Nodes(graph, "/deltamem")("Cast", ids, name="input_ids", to=ir.DataType.INT64.value)
        for use in strange:
            use.node.replace_input_with(use.idx, wide)
    ids.type = ir.TensorType(ir.DataType.INT32)


def _gather_rows_before_lm_head(graph: ir.Graph) -> None:
    """Logits of wanted rows only: the hidden rows are gathered before the largest product of the graph."""
    at = next((n for n, v in enumerate(graph.outputs) if v.name == "logits"), None)
    if at is None:
        raise ExportError("the built graph has no output logits")
    logits = graph.outputs[at]
    node = logits.producer()
    while node is not None and node.op_type not in PROJECTIONS:
        first = node.inputs[0]
        node = first.producer() if first is not None else None
    hidden = node.inputs[0] if node is not None else None
    if node is None or hidden is None or hidden.shape is None:
        raise ExportError("no lm_head was found above logits; the built graph cannot be grafted")
    vocabulary = logits.shape[-1] if logits.shape is not None else "vocabulary"
    rows = add_input(graph, "logits_rows", ir.DataType.INT64, ["rows"])
    nodes = Nodes(graph, "/deltamem/logits")
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


def _scale(config: AdapterConfig, tensors: Mapping[str, npt.NDArray[np.float32]], head: str) -> float:
    """(alpha/r) · scale, in float64 until it meets the weights."""
    if not config.trainable_delta_scale:
        return config.scaling
    raw = tensors["delta_scale_raw"].astype(np.float64)
    chosen = raw[DELTA_HEADS.index(head) if config.delta_scale_granularity == "head" else 0]
    return float(config.scaling * config.delta_scale_max / (1.0 + np.exp(-chosen)))


def _start(site: Site) -> int:
    return site.start or 0
