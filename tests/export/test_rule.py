"""The rule told three times agrees: the oracle in float64, the reference in PyTorch, and the graft's island alone in a graph, over random
shapes, ranks, heads, modes, gates and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from agreement import assert_close
from deltamem_export.adapter import AdapterConfig, AttentionShape
from deltamem_export.island import build_island
from deltamem_export.reference import DeltaMemory, scan, span_weights

MODES = ("standard", "lambda_outside", "no_lambda")
TOLERANCE = 2e-5
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Case:
    """One layer, its input, and what stands before it."""

    config: AdapterConfig
    tensors: dict[str, np.ndarray]
    hidden: np.ndarray  # [B, T, D]
    mask: np.ndarray  # [B, T]
    state: np.ndarray  # [B, H, r, r]
    spans: np.ndarray | None = None  # [B, T], where writes are of spans

    def weights(self) -> np.ndarray:
        """[B, S, T], what takes the mean over each span; S is 0 where each token writes."""
        if self.spans is None:
            return np.zeros((len(self.mask), 0, self.mask.shape[1]), np.float32)
        return span_weights(torch.from_numpy(np.where(self.mask, self.spans, -1))).numpy()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads, rank = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 8, 16, 33]))
    normalize_qk = draw(st.booleans())
    config = AdapterConfig(
        rank=rank,
        alpha=float(rank),
        num_state_heads=heads,
        normalize_qk=normalize_qk,
        couple_lambda=draw(st.booleans()),
        state_update_mode=draw(st.sampled_from(MODES)),
        rankwise_gates=draw(st.booleans()),
        delta_heads=("q",),
        memory_write_granularity=draw(st.sampled_from(["token", "token", "sentence_mean"])),
    )
    batch, length, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 24)), 12
    spread = draw(st.sampled_from([0.5, 4.0, 40.0]))  # of the gates' logits: β from the middle to both ends
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    # Keys that are not unit vectors must stay short, or the rule itself explodes and no two tellings can agree.
    keys = 1.0 if normalize_qk else 0.5 / rank**0.5
    tensors = {
        "memory_q_proj": normal(heads * rank, hidden, scale=hidden**-0.5),
        "memory_k_proj": normal(heads * rank, hidden, scale=keys * hidden**-0.5),
        "memory_v_proj": normal(heads * rank, hidden, scale=hidden**-0.5),
    }
    gates = config.gate_width
    for name in ("beta",) if config.couple_lambda else ("beta", "lambda"):
        tensors[f"{name}_proj"] = normal(gates, hidden, scale=spread * hidden**-0.5)
        tensors[f"{name}_bias"] = normal(gates)
    tensors["delta_q_proj"] = normal(hidden, heads * rank)
    mask = rng.random((batch, length)) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    case = Case(config, tensors, normal(batch, length, hidden), mask, normal(batch, heads, rank, rank))
    if config.writes_spans:
        # Ascending ids with gaps, some tokens in no span, and spans that such tokens interrupt.
        spans = np.cumsum(rng.random((batch, length)) < draw(st.sampled_from([0.1, 0.5, 1.0])), axis=1) * 3
        case.spans = np.where(rng.random((batch, length)) < 0.2, -1, spans)
    return case


def by_oracle(case: Case) -> tuple[np.ndarray, np.ndarray]:
    c = case.config
    wide = {name: tensor.astype(np.float64) for name, tensor in case.tensors.items()}
    rows = [
        oracle.read_and_write(
            case.hidden[b].astype(np.float64),
            wide,
            case.state[b].astype(np.float64),
            case.mask[b],
            mode=c.state_update_mode,
            normalize_qk=c.normalize_qk,
            couple_lambda=c.couple_lambda,
            spans=None if case.spans is None else case.spans[b],
        )
        for b in range(len(case.hidden))
    ]
    return np.stack([reads for reads, _ in rows]), np.stack([state for _, state in rows])


@torch.no_grad()
def by_reference(case: Case) -> tuple[np.ndarray, np.ndarray]:
    shape = AttentionShape(case.hidden.shape[-1], case.hidden.shape[-1], 0, 0, 0)
    layer = DeltaMemory(case.config, shape, {name: torch.from_numpy(t) for name, t in case.tensors.items()})
    hidden, state, may = (torch.from_numpy(x) for x in (case.hidden, case.state, case.mask))
    spans = None if case.spans is None else torch.from_numpy(case.spans)
    _, reads, after = layer.read_and_write(hidden, state, may, spans)
    return reads.numpy(), after.numpy()


def island(case: Case) -> Callable[..., tuple[np.ndarray, ...]]:
    """The case's layer as a graph: a function of a slice of its tokens, the state, the spans' weights for that slice and what earlier
    slices gathered, and whether it is the last slice → reads, state, gathered."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = build_island(case.config, case.tensors)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(
        part: slice, state: np.ndarray, weights: np.ndarray, gathered: np.ndarray, last: bool
    ) -> tuple[np.ndarray, ...]:
        writes = case.mask[:, part] if case.spans is None else np.zeros_like(case.mask[:, part])
        feeds = {
            "hidden": case.hidden[:, part],
            "write_mask": writes.astype(np.float32),
            "past_memory": state[:, None],
        }
        if case.spans is not None:
            complete = case.weights().any(axis=-1) & last
            feeds |= {"span_weights": weights, "span_mask": complete.astype(np.float32), "past_spans": gathered}
        found = dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))
        reads = found["reads"].reshape(*feeds["hidden"].shape[:2], *case.state.shape[1:3])
        return reads, found["present_memory"][:, 0], found.get("present_spans", gathered)

    return run


