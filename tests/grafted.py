"""A bundle's graph run by Python's own onnxruntime, with the memory and the KV cache carried by hand. It follows docs/bundle.md and shares
nothing with the runtime, so that the two are held against each other through the goldens.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort


class Grafted:
    """One graph and its running state. `feed` continues the turn; `end_turn` drops the KV cache; `reset` empties the memory too."""

    def __init__(self, bundle: Path, batch: int = 1, measured: bool = False) -> None:
        self.manifest = json.loads((bundle / "deltamem.json").read_text())
        graph, backbone, memory = (self.manifest[name] for name in ("graph", "backbone", "memory"))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.measured = measured
        file = graph["measured_file"] if measured else graph["file"]
        self.session = ort.InferenceSession(str(bundle / file), options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.batch = batch
        self.kv_layers = graph["kv_layers"]
        self.states = graph.get("states", [])
        self.present = {state["input"]: state["output"] for state in self.states}
        self.kv_shape = (batch, backbone["num_kv_heads"], 0, backbone["head_dim"])
        self.kv_dtype = np.dtype(graph["kv_dtype"])
        self.span_width = graph["span_width"]
        self.memory_shape = (batch, len(memory["layers"]), memory["heads"], memory["rank"], memory["rank"])
        self.reset()

    def reset(self) -> None:
        self.memory = np.zeros(self.memory_shape, np.float32)  # [B, L, H, r, r]
        self.end_turn()

    def end_turn(self) -> None:
        self.past = {
            f"past_key_values.{i}.{part}": np.zeros(self.kv_shape, self.kv_dtype)
            for i in self.kv_layers
            for part in ("key", "value")
        }
        self.past |= {state["input"]: np.zeros((self.batch, *state["shape"]), state["dtype"]) for state in self.states}
        self.mask = np.zeros((self.batch, 0), np.int64)

    def feed(
        self,
        ids: np.ndarray,
        *,
        write: bool = True,
        write_mask: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        spans: np.ndarray | None = None,
        span_mask: np.ndarray | None = None,
        past_spans: np.ndarray | None = None,
        strength: np.ndarray | float = 1.0,
    ) -> np.ndarray:
        """ids [T] or [B, T] → logits [T, V], [B, T, V], or [N, V] of the wanted rows.

        spans: float32 [B, S, T], the weights of span bundles; without them each token writes. span_mask [B, S] is 1 if not given,
        past_spans [B, S, L, W] is 0. strength: of the corrections, one or [B, T]; the measured graph's only.
        """
        tokens = np.atleast_2d(ids).astype(np.int32)
        batch, length = tokens.shape
        new = np.ones((batch, length), np.int64) if attention_mask is None else attention_mask.astype(np.int64)
        self.mask = np.concatenate([self.mask, new], axis=1)
        may = np.full((batch, length), float(write and spans is None)) if write_mask is None else write_mask
        feeds = {
            "input_ids": tokens,
            "attention_mask": self.mask,
            "write_mask": may.astype(np.float32),
            "logits_rows": np.arange(batch * length) if rows is None else rows,
            "past_memory": self.memory,
            **self.past,
        }
        if self.measured:
            feeds["strength"] = np.broadcast_to(np.float32(strength), (batch, length))
        if self.manifest["graph"]["position_ids"]:
            feeds["position_ids"] = (self.mask.cumsum(axis=1) - 1).clip(0)[:, -length:]
        if self.span_width is not None:
            weights = np.zeros((batch, 0, length), np.float32) if spans is None else spans.astype(np.float32)
            count = weights.shape[1]
            wide = (batch, count, self.memory_shape[1], self.span_width)
            feeds |= {
                "span_weights": weights,
                "span_mask": np.full((batch, count), float(write), np.float32) if span_mask is None else span_mask,
                "past_spans": np.zeros(wide, np.float32) if past_spans is None else past_spans,
            }
        found = dict(zip(self.names, self.session.run(self.names, feeds), strict=True))
        self.memory = found["present_memory"]
        self.past = {
            name: found[self.present.get(name) or name.replace("past_key_values", "present")] for name in self.past
        }
        self.energy = found.get("delta_energy")
        self.queries = found.get("queries")
        self.gates = found.get("gates")
        self.spans = found.get("present_spans")
        logits = found["logits"]
        if rows is not None:
            return logits
        return logits if np.ndim(ids) == 1 else logits.reshape(batch, length, -1)
