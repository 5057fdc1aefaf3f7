"""ONNX Runtime's own profile of a bundle's portable graph, node by node: how many run in a step, which of them the graft brought, and what
they take. It runs in Python's onnxruntime with the settings of the engine.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

FILLED = 128
"""Tokens that stand in the KV cache before the steps that are profiled."""


@dataclass(frozen=True)
class Profile:
    """Of one step: nodes that ran, those of the memory, seconds in the kernels of both, and the memory's by operator."""

    nodes: int
    memory_nodes: int
    model_seconds: float
    memory_seconds: float
    by_operator: Counter[str]

    def largest(self, count: int) -> list[tuple[str, float]]:
        """The memory's operators that take most, with their seconds a step."""
        return self.by_operator.most_common(count)


def profile(bundle: Path, tokens: int, steps: int) -> Profile:
    """Runs `steps` steps of `tokens` tokens behind 128 (a prompt's step has none before it), medians over the steps."""
    manifest = json.loads((bundle / "deltamem.json").read_text())
    b, m = manifest["backbone"], manifest["memory"]
    past = FILLED if tokens == 1 else 0
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(str(bundle / manifest["graph"]["file"]), options, ["CPUExecutionProvider"])
        cache = np.zeros((1, b["num_kv_heads"], past, b["head_dim"]), np.float32)
        feeds = {
            "input_ids": np.full((1, tokens), 5, np.int32),
            "attention_mask": np.ones((1, past + tokens), np.int64),
            "write_mask": np.ones((1, tokens), np.float32),
            "logits_rows": np.array([tokens - 1]),
            "past_memory": np.zeros((1, len(m["layers"]), m["heads"], m["rank"], m["rank"]), np.float32),
        }
        if manifest["graph"]["position_ids"]:
            feeds["position_ids"] = np.arange(past, past + tokens)[None]
        for layer in manifest["graph"]["kv_layers"]:
            feeds |= {f"past_key_values.{layer}.{part}": cache for part in ("key", "value")}
        for _ in range(steps + 2):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    each = len(kernels) // (steps + 2)
    runs = [kernels[at : at + each] for at in range(2 * each, len(kernels), each)]  # the first two are to warm up
    own = [[e for e in run if "/deltamem/layers." in e["name"]] for run in runs]
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(own))
    for number, run in enumerate(own):
        for event in run:
            sums[event["args"]["op_name"]][number] += event["dur"] / 1e6
    operators = Counter({name: float(np.median(times)) for name, times in sums.items()})

    def took(run: list[dict[str, float]]) -> float:
        return sum(e["dur"] for e in run) / 1e6

    memory = [took(run) for run in own]
    rest = [took(run) - mine for run, mine in zip(runs, memory, strict=True)]
    return Profile(each, len(own[0]), float(np.median(rest)), float(np.median(memory)), operators)
