"""Users that come and go beside the steps of others, and states that come to the host beside them. The processor plays the card: slots
are wiped and filled, and states are moved, by a thread that is late, held back or fails where a test says so. What was wiped holds bits
that are NaN, and is looked at before it is handed out. Each session is held against the same calls on the plain CPU path, alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import deltamem_rt as dm
from together import together

ON_DEVICE = "_device_on_cpu"
LATE = 0.002
"""Seconds by which a move is late at most: as long as a few steps of these models."""


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, count, dtype=np.int32)


def same(found: object, expected: object) -> None:
    np.testing.assert_array_equal(found, expected)


def close(found: object, expected: object) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def bundle(parity_bundle: Callable[..., Path]) -> Path:
    return parity_bundle("qwen3_tsw_qo")


@pytest.fixture(scope="module")
def cpu(bundle: Path) -> dm.Model:
    return dm.Model.load(bundle, device="cpu", threads=1, max_batch=1)


@pytest.fixture
def device(bundle: Path) -> dm.Model:
    return dm.Model.load(bundle, device=ON_DEVICE, threads=1, max_batch=8)


def disturb(model: dm.Model, **what: object) -> None:
    model._disturb(**what)  # type: ignore[attr-defined]  # for these tests only


@contextmanager
def held(model: dm.Model) -> Iterator[None]:
    """The mover begins nothing."""
    disturb(model, hold=True, poison=True)
    try:
        yield
    finally:
        disturb(model, poison=True)


def within(seconds: float, true: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


class Life:
    """What one user does, by chance and yet the same every time: turns of prompts, single tokens, replies and pauses, beginning with a
    prefix or without, commits, branches, snapshots that another session goes on from, calls that fail.
    """

    def __init__(self, seed: int, turns: int = 6) -> None:
        self.seed, self.turns = seed, turns

    def __call__(
        self, model: dm.Model, prefixes: list[dm.Prefix], store: dm.Store, pauses: bool = True
    ) -> list[object]:
        chance = np.random.default_rng(self.seed)
        found: list[object] = []
        session = model.session(f"user {self.seed}", store=store)
        try:
            for turn in range(self.turns):
                kind = chance.integers(0, 3)
                if kind == 0 and session.position == 0:
                    session.begin(prefixes[chance.integers(len(prefixes))])
                if kind != 1:
                    found.append(session.feed(ids(int(chance.integers(1, 90)), self.seed + turn), logits=True)[-1])
                for token in ids(int(chance.integers(1, 9)), turn):
                    found.append(session.feed([token], logits=True)[0])
                if chance.random() < 0.5:
                    reply = session.generate(None, max_new_tokens=int(chance.integers(1, 9)))
                    list(reply)
                    found.append(np.asarray(reply.token_ids))
                if chance.random() < 0.3:
                    with pytest.raises(dm.ContextLengthError):
                        session.feed(ids(model.context_length, 1))
                if chance.random() < 0.4:
                    found.append(session.memory)
                if chance.random() < 0.8:
                    session.end_turn()
                    if chance.random() < 0.5:
                        session.commit(f"turn {turn}")
                        if chance.random() < 0.3:
                            session.branch(f"from-{turn}")
                if chance.random() < 0.3:
                    # Goes, and comes back.
                    data = session.snapshot().to_bytes()
                    session.close()
                    session = model.session(f"user {self.seed}", store=store)
                    session.restore(dm.Snapshot.from_bytes(data))
                pause = float(chance.random()) * 2 * LATE
                if pauses:
                    time.sleep(pause)
            found.append(session.memory)
        finally:
            session.close()
        return found


@pytest.mark.parametrize("graphs", [False, True], ids=["", "captured"])
def test_users_come_and_go_in_any_order_and_see_nothing_of_one_another(
    graphs: bool, bundle: Path, cpu: dm.Model, tmp_path: Path
) -> None:
    model = dm.Model.load(bundle, device=ON_DEVICE, threads=1, max_batch=5, cuda_graphs=graphs)
    disturb(model, delay=LATE, poison=True)
    lives = [Life(seed) for seed in range(14)]
    with dm.Store(tmp_path / "alone.store") as store:
        prefixes = [cpu.prefix(ids(count, 90 + count)) for count in (3, 70, 256)]
        expected = [life(cpu, prefixes, store, pauses=False) for life in lives]
    with dm.Store(tmp_path / "together.store") as store:
        prefixes = [model.prefix(ids(count, 90 + count)) for count in (3, 70, 256)]
        found = together([lambda life=life: life(model, prefixes, store) for life in lives])
    for life, mine, alone in zip(lives, found, expected, strict=True):
        assert isinstance(mine, list), f"user {life.seed}: {mine!r}"
        assert len(mine) == len(alone)
        for one, other in zip(mine, alone, strict=True):
            close(one, other)
    assert model.stats.largest_step > 1
    assert model.unbatched is None
    assert model.uncaptured is None or not graphs


def test_one_after_another_they_are_the_same_bit_for_bit(device: dm.Model, cpu: dm.Model, tmp_path: Path) -> None:
    """A step of one session sums as the plain path does: every bit, over slots that were others', and a mover that comes late."""
    disturb(device, delay=LATE / 4, poison=True)
    found = []
    for name, model in (("device", device), ("cpu", cpu)):
        with dm.Store(tmp_path / f"{name}.store") as store:
            prefixes = [model.prefix(ids(count, 90 + count)) for count in (3, 70, 256)]
            found.append([each for seed in range(30, 38) for each in Life(seed)(model, prefixes, store, pauses=False)])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        same(one, other)


