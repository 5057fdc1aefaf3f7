"""Many sessions in one step: each gets what it gets alone, sees nothing of the others, and may come, go, fail or be broken off at any
token.
"""

from __future__ import annotations

import asyncio
import threading
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltamem_rt as dm
from grafted import Grafted
from interrupted import interrupted
from sealing import snapshot_with
from together import beside_prompts, shared, together, until_shared

# One row of a product is summed in another order when there are more rows.
LOGITS = STATES = 1e-5


@pytest.fixture(scope="module")
def ids_model(parity_bundle) -> dm.Model:
    """One thread a run: the sessions' own threads are enough for the machine."""
    return dm.Model.load(parity_bundle("qwen3_tsw_qo"), threads=1)


def rng_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, count, dtype=np.int32)


class Talk(NamedTuple):
    """What one session reads: a turn that it is told, then a prompt and tokens one by one."""

    told: np.ndarray
    prompt: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def random(seed: int, most: int = 40) -> Talk:
        told, prompt, tokens = np.random.default_rng(seed).integers(1, most, 3)
        return Talk(rng_ids(told, 3 * seed), rng_ids(prompt, 3 * seed + 1), rng_ids(tokens, 3 * seed + 2))

    def hold(self, model: dm.Model) -> tuple[np.ndarray, np.ndarray]:
        """The logits behind each single token, and the memory at the end."""
        with model.session() as session:
            session.feed(self.told)
            session.end_turn()
            session.feed(self.prompt)
            logits = [session.feed([token], logits=True)[0] for token in self.tokens]
            return np.stack(logits), session.memory


def assert_equal(found: tuple[np.ndarray, np.ndarray], alone: tuple[np.ndarray, np.ndarray], logits: float) -> None:
    np.testing.assert_allclose(found[0], alone[0], rtol=0, atol=logits)
    np.testing.assert_allclose(found[1], alone[1], rtol=0, atol=STATES if logits == LOGITS else logits)


# what each gets


@settings(max_examples=5, deadline=None)
@given(seeds=st.lists(st.integers(0, 10_000), min_size=2, max_size=14, unique=True))
def test_sessions_that_come_and_go_get_what_they_get_alone(ids_model: dm.Model, seeds: list[int]) -> None:
    talks = [Talk.random(seed) for seed in seeds]
    alone = [talk.hold(ids_model) for talk in talks]
    for found, expected in zip(together([lambda t=talk: t.hold(ids_model) for talk in talks]), alone, strict=True):
        assert_equal(found, expected, LOGITS)


def test_threads_share_steps(ids_model: dm.Model) -> None:
    talks = [Talk(rng_ids(5, n), rng_ids(5, n + 50), rng_ids(80, n + 100)) for n in range(8)]
    jobs = [lambda t=talk: t.hold(ids_model) for talk in talks]
    # Steps as short as these end before the next thread has woken. Behind the chunks of a prompt they meet: 6 to 7 in one on a quiet
    # machine, 1.08 to 2.3 beside four busy processes.
    until_shared(ids_model, lambda: beside_prompts(ids_model, rng_ids(500), jobs))


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_other_precisions(parity_bundle, precision: str) -> None:
    model = dm.Model.load(parity_bundle("qwen3_tsw_qo", precision), threads=1)
    # int4 rounds activations to int8, and is not the same for other splits either (tests/runtime/test_precisions.py).
    talks = [Talk.random(seed) for seed in range(10)]
    alone = [talk.hold(model) for talk in talks]
    batched = beside_prompts(model, rng_ids(500), [lambda t=talk: t.hold(model) for talk in talks])
    for found, expected in zip(batched, alone, strict=True):
        assert_equal(found, expected, 1e-1)
    assert model.unbatched is None
    assert model.stats.largest_step > 1


def test_replies_of_many_are_those_of_each_alone(ids_model: dm.Model) -> None:
    def reply(seed: int) -> tuple[list[int], np.ndarray]:
        with ids_model.session() as session:
            session.feed(rng_ids(20, seed))
            session.end_turn()
            made = session.generate(rng_ids(8, seed + 1), max_new_tokens=10 + seed, temperature=0.8, seed=seed)
            made.read()
            session.end_turn()
            return made.token_ids, session.memory

    alone = [reply(seed) for seed in range(12)]
    for (ids, memory), (expected, expected_memory) in zip(
        together([lambda s=seed: reply(s) for seed in range(12)]), alone, strict=True
    ):
        assert ids == expected
        np.testing.assert_allclose(memory, expected_memory, rtol=0, atol=STATES)


