"""Compares the builder's graph, before anything is grafted, with transformers on the same weights. The
builder is wrong for some families and says nothing; a memory on a wrong decoder would be wrong too. It knows
nothing of memories or bundles.

Two methods: `whole` runs both models and compares the logits; `layers` (`layerwise.py`) runs one layer at a time, for
models too large to be run twice on this machine.

What "the same weights" means stands in `weights.py`. A graph with quantised weights is run with activations in
float32 (accuracy level 1), since the rounding of activations to int8 would hide as much as that of weights. The
CPU has no bfloat16: such a graph is widened to float32, so its structure and its rounded weights are compared, and
its 16-bit arithmetic is not.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import transformers

from deltamem_export.backbone import Backbone
from deltamem_export.errors import ExportError
from deltamem_export.precision import Precision
from deltamem_export.probe import Differences, find_places, hooked, kv_layers, read_places, watched_values
from deltamem_export.runner import GraphRun
from deltamem_export.structure import FindAttentions, find_attentions
from deltamem_export.weights import in_float32, weights_of

METHODS = ("whole", "layers")
# The largest difference allowed while no logit is above LARGE; arithmetic loses digits in proportion to
# larger ones.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-1, "bf16": 1e-4}  # by the graph's arithmetic
LARGE = 10.0
MIN_TOKENS = 160

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Check:
    """The manifest's record of a comparison that passed."""

    against: str
    tokens: int
    max_abs_diff: float
    mean_abs_diff: float
    tolerance: float
    method: str = "whole"


def choose_method(backbone: Backbone, graph: Path, precision: Precision) -> tuple[str, str]:
    """`whole` if both models fit into the memory that is free now, else `layers`; and why, in words."""
    parameters = list(backbone.model.parameters())
    held = sum(p.numel() * p.element_size() for p in parameters)
    logits = check_length(backbone) * backbone.geometry.vocab_size * 4 * 3
    weights = sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))
    wide = sum(p.numel() * 4 for p in parameters)
    # At other precisions the weights as the graph has them stand beside the files' own, and ONNX Runtime widens 16 bits.
    rounded = 0 if precision.name == "fp32" else wide + backbone.model.get_output_embeddings().weight.numel() * 4
    running = weights * (1.25 if precision.arithmetic == "fp32" else 3)
    need = wide + rounded - held + int(running) + logits
    free = free_memory()
    fits = need <= free * 0.9
    said = f"both models at once take {need / 2**30:.1f} GiB more, {free / 2**30:.1f} GiB are free"
    return ("whole" if fits else "layers"), said


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of the control group it runs in."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def check(
    backbone: Backbone,
    graph: Path,
    precision: Precision,
    method: str = "whole",
    find: FindAttentions = find_attentions,
) -> Check:
    """Compares the graph with transformers.

    `whole` runs both on the same random tokens: one prefill, then the rest on its KV cache, more tokens in all
    than any window. `layers` does the same for each layer alone, on random hidden vectors. `find` says where the
    graph's attention is.

    Raises:
        ExportError: the difference is over the tolerance; says how large, on average and at most, and where.
    """
    if method == "layers":
        from deltamem_export.layerwise import check_layers

        return check_layers(backbone, graph, precision, find)
    tokens = check_length(backbone)
    ids = np.random.default_rng(0).integers(0, backbone.geometry.vocab_size, tokens)
    split = tokens * 3 // 4
    backbone.to_float32()
    with weights_of(graph, backbone.model, precision), torch.inference_mode():
        want = backbone.model(torch.from_numpy(ids[None]), use_cache=False).logits[0].numpy()
    got = open_graph(graph, backbone, precision).feed(ids, (split,))["logits"]

    size = float(np.abs(want).max())
    tolerance = TOLERANCES[precision.arithmetic] * max(1.0, size / LARGE)
    diff = np.abs(got - want)
    worst, mean = float(diff.max()), float(diff.mean())
    if not worst <= tolerance:  # a NaN is not within it either
        position, token = np.unravel_index(int(np.nan_to_num(diff, nan=np.inf).argmax()), diff.shape)
        first = int(np.argmax(~(diff.max(axis=1) <= tolerance)))
        place = _first_place(backbone, graph, precision, ids[: first + 1], split, find)
        raise ExportError(
            f"the graph that onnxruntime-genai built for {backbone.geometry.architecture} differs from "
            f"transformers {transformers.__version__} by {worst:.3g} at most and {mean:.3g} on average in the logits "
            f"(tolerance {tolerance:.3g}); worst at position {position}, token id {token}, first over tolerance at "
            f"position {first} of {tokens}. The first place that differs is {place}. The builder is wrong about "
            "something in this configuration, so it cannot be exported"
        )
    return Check(f"transformers {transformers.__version__}", tokens, worst, mean, tolerance)


def check_length(backbone: Backbone) -> int:
    """More tokens than any window, as far as the context allows."""
    window = getattr(backbone.config, "sliding_window", None) or 0
    return int(min(max(MIN_TOKENS, 2 * window), backbone.geometry.context_length))


def open_graph(graph: Path, backbone: Backbone, precision: Precision) -> GraphRun:
    """The graph, ready to run."""
    g = backbone.geometry
    return GraphRun(load_graph(graph, precision), graph.parent, (g.num_kv_heads, g.head_dim))


def load_graph(graph: Path, precision: Precision, scratch: Path | None = None) -> ir.Model:
    """The graph as it is compared, its weights left in their file: quantised products at accuracy level 1, bfloat16 as
    float32 (a new file beside the graph, or in `scratch`)."""
    model = ir.load(in_float32(graph, scratch) if precision.name == "bf16" else graph)
    if precision.quantised:
        for node in model.graph:
            if node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return model


def _first_place(
    backbone: Backbone, graph: Path, precision: Precision, ids: npt.NDArray[np.int64], split: int, find: FindAttentions
) -> str:
    """Where the two part, in words. ids: up to the first position that is over the tolerance."""
    model = load_graph(graph, precision)
    layers = kv_layers(model.graph)
    places = find_places(model.graph, find(model.graph, layers))
    model_of_graph = weights_of(graph, backbone.model, precision)
    with model_of_graph, torch.inference_mode(), hooked(backbone.model, layers) as want:
        backbone.model(torch.from_numpy(ids[None]), use_cache=False)
    g = backbone.geometry
    run = GraphRun(model, graph.parent, (g.num_kv_heads, g.head_dim), watched_values(places))
    differences = Differences()
    differences.add(want, read_places(places, run.feed(ids, (split,) if split < len(ids) else ())))
    first = differences.first(TOLERANCES[precision.arithmetic] / LARGE)
    if first is None:
        return "not found: every place inside is within the tolerance"
    return f"{differences.where(first.place)}, off by {first.max:.3g} where values reach {first.size:.3g}"
