"""The fused graph of a bundle: its portable graph with the thirty nodes of each memory layer taken out and one node put in, over the same
file of weights: `deltamem:MemoryLayer` for the CPU, `deltamem:DeviceMemoryLayer` for CUDA. The runtime has both
(`rust/deltamem-engine/src/operator.rs`, `operator/device_layer.rs`); nobody else can run them, so the portable graph stays. It knows the
graft's names and the decoders' attention; it computes nothing.

Where the node stands follows from the graph. Behind a packed projection whose parts are split, it takes the place of the `Split`, and of
the norms of q and k where they follow at once; elsewhere it corrects each projection in its place. Δo goes into the residual where the
decoder adds the two with nothing between, else it is an output of its own, and one `Add` stays.

Inputs: 0 hidden [B, T, D], 1 write_mask [B, T], 2 past_memory [B, L, H, r, r], the constants 3 networks [D, W], 4 gate_bias and
5 corrections [H·r, C]; where a layer has a use for them: 6 q, or the packed projection, 7 k, 8 v and 9 the residual, each [B, T, width],
the constants 10 the weights of the norm on Δo, 11 and 12 those of the norms of q and k, 13 span_weights, 14 span_mask, 15 past_spans.

Outputs: 0 the layer's memory [B, 1, H, r, r], 1 to 3 q, k, v (1 alone for a packed projection that stays packed), 4 the residual with Δo
in it, or Δo, 5 what the layer's spans have gathered [B, S, 1, W].

Attributes: `layer`, its place on the memory's layer axis; `heads`, `rank`, `update_mode`, `gates`, `own_lambda`, `normalize_qk` as in the
manifest; `storage`, how its weights are kept in memory; `outputs` (those of 1 to 4 that it has) and their `widths`; `corrections`, four
numbers for each: its output, its first column in the constant, its columns, where in the output's rows it is laid; `residual`, whether
output 4 is one; `splits`, the widths of the three parts of a packed projection that is split; `q_epsilon`, `k_epsilon`,
`delta_o_epsilon` of the norms; `spans`.

On CUDA the node takes the decoder's tensors (0, 6 to 9, outputs 1 to 4) in their own type, float32, float16 or bfloat16, so that no cast
stands around it; the memory, the masks and all of its own weights stay float32. It has no `storage`, no norms of q and k (the decoder's own
stay, 11 and 12 are not there), no spans (nor 13 to 15), ranks up to
64 and heads times rank up to 1,024, and as output 5 room for its kernels to work in, [n] float32, whose
size it knows from the call's: a value of the graph, so that ONNX Runtime plans it and no step allocates.

A bundle in int4 or int8 has a third graph, with `deltamem:MatMulNBits` in the place of `com.microsoft:MatMulNBits` besides: the same inputs
and attributes, for products at accuracy level 4 without zero points, in blocks of 32 to 256 weights. It rounds as ONNX Runtime's own does,
and sums in another order.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from deltamem_export import manifest
from deltamem_export.errors import ExportError
from deltamem_export.graft import Placed, read_placed
from deltamem_export.inventory import check_island
from deltamem_export.nodes import Nodes, name_of

DOMAIN, VERSION = "deltamem", 1
OPERATORS = {"cpu": "MemoryLayer", "cuda": "DeviceMemoryLayer"}
# What the kernels have (rust/deltamem-cuda): a row of the state in one thread's registers, what a token reads in a block's own memory.
MOST_RANK_ON_CUDA, MOST_READS_ON_CUDA = 64, 1024

_FLOAT = ir.DataType.FLOAT
_ON_CUDA = frozenset({_FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_Q, _RESIDUAL, _DELTA_O_NORM, _Q_NORM, _SPAN_WEIGHTS = 6, 9, 10, 11, 13
_OUTPUT_O, _PRESENT_SPANS, _WORK = 4, 5, 5
_INPUTS, _OUTPUTS = 16, 6
_FILES = ("fused_file", "blocks_file")
# Inputs that CUDA's Concat takes by value (onnxruntime/core/providers/cuda/tensor/concat.cc).
_MOST_JOINED = 32
_SUMS = frozenset({"SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "Add"})
# Weights in blocks are read from memory at 4 or 8 bits a number; those of the memory would be a burden in 32.
_HALF = frozenset({"int4", "int8"})


class _Unfused(Exception):
    """Why a graph cannot be fused, in words."""


def fuse(bundle: Path, found: Mapping[str, Any], target: Path) -> str | None:
    """Writes the fused graph of a bundle.

    Args:
        bundle: its directory; graph, measured graph and weights are there.
        found: its manifest, of which the sections `memory` and `graph` and `precision` are read; the operator is that for the graph's
            `device`.
        target: where the graph goes; beside the file of weights.

    Returns:
        None, or why there is no fused graph; nothing is written then.
    """
    memory, files = found["memory"], found["graph"]
    model = ir.load(bundle / files["file"])
    try:
        if files["measured_file"] is None:
            raise _Unfused("the bundle has no measured graph, which knows where each correction lies")
        placed = read_placed(bundle, found)
        kind = _DeviceLayer if files.get("device") == "cuda" else _HostLayer
        layers = [
            kind(model.graph, number, i, memory, found["precision"], placed[number])
            for number, i in enumerate(memory["layers"])
        ]
    except _Unfused as reason:
        return str(reason)
    for layer in layers:
        layer.place()
    states = [layer.outputs[0] for layer in layers]
    _join(model.graph, "present_memory", _in_groups(model.graph, states) if kind is _DeviceLayer else states, axis=1)
    if files.get("span_width") is not None:
        _join(model.graph, "present_spans", [layer.outputs[_PRESENT_SPANS] for layer in layers], axis=2)
    model.graph.opset_imports[DOMAIN] = VERSION
    model.graph.sort()
    remove_unused(model.graph)
    ir.save(model, target)
    if kind is _DeviceLayer:
        check_island(target)
    return None


def with_own_products(source: Path, target: Path) -> bool:
    """Writes a graph with the runtime's own products of weights in blocks.

    Args:
        source: a graph for the CPU, fused or not.
        target: where the new one goes; beside the same file of weights.

    Returns:
        Whether the graph has any; nothing is written if not.
    """
    model = ir.load(source)
    products = [node for node in model.graph if _is_own_product(node)]
    for node in products:
        node.domain = DOMAIN
        del node.attributes["accuracy_level"]
    if not products:
        return False
    model.graph.opset_imports[DOMAIN] = VERSION
    ir.save(model, target)
    return True


def _is_own_product(node: ir.Node) -> bool:
    """Whether a node is a product that the runtime has an operator for."""
    if node.op_type != "MatMulNBits" or len([v for v in node.inputs if v is not None]) != 3:
        return False
    number = {name: a.as_int() for name, a in node.attributes.items() if a.type == ir.AttributeType.INT}
    weights, scales = node.inputs[1:3]
    return (
        number.get("accuracy_level") == 4
        and number.get("bits") in (4, 8)
        and number.get("block_size") in (32, 64, 128, 256)
        and all(v is not None and v.is_initializer() for v in (weights, scales))
        and scales is not None
        and scales.dtype == _FLOAT  # and so is what is multiplied
    )


def further_graphs(bundle: Path, found: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """Writes the graphs with the runtime's own operators, `<stem>.fused.onnx` and `<stem>.blocks.onnx`.

    Args:
        bundle: its directory.
        found: as for `fuse`.
        stem: what the files' names begin with.

    Returns:
        What the manifest says of them: `fused_file`, `not_fused`, `blocks_file`.
    """
    fused, blocks = f"{stem}.fused.onnx", f"{stem}.blocks.onnx"
    reason = fuse(bundle, found, bundle / fused)
    source = found["graph"]["file"] if reason else fused
    own = found["graph"].get("device") != "cuda" and with_own_products(bundle / source, bundle / blocks)
    return {"fused_file": None if reason else fused, "not_fused": reason, "blocks_file": blocks if own else None}


def add_fused(bundle: str | os.PathLike[str]) -> dict[str, str | None]:
    """Gives each graph of an exported bundle those with the runtime's own operators, or makes them anew. Its weights, its fingerprint and
    its memories stay. It is replaced whole or not at all.

    Returns:
        For each device that the bundle has a graph for: None, or why that graph has no fused one now; its manifest says so too.

    Raises:
        FileNotFoundError: there is no bundle.
        ExportError: its graphs are not those of a graft.
    """
    from deltamem_export.bundle import remade

    with remade(bundle) as (new, found):
        entries = [found["graph"], *found.get("graphs", [])]
        old = {name for entry in entries for name in own_files(entry)}
        for name in old:
            (new / name).unlink()
            del found["files"][name]
        reasons: dict[str, str | None] = {}
        for number, (entry, whole) in enumerate(zip(entries, manifest.graphs(found), strict=True)):
            known = {"memory": found["memory"], "graph": whole, "precision": whole["precision"]}
            # A graph in fp16 may be that of both devices.
            stem = f"model.{whole['device']}" if number else Path(entry["file"]).stem
            entry |= further_graphs(new, known, stem)
            made = own_files(entry)
            found["files"] |= {name: manifest.file_entry(new / name) for name in made}
            # Older manifests do not say which files a graph needs.
            if "files" in entry:
                entry["files"] = sorted({*entry["files"], *made} - (old - set(made)))
            reasons[whole["device"]] = entry["not_fused"]
        found["files"] = dict(sorted(found["files"].items()))
    return reasons


def own_files(graph: Mapping[str, Any]) -> list[str]:
    """The files of the graphs with the runtime's own operators that a section of the manifest names."""
    return [name for key in _FILES if (name := graph.get(key)) is not None]


