"""The recurrence alone, 512 tokens of one head: the Rust rule (`dm.scan`) against ONNX Runtime's `LinearAttention` in a graph of that one
node, NumPy and PyTorch, with a gate per row of the state (each row is a kv head of its own for the operator, with values of width 1) and
with one gate per head (one kv head, the operator's best form). All get what they need ready made, and end in the same state.

    python benches/bench_scan.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

import deltamem_rt as dm
from bench_engine import scan_in_numpy
from deltamem_export.reference import scan as scan_in_torch
from deltamem_export.scan import chunked_scan
from measuring import Figures, Ratio, Table, interleaved, quantity, reached, seconds

TOKENS = 512
RANKS = (8, 32, 64)
Array = npt.NDArray[np.float32]
CALLS = 64
"""Calls that are timed at once: one is a few microseconds, and the first ones after a pause are the slower for it."""


class Operator:
    """`com.microsoft.LinearAttention` alone, its tensors bound once."""

    def __init__(self, q: Array, k: Array, v: Array, keep: Array, write: Array, state: Array) -> None:
        tokens, rank = q.shape[0], q.shape[-1]
        rows = keep.shape[-1]
        self._per_row = rows > 1
        float32 = onnx.TensorProto.FLOAT
        # S ← λ (S − β' (S k) kᵀ) + β' v' kᵀ is the rule with β' = β/λ and v' = λ v.
        feeds = {
            "q": q.reshape(1, tokens, rank),
            "k": k.reshape(1, tokens, rank),
            "v": (keep * v).reshape(1, tokens, rank),
            "state": state.reshape(1, rank, rank, 1) if self._per_row else state.transpose(0, 2, 1)[None],
            "decay": np.log(keep).reshape(1, tokens, rows),
            "gate": (write / keep).reshape(1, tokens, rows),
        }
        node = onnx.helper.make_node(
            "LinearAttention",
            list(feeds),
            ["read", "present"],
            domain="com.microsoft",
            q_num_heads=1,
            kv_num_heads=rows,
            update_rule="gated_delta",
            scale=1.0,
        )
        graph = onnx.helper.make_graph(
            [node],
            "scan",
            [onnx.helper.make_tensor_value_info(name, float32, value.shape) for name, value in feeds.items()],
            [onnx.helper.make_tensor_value_info(name, float32, None) for name in ("read", "present")],
        )
        opsets = [onnx.helper.make_opsetid("", 22), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        self._session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._kept = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for name, v in feeds.items()}
        for name, value in self._kept.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in ("read", "present"):
            self._binding.bind_output(name)

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def state(self) -> np.ndarray:
        found = self._binding.get_outputs()[1].numpy()
        rank = found.shape[-2]
        return found.reshape(1, rank, rank) if self._per_row else found[0].transpose(0, 2, 1)


def timed(work: Callable[[], object], calls: int) -> Figures:
    def several() -> None:
        for _ in range(calls):
            work()

    return {"call": seconds(several) / calls}


def bench(rank: int, per_row: bool, rounds: int, table: Table) -> None:
    rng = np.random.default_rng(rank)
    q, k, v = (rng.standard_normal((TOKENS, 1, rank)).astype(np.float32) / rank**0.5 for _ in range(3))
    logit = rng.standard_normal((TOKENS, 1, rank if per_row else 1)).astype(np.float32)
    write = (1 / (1 + np.exp(-logit))).astype(np.float32)
    keep, state = 1 - write, np.zeros((1, rank, rank), np.float32)
    tensors = [torch.from_numpy(x)[None] for x in (q, k, v, keep, write, write, state)]
    operator = Operator(q, k, v, keep, write, state)

    ours = dm.scan(q, k, v, keep, write, write, state)[1]
    operator()
    for name, found in (
        ("LinearAttention", operator.state()),
        ("NumPy", scan_in_numpy(q, k, v, keep, write, write, state)[1]),
        ("PyTorch", scan_in_torch(*tensors)[1][0].numpy()),
        ("PyTorch, in chunks", chunked_scan(*tensors)[1][0].numpy()),
    ):
        np.testing.assert_allclose(found, ours, rtol=0, atol=1e-4, err_msg=name)

    @torch.inference_mode()
    def in_torch(scan: Callable[..., object]) -> None:
        scan(*tensors)

    with torch.inference_mode():
        found = interleaved(
            {
                "Rust": lambda: timed(lambda: dm.scan(q, k, v, keep, write, write, state), CALLS),
                "LinearAttention": lambda: timed(operator, CALLS),
                "NumPy": lambda: timed(lambda: scan_in_numpy(q, k, v, keep, write, write, state), 1),
                "PyTorch": lambda: timed(lambda: in_torch(scan_in_torch), 1),
                "PyTorch, in chunks": lambda: timed(lambda: in_torch(chunked_scan), 1),
            },
            rounds,
            warm_ups=2,
            pause=0.005,
        )
    rust = found.pop("Rust")["call"]
    for name, figures in found.items():
        ratio = Ratio.of(figures["call"], rust)
        goal = reached(ratio.value, 10.0) if name == "LinearAttention" else "-"
        gates = "per row" if per_row else "per head"
        table.row(rank, gates, name, quantity(rust), quantity(figures["call"]), ratio, goal, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs")
    rounds = 2 if parser.parse_args().quick else 21
    print(
        f"## scan\n\nThe recurrence alone: {TOKENS} tokens, one head, one sequence, from arrays to arrays. The Rust rule runs in one "
        f"thread and reads before it writes; `LinearAttention` (onnxruntime {ort.__version__}, its graph alone, all tensors bound) may use "
        f"all; NumPy {np.__version__} and PyTorch {torch.__version__} go token by token, or in chunks as deltamem_export trains. All end "
        "in the same state within 1e-4."
    )
    table = Table("rank", "gates", "opponent", "Rust", "opponent's", "times as fast", "goal", "rounds")
    for rank in RANKS:
        for per_row in (True, False):
            bench(rank, per_row, rounds, table)


if __name__ == "__main__":
    main()
