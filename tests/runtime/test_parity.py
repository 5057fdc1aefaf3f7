"""The bundle, run by the Rust engine, against the goldens of the official code: every array, every protocol.

Tolerances are the goldens' own (fp32): logits 1e-4, states 1e-5, greedy ids exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import deltamem_rt as dm
from agreement import assert_close
from emulated import ON_DEVICE

LOGITS, STATES = 1e-4, 1e-5
CASES = ("qwen3_tsw_qo", "smollm3_tsw_qo", "phi3_tsw_qkvo", "gemma2_tsw_qo", "mistral_window_tsw_qo")


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def golden(case: str, golden_case) -> dict[str, np.ndarray]:
    with np.load(golden_case(case) / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(params=("fused", "portable", "fused for a card"), scope="module")
def model(request: pytest.FixtureRequest, case: str, parity_bundle) -> dm.Model:
    if request.param == "fused for a card":  # which the processor plays
        bundle, device = request.getfixturevalue("device_bundle")(case), ON_DEVICE
    else:
        bundle, device = parity_bundle(case), "cpu"
    model = dm.Model.load(bundle, device=device, graph=request.param.split()[0])
    assert model.graph == request.param.split()[0]
    return model


@pytest.fixture
def session(model: dm.Model) -> Iterator[dm.Session]:
    with model.session() as session:
        yield session


def turn(session: dm.Session, ids: np.ndarray, **options: bool) -> np.ndarray:
    logits = session.feed(ids, logits=True, **options)
    session.end_turn()
    return logits


def test_five_turns_then_greedy_decoding(session: dm.Session, golden: dict[str, np.ndarray]) -> None:
    for t in range(5):
        logits = session.feed(golden[f"turn{t}_ids"], logits=True)
        assert_close(f"turn {t} logits", logits, golden[f"turn{t}_logits"], LOGITS)
        assert_close(f"turn {t} states", session.memory, golden[f"turn{t}_states"], STATES)
        if t < 4:
            session.end_turn()
    for step, token in enumerate(golden["decode_ids"]):
        assert int(np.argmax(logits[-1])) == token, f"greedy step {step}"
        logits = session.feed([int(token)], logits=True)
        assert_close(f"decode step {step}", logits[0], golden["decode_logits"][step], LOGITS)
    assert_close("decode states", session.memory, golden["decode_states"], STATES)
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
    assert_close("states after generate", session.memory, golden["decode_states"], STATES)


def test_one_call_and_chunks_of_64(session: dm.Session, golden: dict[str, np.ndarray]) -> None:
    ids = golden["cont_ids"]
    assert_close("one call logits", session.feed(ids, logits=True), golden["cont_once_logits"], LOGITS)
    assert_close("one call states", session.memory, golden["cont_once_states"], STATES)
    session.reset()
    logits = np.concatenate([session.feed(ids[start : start + 64], logits=True) for start in range(0, 200, 64)])
    assert_close("chunked logits", logits[golden["cont_chunk_tail_pos"]], golden["cont_chunk_logits_tail"], LOGITS)
    assert_close("chunked states", session.memory, golden["cont_chunk_states"], STATES)


def test_read_only(session: dm.Session, golden: dict[str, np.ndarray]) -> None:
    turn(session, golden["turn0_ids"])
    turn(session, golden["turn1_ids"])
    assert_close("states before", session.memory, golden["read_only_states_before"], STATES)
    before = session.memory
    assert_close(
        "read-only logits", turn(session, golden["turn2_ids"], write=False), golden["read_only_logits"], LOGITS
    )
    assert np.array_equal(before, session.memory), "writes were off and the memory moved"
    assert_close("states after", session.memory, golden["read_only_states_after"], STATES)


def test_float64_references(case: str, session: dm.Session, golden: dict[str, np.ndarray]) -> None:
    if "fp64_turn0_last_logits" not in golden:
        pytest.skip(f"{case} has no arrays in float64")
    for t in range(5):
        logits = turn(session, golden[f"turn{t}_ids"])
        assert_close(f"turn {t} last logits against float64", logits[-1], golden[f"fp64_turn{t}_last_logits"], LOGITS)
        assert_close(f"turn {t} states against float64", session.memory, golden[f"fp64_turn{t}_states"], STATES)


def test_every_array_of_the_golden_is_held_to(golden: dict[str, np.ndarray]) -> None:
    protocols = ("turn", "decode_", "cont_", "read_only_", "fp64_")
    # dbg_*: inside the first layer, held by the exporter's tests; quirk_*: the official code's mask bug, not a target.
    assert all(name.startswith((*protocols, "dbg_", "quirk_")) for name in golden), sorted(golden)