@dataclass(frozen=True)
class _Target:
    """An output of the node: the value that it stands for, who takes it, and what is laid on it (the first column of the constant, how
    many, where in the row)."""

    output: int
    width: int
    made: ir.Value
    readers: Sequence[ir.Usage]
    corrections: Sequence[tuple[int, int, int]] = ()


class _Layer(ABC):
    """One memory layer as it lies in the portable graph. Making one reads, `place` changes the graph. What the operators of the two devices
    differ in stands in the two classes below."""

    operator: str
    extra_output: int | None = None  # an output of the node that no reader of the portable graph's takes

    def __init__(
        self,
        graph: ir.Graph,
        number: int,
        i: int,
        memory: Mapping[str, Any],
        precision: str,
        placed: Mapping[str, Placed],
    ) -> None:
        """number: its place on the memory's layer axis; i: its number in the decoder; precision: the graph's."""
        self.graph = graph
        self.prefix = f"/deltamem/layers.{i}"
        self.named = {node.name: node for node in graph if node.name and node.name.startswith(f"{self.prefix}/")}
        networks, corrections = self._node("networks/MatMul"), self._node("corrections/MatMul")
        self.inputs: list[ir.Value | None] = [None] * _INPUTS
        self.inputs[0] = self._hidden(networks)
        self.dtype = self.inputs[0].dtype or _FLOAT  # the decoder's
        ends = {name_of(value): value for value in graph.inputs}
        self.inputs[1:3] = ends["write_mask"], ends["past_memory"]
        self.inputs[3], self.inputs[5] = networks.inputs[1], corrections.inputs[1]
        self.inputs[4] = self._node("gates/Add").inputs[1]
        standard = not memory["couple_lambda"] and memory["update_mode"] != "no_lambda"
        self.attributes: dict[str, Any] = {
            "layer": number,
            "heads": memory["heads"],
            "rank": memory["rank"],
            "update_mode": memory["update_mode"],
            "gates": memory["gates"],
            "own_lambda": int(standard),
            "normalize_qk": int(memory["normalize_qk"]),
            "residual": 0,
        }
        shape = ["batch_size", 1, memory["heads"], memory["rank"], memory["rank"]]
        self.outputs: list[ir.Value] = [self._value(n, shape) for n in range(_OUTPUTS)]
        self._set_up(memory, precision, ends)
        self.targets = self._projections(placed)
        self.bypass: tuple[ir.Node, int, ir.Value] | None = None
        if "o" in placed:
            self.targets.append(self._output(placed["o"]))

    @abstractmethod
    def _hidden(self, networks: ir.Node) -> ir.Value:
        """The attention's input, which the networks are multiplied with."""

    @abstractmethod
    def _set_up(self, memory: Mapping[str, Any], precision: str, ends: Mapping[str, ir.Value]) -> None:
        """What else the operator has. precision: the graph's; ends: the graph's inputs by name."""

    @abstractmethod
    def _norm(self, value: ir.Value, width: int) -> tuple[ir.Value, ir.Value, float] | None:
        """An RMS norm of every head behind a projection, where the operator takes it in: what comes out of it in the projection's
        shape, its weights, its epsilon."""

    def place(self) -> None:
        """Puts the node in and gives what it makes to whoever took what was there."""
        attributes = {
            **self.attributes,
            "outputs": [target.output for target in self.targets],
            "widths": [target.width for target in self.targets],
            "corrections": [n for target in self.targets for own in target.corrections for n in (target.output, *own)],
        }
        used = {0, *(target.output for target in self.targets)} | (
            set() if self.extra_output is None else {self.extra_output}
        )
        outputs = [value if n in used else ir.Value(name="") for n, value in enumerate(self.outputs[: max(used) + 1])]
        inputs = self.inputs[: max(n for n, value in enumerate(self.inputs) if value is not None) + 1]
        name = f"{self.prefix}/{self.operator}"
        node = ir.node(self.operator, inputs, attributes=attributes, domain=DOMAIN, outputs=outputs, name=name)
        for target in self.targets:
            new = outputs[target.output]
            new.shape, new.type = target.made.shape, ir.TensorType(self.dtype)
            for use in target.readers:
                use.node.replace_input_with(use.idx, new)
        if self.bypass is not None:
            reader, at, value = self.bypass
            reader.replace_input_with(at, value)
        self.graph.append(node)

    def _node(self, name: str) -> ir.Node:
        node = self.named.get(f"{self.prefix}/{name}")
        if node is None:
            raise ExportError(f"the graph has no node {self.prefix}/{name}; export the bundle again")
        return node

    def _value(self, n: int, shape: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=f"{self.prefix}/{self.operator}/{n}", shape=ir.Shape(shape), type=ir.TensorType(_FLOAT))

    def _group(self, own: Placed) -> tuple[ir.Node, int]:
        """The Add of a correction, and the first of its group's columns in the constant of all of them."""
        add = next(
            (
                node
                for name, node in self.named.items()
                if name.startswith(f"{self.prefix}/delta_")
                and node.op_type == "Add"
                and node.inputs[0] is not None
                and node.inputs[0].name == own.projection
            ),
            None,
        )
        part = add.inputs[1] if add is not None else None
        made = part.producer() if part is not None else None
        for between in ("Cast", "SimplifiedLayerNormalization"):
            if made is not None and made.op_type == between:
                part = made.inputs[0]
                made = part.producer() if part is not None else None
        if add is None or made is None or made.op_type not in ("Split", "MatMul"):
            raise _Unfused(f"{self.prefix}: the correction of {own.projection} is not where the graft puts it")
        if made.op_type == "MatMul":
            return add, 0
        sizes = made.inputs[1].const_value if made.inputs[1] is not None else None
        assert sizes is not None
        return add, int(sizes.numpy()[: list(made.outputs).index(part)].sum())

    def _projections(self, placed: Mapping[str, Placed]) -> list[_Target]:
        """The targets among q, k and v, in the order of the outputs."""
        groups: dict[str, tuple[ir.Node, int, list[str]]] = {}
        for p in "qkv":
            if p in placed:
                groups.setdefault(placed[p].projection, (*self._group(placed[p]), []))[2].append(p)
        if not groups:
            return []
        split = self._split(groups)
        if split is not None:
            return self._parts(split, placed, groups)
        found = []
        for add, first, heads in groups.values():
            output = "qkv".index(heads[0]) + 1
            value = add.inputs[0]
            assert value is not None
            corrections = [(first + placed[p].start, placed[p].width, placed[p].start) for p in heads]
            self.inputs[_Q + output - 1] = value
            found.append(_target(output, _width(value), add.outputs[0], corrections))
        return found

    def _split(self, groups: Mapping[str, tuple[ir.Node, int, list[str]]]) -> ir.Node | None:
        """The Split of a packed projection into q, k and v, if all that is corrected comes out of it."""
        producers = {add.inputs[0].producer() for add, _, _ in groups.values() if add.inputs[0] is not None}
        node = producers.pop() if len(producers) == 1 else None
        if node is None or node.op_type != "Split" or len(node.outputs) != 3:
            return None
        in_order = all(
            len(heads) == 1 and node.outputs["qkv".index(heads[0])].name == name
            for name, (_, _, heads) in groups.items()
        )
        packed = node.inputs[0]
        last = "axis" in node.attributes and node.attributes["axis"].as_int() in (-1, 2)
        return node if in_order and last and packed is not None else None

    def _parts(
        self, split: ir.Node, placed: Mapping[str, Placed], groups: Mapping[str, tuple[ir.Node, int, list[str]]]
    ) -> list[_Target]:
        self.inputs[_Q] = split.inputs[0]
        self.attributes["splits"] = [_width(value) for value in split.outputs]
        found = []
        for n, (p, part) in enumerate(zip("qkv", split.outputs, strict=True)):
            made, corrections = part, []
            if p in placed:
                add, first, _ = groups[placed[p].projection]
                made = add.outputs[0]
                corrections = [(first, placed[p].width, 0)]
            norm = self._norm(made, _width(part)) if p in "qk" else None
            if norm is not None:
                made, self.inputs[_Q_NORM + n], self.attributes[f"{p}_epsilon"] = norm
            found.append(_target(n + 1, _width(part), made, corrections))
        return found

    def _output(self, own: Placed) -> _Target:
        """The target of Δo."""
        add, first = self._group(own)
        if "delta_o_rmsnorm" in {name.rsplit("/", 1)[-1] for name in self.named}:
            norm = self._node("delta_o_rmsnorm")
            self.inputs[_DELTA_O_NORM] = norm.inputs[1]
            self.attributes["delta_o_epsilon"] = norm.attributes["epsilon"].as_float()
        corrected, value, part = add.outputs[0], add.inputs[0], add.inputs[1]
        assert value is not None
        assert part is not None
        corrections = [(first + own.start, own.width, own.start)]
        users = tuple(corrected.uses())
        if len(users) == 1 and users[0].node.op_type in _SUMS and users[0].idx < 2:
            reader, at = users[0].node, users[0].idx
            residual = reader.inputs[1 - at]
            if (
                residual is not None
                and residual is not corrected
                and (residual.dtype or _FLOAT) == self.dtype
                and str(residual.shape) == str(value.shape)
                and not _depends(residual, {name_of(target.made) for target in self.targets})
            ):
                self.inputs[_RESIDUAL] = residual
                self.attributes["residual"] = 1
                self.bypass = reader, at, value
                # Only this sum takes the residual with Δo in it.
                readers = [use for use in residual.uses() if use.node is reader and use.idx == 1 - at]
                return _Target(_OUTPUT_O, own.width, residual, readers, corrections)
        return _target(_OUTPUT_O, own.width, part, corrections)


