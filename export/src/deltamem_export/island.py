"""The rule as a small island of standard nodes around `com.microsoft.LinearAttention`, in float32 whatever the
decoder's precision. It knows an adapter's settings and tensors; it knows nothing of the decoder around it. Twins:
`reference.py` (PyTorch) and `deltamem-core` (Rust).

What the operator computes per key/value head, with its own decay g and gate β', reading after the write:

    S ← e^g S;   S ← S + β' (v' − S k) kᵀ;   read = S q

The rule is that, with v' = λ v, g = log λ and β' = β/λ for `standard`; v' = v, g = log λ and β' = β for
`lambda_outside`; no g and β' = β for `no_lambda`. With x the logit of β and λ = 1 − β coupled: log λ =
−softplus(x), β/λ = e^x, λ = σ(−x), with nothing lost where β is close to 0 or 1. A read before the write is
had by one more step in front, which reads with the first query and writes nothing, while keys, values and
gates come one step later.

Layouts of the state. Gates per row: each row of S is a head of its own with values of width 1, H·r heads that
share H keys; the operator's state [B, H·r, r, 1] is the memory [B, H, r, r] as it lies. Gates per head: H
heads with values of width r; the operator's state is Sᵀ, so the memory is transposed on its way in and out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deltamem_export.adapter import AdapterConfig
from deltamem_export.nodes import Nodes, add_input

# Above this the logit of 1 − λ changes nothing: keep is below 1e-13 and β rounds to 1. Without a bound e^x
# overflows at 89.
GATE_LOGIT_MAX = 30.0
L2_EPSILON = 1e-6

_FLOAT = ir.DataType.FLOAT


def build_island(config: AdapterConfig, tensors: Mapping[str, npt.NDArray[np.float32]]) -> ir.Model:
    """One layer's rule alone in a graph: hidden [B, T, D], write_mask [B, T], past_memory [B, 1, H, r, r] → reads [B, T, R],
    present_memory. The graft is made of the same parts; this one is for tests and measurements."""
    graph = ir.Graph((), (), nodes=(), opset_imports={"": 22, "com.microsoft": 1}, name="island")
    heads, rank = config.num_state_heads, config.rank
    hidden = add_input(graph, "hidden", _FLOAT, ["batch_size", "sequence_length", tensors["memory_q_proj"].shape[1]])
    island, states = start_island(graph, config, 1)
    reads, state = island.read_and_write(Nodes(graph, "/deltamem/layer"), hidden, states[0], tensors)
    reads.name, reads.type = "reads", ir.TensorType(_FLOAT)
    reads.shape = ir.Shape(["batch_size", "sequence_length", heads * rank])
    graph.outputs.append(reads)
    end_island(graph, island, [state])
    return ir.Model(graph, ir_version=10)


def start_island(graph: ir.Graph, config: AdapterConfig, count: int) -> tuple[Island, list[ir.Value]]:
    """Adds the inputs write_mask and past_memory, and what all layers share; returns one state for each of `count` layers."""
    write_mask = add_input(graph, "write_mask", _FLOAT, ["batch_size", "sequence_length"])
    shape: list[int | str] = ["batch_size", count, config.num_state_heads, config.rank, config.rank]
    memory = add_input(graph, "past_memory", _FLOAT, shape)
    top = Nodes(graph, "/deltamem")
    # One step more than there are tokens; the first writes nothing. [B, T + 1, 1]
    mask = top("Pad", write_mask, top.ints([0, 1, 0, 0]), name="mask/Pad")
    mask = top("Unsqueeze", mask, top.ints([2]), name="mask")
    minus_mask = top("Neg", mask, name="minus_mask") if config.state_update_mode != "no_lambda" else None
    island = Island(config, mask, minus_mask)
    return island, island.split_memory(top, memory, count)


def end_island(graph: ir.Graph, island: Island, states: Sequence[ir.Value]) -> None:
    """Adds the output present_memory."""
    c = island.config
    present = island.join_memory(Nodes(graph, "/deltamem"), states, len(states))
    present.name, present.type = "present_memory", ir.TensorType(_FLOAT)
    present.shape = ir.Shape(["batch_size", len(states), c.num_state_heads, c.rank, c.rank])
    graph.outputs.append(present)
    graph.sort()


class Island:
    """The rule as nodes, for one adapter's settings."""

    def __init__(self, config: AdapterConfig, mask: ir.Value, minus_mask: ir.Value | None) -> None:
        """mask: [B, T + 1, 1] float32, 0 in the step before the first token; minus_mask: its negative, not
        needed by `no_lambda`."""
        self.config = config
        self.mask = mask
        self.minus_mask = minus_mask
        self.per_row = config.rankwise_gates

    def split_memory(self, nodes: Nodes, memory: ir.Value, count: int) -> list[ir.Value]:
        """[B, L, H, r, r] → one state in the operator's layout for each of `count` layers."""
        c = self.config
        if self.per_row:
            kv_heads, width = c.num_state_heads * c.rank, 1
        else:
            kv_heads, width = c.num_state_heads, c.rank
            memory = nodes("Transpose", memory, name="past/Transpose", perm=[0, 1, 2, 4, 3])
        flat = nodes("Reshape", memory, nodes.ints([0, count * kv_heads, c.rank, width]), name="past")
        if count == 1:
            return [flat]
        return nodes.many("Split", flat, nodes.ints([kv_heads] * count), outputs=count, name="past/Split", axis=1)

    def join_memory(self, nodes: Nodes, states: Sequence[ir.Value], count: int) -> ir.Value:
        """The inverse of `split_memory`."""
        c = self.config
        flat = states[0] if count == 1 else nodes("Concat", *states, name="present/Concat", axis=1)
        memory = nodes("Reshape", flat, nodes.ints([0, count, c.num_state_heads, c.rank, c.rank]), name="present")
        if not self.per_row:
            memory = nodes("Transpose", memory, name="present/Transpose", perm=[0, 1, 2, 4, 3])
        return memory

    def read_and_write(
        self, nodes: Nodes, hidden: ir.Value, state: ir.Value, tensors: Mapping[str, npt.NDArray[np.float32]]
    ) -> tuple[ir.Value, ir.Value]:
        """hidden [B, T, D] float32, state in the operator's layout → reads [B, T, R] and the state after."""
        c = self.config
        heads, rank, width, gates = c.num_state_heads, c.rank, c.read_width, c.gate_width
        own_lambda = not c.couple_lambda and c.state_update_mode != "no_lambda"

        # All networks are one product, [B, T, q k | v β (−λ)]. λ's logit is negated, so that what is bounded
        # is 1 − λ in every mode.
        rows = [tensors["memory_q_proj"], tensors["memory_k_proj"], tensors["memory_v_proj"], tensors["beta_proj"]]
        bias = [tensors["beta_bias"]]
        if own_lambda:
            rows.append(-tensors["lambda_proj"])
            bias.append(-tensors["lambda_bias"])
        weight = nodes.floats(np.concatenate(rows).T, "networks")
        rest = width + gates * len(bias)
        proposal = nodes("MatMul", hidden, weight, name="networks/MatMul")
        qk, vg = nodes.many("Split", proposal, nodes.ints([2 * width, rest]), outputs=2, name="networks/Split", axis=-1)

        if c.normalize_qk:
            qk = nodes("Tanh", qk, name="qk/Tanh")
            qk = nodes("Reshape", qk, nodes.ints([0, 0, 2 * heads, rank]), name="qk/Reshape")
            length = nodes("ReduceL2", qk, nodes.ints([-1]), name="qk/ReduceL2", keepdims=1)
            length = nodes("Max", length, nodes.scalar(L2_EPSILON), name="qk/Max")
            qk = nodes("Div", qk, length, name="qk/Div")
            qk = nodes("Reshape", qk, nodes.ints([0, 0, 2 * width]), name="qk")
        q, k = nodes.many("Split", qk, nodes.ints([width, width]), outputs=2, name="qk/Split", axis=-1)
        # The extra step: behind the queries, in front of everything else. [B, T + 1, ..]
        q = nodes("Pad", q, nodes.ints([0, 0, 0, 0, 1, 0]), name="q")
        k = nodes("Pad", k, nodes.ints([0, 1, 0, 0, 0, 0]), name="k")
        vg = nodes("Pad", vg, nodes.ints([0, 1, 0, 0, 0, 0]), name="vg")
        v, x = nodes.many("Split", vg, nodes.ints([width, rest - width]), outputs=2, name="vg/Split", axis=-1)
        x = nodes("Add", x, nodes.floats(np.concatenate(bias), "gate_bias"), name="gates/Add")

        standard, coupled = c.state_update_mode == "standard", not own_lambda
        minus_log_odds = x  # of λ: the logit of 1 − λ
        if not coupled:
            x, minus_log_odds = nodes.many(
                "Split", x, nodes.ints([gates, gates]), outputs=2, name="gates/Split", axis=-1
            )
        if c.state_update_mode == "no_lambda":
            decay, gate = None, nodes("Sigmoid", x, name="beta")
        else:
            bounded = nodes("Min", minus_log_odds, nodes.scalar(GATE_LOGIT_MAX), name="gates/Min")
            decay = nodes("Softplus", bounded, name="decay/Softplus")
            assert self.minus_mask is not None
            decay = nodes("Mul", decay, self.minus_mask, name="decay")
            if standard:
                # Not σ: ONNX Runtime's is right to 1e-8, and what is left of it at λ = 1e-8 is divided by λ again.
                keep = nodes("Exp", decay, name="keep")
                if coupled:
                    gate = nodes("Exp", bounded, name="beta_over_lambda")
                else:
                    gate = nodes("Div", nodes("Sigmoid", x, name="beta"), keep, name="beta_over_lambda")
                if not self.per_row and heads > 1:
                    row_head = np.repeat(np.arange(heads, dtype=np.int64), rank)
                    keep = nodes("Gather", keep, nodes.ints(row_head.tolist()), name="keep/Gather", axis=2)
                v = nodes("Mul", v, keep, name="v")
            else:
                gate = nodes("Sigmoid", x, name="beta")
        gate = nodes("Mul", gate, self.mask, name="gate")

        read, state = nodes.many(
            "LinearAttention",
            q,
            k,
            v,
            state,
            decay,
            gate,
            outputs=2,
            name="LinearAttention",
            domain="com.microsoft",
            q_num_heads=heads,
            kv_num_heads=heads * rank if self.per_row else heads,
            update_rule="delta" if decay is None else "gated_delta",
            scale=1.0,
        )
        one = nodes.ints([1])
        reads = nodes("Slice", read, nodes.ints([0]), nodes.ints([-1]), one, name="reads")
        return reads, state
