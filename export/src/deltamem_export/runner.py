"""Runs a decoder's graph with Python's own onnxruntime and carries what it leaves from call to call: the KV cache, the
other states of a turn, the memory. docs/bundle.md is what it follows; a graph without a memory is run as well. It
shares nothing with the runtime and compares nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch

from deltamem_export.errors import ExportError
from deltamem_export.nodes import Nodes, name_of

_FLOAT = ir.DataType.FLOAT
_CUDA = "CUDAExecutionProvider"
_PAST = re.compile(r"past(_key_values)?(?=[._])")

Float32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """The spans of one call's tokens: `ids` int32 [T], ascending, -1 = in none."""

    ids: npt.NDArray[np.int32]

    def weights(self) -> Float32:
        """[S, T]: 1/length of span s for the tokens in it."""
        member = (self.ids[None] == np.unique(self.ids[self.ids >= 0])[:, None]).astype(np.float32)
        weights: Float32 = member / member.sum(axis=1, keepdims=True)
        return weights


class GraphRun:
    """One sequence on one graph. `feed` goes on with the turn; `end_turn` drops what a turn carries; `memory` stays."""

    def __init__(
        self,
        model: ir.Model,
        folder: Path,
        cache: tuple[int, int],
        watched: Mapping[str, ir.Value] | None = None,
        device: str = "cpu",
    ) -> None:
        """Loads the graph; nothing is written to disk.

        Args:
            model: the decoder; `watched` values become further outputs of it.
            folder: where its files of weights are.
            cache: kv heads and head_dim, where the graph leaves them open.
            watched: label → a value of the graph; `feed` returns it as float32.
            device: `cpu`, or `cuda` for a GPU in full float32 (TF32 off).

        Raises:
            ExportError: this onnxruntime has no provider for the device, or the provider does not start.
        """
        self._labels = {label: _watch(model.graph, label, value) for label, value in (watched or {}).items()}
        model.graph.sort()
        self._inputs = {name_of(v): v for v in model.graph.inputs}
        self._outputs = [name_of(v) for v in model.graph.outputs]
        self._cache = cache
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
        graph = ir.to_proto(model).SerializeToString()
        self._session = ort.InferenceSession(graph, options, providers=_providers(device))
        if device == "cuda" and self._session.get_providers()[0] != _CUDA:
            raise ExportError(
                "CUDA did not start in onnxruntime (its log says why); `deltamem doctor` shows what is missing"
            )
        self._memory: Any = self._zeros("past_memory") if "past_memory" in self._inputs else None
        self.end_turn()

    @property
    def memory(self) -> Float32:
        """[1, L, H, r, r]."""
        found: Float32 = self._memory.numpy()
        return found

    @property
    def past(self) -> dict[str, Any]:
        """What the turn carries, by the names of the graph's inputs: the KV cache, [1, kv heads, P, head_dim] each."""
        return {name: value.numpy() for name, value in self._past.items()}

    def end_turn(self) -> None:
        """Drops the KV cache and every other state of the turn."""
        self._tokens = 0
        carried = [n for n in self._inputs if _PAST.match(n) and n not in ("past_memory", "past_spans")]
        self._past = {name: self._zeros(name) for name in carried}

    def feed(
        self, ids: Ids, cuts: Sequence[int] = (), *, write: bool = True, spans: Spans | None = None, **more: Any
    ) -> dict[str, Float32]:
        """One call in chunks.

        Args:
            ids: [T].
            cuts: where the call is cut into chunks.
            write: whether its tokens, or its spans, are written.
            spans: of a span bundle; without them its tokens are written one by one.
            more: further inputs of the graph, [1, T, ...], cut like the tokens.

        Returns:
            `logits` [T, V] and every watched value [T, width].
        """
        weights = spans.weights()[None] if spans is not None else np.zeros((1, 0, len(ids)), np.float32)
        gathered = None
        edges = [0, *cuts, len(ids)]
        found = []
        for start, end in pairwise(edges):
            part = slice(start, end)
            feeds = {name: value[:, part].astype(self._type(name)) for name, value in more.items()}
            if "input_ids" in self._inputs:
                feeds["input_ids"] = ids[None, part].astype(self._type("input_ids"))
            feeds |= self._positions(end - start)
            if "logits_rows" in self._inputs:
                feeds["logits_rows"] = np.arange(end - start)
            if self._memory is not None:
                feeds["write_mask"] = np.full((1, end - start), float(write and spans is None), np.float32)
            values = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for n, v in feeds.items()}
            if self._memory is not None:
                values["past_memory"] = self._memory
            if "past_spans" in self._inputs:
                mask = np.full(weights.shape[:2], float(write and end == len(ids)), np.float32)
                values["span_weights"] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(weights[..., part]))
                values["span_mask"] = ort.OrtValue.ortvalue_from_numpy(mask)
                values["past_spans"] = gathered or self._zeros("past_spans", spans=weights.shape[1])
            made = self._session.run_with_ort_values(self._outputs, values | self._past)
            outputs = dict(zip(self._outputs, made, strict=True))
            self._tokens += end - start
            self._past = {name: outputs[_PAST.sub("present", name)] for name in self._past}
            self._memory = outputs.get("present_memory", self._memory)
            gathered = outputs.get("present_spans")
            found.append(self._read(outputs, end - start))
        return {label: np.concatenate([part[label] for part in found]) for label in found[0]}

    def _type(self, name: str) -> Any:
        dtype = self._inputs[name].dtype
        assert dtype is not None
        return dtype.numpy()

    def _positions(self, new: int) -> dict[str, Any]:
        feeds: dict[str, Any] = {}
        if "attention_mask" in self._inputs:
            feeds["attention_mask"] = np.ones((1, self._tokens + new), np.int64)
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.arange(self._tokens, self._tokens + new, dtype=np.int64)[None]
        return feeds

    def _read(self, outputs: Mapping[str, Any], tokens: int) -> dict[str, Float32]:
        named = {label: outputs[name].numpy() for label, name in self._labels.items()}
        if "logits" in outputs:
            named["logits"] = outputs["logits"].numpy()
        return {label: value.reshape(tokens, -1).astype(np.float32) for label, value in named.items()}

    def _zeros(self, name: str, spans: int = 0) -> Any:
        """What an empty turn or memory feeds as this input."""
        value = self._inputs[name]
        assert value.shape is not None
        assert value.dtype is not None
        sizes = [d if isinstance(d, int) else 0 for d in value.shape]
        sizes[0] = 1
        if name.startswith("past_key_values."):
            sizes[1], sizes[3] = sizes[1] or self._cache[0], sizes[3] or self._cache[1]
        elif name == "past_spans":
            sizes[1] = spans
        if value.dtype == ir.DataType.BFLOAT16:  # NumPy has none
            zeros = np.zeros(sizes, np.uint16)
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, int(value.dtype.value))
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(sizes, value.dtype.numpy()))


def has_cuda() -> bool:
    """Whether this onnxruntime can run on a GPU, as far as it knows itself."""
    return _CUDA in ort.get_available_providers()


def _providers(device: str) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if not has_cuda():
        raise ExportError(
            "this onnxruntime has no CUDA provider; in its place install onnxruntime-gpu (pip install onnxruntime-gpu)"
        )
    return [(_CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"]


def _watch(graph: ir.Graph, label: str, value: ir.Value) -> str:
    """Makes a value an output of the graph, as float32, and returns its name."""
    seen = Nodes(graph, "/watched")("Cast", value, name=label, to=_FLOAT.value)
    seen.type = ir.TensorType(_FLOAT)
    if value.shape is not None:
        seen.shape = ir.Shape([None] * len(value.shape))
    graph.outputs.append(seen)
    return name_of(seen)