class _HostLayer(_Layer):
    """For the CPU: float32, norms of q and k and spans taken in."""

    operator = OPERATORS["cpu"]

    def _hidden(self, networks: ir.Node) -> ir.Value:
        value = networks.inputs[0]
        if value is None or (value.dtype or _FLOAT) != _FLOAT or f"{self.prefix}/hidden" in self.named:
            raise _Unfused("the backbone computes in 16 bits, the fused operator in float32")
        return value

    def _set_up(self, memory: Mapping[str, Any], precision: str, ends: Mapping[str, ir.Value]) -> None:
        self.attributes |= {"storage": "float16" if precision in _HALF else "float32", "spans": 0}
        if "span_weights" in ends:
            self.attributes["spans"] = 1
            self.inputs[_SPAN_WEIGHTS:] = ends["span_weights"], ends["span_mask"], ends["past_spans"]
            width = ends["past_spans"].shape
            assert width is not None
            self.extra_output = _PRESENT_SPANS
            self.outputs[_PRESENT_SPANS].shape = ir.Shape(["batch_size", "spans", 1, width[3]])

    def _norm(self, value: ir.Value, width: int) -> tuple[ir.Value, ir.Value, float] | None:
        apart = _only(value, "Reshape")
        norm = _only(apart.outputs[0], "SimplifiedLayerNormalization") if apart is not None else None
        together = _only(norm.outputs[0], "Reshape") if norm is not None else None
        if norm is None or together is None or len([v for v in norm.outputs if v.uses()]) != 1:
            return None
        weights, axis = norm.inputs[1], norm.attributes.get("axis")
        if weights is None or weights.const_value is None or weights.dtype != _FLOAT or (axis and axis.as_int() != -1):
            return None
        head = int(weights.const_value.size)
        if width % head or _sizes(apart) != [0, -1, head] or _sizes(together) != [0, -1, width]:
            return None
        epsilon = norm.attributes.get("epsilon")
        return together.outputs[0], weights, epsilon.as_float() if epsilon is not None else 1e-5


