"""Laws of streams: chunking never changes a result, sessions never see each other, writes off leaves no trace."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import deltamem_rt as dm

# The split of a stream moves fp32 sums inside a matrix product, no more (the goldens' own tolerances are 1e-4 and 1e-5).
LOGITS, STATES = 1e-4, 1e-5

ids = st.lists(st.integers(3, 255), min_size=1, max_size=600)


def rng_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, count, dtype=np.int32)


@settings(max_examples=25, deadline=None)
@given(ids=ids, cuts=st.lists(st.integers(0, 600), max_size=6))
def test_any_split_of_a_stream_gives_the_same_logits_and_state(ids_model: dm.Model, ids, cuts) -> None:
    stream = np.asarray(ids, np.int32)
    with ids_model.session() as once, ids_model.session() as split:
        expected = once.feed(stream, logits=True)
        edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
        parts = [split.feed(stream[a:b], logits=True) for a, b in pairwise(edges)]
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=LOGITS)
        np.testing.assert_allclose(split.memory, once.memory, rtol=0, atol=STATES)
        assert split.tokens_seen == once.tokens_seen == len(stream)


def test_a_token_at_a_time_equals_one_long_call(ids_model: dm.Model) -> None:
    stream = rng_ids(700)
    with ids_model.session() as once, ids_model.session() as single:
        expected = once.feed(stream, logits=True)
        rows = [single.feed(stream[t : t + 1], logits=True)[0] for t in range(len(stream))]
        np.testing.assert_allclose(np.stack(rows), expected, rtol=0, atol=LOGITS)
        np.testing.assert_allclose(single.memory, once.memory, rtol=0, atol=STATES)


@settings(max_examples=15, deadline=None)
@given(
    a=st.lists(ids, min_size=1, max_size=5),
    b=st.lists(ids, min_size=1, max_size=5),
    order=st.lists(st.booleans(), max_size=10),
    turns=st.booleans(),
)
def test_two_sessions_interleaved_equal_each_alone_bit_for_bit(ids_model: dm.Model, a, b, order, turns) -> None:
    def play(session: dm.Session, part: list[int]) -> np.ndarray:
        logits = session.feed(part, logits=True)
        if turns:
            session.end_turn()
        return logits

    alone = []
    for parts in (a, b):
        with ids_model.session() as session:
            alone.append(([play(session, part) for part in parts], session.memory))
    with ids_model.session() as first, ids_model.session() as second:
        queues, found = [list(a), list(b)], ([], [])
        sessions = (first, second)
        for pick in [*order, *([False] * len(a)), *([True] * len(b))]:
            if queues[pick]:
                found[pick].append(play(sessions[pick], queues[pick].pop(0)))
        for pick in (0, 1):
            for mine, expected in zip(found[pick], alone[pick][0], strict=True):
                np.testing.assert_array_equal(mine, expected)
            np.testing.assert_array_equal(sessions[pick].memory, alone[pick][1])


def test_a_session_in_reused_buffers_equals_a_fresh_one(ids_model: dm.Model) -> None:
    stream = rng_ids(50, 1)
    with ids_model.session() as fresh:
        expected = fresh.feed(stream, logits=True)
    for seed in range(8):
        with ids_model.session() as other:
            other.feed(rng_ids(400, seed))
    with ids_model.session() as again:
        np.testing.assert_array_equal(again.feed(stream, logits=True), expected)


@settings(max_examples=15, deadline=None)
@given(told=ids, asked=ids)
def test_writes_off_leaves_the_memory_and_reads_the_old_one(ids_model: dm.Model, told, asked) -> None:
    with ids_model.session() as session:
        session.feed(told)
        session.end_turn()
        before = session.memory
        once = session.feed(asked, write=False, logits=True)
        np.testing.assert_array_equal(session.memory, before)
        session.end_turn()
        half = len(asked) // 2
        parts = [session.feed(part, write=False, logits=True) for part in (asked[:half], asked[half:]) if part]
        np.testing.assert_allclose(np.concatenate(parts), once, rtol=0, atol=LOGITS)
        np.testing.assert_array_equal(session.memory, before)


def test_the_memory_makes_a_difference(ids_model: dm.Model) -> None:
    told, asked = rng_ids(40, 2), rng_ids(20, 3)
    with ids_model.session() as empty, ids_model.session() as full:
        full.feed(told)
        full.end_turn()
        difference = np.abs(full.feed(asked, logits=True) - empty.feed(asked, logits=True)).max()
    assert difference > 0.01, f"what was told moved the logits by {difference} only"


def test_the_first_read_after_a_reset_is_zero(ids_model: dm.Model) -> None:
    with ids_model.session() as used, ids_model.session() as fresh:
        used.feed(rng_ids(30))
        used.reset()
        assert not used.memory.any()
        assert used.tokens_seen == used.turns == used.position == 0
        np.testing.assert_array_equal(used.feed([7], logits=True), fresh.feed([7], logits=True))