def test_more_sessions_than_fit_into_a_step(parity_bundle) -> None:
    model = dm.Model.load(parity_bundle("qwen3_tsw_qo"), max_batch=3, threads=1)
    talks = [Talk.random(seed) for seed in range(10)]
    alone = [talk.hold(model) for talk in talks]
    batched = beside_prompts(model, rng_ids(500), [lambda t=talk: t.hold(model) for talk in talks])
    for found, expected in zip(batched, alone, strict=True):
        assert_equal(found, expected, LOGITS)
    assert 2 <= model.stats.largest_step <= 3


def test_a_batch_of_one_runs_them_one_after_another_bit_for_bit(parity_bundle) -> None:
    model = dm.Model.load(parity_bundle("qwen3_tsw_qo"), max_batch=1, threads=1)
    assert (model.max_batch, model.unbatched) == (1, "max_batch is 1")
    talks = [Talk.random(seed) for seed in range(6)]
    alone = [talk.hold(model) for talk in talks]
    for found, expected in zip(together([lambda t=talk: t.hold(model) for talk in talks]), alone, strict=True):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    with pytest.raises(ValueError, match="max_batch is 0"):
        dm.Model.load(parity_bundle("qwen3_tsw_qo"), max_batch=0)


def test_asyncio_tasks_share_steps(ids_model: dm.Model) -> None:
    async def reply(seed: int) -> list[int]:
        with ids_model.session() as session:
            made = session.generate(rng_ids(5, seed), max_new_tokens=40)
            async for _ in made:
                pass
            return made.token_ids

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(reply(seed) for seed in range(16)))

    alone = [asyncio.run(reply(seed)) for seed in range(16)]
    before = ids_model.stats
    assert beside_prompts(ids_model, rng_ids(500), [lambda: asyncio.run(all_of_them())]) == [alone]
    assert shared(before, ids_model.stats) > 1.0, "no two tasks ever shared a step"


# what nobody sees of another


def test_a_slot_of_many_users_is_as_new(ids_model: dm.Model) -> None:
    with ids_model.session() as fresh:
        expected = fresh.feed(rng_ids(50, 1), logits=True)
        expected_memory = fresh.memory
    together([lambda n=n: Talk.random(n, 200).hold(ids_model) for n in range(16)])
    with ids_model.session() as again:
        np.testing.assert_array_equal(again.feed(rng_ids(50, 1), logits=True), expected)
        np.testing.assert_array_equal(again.memory, expected_memory)


def test_what_others_hold_moves_nothing(parity_bundle) -> None:
    model = dm.Model.load(parity_bundle("qwen3_tsw_qo"), threads=1)
    found = []
    for others in range(3):
        with model.session() as one, model.session() as idle, model.session() as last:
            for seed, session in enumerate((one, idle, last)):
                session.feed(rng_ids(12, 0 if session is one else 10 * others + seed))
            # `idle` lies between the two that step, and rides along or is moved away.
            logits = []
            for step in range(20):
                token = rng_ids(20, 99)[step : step + 1]
                rows = together(
                    [
                        lambda t=token: one.feed(t, logits=True)[0],
                        lambda o=others, s=step: last.feed(rng_ids(20, o)[s : s + 1]),
                    ]
                )
                logits.append(rows[0])
            found.append((np.stack(logits), one.memory))
            np.testing.assert_allclose(found[-1][0], found[0][0], rtol=0, atol=LOGITS)
            np.testing.assert_allclose(found[-1][1], found[0][1], rtol=0, atol=STATES)


def test_an_idle_turn_between_others_goes_on_as_if_alone(ids_model: dm.Model) -> None:
    with ids_model.session() as alone:
        alone.feed(rng_ids(30))
        expected = alone.feed(rng_ids(10, 1), logits=True)
    sessions = [ids_model.session() for _ in range(6)]
    for number, session in enumerate(sessions):
        session.feed(rng_ids(30, number))
    before = ids_model.stats
    for _ in range(3):
        together([lambda s=session: [s.feed([7]) for _ in range(15)] for session in sessions[1:]])
    assert ids_model.stats.step_tokens - before.step_tokens == 225
    np.testing.assert_allclose(sessions[0].feed(rng_ids(10, 1), logits=True), expected, rtol=0, atol=LOGITS)
    for session in sessions:
        session.close()


# coming, going, failing


