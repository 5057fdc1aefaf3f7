"""Compares the builder's graph, before anything is grafted, with transformers on the same weights. The
builder is wrong for some families and says nothing; a memory on a wrong decoder would be wrong too. It knows
nothing of memories or bundles.

What "the same weights" means stands in `weights.py`. A graph with quantised weights is run with activations in
float32 (accuracy level 1), since the rounding of activations to int8 would hide as much as that of weights. The
CPU has no bfloat16: such a graph is widened to float32, so its structure and its rounded weights are compared, and
its 16-bit arithmetic is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
import transformers

from deltamem_export.backbone import Backbone
from deltamem_export.errors import ExportError
from deltamem_export.precision import Precision
from deltamem_export.weights import in_float32, weights_of, with_float_activations

# The largest difference allowed while no logit is above LARGE; arithmetic loses digits in proportion to
# larger ones.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-1, "bf16": 1e-4, "int8": 1e-4, "int4": 1e-4}
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


def check(backbone: Backbone, graph: Path, precision: Precision) -> Check:
    """Runs both on the same random tokens: one prefill, then the rest on its KV cache, more tokens in all
    than any window.

    Raises:
        ExportError: the difference is over the tolerance; says how large, on average and at most, and where.
    """
    tokens = _length(backbone)
    ids = np.random.default_rng(0).integers(0, backbone.geometry.vocab_size, tokens)
    backbone.to_float32()
    with weights_of(graph, backbone.model, precision), torch.inference_mode():
        want = backbone.model(torch.from_numpy(ids[None]), use_cache=False).logits[0].numpy()
    got = _run(graph, ids, tokens * 3 // 4, backbone, precision)

    size = float(np.abs(want).max())
    tolerance = TOLERANCES[precision.name] * max(1.0, size / LARGE)
    diff = np.abs(got - want)
    worst, mean = float(diff.max()), float(diff.mean())
    if not worst <= tolerance:  # a NaN is not within it either
        position, token = np.unravel_index(int(np.nan_to_num(diff, nan=np.inf).argmax()), diff.shape)
        first = int(np.argmax(~(diff.max(axis=1) <= tolerance)))
        raise ExportError(
            f"the graph that onnxruntime-genai built for {backbone.geometry.architecture} differs from "
            "transformers "
            f"{transformers.__version__} by {worst:.3g} at most and {mean:.3g} on average in the logits "
            f"(tolerance {tolerance:.3g}); "
            f"worst at position {position}, token id {token}, first over tolerance at position {first} of "
            f"{tokens}. The builder is "
            "wrong about something in this configuration, so it cannot be exported"
        )
    return Check(f"transformers {transformers.__version__}", tokens, worst, mean, tolerance)


def _length(backbone: Backbone) -> int:
    window = getattr(backbone.config, "sliding_window", None) or 0
    return int(min(max(MIN_TOKENS, 2 * window), backbone.geometry.context_length))


def _run(graph: Path, ids: npt.NDArray[np.int64], split: int, backbone: Backbone, precision: Precision) -> Float32:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    path = graph
    if precision.quantised:
        path = with_float_activations(graph)
    elif precision.name == "bf16":
        path = in_float32(graph)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    g = backbone.geometry
    empty = np.zeros((1, g.num_kv_heads, 0, g.head_dim), np.float16 if precision.name == "fp16" else np.float32)
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    rows = []
    for start, end in ((0, split), (split, len(ids))):
        feeds: dict[str, Any] = {
            "input_ids": ids[None, start:end],
            "attention_mask": np.ones((1, end), np.int64),
            **past,
        }
        if "position_ids" in wanted:
            feeds["position_ids"] = np.arange(start, end, dtype=np.int64)[None]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        rows.append(found["logits"][0].astype(np.float32))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return np.concatenate(rows)
