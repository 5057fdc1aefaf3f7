"""The reference in PyTorch and the grafted graph in ONNX Runtime against the same goldens: every array, every protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agreement import assert_close
from deltamem_export.adapter import Adapter
from deltamem_export.reference import MemoryHandle, attach
from grafted import Grafted

CASES = (
    "qwen3_tsw_qo",
    "smollm3_tsw_qo",
    "llama_tsw_qo",
    "phi3_tsw_qkvo",
    "gemma2_tsw_qo",
    "mistral_window_tsw_qo",
)
LOGITS, STATES = 1e-4, 1e-5


class Stream(Protocol):
    """What both have in common: a memory [B, L, H, r, r] and a KV cache that `feed` continues."""

    memory: np.ndarray

    def feed(self, ids: np.ndarray, *, write: bool = True) -> np.ndarray: ...
    def end_turn(self) -> None: ...
    def reset(self) -> None: ...


class Reference:
    """The PyTorch reference behind the same three verbs."""

    def __init__(self, source: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source / "backbone", attn_implementation="eager").eval()
        self.handle: MemoryHandle = attach(self.model, Adapter.load(source / "adapter"))
        self.reset()

    @property
    def memory(self) -> np.ndarray:
        assert self.handle.state is not None
        return self.handle.state.numpy()

    def reset(self) -> None:
        self.handle.reset(1)
        self.end_turn()

    def end_turn(self) -> None:
        self.past = None

    @torch.no_grad()
    def feed(self, ids: np.ndarray, *, write: bool = True) -> np.ndarray:
        self.handle.writes = write
        out = self.model(torch.from_numpy(ids[None].astype(np.int64)), past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        return out.logits[0].numpy()


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def golden(case: str, golden_case) -> dict[str, np.ndarray]:
    with np.load(golden_case(case) / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(params=["reference", "grafted"], scope="module")
def stream(request: pytest.FixtureRequest, case: str, golden_case, parity_bundle: Callable[..., Path]) -> Stream:
    return Reference(golden_case(case)) if request.param == "reference" else Grafted(parity_bundle(case))


@pytest.fixture(autouse=True)
def _fresh(stream: Stream) -> Iterator[None]:
    stream.reset()
    with torch.no_grad():
        yield


def state(stream: Stream) -> np.ndarray:
    """[layers, 1, r, r], as the goldens have it: one sequence, one head."""
    return stream.memory[0]


def turns(stream: Stream, golden: dict[str, np.ndarray], count: int) -> None:
    for t in range(count):
        stream.end_turn()
        logits = stream.feed(golden[f"turn{t}_ids"])
        assert_close(f"turn {t}: logits", logits, golden[f"turn{t}_logits"], LOGITS)
        assert_close(f"turn {t}: states", state(stream), golden[f"turn{t}_states"], STATES)
        if f"fp64_turn{t}_states" in golden:
            assert_close(f"turn {t}: states in float64", state(stream), golden[f"fp64_turn{t}_states"], STATES)
            last = golden[f"fp64_turn{t}_last_logits"]
            assert_close(f"turn {t}: last logits in float64", logits[-1], last, LOGITS)


def test_turns_with_a_fresh_cache_and_then_decoding(stream, golden) -> None:
    turns(stream, golden, 5)
    token = golden["turn4_logits"][-1].argmax()
    for step, expected in enumerate(golden["decode_ids"]):
        assert token == expected, f"decode step {step}: greedy id {token}, expected {expected}"
        logits = stream.feed(np.array([token]))
        assert_close(f"decode step {step}: logits", logits[0], golden["decode_logits"][step], LOGITS)
        token = logits[0].argmax()
    assert token == golden["decode_next_id"][0]
    assert_close("decode: states", state(stream), golden["decode_states"], STATES)


def test_a_stream_in_one_call(stream, golden) -> None:
    assert_close("logits", stream.feed(golden["cont_ids"]), golden["cont_once_logits"], LOGITS)
    assert_close("states", state(stream), golden["cont_once_states"], STATES)


@pytest.mark.parametrize("cuts", [[64, 128, 192], [1, 2, 3, 150], [199]], ids=str)
def test_a_stream_in_chunks(stream, golden, cuts) -> None:
    logits = np.concatenate([stream.feed(part) for part in np.split(golden["cont_ids"], cuts)])
    tail = golden["cont_chunk_tail_pos"]
    assert_close("logits", logits[tail], golden["cont_chunk_logits_tail"], LOGITS)
    assert_close("states", state(stream), golden["cont_chunk_states"], STATES)


def test_reading_alone(stream, golden) -> None:
    turns(stream, golden, 2)
    stream.end_turn()
    assert_close("states before", state(stream), golden["read_only_states_before"], STATES)
    before = state(stream).copy()
    assert_close("logits", stream.feed(golden["turn2_ids"], write=False), golden["read_only_logits"], LOGITS)
    assert_close("states after", state(stream), golden["read_only_states_after"], STATES)
    assert np.array_equal(state(stream), before), "a memory that may not be written changed"


def test_inside_the_first_layer(case, golden, golden_case) -> None:
    if "dbg_turn0_beta" not in golden:
        pytest.skip(f"{case} has no arrays from inside a layer")
    reference = Reference(golden_case(case))
    reference.handle.record = True
    reads = []
    scan = reference.handle.scan
    reference.handle.scan = lambda *tensors: reads.append(scan(*tensors)) or reads[-1]
    reference.feed(golden["turn0_ids"])
    proposal = reference.handle.recorded[0]
    found = {
        "mq": proposal.q,
        "mk": proposal.k,
        "mv": proposal.v,
        "beta": proposal.write,
        "lam": proposal.keep,
        "reads": reads[0][0],
    }
    for name, tensor in found.items():
        assert_close(name, tensor[0, :, 0].detach().numpy(), golden[f"dbg_turn0_{name}"], STATES)