def test_breaking_off_frees_the_slot_and_harms_nobody(ids_model: dm.Model) -> None:
    talks = [Talk(rng_ids(5, n), rng_ids(5, n + 50), rng_ids(60, n + 100)) for n in range(6)]
    alone = [talk.hold(ids_model) for talk in talks]

    def breaks_off(seed: int) -> None:
        for attempt in range(12):
            session = ids_model.session()
            reply = session.generate(rng_ids(9, seed + attempt), max_new_tokens=50, temperature=1.0, seed=seed)
            for _ in zip(range(1 + (seed + attempt) % 5), reply, strict=False):
                pass
            if attempt % 3 == 0:
                reply.close()
            if attempt % 3 == 1:
                session.close()
            del reply, session  # or neither: the last one to hold it lets go

    def fails() -> None:
        with ids_model.session() as session:
            for _ in session.generate([5, 6], max_new_tokens=50):
                raise ZeroDivisionError

    def raises() -> None:
        for _ in range(12):
            with pytest.raises(ZeroDivisionError):
                fails()

    found = together(
        [lambda t=talk: t.hold(ids_model) for talk in talks] + [lambda: breaks_off(1), lambda: breaks_off(40), raises]
    )
    assert found[6:] == [None, None, None]
    for one, expected in zip(found, alone, strict=False):
        assert_equal(one, expected, LOGITS)


def test_a_memory_that_overflows_fails_alone(ids_model: dm.Model) -> None:
    with ids_model.session() as session:
        session.feed(rng_ids(20))
        data = session.snapshot().to_bytes()
    # The largest numbers that there are: the next write leaves what is no number.
    poisoned = dm.Snapshot.from_bytes(snapshot_with(data, np.full(ids_model.geometry.shape, 3e38, np.float32)))
    talks = [Talk.random(seed) for seed in range(6)]
    alone = [talk.hold(ids_model) for talk in talks]

    def fails() -> int:
        errors = 0
        with ids_model.session() as session:
            session.restore(poisoned)
            for _ in range(10):
                try:
                    session.feed([7])
                except dm.NotFiniteError:
                    errors += 1
                    np.testing.assert_array_equal(session.memory, poisoned.memory)
                    assert session.position == 0
        return errors

    found = together([lambda t=talk: t.hold(ids_model) for talk in talks] + [fails])
    assert found[-1] == 10
    for one, expected in zip(found, alone, strict=False):
        assert_equal(one, expected, LOGITS)


def test_ctrl_c_in_a_prompt_beside_a_reply_leaves_both_in_order(ids_model: dm.Model) -> None:
    stop = threading.Event()
    expected = Talk(rng_ids(5), rng_ids(5, 1), rng_ids(100, 2)).hold(ids_model)
    found: list[tuple[np.ndarray, np.ndarray]] = []

    def streams() -> None:
        while not stop.is_set():
            found.append(Talk(rng_ids(5), rng_ids(5, 1), rng_ids(100, 2)).hold(ids_model))

    other = threading.Thread(target=streams, daemon=True)
    with ids_model.session() as session:

        def reads() -> None:
            while True:
                session.feed(rng_ids(2000, 3))
                session.end_turn()

        other.start()
        try:
            assert interrupted(reads, 0.5)
        finally:
            stop.set()
            other.join(60)
        assert not other.is_alive()
        assert session.tokens_seen % 2000 == 0
        session.feed([1])
    assert found
    for one in found:
        assert_equal(one, expected, LOGITS)


def test_a_prompt_does_not_hold_up_a_reply(ids_model: dm.Model) -> None:
    """Counted in runs: a prompt beside a reply is read in short chunks, and the reply goes on between them."""
    long = rng_ids(2000, 3)
    gaps: list[int] = []
    done, begun = threading.Event(), threading.Event()

    def streams() -> None:
        while not done.is_set():
            with ids_model.session() as session:
                last = None
                for _ in session.generate(rng_ids(3), max_new_tokens=1000, temperature=1.0, seed=0):
                    begun.set()
                    now = ids_model.stats.chunks
                    if last is not None:
                        gaps.append(now - last)
                    last = now
                    if done.is_set():
                        break

    def reads() -> None:
        begun.wait(20)
        try:
            for _ in range(3):
                with ids_model.session() as session:
                    before = ids_model.stats.chunks
                    session.feed(long)
                    # 8 chunks of 256 when nobody else is there.
                    assert ids_model.stats.chunks - before > 12
        finally:
            done.set()

    assert together([streams, reads]) == [None, None]
    # How many chunks pass while the streaming thread waits for Python is the machine's affair; who is next when it asks is held by the
    # schedule's own tests.
    assert len([gap for gap in gaps if gap]) > 12


# what is read once