def test_steps_go_on_while_the_mover_is_held(device: dm.Model, cpu: dm.Model) -> None:
    """Users leave and come in, some with a prefix, and states are asked for, while nothing that was asked of the mover is begun."""
    prefix, prefix_cpu = device.prefix(ids(40, 3)), cpu.prefix(ids(40, 3))
    with held(device):

        def talk(model: dm.Model, seed: int, given: dm.Prefix) -> list[object]:
            found: list[object] = []
            for turn in range(4):
                with model.session() as session:
                    if turn % 2:
                        session.begin(given)
                    for token in ids(12, seed + turn):
                        found.append(session.feed([token], logits=True)[0])
                    session.end_turn()
                    found.append(session.memory)
            return found

        found = together([lambda seed=seed: talk(device, seed, prefix) for seed in range(0, 60, 10)])
    for seed, mine in zip(range(0, 60, 10), found, strict=True):
        assert isinstance(mine, list), mine
        for one, other in zip(mine, talk(cpu, seed, prefix_cpu), strict=True):
            close(one, other)


def test_a_slot_is_made_ready_beside_the_steps_of_others(device: dm.Model) -> None:
    """Who ends a turn, or begins one with a prefix, waits for nothing that the mover is asked for; and steps go on in the meantime."""
    prefix = device.prefix(ids(200, 3))
    sessions = [device.session() for _ in range(3)]
    for session in sessions:
        session.feed(ids(5))
    device.session().close()
    stop, steps = threading.Event(), [0]

    def stepping() -> None:
        while not stop.is_set():
            sessions[0].feed([7])
            steps[0] += 1

    with held(device):
        thread = threading.Thread(target=stepping, daemon=True)
        thread.start()
        try:
            # Neither has anything of the mover to wait for.
            sessions[1].end_turn()
            sessions[2].end_turn()
            sessions[2].begin(prefix)
            before = steps[0]
            assert within(20, lambda: steps[0] > before + 5)
        finally:
            stop.set()
            thread.join(60)
    assert not thread.is_alive()
    with device.session() as alone:
        alone.begin(prefix)
        expected = alone.feed([9], logits=True)
    sessions[2].reset()
    sessions[2].begin(prefix)
    same(sessions[2].feed([9], logits=True), expected)
    for session in sessions:
        session.close()


def test_a_state_is_on_the_host_before_it_is_asked_for(device: dm.Model) -> None:
    """Who asked in the turn before finds it there: no move is made for it, and so none can fail."""
    with device.session() as session:
        for turn in range(3):
            session.feed(ids(20, turn))
            session.feed([5])
            session.end_turn()
            if turn == 2:
                time.sleep(0.3)  # the mover has nothing else to do
                disturb(device, fail_moves=1)
            found = session.memory
        disturb(device)
    with device.session() as session:
        for turn in range(3):
            session.feed(ids(20, turn))
            session.feed([5])
            session.end_turn()
        # Nobody has asked for this one.
        time.sleep(0.1)
        disturb(device, fail_moves=1)
        with pytest.raises(dm.DeviceError, match="a test has this move fail"):
            _ = session.memory
        same(session.memory, found)


