"""The KV cache in 8 bits: one scale for every channel of every layer's keys and values, found by running the finished
graph (memory and all) on some text, then written into the graph. GroupQueryAttention rounds what it puts into the
cache and reads all of it back from there, so any split of a stream still gives the same result. It knows nothing of
bundles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from blake3 import blake3
from tokenizers import Tokenizer

from deltamem_export.errors import ExportError
from deltamem_export.nodes import int_attribute
from deltamem_export.runner import GraphRun

TOKENS = 512
_CHUNK = 64
# Text that was not seen goes further, and what goes beyond the scale is cut off, which costs more than coarser steps:
# on the embedded default, KL 1.9e-2 at 1.2, 2.7e-3 at 2, 1.1e-3 at 2.5, 2.2e-3 at 4.
_MARGIN = 2.5
_LEVELS = 127.0
_K_SCALE, _V_SCALE = 12, 13

Float32 = npt.NDArray[np.float32]

# Prose, talk, code, figures and other languages, since their keys differ.
TEXT = """The lighthouse had stood empty for eleven years when Marta came back to it, with two suitcases and a letter she
had not opened. The stairs were dry. Someone had swept them.
User: Could you remind me when my train leaves on Thursday? Assistant: At 8:42 from platform 3; you change in Lyon and
arrive at 13:07. User: And my sister's new address? Assistant: 17 Harbour Street, second floor.
def mean(values): return sum(values) / len(values) if values else float("nan")  # 0.333, 1e-6, -273.15
SELECT name, COUNT(*) FROM orders WHERE total > 1000 GROUP BY name ORDER BY 2 DESC LIMIT 10;
La pluie tombait depuis trois jours et personne ne parlait plus de la récolte. Der Zug hatte, wie immer, Verspätung.
Water boils at 100 degrees; the train was 3,141.59 m long; 2 + 2 = 4; {"id": 7, "tags": ["a", "b"], "ok": true}
1. Wash the rice until the water runs clear. 2. Bring it to the boil. 3. Cover it, and do not lift the lid for twelve
minutes. Why? Because the steam finishes what the water began.
"""


@dataclass(frozen=True)
class KvScales:
    """`scales[i]`: of layer i's keys and values, float32 [kv heads, head_dim] each."""

    scales: dict[int, tuple[Float32, Float32]]

    @property
    def digest(self) -> str:
        """BLAKE3 over all scales, 64 hex digits: they change results, so they are part of the fingerprint."""
        hasher = blake3()
        for i in sorted(self.scales):
            for scale in self.scales[i]:
                hasher.update(scale.tobytes())
        return str(hasher.hexdigest())


def sample_ids(tokenizer: Path | None, vocab_size: int) -> npt.NDArray[np.int64]:
    """512 token ids, [T]: of the text above, repeated, or random ones where there is no tokenizer."""
    if tokenizer is not None:
        ids = Tokenizer.from_file(str(tokenizer)).encode(TEXT, add_special_tokens=False).ids
        if ids:
            return np.resize(np.asarray(ids, np.int64), TOKENS)
    return np.random.default_rng(0).integers(0, vocab_size, TOKENS)


def quantise_kv(graphs: Sequence[Path], ids: npt.NDArray[np.int64], cache: tuple[int, int]) -> tuple[KvScales, float]:
    """Gives graphs that share their attention (the grafted one first) a KV cache in 8 bits, in place.

    Args:
        graphs: files of graphs; the first is run to find the scales.
        ids: [T], what it is run on.
        cache: kv heads and head_dim.

    Returns:
        the scales, and the largest difference that the first graph's logits have on the same ids afterwards.

    Raises:
        ExportError: an attention that has no such form, or a cache that is not finite.
    """
    first = ir.load(graphs[0])
    run = GraphRun(first, graphs[0].parent, cache)
    cuts = range(_CHUNK, len(ids), _CHUNK)
    before = run.feed(ids, cuts)["logits"]
    scales = KvScales(
        {
            i: (_key_scale(node, run.past[f"past_key_values.{i}.key"]), _scale(run.past[f"past_key_values.{i}.value"]))
            for i, node in _attentions(first.graph).items()
        }
    )
    del run
    for path in graphs:
        model = ir.load(path)
        _quantise(model.graph, scales)
        ir.save(model, path)
    after = GraphRun(ir.load(graphs[0]), graphs[0].parent, cache).feed(ids, cuts)["logits"]
    return scales, float(np.abs(after - before).max())