def test_a_prefix_is_the_same_as_reading_it_with_an_empty_memory(ids_model: dm.Model) -> None:
    first, prompt = rng_ids(300, 4), rng_ids(20, 5)
    prefix = ids_model.prefix(first)
    assert (len(prefix), prefix.token_ids, prefix.system) == (300, first.tolist(), None)
    for _ in range(2):
        with ids_model.session() as reads, ids_model.session() as copies:
            reads.feed(first, write=False)
            copies.begin(prefix)
            assert copies.position == 300
            assert copies.tokens_seen == 0
            np.testing.assert_array_equal(copies.feed(prompt, logits=True), reads.feed(prompt, logits=True))
            np.testing.assert_array_equal(copies.memory, reads.memory)
            a, b = (session.generate(max_new_tokens=30) for session in (reads, copies))
            assert a.read() == b.read()
            assert a.token_ids == b.token_ids
            np.testing.assert_array_equal(copies.memory, reads.memory)


def test_behind_a_prefix_a_turn_reads_its_own_memory(parity_bundle, ids_model: dm.Model) -> None:
    told, first, prompt = rng_ids(60, 6), rng_ids(40, 4), rng_ids(20, 5)
    oracle = Grafted(parity_bundle("qwen3_tsw_qo"))
    oracle.feed(told)
    memory = oracle.memory
    oracle.reset()
    oracle.feed(first, write=False)
    oracle.memory = memory
    expected = oracle.feed(prompt)
    prefix = ids_model.prefix(first)
    with ids_model.session() as session:
        session.feed(told)
        session.end_turn()
        session.begin(prefix)
        np.testing.assert_allclose(session.feed(prompt, logits=True), expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(session.memory, oracle.memory[0], rtol=0, atol=1e-5)


def test_a_prefix_stands_at_the_start_of_a_turn_of_its_model(ids_model: dm.Model, text_model: dm.Model) -> None:
    prefix = ids_model.prefix([5, 6, 7])
    with ids_model.session() as session:
        session.feed([1])
        with pytest.raises(dm.SessionError, match="1 tokens"):
            session.begin(prefix)
        session.end_turn()
        session.begin(prefix)
        assert session.cache_bytes > 0
        assert len(session.generate(max_new_tokens=2).read()) == 0
        session.end_turn()
        session.begin(prefix)
    with text_model.session() as session, pytest.raises(ValueError, match="another model"):
        session.begin(prefix)
    for arguments in ({}, {"tokens": [1], "system": "x"}, {"tokens": []}):
        with pytest.raises(ValueError, match="prefix"):
            ids_model.prefix(**arguments)


def test_a_system_message_that_was_read_before(text_model: dm.Model) -> None:
    prefix = text_model.prefix(system="Be kind.")
    assert prefix.system == "Be kind."
    before = text_model.stats.chunks
    with text_model.session() as copies, text_model.session() as reads:
        a = copies.chat("Hello.", system=prefix, max_new_tokens=8)
        b = reads.chat("Hello.", system="Be kind.", max_new_tokens=8, write=False)
        b.read()
        assert a.stats.prompt_tokens + len(prefix) == b.stats.prompt_tokens
        a.read()
        assert copies.position == 0
        assert copies.turns == 1
        # With an empty memory and nothing written in front of it the first reply is the same.
        assert a.token_ids[:1] == b.token_ids[:1]
    assert text_model.stats.chunks - before <= 2
    with text_model.session() as session:
        for _ in range(2):
            session.chat("My dog is called Bruno.", system=prefix, max_new_tokens=16).read()
        with pytest.raises(ValueError, match="made of tokens"):
            session.chat("Hello.", system=text_model.prefix([5, 6]))


# what it costs


def test_a_turn_costs_the_same_after_any_history(ids_model: dm.Model) -> None:
    """Counted, not timed: runs, tokens read, and bytes held by a turn of 40 tokens and 10 more."""

    def turn(session: dm.Session) -> tuple[int, int, int, int]:
        before, seen = ids_model.stats, session.tokens_seen
        session.feed(rng_ids(40, 8))
        for token in rng_ids(10, 9):
            session.feed([token])
        held = session.cache_bytes
        session.end_turn()
        after = ids_model.stats
        return after.steps - before.steps, after.chunks - before.chunks, session.tokens_seen - seen, held

    with ids_model.session() as new, ids_model.session() as old:
        for _ in range(30):
            old.feed(rng_ids(1500, 9))
            old.end_turn()
        assert old.cache_bytes == 0
        assert turn(old)[:3] == (10, 1, 50)
        assert turn(old) == turn(new)