def test_every_job_fails_once(device: dm.Model, cpu: dm.Model, tmp_path: Path) -> None:
    """A wipe, a fill, a state that leaves: the call that needs it says so or does it again, and committed memories are there."""
    prefix = device.prefix(ids(40, 3))
    failed = 0
    with dm.Store(tmp_path / "store") as store, device.session("ada", store=store) as session, cpu.session() as plain:
        given = cpu.prefix(ids(40, 3))
        for turn in range(12):
            disturb(device, poison=True, fail_beside=turn % 4, delay=LATE / 4 if turn % 2 else 0.0)
            session.begin(prefix)
            plain.begin(given)
            for token in ids(4, turn):
                # The session's own try may fail, and the mover's beside it.
                for last in (False, False, True):
                    try:
                        found = session.feed([token], logits=True)
                        break
                    except dm.DeviceError as error:
                        assert "a test has this move fail" in str(error)  # noqa: PT017 - the mover may have come first or not
                        assert not last
                        failed += 1
                        disturb(device, poison=True)
                same(found, plain.feed([token], logits=True))
            session.end_turn()
            plain.end_turn()
            commit = session.commit(f"turn {turn}")
            assert session.show(commit.id).id == commit.id
            same(session.memory, plain.memory)
    assert failed, "not one of the fills failed"


@pytest.mark.parametrize("moves", range(1, 9))
def test_a_device_that_fails_takes_nothing_away(moves: int, device: dm.Model, cpu: dm.Model) -> None:
    """So many moves fail, whoever makes them: calls say so, and go on from the same state once it works again."""
    prefixes = [model.prefix(ids(30, 3)) for model in (device, cpu)]
    with device.session() as first, device.session() as other, cpu.session() as plain:
        other.feed(ids(9))
        first.feed(ids(20))
        plain.feed(ids(20))
        disturb(device, fail_moves=moves)

        def tried(call: Callable[[], object]) -> object:
            for _ in range(moves + 1):
                try:
                    return call()
                except dm.DeviceError as error:
                    assert "a test has this move fail" in str(error)  # noqa: PT017 - any of the calls may meet it
            raise AssertionError("it fails for ever")

        first.end_turn()
        plain.end_turn()
        same(tried(lambda: first.memory), plain.memory)
        tried(lambda: first.begin(prefixes[0]))
        plain.begin(prefixes[1])
        same(tried(lambda: first.feed(ids(3, 1), logits=True)), plain.feed(ids(3, 1), logits=True))
        same(tried(lambda: first.feed([5], logits=True)), plain.feed([5], logits=True))
        tried(lambda: other.feed([5]))
        same(tried(lambda: first.memory), plain.memory)


def test_a_model_is_let_go_of_while_the_mover_has_work(bundle: Path) -> None:
    for hold in (False, True):
        model = dm.Model.load(bundle, device=ON_DEVICE, threads=1, max_batch=4)
        disturb(model, hold=hold, delay=LATE)
        sessions = [model.session() for _ in range(4)]
        prefix = model.prefix(ids(20))
        for session in sessions:
            session.begin(prefix)
            session.feed([5])
            session.end_turn()
            session.begin(prefix)
        if hold:
            disturb(model)
        for session in sessions:
            session.close()
        del sessions, session, prefix, model


def test_without_a_device_there_is_no_mover(cpu: dm.Model, bundle: Path) -> None:
    def movers() -> int:
        names = Path("/proc/self/task").glob("*/comm")
        return sum(name.read_text().startswith("deltamem-moves") for name in names)

    if not Path("/proc/self/task").is_dir():
        pytest.skip("this system does not list a process's threads")
    before = movers()
    with cpu.session() as session:
        session.feed(ids(9))
        session.end_turn()
    assert movers() == before
    model = dm.Model.load(bundle, device=ON_DEVICE, threads=1)
    assert movers() == before
    with model.session() as session:
        session.feed(ids(9))
        session.end_turn()
    assert within(10, lambda: movers() == before + 1)
    del session, model
    assert within(10, lambda: movers() == before)
