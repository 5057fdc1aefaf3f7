"""What a session promises: views that never change, snapshots that continue bit for bit, calls that happen whole or not at all."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import deltamem_rt as dm


def rng_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, count, dtype=np.int32)


# memory


def test_memory_is_a_read_only_float32_view_of_the_geometry(session: dm.Session) -> None:
    memory = session.memory
    assert memory.shape == session.geometry.shape == (3, 1, 8, 8)
    assert memory.dtype == np.float32
    assert memory.nbytes == session.geometry.bytes
    assert not memory.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        memory[0, 0, 0, 0] = 1.0
    with pytest.raises(ValueError, match="WRITEABLE"):
        memory.flags.writeable = True
    again = session.memory
    assert memory.__array_interface__["data"] == again.__array_interface__["data"], "a second look made a copy"


def test_a_held_view_never_changes_and_outlives_its_session(ids_model: dm.Model) -> None:
    session = ids_model.session()
    views, copies = [], []
    for seed in range(12):
        session.feed(rng_ids(9, seed))
        views.append(session.memory)
        copies.append(session.memory.copy())
    session.close()
    del session
    gc.collect()
    for view, copy in zip(views, copies, strict=True):
        np.testing.assert_array_equal(view, copy)


# snapshots


def test_a_restored_snapshot_continues_bit_for_bit(ids_model: dm.Model) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9}
    with ids_model.session() as first, ids_model.session() as second:
        first.feed(rng_ids(100))
        list(first.generate(rng_ids(5), **options, seed=11))
        first.end_turn()
        data = first.snapshot().to_bytes()
        second.feed(rng_ids(33, 5))
        second.restore(dm.Snapshot.from_bytes(data))
        np.testing.assert_array_equal(first.memory, second.memory)
        assert (second.tokens_seen, second.turns, second.position) == (first.tokens_seen, first.turns, 0)
        replies = []
        for session in (first, second):
            reply = session.generate(rng_ids(8, 9), **options)
            list(reply)
            session.end_turn()
            replies.append((reply.token_ids, session.memory, session.snapshot().to_bytes()))
        assert replies[0][0] == replies[1][0], "the samplers went different ways"
        np.testing.assert_array_equal(replies[0][1], replies[1][1])
        assert replies[0][2] == replies[1][2]


def test_a_snapshot_is_a_few_kb_of_safetensors(session: dm.Session) -> None:
    from safetensors.numpy import load

    session.feed(rng_ids(50))
    snapshot = session.snapshot()
    data = snapshot.to_bytes()
    assert len(data) < session.geometry.bytes + 1024
    np.testing.assert_array_equal(load(data)["memory"], session.memory)
    assert snapshot == dm.Snapshot.from_bytes(data)
    assert snapshot.fingerprint in data.decode("latin-1")


def test_a_snapshot_does_not_move_with_its_session(session: dm.Session) -> None:
    session.feed(rng_ids(20))
    snapshot = session.snapshot()
    data = snapshot.to_bytes()
    session.feed(rng_ids(20, 1))
    assert snapshot.to_bytes() == data
    session.restore(snapshot)
    session.feed(rng_ids(20, 2))
    assert snapshot.to_bytes() == data


def test_a_snapshot_of_another_model_is_refused(parity_bundle, session: dm.Session) -> None:
    other = dm.Model.load(parity_bundle("smollm3_tsw_qo"))
    session.feed(rng_ids(5))
    before = session.memory
    with other.session() as stranger:
        snapshot = stranger.snapshot()
    with pytest.raises(dm.FingerprintError, match=snapshot.fingerprint):
        session.restore(snapshot)
    np.testing.assert_array_equal(session.memory, before)
    assert session.position == 5


# whole or not at all


def test_a_turn_over_the_context_is_refused_before_anything_is_read(session: dm.Session, ids_model: dm.Model) -> None:
    session.feed(rng_ids(10))
    before = session.snapshot().to_bytes()
    with pytest.raises(dm.ContextLengthError, match=r"end_turn\(\)"):
        session.feed(rng_ids(ids_model.context_length))
    with pytest.raises(dm.ContextLengthError):
        session.feed(rng_ids(ids_model.context_length), logits=True)
    assert session.position == 10
    assert session.snapshot().to_bytes() == before
    session.end_turn()
    session.feed(rng_ids(ids_model.context_length))
    assert session.position == ids_model.context_length


def test_ctrl_c_in_a_long_prefill_leaves_the_session_as_it_was(ids_model: dm.Model, session: dm.Session) -> None:
    session.feed(rng_ids(10))
    before, position = session.memory, session.position
    long = rng_ids(ids_model.context_length - 10)

    def interrupt() -> None:
        time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    for _ in range(20):
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            session.feed(long)
        except KeyboardInterrupt:
            thread.join()
            assert session.position == position
            np.testing.assert_array_equal(session.memory, before)
            session.feed(rng_ids(3))
            return
        finally:
            thread.join()
        session.end_turn()
        session.reset()
        session.feed(rng_ids(10))
        before = session.memory
    pytest.fail("twenty prefills were never interrupted")


# threads


def test_many_threads_share_one_model(ids_model: dm.Model) -> None:
    streams = [rng_ids(300, seed) for seed in range(6)]
    expected = []
    for stream in streams:
        with ids_model.session() as session:
            session.feed(stream)
            expected.append(session.memory)
    found: list[np.ndarray | None] = [None] * len(streams)

    def work(index: int) -> None:
        with ids_model.session(f"thread {index}") as session:
            for start in range(0, 300, 300):
                session.feed(streams[index][start : start + 300])
            found[index] = session.memory

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, alone in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, alone)


def test_one_session_in_two_threads_is_refused(ids_model: dm.Model) -> None:
    session = ids_model.session("shared")
    stop, refusals, others = threading.Event(), [], []
    long = rng_ids(ids_model.context_length)

    def work() -> None:
        while not stop.is_set():
            try:
                session.feed(long)
                session.end_turn()
            except dm.SessionError as error:
                refusals.append(str(error))
            except Exception as error:
                others.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while not refusals and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not [error for error in others if not isinstance(error, dm.ContextLengthError)]
    assert refusals
    assert "in use by another thread" in refusals[0]
    assert "'shared'" in refusals[0] or '"shared"' in refusals[0]


# generation


def test_breaking_out_stops_the_work_and_keeps_what_was_given(session: dm.Session) -> None:
    reply = session.generate(rng_ids(10), max_new_tokens=50)
    for _piece in reply:
        if len(reply.token_ids) == 3:
            break
    seen = session.tokens_seen
    time.sleep(0.05)
    assert session.tokens_seen == seen == 12, "the third token is read at the next call"
    session.feed([5])
    with pytest.raises(dm.SessionError, match="ended by a later call"):
        next(reply)
    assert session.tokens_seen == 14
    assert reply.stats.finish_reason == "closed"


def test_a_reply_read_to_its_end_is_in_the_memory(ids_model: dm.Model) -> None:
    prompt = rng_ids(10)
    with ids_model.session() as spoke, ids_model.session() as read:
        reply = spoke.generate(prompt, max_new_tokens=7)
        reply.read()
        read.feed(prompt)
        for token in reply.token_ids:
            read.feed([token])
        np.testing.assert_array_equal(spoke.memory, read.memory)
        assert reply.stats.finish_reason == "length"
        assert reply.stats.tokens == 7
        assert reply.stats.prompt_tokens == 10
        assert reply.stats.time_to_first_token > 0
        assert reply.stats.tokens_per_second > 0
        assert reply.stats.delta_ratio is None


def test_close_ends_a_reply(session: dm.Session) -> None:
    reply = session.generate(rng_ids(4), max_new_tokens=50)
    next(reply)
    reply.close()
    reply.close()
    assert next(reply, None) is None
    assert reply.stats.finish_reason == "closed"
    assert session.tokens_seen == 5


def test_going_on_without_a_prompt(ids_model: dm.Model) -> None:
    with ids_model.session() as at_once, ids_model.session() as in_two:
        whole = at_once.generate(rng_ids(6), max_new_tokens=12)
        whole.read()
        first = in_two.generate(rng_ids(6), max_new_tokens=5)
        first.read()
        second = in_two.generate(max_new_tokens=7)
        second.read()
        assert first.token_ids + second.token_ids == whole.token_ids


def test_the_same_seed_gives_the_same_tokens(ids_model: dm.Model) -> None:
    def run(seed: int | None) -> list[int]:
        with ids_model.session() as session:
            reply = session.generate(rng_ids(6), max_new_tokens=30, temperature=1.2, top_k=50, seed=seed)
            reply.read()
            return reply.token_ids

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)


def test_the_context_ends_a_reply(ids_model: dm.Model, session: dm.Session) -> None:
    session.feed(rng_ids(ids_model.context_length - 3))
    reply = session.generate(rng_ids(1), max_new_tokens=50, temperature=1.0, seed=1)
    reply.read()
    assert reply.stats.finish_reason == "context"
    assert session.position == ids_model.context_length
    session.end_turn()
    session.feed([3])


def test_measuring_changes_nothing_but_gives_a_ratio(ids_model: dm.Model) -> None:
    with ids_model.session() as plain, ids_model.session() as measured:
        for session in (plain, measured):
            session.feed(rng_ids(40))
            session.end_turn()
        a = plain.generate(rng_ids(5), max_new_tokens=6)
        b = measured.generate(rng_ids(5), max_new_tokens=6, measure=True)
        a.read()
        b.read()
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(plain.memory, measured.memory, rtol=0, atol=1e-5)
        assert 0 < b.stats.delta_ratio < 10


def test_asynchronous_replies_leave_the_loop_free(ids_model: dm.Model) -> None:
    async def one(seed: int) -> list[int]:
        with ids_model.session() as session:
            reply = session.generate(rng_ids(5, seed), max_new_tokens=15)
            async for piece in reply:
                assert piece == ""
            return reply.token_ids

    async def all_of_them() -> list[list[int]]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        replies = await asyncio.gather(*(one(seed) for seed in range(4)))
        ticker.cancel()
        assert ticks > 10
        return replies

    expected = []
    for seed in range(4):
        with ids_model.session() as session:
            reply = session.generate(rng_ids(5, seed), max_new_tokens=15)
            reply.read()
            expected.append(reply.token_ids)
    assert asyncio.run(all_of_them()) == expected


# closing


def test_a_closed_session_says_so(ids_model: dm.Model) -> None:
    session = ids_model.session("ada")
    reply = session.generate([5, 6], max_new_tokens=5)
    with session:
        next(reply)
    session.close()
    assert session.closed
    for call in (lambda: session.feed([1]), lambda: session.memory, session.snapshot, session.reset, reply.read):
        with pytest.raises(dm.SessionError, match="closed"):
            call()
    reply.close()
    assert "closed" in repr(session)


def test_an_idle_model_uses_no_processor_time(ids_model: dm.Model) -> None:
    """In a process of its own, where no other library's threads are counted."""
    work = (
        "import sys, time, numpy as np, deltamem_rt as dm\n"
        "with dm.Model.load(sys.argv[1], threads=2).session() as session:\n"
        "    reply = session.generate(np.array([5, 6], np.int32), max_new_tokens=20)\n"
        "    next(reply)\n"
        "    began = time.process_time()\n"
        "    time.sleep(0.5)\n"
        "    print(time.process_time() - began)\n"
    )
    said = subprocess.run([sys.executable, "-c", work, ids_model.path], capture_output=True, text=True, check=True)
    assert float(said.stdout) < 0.02