class _DeviceLayer(_Layer):
    """For CUDA: the decoder's tensors as they are, the memory in float32."""

    operator = OPERATORS["cuda"]
    extra_output = _WORK

    def _hidden(self, networks: ir.Node) -> ir.Value:
        cast = self.named.get(f"{self.prefix}/hidden")
        value = cast.inputs[0] if cast is not None else networks.inputs[0]
        if value is None or (value.dtype or _FLOAT) not in _ON_CUDA:
            raise _Unfused(f"{self.prefix}: the attention's input is {value.dtype if value else 'missing'}")
        return value

    def _set_up(self, memory: Mapping[str, Any], precision: str, ends: Mapping[str, ir.Value]) -> None:
        if "span_weights" in ends:
            raise _Unfused("it writes by spans, which the fused operator for CUDA does not")
        reads = memory["heads"] * memory["rank"]
        for what, found, most in (
            ("rank is", memory["rank"], MOST_RANK_ON_CUDA),
            ("heads times rank are", reads, MOST_READS_ON_CUDA),
        ):
            if found > most:
                raise _Unfused(f"its {what} {found}, and the fused operator for CUDA has up to {most}")
        self.outputs[_WORK].shape = ir.Shape([f"{self.prefix}/work"])

    def _norm(self, value: ir.Value, width: int) -> tuple[ir.Value, ir.Value, float] | None:
        return None

    def _projections(self, placed: Mapping[str, Placed]) -> list[_Target]:
        targets = super()._projections(placed)
        for value in self.inputs[_Q : _Q + 3]:
            if value is not None and (value.dtype or _FLOAT) != self.dtype:
                raise _Unfused(f"{name_of(value)} is {value.dtype}, and the attention's input {self.dtype}")
        return targets


