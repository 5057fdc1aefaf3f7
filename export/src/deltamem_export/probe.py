"""Looks inside two forms of one decoder at the same places: an ONNX graph, by its structure, and a transformers model,
by hooks. It says how far the two are apart at each place, and which comes first. It knows nothing of files, bundles or
tolerances of precisions.

The places, in the order in which they are computed:

    layer input          what the layers before have added up, before the norm in front of layer i
    attention input      behind that norm: what q, k, v and the memory's networks are projected from
    q k v                behind their projections, before any correction
    state                the memory of layer i after the call
    Δq Δk Δv             the same as q k v with their corrections, where the memory has them
    o                    behind o_proj, before its correction
    attention output     behind o_proj, with its correction
    last layer           what all layers have added up
    last norm            behind the last norm: the lm_head's input
    logits
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from deltamem_export.decoder import Projection, attentions, projections
from deltamem_export.errors import ExportError
from deltamem_export.structure import PROJECTIONS, Attention, Site

Float32 = npt.NDArray[np.float32]

LAYER_INPUT, ATTENTION_INPUT, ATTENTION_OUTPUT = "layer input", "attention input", "attention output"
STATE, LAST_LAYER, LAST_NORM, LOGITS = "state", "last layer", "last norm", "logits"
_ORDER = (
    LAYER_INPUT,
    ATTENTION_INPUT,
    *"qkv",
    STATE,
    "Δq",
    "Δk",
    "Δv",
    "o",
    ATTENTION_OUTPUT,
    LAST_LAYER,
    LAST_NORM,
    LOGITS,
)
_NORMS = frozenset(
    f"{skip}{kind}" for skip in ("", "Skip") for kind in ("SimplifiedLayerNormalization", "LayerNormalization")
) | {"RMSNormalization"}
# A jump in the relative difference that rounding does not make from one place to the next.
_JUMP = 8.0


@dataclass(frozen=True)
class Place:
    """A value inside a decoder. `layer` is None behind the last layer."""

    layer: int | None
    what: str

    def __str__(self) -> str:
        return self.what if self.layer is None else f"layer {self.layer}, {self.what}"

    @property
    def order(self) -> tuple[float, int]:
        """When it is computed."""
        return (np.inf if self.layer is None else self.layer, _ORDER.index(self.what))


# ---------------------------------------------------------------------- in the graph


@dataclass(frozen=True)
class Traced:
    """Where a place is in a graph: the sum of one or two values, and which part of the last axis (all if None)."""

    values: tuple[ir.Value, ...]
    part: tuple[int, int] | None = None


def find_places(graph: ir.Graph, found: Mapping[int, Attention]) -> dict[Place, Traced]:
    """Every place that this graph has, for the layers whose attention was found. A norm that is not one node hides the
    layer input behind it; all other places are always there."""
    places: dict[Place, Traced] = {}
    for i, attention in sorted(found.items()):
        summed = before_norm(attention.hidden)
        if summed is not None:
            places[Place(i, LAYER_INPUT)] = Traced(summed)
        places[Place(i, ATTENTION_INPUT)] = Traced((attention.hidden,))
        starts = sorted(site.start for site in attention.sites.values() if site.start is not None)
        for p, site in attention.sites.items():
            part = None
            if site.start is not None:
                after = [start for start in starts if start > site.start]
                part = (site.start, after[0] if after else -1)
            corrected = _corrected(site.value)
            places[Place(i, p)] = Traced((site.value,), part)
            if p == "o":
                places[Place(i, ATTENTION_OUTPUT)] = Traced((corrected or site.value,))
            elif corrected is not None:
                places[Place(i, f"Δ{p}")] = Traced((corrected,), part)
    head = lm_head_input(graph)
    summed = before_norm(head)
    if summed is not None:
        places[Place(None, LAST_LAYER)] = Traced(summed)
    places[Place(None, LAST_NORM)] = Traced((head,))
    return places


def before_norm(value: ir.Value) -> tuple[ir.Value, ...] | None:
    """From a norm's output to what the norm is of: one value, or two that it adds up first. None: no norm there."""
    node = value.producer()
    while node is not None and node.op_type == "Cast":
        node = _producer(node.inputs[0])
    if node is None or node.op_type not in _NORMS:
        return None
    taken = node.inputs[: 2 if node.op_type.startswith("Skip") else 1]
    return tuple(v for v in taken if v is not None)


