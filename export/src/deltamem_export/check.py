"""Compares the builder's graph, before anything is grafted, with transformers on the same weights. The
builder is wrong for some families and says nothing; a memory on a wrong decoder would be wrong too. It knows
nothing of memories or bundles.

What "the same weights" means: fp32: the files'; fp16: the files' rounded to float16; int4: what the graph's
4-bit blocks stand for. So the tolerance covers arithmetic alone, and a mistake in the graph cannot hide
behind the rounding of weights. For int4 the graph is run with activations in float32 (accuracy level 1),
since the rounding of activations to int8 would hide as much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers
from torch import nn

from deltamem_export.backbone import Backbone
from deltamem_export.errors import ExportError
from deltamem_export.precision import Precision

# The largest difference allowed while no logit is above LARGE; arithmetic loses digits in proportion to
# larger ones.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-1, "int4": 1e-4}
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
    with _weights_of(graph, backbone, precision), torch.inference_mode():
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
    path = _with_float_activations(graph) if precision.name == "int4" else graph
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


def _with_float_activations(graph: Path) -> Path:
    """The same graph at accuracy level 1, beside it, on the same weights' file."""
    model = ir.load(graph)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    path = graph.with_name("check.onnx")
    ir.save(model, path)
    return path


# ---------------------------------------------------------------------- transformers with the graph's weights


@contextlib.contextmanager
def _weights_of(graph: Path, backbone: Backbone, precision: Precision) -> Iterator[None]:
    """While it lasts, the backbone's linear layers hold what the graph's weights stand for."""
    model = backbone.model
    kept: list[tuple[nn.Module, nn.Parameter]] = []

    def put(module: nn.Module, weight: torch.Tensor) -> None:
        kept.append((module, module.get_parameter("weight")))
        module.weight = nn.Parameter(weight, requires_grad=False)

    try:
        if precision.name == "fp16":
            for module in model.modules():
                if isinstance(getattr(module, "weight", None), nn.Parameter):
                    put(module, module.get_parameter("weight").half().float())
        elif precision.name == "int4":
            for name, weight in _dequantised(graph):
                parts = _modules(model, name)
                split = torch.split(weight, [m.get_parameter("weight").shape[0] for m in parts])
                for module, part in zip(parts, split, strict=True):
                    put(module, part)
        yield
    finally:
        for module, parameter in reversed(kept):
            module.weight = parameter


def _dequantised(graph: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each MatMulNBits of the graph: its node's name and its weight, [out, in], as float32."""
    for node in ir.load(graph).graph:
        if node.op_type != "MatMulNBits":
            continue
        bits, k, n = (node.attributes[a].as_int() for a in ("bits", "K", "N"))
        block = node.attributes["block_size"].as_int()
        packed, scales = (_array(node.inputs[at]) for at in (1, 2))
        zeros = _array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
        if bits != 4 or zeros is not None:
            raise ExportError(
                f"{node.name}: {bits} bits {'with' if zeros is not None else 'without'} zero points are not checked"
            )
        packed = packed.reshape(n, -1, block // 2)
        levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, -1, block).astype(np.float32) - 8.0
        weight = (levels * scales.reshape(n, -1, 1).astype(np.float32)).reshape(n, -1)[:, :k]
        yield str(node.name), torch.from_numpy(np.ascontiguousarray(weight))


def _modules(model: nn.Module, node: str) -> list[nn.Module]:
    """/model/layers.0/attn/qkv_proj/MatMul_Q4 → q_proj, k_proj and v_proj of that layer."""
    path = node.strip("/").rsplit("/", 1)[0].replace("/", ".").replace(".attn.", ".self_attn.")
    try:
        if path.endswith(".qkv_proj"):
            return [model.get_submodule(path.replace("qkv_proj", f"{p}_proj")) for p in "qkv"]
        return [model.get_submodule(path)]
    except AttributeError:
        raise ExportError(f"the built graph has {node}, for which {type(model).__name__} has no module") from None


def _array(value: ir.Value | None) -> npt.NDArray[Any]:
    if value is None or value.const_value is None:
        raise ExportError("a quantised product of the built graph has no constant weights")
    return value.const_value.numpy()
