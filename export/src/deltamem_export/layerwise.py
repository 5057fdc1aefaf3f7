"""The comparison with transformers for models too large to be run twice on one machine: layer by layer. Each layer's
piece of the graph is cut out by structure, from what the layers before have added up to what it leaves behind, and
run with its own weights alone; the same layer of the transformers model runs in float32 on the same hidden vectors.
The embedding in front and the last norm with the lm_head behind are pieces of their own. At most one layer is held in
float32 on either side.

The hidden vectors are random and of all sizes, from far below a norm's epsilon to far above it, so that a wrong
epsilon shows. What this method cannot show is how differences of one layer grow in the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import transformers
from torch import Tensor, nn

from deltamem_export.backbone import Backbone
from deltamem_export.check import LARGE, MIN_TOKENS, TOLERANCES, Check, load_graph
from deltamem_export.errors import ExportError
from deltamem_export.precision import Precision
from deltamem_export.probe import before_norm, kv_layers, lm_head_input
from deltamem_export.runner import GraphRun
from deltamem_export.structure import FindAttentions
from deltamem_export.weights import weights_of

Float32 = npt.NDArray[np.float32]
# A window is passed by this many tokens.
_BEYOND = 32
# Logits of a large vocabulary are compared for this many tokens.
_HEAD_TOKENS = 32


@dataclass(frozen=True)
class _Piece:
    """Layers first to last - 1, between two sums of the residual stream. (n, n) is what comes behind the last of n."""

    first: int
    last: int
    start: tuple[ir.Value, ...]
    end: tuple[ir.Value, ...]

    def __str__(self) -> str:
        if not self.end:
            return "the last norm or the lm_head"
        if not self.start:
            return "the embedding" + (f", or layers 0 to {self.last - 1}" if self.last else "")
        more = f" to {self.last - 1} (one of them)" if self.last > self.first + 1 else ""
        return f"layer{'s' if more else ''} {self.first}{more}"


def check_layers(backbone: Backbone, graph: Path, precision: Precision, find: FindAttentions) -> Check:
    """Compares every piece of the graph with the same layers of the transformers model.

    Raises:
        ExportError: a piece differs by more than the tolerance, and which; or the graph cannot be cut.
    """
    model = load_graph(graph, precision)
    worst, total, count, tolerance = 0.0, 0.0, 0, TOLERANCES[precision.arithmetic]
    tokens = _length(backbone)
    for piece in _pieces(model.graph, len(_stack(backbone.model)), find):
        rows = tokens if piece.end else _HEAD_TOKENS
        given = _hidden(rows, backbone.geometry.hidden_size, precision) if piece.start else None
        ids = np.random.default_rng(0).integers(0, backbone.geometry.vocab_size, rows)
        want = _transformers(backbone, graph, precision, piece, ids, given)
        got = _onnx(model, graph.parent, backbone, piece, ids, given)
        diff = np.nan_to_num(np.abs(got - want), nan=np.inf)
        # Rows are of very different sizes, and each is held to its own.
        scaled = diff.max(axis=1) / np.maximum(1.0, np.abs(want).max(axis=1) / LARGE)
        row = int(scaled.argmax())
        if scaled[row] > tolerance:
            raise ExportError(
                f"the graph that onnxruntime-genai built for {backbone.geometry.architecture} differs from "
                f"transformers {transformers.__version__} in {piece}: by {diff[row].max():.3g} at most at position {row} "
                f"of {rows}, where values reach {np.abs(want[row]).max():.3g} (tolerance "
                f"{tolerance * max(1.0, float(np.abs(want[row]).max()) / LARGE):.3g}). The builder is wrong about "
                "something in this configuration, so it cannot be exported"
            )
        worst = max(worst, float(scaled[row]))
        total += float(diff.sum(dtype=np.float64))
        count += diff.size
    return Check(f"transformers {transformers.__version__}", tokens, worst, total / count, tolerance, "layers")


def _length(backbone: Backbone) -> int:
    window = getattr(backbone.config, "sliding_window", None) or 0
    return int(min(max(MIN_TOKENS, window + _BEYOND), backbone.geometry.context_length))


def _hidden(tokens: int, width: int, precision: Precision) -> Float32:
    """[T, width]: random vectors whose sizes go from 1e-3 to 10 and are in no order."""
    rng = np.random.default_rng(1)
    sizes = rng.permutation(np.geomspace(1e-3, 10.0, tokens))[:, None]
    vectors = (rng.standard_normal((tokens, width)) * sizes).astype(np.float32)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision.arithmetic)
    found: Float32 = vectors if kind is None else torch.from_numpy(vectors).to(kind).float().numpy()
    return found


# ---------------------------------------------------------------------- the graph's side


def _pieces(graph: ir.Graph, layers: int, find: FindAttentions) -> list[_Piece]:
    """The embedding, then from each layer with attention to the next one, then the last norm and the lm_head."""
    found = find(graph, kv_layers(graph))
    edges = [(i, before_norm(attention.hidden)) for i, attention in sorted(found.items())]
    edges.append((layers, before_norm(lm_head_input(graph))))
    for i, values in edges:
        if values is None:
            raise ExportError(
                f"no norm was found in front of {f'the attention of layer {i}' if i < layers else 'the lm_head'}, so the "
                "graph cannot be compared layer by layer; use --check whole on a machine with more memory"
            )
    cuts = [(i, values) for i, values in edges if values is not None]
    first, last = cuts[0], cuts[-1]
    between = [_Piece(i, j, start, end) for (i, start), (j, end) in pairwise(cuts)]
    return [_Piece(0, first[0], (), first[1]), *between, _Piece(last[0], last[0], last[1], ())]


def _onnx(
    model: ir.Model, folder: Path, backbone: Backbone, piece: _Piece, ids: npt.NDArray[np.int64], given: Float32 | None
) -> Float32:
    """What the piece leaves behind, [T, width], or the logits: three quarters in one call, the rest on its cache."""
    graph = model.graph
    ends = list(piece.end) or [v for v in graph.outputs if v.name == "logits"]
    numbers = range(piece.first, piece.last)
    states = [
        v for v in graph.outputs if v.name and v.name.startswith("present.") and int(v.name.split(".")[1]) in numbers
    ]
    inputs = [*piece.start, *_needed(graph, [*ends, *states], piece.start)]
    try:
        cut = ir.Model(ir.convenience.extract(graph, inputs, [*ends, *states]), ir_version=model.ir_version)
    except ValueError as error:
        raise ExportError(f"{piece} cannot be cut out of the graph ({error}); use --check whole") from error
    named = {v.name: v for node in cut.graph for v in node.outputs} | {v.name: v for v in cut.graph.inputs}
    watched = {f"end {n}": named[v.name] for n, v in enumerate(ends)}
    for _ in ends:  # they are watched instead
        cut.graph.outputs.pop(0)
    g = backbone.geometry
    run = GraphRun(cut, folder, (g.num_kv_heads, g.head_dim), watched)
    # A sum of two takes the vectors in the first and zeros in the second.
    more: dict[str, Any] = {}
    for n, value in enumerate(piece.start):
        assert given is not None
        more[str(value.name)] = (given if n == 0 else np.zeros_like(given))[None]
    found = run.feed(ids, (len(ids) * 3 // 4,), **more)
    total: Float32 = np.asarray(sum(found[label] for label in watched), np.float32)
    return total


def _needed(graph: ir.Graph, ends: Sequence[ir.Value], stops: Sequence[ir.Value]) -> list[ir.Value]:
    """The graph's own inputs that these values depend on, when the walk up to them ends at `stops`."""
    inputs = set(graph.inputs)
    seen: set[ir.Value] = set(stops)
    walk = [v for v in ends if v not in seen]
    found: dict[ir.Value, None] = {}
    while walk:
        value = walk.pop()
        if value in inputs:
            found[value] = None
        node = value.producer()
        for above in node.inputs if node is not None else ():
            if above is not None and above not in seen:
                seen.add(above)
                walk.append(above)
    return list(found)