def _target(output: int, width: int, made: ir.Value, corrections: Sequence[tuple[int, int, int]]) -> _Target:
    """A target that everybody takes who took `made`."""
    return _Target(output, width, made, tuple(made.uses()), corrections)


def _width(value: ir.Value) -> int:
    width = value.shape[-1] if value.shape is not None else None
    if not isinstance(width, int):
        raise _Unfused(f"{name_of(value)} has no known width")
    return width


def _only(value: ir.Value, op: str) -> ir.Node | None:
    """The node that takes a value, if it is the only one, of this kind, and takes it first."""
    users = tuple(value.uses())
    return users[0].node if len(users) == 1 and users[0].node.op_type == op and users[0].idx == 0 else None


def _sizes(reshape: ir.Node | None) -> list[int]:
    """What a Reshape makes, where that is a constant."""
    shape = reshape.inputs[1] if reshape is not None else None
    tensor = ir.convenience.get_const_tensor(shape) if shape is not None else None
    return [] if tensor is None else [int(n) for n in tensor.numpy()]


def _depends(value: ir.Value, on: set[str]) -> bool:
    """Whether any of the named values is needed to make this one."""
    seen: set[str] = set()
    left = [value]
    while left:
        name = name_of(left[-1])
        node = left.pop().producer()
        if name in on:
            return True
        if node is not None and name not in seen:
            seen.add(name)
            left += [v for v in node.inputs if v is not None]
    return False