def lm_head_input(graph: ir.Graph) -> ir.Value:
    """What the lm_head is a product with, before rows are picked from it.

    Raises:
        ExportError: no product above `logits`.
    """
    value: ir.Value | None = next((v for v in graph.outputs if v.name == "logits"), None)
    node = _producer(value)
    while node is not None and node.op_type not in PROJECTIONS:
        node = _producer(node.inputs[0])
    value = node.inputs[0] if node is not None else None
    node = _producer(value)
    if (
        node is not None
        and node.op_type == "Gather"
        and "logits_rows" in [v.name for v in node.inputs if v is not None]
    ):
        node = _producer(node.inputs[0])
        value = node.inputs[0] if node is not None else None
    if value is None:
        raise ExportError("no lm_head was found above logits; the graph cannot be compared inside")
    return value


def _corrected(value: ir.Value) -> ir.Value | None:
    """Behind the addition of the graft's correction, if there is one."""
    for use in value.uses():
        if use.node.op_type == "Add" and (use.node.name or "").startswith("/deltamem/layers."):
            return use.node.outputs[0]
    return None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def kv_layers(graph: ir.Graph) -> list[int]:
    """The layers that have a KV cache, ascending."""
    names = (v.name or "" for v in graph.inputs)
    return sorted(int(n.split(".")[1]) for n in names if n.startswith("past_key_values.") and n.endswith(".key"))


def find_grafted(graph: ir.Graph, layers: Sequence[int]) -> dict[int, Attention]:
    """The attention of each memory layer by what was grafted onto it, in a graph of any structure: what the memory's
    networks multiply, and what a correction of one head alone was added to."""
    nodes = {node.name: node for node in graph}
    found = {}
    for i in layers:
        hidden = nodes[f"/deltamem/layers.{i}/networks/MatMul"].inputs[0]
        above = _producer(hidden)
        if above is not None and above.name == f"/deltamem/layers.{i}/hidden":
            hidden = above.inputs[0]
        assert hidden is not None
        sites = {}
        for p in "qkvo":
            added = nodes.get(f"/deltamem/layers.{i}/delta_{p}")
            if added is not None and added.inputs[0] is not None:
                sites[p] = Site(added.inputs[0])
        found[i] = Attention(hidden, sites)
    return found


def watched_values(places: Mapping[Place, Traced]) -> dict[str, ir.Value]:
    """What a `GraphRun` must watch for these places."""
    return {f"{place}/{n}": value for place, traced in places.items() for n, value in enumerate(traced.values)}


def read_places(places: Mapping[Place, Traced], found: Mapping[str, Float32]) -> dict[Place, Float32]:
    """The places' values [T, width] from what the `GraphRun` returned."""
    values: dict[Place, Float32] = {}
    for place, traced in places.items():
        total = np.asarray(sum(found[f"{place}/{n}"] for n in range(len(traced.values))), np.float32)
        if traced.part is not None:
            start, end = traced.part
            total = total[:, start : end if end >= 0 else total.shape[1]]
        values[place] = total
    if "logits" in found:
        values[Place(None, LOGITS)] = found["logits"]
    return values


# ---------------------------------------------------------------------- in transformers


