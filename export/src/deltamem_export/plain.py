"""GroupQueryAttention in standard operators, for what CUDA's own does not take: float32. It is slower and keeps past and present keys and
values apart, and it is exact; what it computes can be compared on any device. It knows nothing of memories.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir

from deltamem_export.errors import ExportError
from deltamem_export.fused import remove_unused
from deltamem_export.nodes import Nodes, int_attribute
from deltamem_export.structure import PLAIN

# What is added where nothing may be seen. Every token sees itself, so no row is all of these.
_UNSEEN = -1e30
_SINK = 11


def spell_out(source: Path, target: Path) -> None:
    """Writes a graph with every GroupQueryAttention in standard operators and `com.microsoft.RotaryEmbedding`.

    Past and present keys and values have exactly the rows that there are, [B, kv heads, P, head_dim] and [B, kv heads, P + T, head_dim].
    Several sequences (B > 1) are prompts without a past, padded behind.

    Args:
        source: the graph, in float32.
        target: where the new one goes, beside the same file of weights; it may be `source`.

    Raises:
        ExportError: an attention that has what is not known here.
    """
    model = ir.load(source)
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if attentions:
        shared = _Shared(graph)
        for node in attentions:
            _spell_out(graph, node, shared)
        graph.sort()
        remove_unused(graph)
    if target == source:
        source.unlink()  # it may be a second name of a file elsewhere
    ir.save(model, target)


class _Shared:
    """What all layers have in common: where the tokens stand, and which keys each may see."""

    def __init__(self, graph: ir.Graph) -> None:
        nodes = self.nodes = Nodes(graph, "/model/plain")
        inputs = {v.name: v for v in graph.inputs}
        if "input_ids" not in inputs or "attention_mask" not in inputs:
            raise ExportError("the graph has no input_ids and attention_mask, which say how many tokens there are")
        # [1] each: T, P + T, P.
        new = nodes("Shape", inputs["input_ids"], name="new", start=1, end=2)
        total = nodes("Shape", inputs["attention_mask"], name="total", start=1, end=2)
        self.past = nodes("Sub", total, new, name="past")
        zero, one = (nodes("Squeeze", nodes.ints([n]), name=f"number/{n}") for n in (0, 1))
        ends = [nodes("Squeeze", value, name=f"end/{n}") for n, value in enumerate((self.past, total))]
        rows = nodes("Range", ends[0], ends[1], one, name="rows/Range")
        self.rows = nodes("Unsqueeze", rows, nodes.ints([1]), name="rows")  # [T, 1]
        columns = nodes("Range", zero, ends[1], one, name="columns/Range")
        self.columns = nodes("Unsqueeze", columns, nodes.ints([0]), name="columns")  # [1, P + T]
        self._causal = nodes("LessOrEqual", self.columns, self.rows, name="causal")
        self._biases: dict[int, ir.Value] = {}

    def bias(self, window: int) -> ir.Value:
        """What is added to the scores, [T, P + T]: the last `window` keys are seen, or all with a window of -1."""
        if window not in self._biases:
            nodes, seen = self.nodes, self._causal
            if window > 0:
                first = nodes("Sub", self.rows, nodes.ints([window]), name=f"window/{window}/Sub")
                near = nodes("Greater", self.columns, first, name=f"window/{window}/Greater")
                seen = nodes("And", seen, near, name=f"window/{window}/And")
            self._biases[window] = nodes(
                "Where", seen, nodes.scalar(0.0), nodes.scalar(_UNSEEN), name=f"window/{window}/bias"
            )
        return self._biases[window]


def _spell_out(graph: ir.Graph, node: ir.Node, shared: _Shared) -> None:
    nodes = Nodes(graph, f"{str(node.name).rpartition('/')[0]}{PLAIN}")
    heads, kv_heads = int_attribute(node, "num_heads"), int_attribute(node, "kv_num_heads")
    given = [*node.inputs, *[None] * (_SINK + 1 - len(node.inputs))]
    query, key, value, past_key, past_value, _, _, cos, sin, *more = given[: _SINK + 1]
    sink, rest = given[_SINK], [*more[:2], *given[_SINK + 1 :]]
    known = {"num_heads", "kv_num_heads", "scale", "local_window_size", "softcap", "do_rotary", "rotary_interleaved"}
    odd = [name for name in node.attributes if name not in known]
    width = query.shape[-1] if query is not None and query.shape is not None else None
    if (
        odd
        or any(v is not None for v in rest)
        or not isinstance(width, int)
        or not query
        or not past_key
        or not past_value
    ):
        raise ExportError(
            f"{node.name}: has {', '.join(odd) or 'inputs'} that cannot be told in standard operators; choose fp16 or bf16 for CUDA"
        )
    if key is None or value is None:
        size = width // (heads + 2 * kv_heads)
        query, key, value = nodes.split(query, [heads * size, kv_heads * size, kv_heads * size], name="Split")
    else:
        size = width // heads
    if _number(node, "do_rotary"):
        rotary = _width(cos) * 2
        for_heads = {"interleaved": int(_number(node, "rotary_interleaved"))}
        query, key = (
            nodes(
                "RotaryEmbedding",
                x,
                shared.past,
                cos,
                sin,
                name=f"{label}/RotaryEmbedding",
                domain="com.microsoft",
                num_heads=n,
                rotary_embedding_dim=rotary if rotary < size else 0,
                **for_heads,
            )
            for label, x, n in (("q", query, heads), ("k", key, kv_heads))
        )

    # Heads that share keys lie side by side: [B, kv heads, group, T, size].
    query = nodes("Reshape", query, nodes.ints([0, 0, kv_heads, heads // kv_heads, size]), name="q/Reshape")
    query = nodes("Transpose", query, name="q", perm=[0, 2, 3, 1, 4])
    presents = []
    for label, new, past in (("k", key, past_key), ("v", value, past_value)):
        new = nodes("Reshape", new, nodes.ints([0, 0, kv_heads, size]), name=f"{label}/Reshape")
        new = nodes("Transpose", new, name=f"{label}/Transpose", perm=[0, 2, 1, 3])
        presents.append(nodes("Concat", past, new, name=f"{label}/Concat", axis=2))
    keys, values = (
        nodes("Unsqueeze", present, nodes.ints([2]), name=f"{label}/Unsqueeze")
        for label, present in zip("kv", presents, strict=True)
    )
    scale = _number(node, "scale") or 1.0 / math.sqrt(size)
    keys = nodes("Transpose", keys, name="k/turned", perm=[0, 1, 2, 4, 3])
    scores = nodes("MatMul", nodes("Mul", query, nodes.scalar(scale), name="q/scaled"), keys, name="scores/MatMul")
    cap = _number(node, "softcap")
    if cap:
        scores = nodes("Div", scores, nodes.scalar(cap), name="scores/Div")
        scores = nodes("Mul", nodes("Tanh", scores, name="scores/Tanh"), nodes.scalar(cap), name="scores/Mul")
    scores = nodes("Add", scores, shared.bias(int(_number(node, "local_window_size") or -1)), name="scores")
    if sink is None:
        weights = nodes("Softmax", scores, name="weights", axis=-1)
    else:
        # One more key, of which each head has the score and whose value is nothing.
        column = nodes("Reshape", sink, nodes.ints([1, kv_heads, heads // kv_heads, 1, 1]), name="sink/Reshape")
        first = nodes("Slice", scores, nodes.ints([0]), nodes.ints([1]), nodes.ints([-1]), name="sink/Slice")
        column = nodes("Expand", column, nodes("Shape", first, name="sink/Shape"), name="sink")
        weights = nodes(
            "Softmax", nodes("Concat", scores, column, name="sink/Concat", axis=-1), name="weights/all", axis=-1
        )
        weights = nodes("Slice", weights, nodes.ints([0]), nodes.ints([-1]), nodes.ints([-1]), name="weights")
    out = nodes("MatMul", weights, values, name="out/MatMul")
    out = nodes("Transpose", out, name="out/Transpose", perm=[0, 3, 1, 2, 4])
    out = nodes("Reshape", out, nodes.ints([0, 0, heads * size]), name="out")

    made = [out, *presents]
    for old, new in zip(node.outputs, made, strict=True):
        new.type, new.shape = old.type, old.shape
        for use in tuple(old.uses()):
            use.node.replace_input_with(use.idx, new)
        for at, output in enumerate(graph.outputs):
            if output is old:
                old.name, new.name = f"{old.name}/attention", old.name
                graph.outputs[at] = new
    graph.remove(node, safe=True)


def _number(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    if attribute is None:
        return 0.0
    return float(attribute.as_int() if attribute.type == ir.AttributeType.INT else attribute.as_float())


def _width(table: ir.Value | None) -> int:
    width = table.shape[-1] if table is not None and table.shape is not None else None
    if not isinstance(width, int):
        raise ExportError("RoPE's table has no known width; choose fp16 or bf16 for CUDA")
    return width