def remove_unused(graph: ir.Graph) -> None:
    """Takes out the nodes and constants that nothing needs any more; the graph is in order."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in tuple(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _in_groups(graph: ir.Graph, states: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """The layers' memories, [B, 1, H, r, r] each, joined to as few of equal size as CUDA's Concat takes at once. Of more, or unequal
    ones, it is told by a copy from the host, which a captured step would repeat from where nothing is any more. A count without such
    groups stays."""
    count = len(states)
    groups = next((n for n in range(2, _MOST_JOINED + 1) if count % n == 0 and count // n <= _MOST_JOINED), 0)
    if count <= _MOST_JOINED or not groups:
        return states
    size = count // groups
    nodes = Nodes(graph, f"/{DOMAIN}")
    joined = [
        nodes.concat(states[n : n + size], name=f"present_memory/Concat/{n // size}", axis=1)
        for n in range(0, count, size)
    ]
    for value in joined:
        value.type = ir.TensorType(_FLOAT)
    return joined


def _join(graph: ir.Graph, name: str, parts: Sequence[ir.Value], axis: int) -> None:
    """The layers' parts side by side, in the place of the graph's output `name`."""
    at, old = next((n, value) for n, value in enumerate(graph.outputs) if value.name == name)
    old.name = f"/{DOMAIN}/portable/{name}"
    value = Nodes(graph, f"/{DOMAIN}").concat(parts, name=f"{name}/Concat", axis=axis)
    value.name, value.type, value.shape = name, ir.TensorType(_FLOAT), old.shape
    graph.outputs[at] = value
