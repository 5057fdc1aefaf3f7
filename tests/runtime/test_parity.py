"""The bundle, run by the Rust engine, against the goldens of the official code: every array, every protocol.

Tolerances are the goldens' own (fp32): logits 1e-4, states 1e-5, greedy ids exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import deltamem_rt as dm

LOGITS, STATES = 1e-4, 1e-5
CASES = ("qwen3_tsw_qo", "smollm3_tsw_qo")


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def golden(case: str, parity_data: Path) -> dict[str, np.ndarray]:
    with np.load(parity_data / case / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(case: str, parity_bundle) -> dm.Model:
    return dm.Model.load(parity_bundle(case), device="cpu")


@pytest.fixture
def session(model: dm.Model) -> Iterator[dm.Session]:
    with model.session() as session:
        yield session


def agree(what: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Fail with the largest and the mean difference, and where the largest is."""
    assert found.shape == expected.shape, f"{what}: found shape {found.shape}, expected {expected.shape}"
    difference = np.abs(found.astype(np.float64) - expected)
    where = np.unravel_index(np.argmax(difference), difference.shape)
    assert difference.max() <= tolerance, (
        f"{what}: max {difference.max():.3e}, mean {difference.mean():.3e}, tolerance {tolerance:.0e}; the largest at "
        f"{tuple(int(i) for i in where)}: found {found[where]:.6f}, expected {expected[where]:.6f}"
    )


def memory(session: dm.Session) -> np.ndarray:
    """The state as the goldens lay it out: [layers, batch, r, r], with one head and a batch of one."""
    return session.memory


def turn(session: dm.Session, ids: np.ndarray, **options: bool) -> np.ndarray:
    logits = session.feed(ids, logits=True, **options)
    session.end_turn()
    return logits


def test_five_turns_then_greedy_decoding(session: dm.Session, golden: dict[str, np.ndarray]) -> None:
    for t in range(5):
        logits = session.feed(golden[f"turn{t}_ids"], logits=True)
        agree(f"turn {t} logits", logits, golden[f"turn{t}_logits"], LOGITS)
        agree(f"turn {t} states", memory(session), golden[f"turn{t}_states"], STATES)
        if t < 4:
            session.end_turn()
    for step, token in enumerate(golden["decode_ids"]):
        assert int(np.argmax(logits[-1])) == token, f"greedy step {step}"
        logits = session.feed([int(token)], logits=True)
        agree(f"decode step {step}", logits[0], golden["decode_logits"][step], LOGITS)
    agree("decode states", memory(session), golden["decode_states"], STATES)
    assert int(np.argmax(logits[-1])) == golden["decode_next_id"][0]


def test_generate_gives_the_greedy_ids(session: dm.Session, model: dm.Model, golden: dict[str, np.ndarray]) -> None:
    for t in range(4):
        turn(session, golden[f"turn{t}_ids"])
    reply = session.generate(golden["turn4_ids"], max_new_tokens=8)
    pieces = list(reply)
    expected = golden["decode_ids"].tolist()
    eos = model.manifest["tokens"]["eos"]
    assert not set(eos) & set(expected), "the golden ignores eos; this test needs greedy ids without it"
    assert reply.token_ids == expected
    assert len(pieces) == 8
    agree("states after generate", memory(session), golden["decode_states"], STATES)


def test_one_call_and_chunks_of_64(session: dm.Session, golden: dict[str, np.ndarray]) -> None:
    ids = golden["cont_ids"]
    agree("one call logits", session.feed(ids, logits=True), golden["cont_once_logits"], LOGITS)
    agree("one call states", memory(session), golden["cont_once_states"], STATES)
    session.reset()
    logits = np.concatenate([session.feed(ids[start : start + 64], logits=True) for start in range(0, 200, 64)])
    agree("chunked logits", logits[golden["cont_chunk_tail_pos"]], golden["cont_chunk_logits_tail"], LOGITS)
    agree("chunked states", memory(session), golden["cont_chunk_states"], STATES)


def test_read_only(session: dm.Session, golden: dict[str, np.ndarray]) -> None:
    turn(session, golden["turn0_ids"])
    turn(session, golden["turn1_ids"])
    agree("states before", memory(session), golden["read_only_states_before"], STATES)
    before = session.memory
    agree("read-only logits", turn(session, golden["turn2_ids"], write=False), golden["read_only_logits"], LOGITS)
    assert np.array_equal(before, session.memory), "writes were off and the memory moved"
    agree("states after", memory(session), golden["read_only_states_after"], STATES)


def test_float64_references(session: dm.Session, golden: dict[str, np.ndarray]) -> None:
    for t in range(5):
        logits = turn(session, golden[f"turn{t}_ids"])
        agree(f"turn {t} last logits against float64", logits[-1], golden[f"fp64_turn{t}_last_logits"], LOGITS)
        agree(f"turn {t} states against float64", memory(session), golden[f"fp64_turn{t}_states"], STATES)


def test_every_array_of_the_golden_is_held_to(golden: dict[str, np.ndarray]) -> None:
    protocols = ("turn", "decode_", "cont_", "read_only_", "fp64_")
    # dbg_*: inside the first layer, held by the exporter's tests; quirk_*: the official code's mask bug, not a target.
    assert all(name.startswith((*protocols, "dbg_", "quirk_")) for name in golden), sorted(golden)