def by_island(case: Case) -> tuple[np.ndarray, np.ndarray]:
    weights = case.weights()
    gathered = np.zeros((*weights.shape[:2], 1, case.config.proposal_width), np.float32)
    reads, state, _ = island(case)(slice(None), case.state, weights, gathered, True)
    return reads, state


@quick
@given(case=cases())
@pytest.mark.parametrize("telling", [by_reference, by_island])
def test_every_telling_of_the_rule_is_the_oracles(telling, case: Case) -> None:
    reads, state = telling(case)
    want_reads, want_state = by_oracle(case)
    size = max(1.0, float(np.abs(want_reads).max()), float(np.abs(want_state).max()))
    assert_close("reads", reads, want_reads, TOLERANCE * size)
    assert_close("state", state, want_state, TOLERANCE * size)


@quick
@given(case=cases(), cut=st.integers(0, 24))
def test_the_island_gives_the_same_for_any_split(case: Case, cut: int) -> None:
    """Of tokens: two calls. Of spans: the first chunk gathers what the second one writes, so a span that is cut is one write."""
    cut = min(cut, case.hidden.shape[1] - 1)
    whole_reads, whole_state = by_island(case)
    parts = []
    run = island(case)
    state, weights = case.state, case.weights()
    gathered = np.zeros((*weights.shape[:2], 1, case.config.proposal_width), np.float32)
    for part, last in ((slice(0, cut), False), (slice(cut, None), True)):
        if case.hidden[:, part].shape[1]:
            reads, state, gathered = run(part, state, weights[..., part], gathered, last)
            parts.append(reads)
    size = max(1.0, float(np.abs(whole_state).max()), float(np.abs(whole_reads).max()))
    assert_close("reads", np.concatenate(parts, axis=1), whole_reads, TOLERANCE * size)
    assert_close("state", state, whole_state, TOLERANCE * size)


@quick
@given(case=cases())
def test_a_token_that_may_not_write_leaves_the_island_bit_for_bit(case: Case) -> None:
    case.mask[:] = False
    _, state = by_island(case)
    assert np.array_equal(state, case.state)


@pytest.mark.parametrize("logit", [-200.0, -90.0, 30.0, 90.0, 200.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("couple", [True, False], ids=["coupled", "own lambda"])
def test_gates_at_their_ends_stay_finite_and_right(mode: str, couple: bool, logit: float) -> None:
    """e^x overflows at 89; β is then 1 and λ 0, and the memory keeps nothing but the last write."""
    rng = np.random.default_rng(0)
    config = AdapterConfig(rank=4, alpha=4.0, state_update_mode=mode, couple_lambda=couple, delta_heads=("q",))
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    tensors = {f"memory_{p}_proj": normal(4, 12) for p in "qkv"} | {"delta_q_proj": normal(12, 4)}
    for name in ("beta", "lambda")[: 1 if couple else 2]:
        sign = 1 if name == "beta" else -1
        tensors |= {f"{name}_proj": np.zeros((4, 12), np.float32), f"{name}_bias": np.full(4, sign * logit, np.float32)}
    case = Case(config, tensors, normal(1, 9, 12), np.ones((1, 9), bool), normal(1, 1, 4, 4))
    for telling in (by_reference, by_island):
        for found, want in zip(telling(case), by_oracle(case), strict=True):
            assert_close(telling.__name__, found, want, TOLERANCE)


@pytest.mark.parametrize("rows", [True, False], ids=["gate per row", "gate per head"])
def test_reads_and_states_keep_their_gradients(rows: bool) -> None:
    """Trained state-only: a loss on a later call's reads reaches the networks that wrote in an earlier one."""
    torch.manual_seed(0)
    config = AdapterConfig(rank=4, alpha=4.0, num_state_heads=2, rankwise_gates=rows, delta_heads=("q", "o"))
    layer = DeltaMemory(config, AttentionShape(12, 12, 12, 12, 12))
    state = torch.zeros(2, 2, 4, 4)
    for _ in range(2):
        p = layer.propose(torch.randn(2, 5, 12))
        reads, state = scan(p.q, p.k, p.v, p.keep, p.erase, p.write, state)
    reads.square().sum().backward()
    for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj", "beta_bias"):
        gradient = layer.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