# ---------------------------------------------------------------------- transformers' side


class _Reached(Exception):
    """The piece's end was reached; nothing behind it is run."""


def _transformers(
    backbone: Backbone,
    graph: Path,
    precision: Precision,
    piece: _Piece,
    ids: npt.NDArray[np.int64],
    given: Float32 | None,
) -> Float32:
    model: Any = backbone.model
    stack = _stack(model)
    hidden = torch.from_numpy(given[None]) if given is not None else None
    found: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (hidden, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise _Reached

    def left(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    own = list(stack[piece.first : piece.last])
    if not piece.start:
        own.append(model.get_input_embeddings())
    if not piece.end:
        own += [
            *(child for name, child in model.model.named_children() if "norm" in name),
            model.get_output_embeddings(),
        ]
    hooks = []
    tuples = _returns_tuples(model) if given is not None else False
    with contextlib.ExitStack() as scope:
        scope.enter_context(torch.inference_mode())
        scope.enter_context(_widened(own))
        scope.enter_context(weights_of(graph, model, precision, own))
        for i, layer in enumerate(stack):
            if i < piece.first or i >= piece.last:
                scope.enter_context(_passing(layer, hidden if i == len(stack) - 1 else None, tuples))
        if piece.start and piece.first < piece.last:
            hooks.append(own[0].register_forward_pre_hook(enter, with_kwargs=True))
        if piece.end and piece.last > piece.first:
            hooks.append(own[piece.last - piece.first - 1].register_forward_hook(left))
        elif piece.end:
            hooks.append(stack[0].register_forward_pre_hook(leave, with_kwargs=True))
        try:
            if hidden is None:
                model(input_ids=torch.from_numpy(ids[None]), use_cache=False)
            else:
                found.append(model(inputs_embeds=hidden, use_cache=False).logits)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
    return found[0][0].float().numpy()


def _stack(model: nn.Module) -> Any:
    return model.get_submodule("model.layers")


def _returns_tuples(model: Any) -> bool:
    """Whether the model's layers return a tuple or the hidden vectors alone."""
    found: list[bool] = []

    def left(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
        raise _Reached

    hook = _stack(model)[0].register_forward_hook(left)
    try:
        with torch.inference_mode(), contextlib.suppress(_Reached):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    finally:
        hook.remove()
    return found[0]


@contextlib.contextmanager
def _passing(layer: nn.Module, instead: Tensor | None, tuples: bool) -> Iterator[None]:
    """While it lasts, the layer hands on what it is given, or `instead`."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden_states if instead is None else instead
        return (out,) if tuples else out

    layer.forward = forward  # the class's own comes back when this one is deleted
    try:
        yield
    finally:
        del layer.forward


@contextlib.contextmanager
def _widened(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, the modules' parameters are float32."""
    parameters = {id(p): p for module in modules for p in module.parameters()}
    kept = [(parameter, parameter.data) for parameter in parameters.values()]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
