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

from collections.abc import Mapping

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
    present_memory; where writes are of spans also span_weights [B, S, T], span_mask [B, S], past_spans [B, S, 1, W] →
    present_spans. The graft is made of the same parts; this one is for tests and measurements."""
    graph = ir.Graph((), (), nodes=(), opset_imports={"": 22, "com.microsoft": 1}, name="island")
    heads, rank = config.num_state_heads, config.rank
    hidden = add_input(graph, "hidden", _FLOAT, ["batch_size", "sequence_length", tensors["memory_q_proj"].shape[1]])
    island = Island(graph, config, 1)
    reads = island.read_and_write(Nodes(graph, "/deltamem/layer"), 0, hidden, tensors)
    reads.name, reads.type = "reads", ir.TensorType(_FLOAT)
    reads.shape = ir.Shape(["batch_size", "sequence_length", heads * rank])
    graph.outputs.append(reads)
    island.end()
    return ir.Model(graph, ir_version=10)


class Island:
    """The rule as nodes in one graph, for one adapter's settings and all its layers. Making one adds the graph's inputs for
    it and what the layers share; `read_and_write` adds a layer; `end` adds the outputs.

    With writes of spans (`message_mean`, `sentence_mean`) the steps of the recurrence are the call's tokens and then its
    spans, T + S: tokens of spans read and do not write, and a span's step writes what the networks make of the mean of its
    tokens. All networks are one linear product, so the mean is taken behind it, over W numbers instead of D.
    """

    def __init__(self, graph: ir.Graph, config: AdapterConfig, layers: int) -> None:
        """layers: how many carry a memory."""
        self.graph = graph
        self.config = config
        self.layers = layers
        self.per_row = config.rankwise_gates
        self.own_lambda = not config.couple_lambda and config.state_update_mode != "no_lambda"
        nodes = self.nodes = Nodes(graph, "/deltamem")
        c, batch = config, "batch_size"

        mask = write_mask = add_input(graph, "write_mask", _FLOAT, [batch, "sequence_length"])
        memory = add_input(graph, "past_memory", _FLOAT, [batch, layers, c.num_state_heads, c.rank, c.rank])
        self.states = self._split_memory(memory)
        self.queries: list[ir.Value] = []  # of each layer, [B, T (+ S), R]
        self.gates: list[
            ir.Value
        ] = []  # the logits of β (and of 1 − λ), [B, 1 + T (+ S), G or 2 G]; the first row is of no token
        self.span_weights: ir.Value | None = None
        if c.writes_spans:
            self.span_weights = add_input(graph, "span_weights", _FLOAT, [batch, "spans", "sequence_length"])
            span_mask = add_input(graph, "span_mask", _FLOAT, [batch, "spans"])
            past = add_input(graph, "past_spans", _FLOAT, [batch, "spans", layers, c.proposal_width])
            past = nodes("Reshape", past, nodes.ints([0, 0, layers * c.proposal_width]), name="past_spans")
            self.spans = nodes.split(past, [c.proposal_width] * layers, name="past_spans/Split")  # [B, S, W] each
            mask = nodes("Concat", write_mask, span_mask, name="mask/Concat", axis=1)
            self.tokens = nodes("Shape", write_mask, name="tokens", start=1, end=2)
        # One step more than there are tokens and spans; the first writes nothing. [B, T + S + 1, 1]
        mask = nodes("Pad", mask, nodes.ints([0, 1, 0, 0]), name="mask/Pad")
        self.mask = nodes("Unsqueeze", mask, nodes.ints([2]), name="mask")
        self.minus_mask = nodes("Neg", self.mask, name="minus_mask") if c.state_update_mode != "no_lambda" else None

    def end(self) -> None:
        """Adds the outputs present_memory and, with writes of spans, present_spans."""
        c, nodes = self.config, self.nodes
        present = self._join_memory()
        present.shape = ir.Shape(["batch_size", self.layers, c.num_state_heads, c.rank, c.rank])
        outputs = {"present_memory": present}
        if c.writes_spans:
            spans = nodes.concat(self.spans, name="present_spans/Concat")
            spans = nodes("Reshape", spans, nodes.ints([0, 0, self.layers, c.proposal_width]), name="present_spans")
            spans.shape = ir.Shape(["batch_size", "spans", self.layers, c.proposal_width])
            outputs["present_spans"] = spans
        for name, value in outputs.items():
            value.name, value.type = name, ir.TensorType(_FLOAT)
            self.graph.outputs.append(value)
        self.graph.sort()

    def _split_memory(self, memory: ir.Value) -> list[ir.Value]:
        """[B, L, H, r, r] → one state in the operator's layout for each layer."""
        c, nodes = self.config, self.nodes
        if self.per_row:
            kv_heads, width = c.num_state_heads * c.rank, 1
        else:
            kv_heads, width = c.num_state_heads, c.rank
            memory = nodes("Transpose", memory, name="past/Transpose", perm=[0, 1, 2, 4, 3])
        flat = nodes("Reshape", memory, nodes.ints([0, self.layers * kv_heads, c.rank, width]), name="past")
        return nodes.split(flat, [kv_heads] * self.layers, name="past/Split", axis=1)

    def _join_memory(self) -> ir.Value:
        """The inverse of `_split_memory`."""
        c, nodes = self.config, self.nodes
        flat = nodes.concat(self.states, name="present/Concat", axis=1)
        memory = nodes("Reshape", flat, nodes.ints([0, self.layers, c.num_state_heads, c.rank, c.rank]), name="present")
        if not self.per_row:
            memory = nodes("Transpose", memory, name="present/Transpose", perm=[0, 1, 2, 4, 3])
        return memory

    def read_and_write(
        self, nodes: Nodes, at: int, hidden: ir.Value, tensors: Mapping[str, npt.NDArray[np.float32]]
    ) -> ir.Value:
        """Adds the `at`-th memory layer under the prefix of `nodes`: hidden [B, T, D] float32 → reads [B, T, R]."""
        c = self.config
        heads, rank, width, gates = c.num_state_heads, c.rank, c.read_width, c.gate_width
        rest = c.proposal_width - 2 * width
        proposal = self._propose(nodes, at, hidden, tensors)
        bias = [tensors["beta_bias"], *([-tensors["lambda_bias"]] if self.own_lambda else [])]
        qk, vg = nodes.split(proposal, [2 * width, rest], name="networks/Split")

        if c.normalize_qk:
            qk = nodes("Tanh", qk, name="qk/Tanh")
            qk = nodes("Reshape", qk, nodes.ints([0, 0, 2 * heads, rank]), name="qk/Reshape")
            length = nodes("ReduceL2", qk, nodes.ints([-1]), name="qk/ReduceL2", keepdims=1)
            length = nodes("Max", length, nodes.scalar(L2_EPSILON), name="qk/Max")
            qk = nodes("Div", qk, length, name="qk/Div")
            qk = nodes("Reshape", qk, nodes.ints([0, 0, 2 * width]), name="qk")
        q, k = nodes.split(qk, [width, width], name="qk/Split")
        self.queries.append(q)
        # The extra step: behind the queries, in front of everything else. [B, T + 1, ..]
        q = nodes("Pad", q, nodes.ints([0, 0, 0, 0, 1, 0]), name="q")
        k = nodes("Pad", k, nodes.ints([0, 1, 0, 0, 0, 0]), name="k")
        vg = nodes("Pad", vg, nodes.ints([0, 1, 0, 0, 0, 0]), name="vg")
        v, x = nodes.split(vg, [width, rest - width], name="vg/Split")
        x = nodes("Add", x, nodes.floats(np.concatenate(bias), "gate_bias"), name="gates/Add")
        self.gates.append(x)

        standard, coupled = c.state_update_mode == "standard", not self.own_lambda
        minus_log_odds = x  # of λ: the logit of 1 − λ
        if not coupled:
            x, minus_log_odds = nodes.split(x, [gates, gates], name="gates/Split")
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

        read, self.states[at] = nodes.many(
            "LinearAttention",
            q,
            k,
            v,
            self.states[at],
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
        end = self.tokens if c.writes_spans else nodes.ints([-1])
        return nodes("Slice", read, nodes.ints([0]), end, nodes.ints([1]), name="reads")

    def _propose(
        self, nodes: Nodes, at: int, hidden: ir.Value, tensors: Mapping[str, npt.NDArray[np.float32]]
    ) -> ir.Value:
        """All networks as one product, [B, T, W] with W = q k | v β (−λ), and behind the tokens the spans, [B, T + S, W]. λ's
        logit is negated, so that what is bounded is 1 − λ in every mode."""
        rows = [tensors["memory_q_proj"], tensors["memory_k_proj"], tensors["memory_v_proj"], tensors["beta_proj"]]
        if self.own_lambda:
            rows.append(-tensors["lambda_proj"])
        weight = nodes.floats(np.concatenate(rows).T, "networks")
        proposal = nodes("MatMul", hidden, weight, name="networks/MatMul")
        if self.span_weights is None:
            return proposal
        means = nodes("MatMul", self.span_weights, proposal, name="spans/MatMul")
        self.spans[at] = nodes("Add", self.spans[at], means, name="spans")
        return nodes("Concat", proposal, self.spans[at], name="networks/Concat", axis=1)