@contextlib.contextmanager
def hooked(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[Place, Float32]]:
    """While it lasts, every call of the model puts the values at the places of these layers into the dictionary, each
    [T, width] of the one sequence. Corrections are seen if the memory was attached before."""
    found: dict[Place, Float32] = {}
    hooks: list[Any] = []
    body = model.get_submodule("model")
    stack: Any = body.get_submodule("layers")

    def keep(place: Place, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        # A copy: some families go on in place (OLMo clamps what its projections return).
        found[place] = tensor.detach().to(torch.float32, copy=True).numpy().reshape(-1, tensor.shape[-1])

    def before(place: Place, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(place, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def after(place: Place, _module: nn.Module, _args: Any, output: Any) -> None:
        keep(place, output)

    def part(place: Place, projection: Projection, _module: nn.Module, _args: Any, output: Any) -> None:
        start = projection.start or 0
        keep(place, output[..., start : start + projection.width])

    for i, attention in enumerate(attentions(model)):
        if i not in layers or attention is None:
            continue
        hooks.append(stack[i].register_forward_pre_hook(partial(before, Place(i, LAYER_INPUT)), with_kwargs=True))
        hooks.append(attention.register_forward_pre_hook(partial(before, Place(i, ATTENTION_INPUT)), with_kwargs=True))
        for p, projection in projections(attention).items():
            plain, corrected = (partial(part, Place(i, mark + p), projection) for mark in ("", "Δ"))
            hooks.append(projection.module.register_forward_hook(plain, prepend=True))
            if p != "o":
                hooks.append(projection.module.register_forward_hook(corrected))
        hooks.append(attention.register_forward_hook(partial(after, Place(i, ATTENTION_OUTPUT))))
    hooks.append(stack[-1].register_forward_hook(partial(after, Place(None, LAST_LAYER))))
    head = model.get_output_embeddings()  # type: ignore[operator]
    hooks.append(head.register_forward_pre_hook(lambda _module, args: keep(Place(None, LAST_NORM), args[0])))
    hooks.append(model.register_forward_hook(lambda _m, _a, output: keep(Place(None, LOGITS), output.logits)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------------- how far apart


@dataclass
class Difference:
    """How far the two are apart at one place, over all calls so far. `size` is the largest value there."""

    place: Place
    max: float = 0.0
    total: float = 0.0
    count: int = 0
    size: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def relative(self) -> float:
        return self.max / max(self.size, 1e-6)


@dataclass
class Differences:
    """The differences at every place that both forms have."""

    places: dict[Place, Difference] = field(default_factory=dict)

    def add(self, want: Mapping[Place, Float32], got: Mapping[Place, Float32]) -> None:
        """One call. Values are [T, width] in both; a NaN counts as an infinite difference."""
        for place in sorted(want.keys() & got.keys(), key=lambda place: place.order):
            expected, found = want[place], got[place]
            at = self.places.setdefault(place, Difference(place))
            if expected.shape != found.shape:
                raise ExportError(f"{place}: the graph has {list(found.shape)}, transformers {list(expected.shape)}")
            diff = np.nan_to_num(np.abs(found - expected), nan=np.inf)
            at.max = max(at.max, float(diff.max(initial=0.0)))
            at.total += float(diff.sum(dtype=np.float64))
            at.count += diff.size
            at.size = max(at.size, float(np.abs(expected).max(initial=0.0)))

    def ordered(self) -> list[Difference]:
        return [self.places[place] for place in sorted(self.places, key=lambda place: place.order)]

    def first(self, relative: float) -> Difference | None:
        """The first place that is further apart than `relative` of its size, and by far more than any place before it:
        rounding grows from layer to layer, a mistake jumps. Without a jump, the first over `relative`."""
        ordered = self.ordered()
        largest = 0.0
        for at in ordered:
            if at.relative > relative and at.relative > _JUMP * largest:
                return at
            largest = max(largest, at.relative)
        return next((at for at in ordered if at.relative > relative), None)

    def where(self, place: Place) -> str:
        """What is computed between a place and the one before it, in words."""
        layer, what = place.layer, place.what
        own = f"layer {layer}" if layer is not None else ""
        norm = f"{own}: the norm in front of the attention" if own else "the last norm"
        if what in (LAYER_INPUT, LAST_LAYER):
            return self._before(layer)
        if what in (ATTENTION_INPUT, LAST_NORM):
            summed = Place(layer, LAYER_INPUT if own else LAST_LAYER)
            return norm if summed in self.places else f"{self._before(layer)}; or {norm}"
        if what == LOGITS:
            return "the lm_head"
        if what == STATE:
            return f"{own}: the memory's networks or rule"
        if what in ("o", ATTENTION_OUTPUT):
            return f"{own}: the attention or o_proj" if what == "o" else f"{own}: the memory's correction of o"
        return f"{own}: the memory's correction of {what[1:]}" if what.startswith("Δ") else f"{own}: {what}_proj"

    def _before(self, layer: int | None) -> str:
        """What lies between the attention that was seen last and the input of a layer (None: the end)."""
        earlier = [p.layer for p in self.places if p.layer is not None and (layer is None or p.layer < layer)]
        between = (max(earlier) if earlier else -1) + 1
        start = f"layer {max(earlier)}: behind the attention (norms or MLP)" if earlier else "the embedding"
        if layer is None:
            return start
        to = f" to {layer - 1}" if between < layer - 1 else ""
        others = f", or layer {between}{to}" if between < layer else ""
        return f"{start}{others}, seen at the input of layer {layer}"