def read_scales(graph: Path) -> KvScales | None:
    """The scales that a graph was given; None where its cache is not in 8 bits."""
    model = ir.load(graph)
    scales = {}
    for i, node in _attentions(model.graph).items():
        found = [node.inputs[at] if at < len(node.inputs) else None for at in (_K_SCALE, _V_SCALE)]
        tensors = [value.const_value for value in found if value is not None]
        if len(tensors) == 2 and tensors[0] is not None and tensors[1] is not None:
            scales[i] = (tensors[0].numpy(), tensors[1].numpy())
    return KvScales(scales) if scales else None


def with_float_cache(graph: ir.Graph) -> None:
    """Takes the 8 bits back, in place: the same graph with its KV cache in the type of its activations."""
    for i, node in _attentions(graph).items():
        activations = node.inputs[0]
        assert activations is not None
        for value in (*graph.inputs, *graph.outputs):
            if value.name in [
                f"{side}.{i}.{what}" for side in ("past_key_values", "present") for what in ("key", "value")
            ]:
                value.type = ir.TensorType(activations.dtype or ir.DataType.FLOAT)
        for at, what in ((_K_SCALE, "k"), (_V_SCALE, "v")):
            node.replace_input_with(at, None)
            node.attributes.pop(f"{what}_quant_type")
        node.attributes.pop("kv_cache_bit_width")


def _attentions(graph: ir.Graph) -> dict[int, ir.Node]:
    """Layer → the GroupQueryAttention that its cache feeds."""
    found = {}
    for value in graph.inputs:
        name = str(value.name)
        if not name.startswith("past_key_values.") or not name.endswith(".key"):
            continue
        nodes = [use.node for use in value.uses()]
        if len(nodes) != 1 or nodes[0].op_type != "GroupQueryAttention":
            raise ExportError(
                f"{name} feeds {', '.join(n.op_type for n in nodes) or 'nothing'}; an int8 KV cache needs "
                "GroupQueryAttention. Export with the KV cache as it is"
            )
        found[int(name.split(".")[1])] = nodes[0]
    return found


def _scale(values: Any) -> Float32:
    """[1, kv heads, T, head_dim] → [kv heads, head_dim]."""
    largest = np.abs(values[0].astype(np.float32)).max(axis=1)
    if not np.isfinite(largest).all():
        raise ExportError("the KV cache holds NaN or infinity on the calibration text; it cannot be put into 8 bits")
    scale: Float32 = np.maximum(largest * np.float32(_MARGIN / _LEVELS), np.float32(1e-8))
    return scale


def _key_scale(node: ir.Node, keys: Any) -> Float32:
    """Keys lie in the cache after RoPE, which turns pairs of channels into each other as positions go on: the two of a
    pair share the length of both. Where RoPE is a node of its own, its pairs are not known, and a head shares one."""
    scale = _scale(keys)  # [kv heads, head_dim]
    if not int_attribute(node, "do_rotary"):
        return np.broadcast_to(scale.max(axis=1, keepdims=True), scale.shape).copy()
    table = node.inputs[7]
    if table is None or table.shape is None or not isinstance(table.shape[1], int):
        raise ExportError(f"{node.name}: has no table of cosines with a known width")
    half = int(table.shape[1])
    interleaved = "rotary_interleaved" in node.attributes and int_attribute(node, "rotary_interleaved")
    pairs = np.arange(2 * half).reshape((half, 2) if interleaved else (2, half))
    first, second = (pairs[:, 0], pairs[:, 1]) if interleaved else (pairs[0], pairs[1])
    both = np.abs(keys[0].astype(np.float32))
    length = np.sqrt(both[..., first] ** 2 + both[..., second] ** 2).max(axis=1)  # [kv heads, half]
    length = np.maximum(length * np.float32(_MARGIN / _LEVELS), np.float32(1e-8))
    scale[:, first] = scale[:, second] = length
    return scale


def _quantise(graph: ir.Graph, scales: KvScales) -> None:
    kind = ir.TensorType(ir.DataType.INT8)
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")) and str(value.name).endswith(
            (".key", ".value")
        ):
            value.type = kind
    for i, node in _attentions(graph).items():
        node.resize_inputs(max(len(node.inputs), _V_SCALE + 1))
        for at, what, scale in zip((_K_SCALE, _V_SCALE), "kv", scales.scales[i], strict=True):
            name = f"deltamem.kv.{i}.{what}_scale"
            value = ir.Value(
                name=name,
                shape=ir.Shape([scale.size]),
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=ir.tensor(scale.reshape(-1), name=name),
            )
            graph.register_initializer(value)
            node.replace_input_with(at, value)
            node.attributes[f"{what}_quant_type"] = ir.AttrString(f"{what}_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
