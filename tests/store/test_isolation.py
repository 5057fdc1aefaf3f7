"""Ten thousand memories over sixteen live sessions: each is what it would be alone."""

from __future__ import annotations

import random

import numpy as np

import deltamem_rt as dm

USERS, SLOTS, KINDS = 10_000, 16, 24


def turn(kind: int, number: int) -> np.ndarray:
    """The tokens of a user's turn: users of one kind say the same."""
    return np.random.default_rng(1000 * kind + number).integers(3, 2000, 2).astype(np.int32)


def test_ten_thousand_memories_over_sixteen_slots_equal_each_alone(model: dm.Model):
    expected: dict[tuple[int, int], bytes] = {}
    for kind in range(KINDS):
        with model.session() as alone:
            for number in range(3):
                alone.feed(turn(kind, number))
                alone.end_turn()
                expected[kind, number + 1] = alone.memory.tobytes()

    rng = random.Random(16)
    done = dict.fromkeys(range(USERS), 0)
    # Every user once, and a third of them more often, in any order.
    work = list(range(USERS)) + rng.choices(range(USERS), k=USERS // 3)
    rng.shuffle(work)
    with dm.Store.in_memory() as store:
        live: dict[int, dm.Session] = {}
        for user in work:
            if done[user] == 3:
                continue
            if user not in live:
                if len(live) == SLOTS:
                    left = rng.choice(list(live))
                    live.pop(left).close()
                live[user] = model.session(f"user {user}", store=store, autocommit=True)
                held = expected.get((user % KINDS, done[user]))
                assert live[user].memory.tobytes() == (held or bytes(model.geometry.bytes)), (
                    f"user {user}, at the start"
                )
            # Other users' turns go on meanwhile: some turns are left open over others' calls.
            live[user].feed(turn(user % KINDS, done[user]))
            if rng.random() < 0.5 and len(live) > 1:
                other = live[rng.choice([name for name in live if name != user])]
                assert other.memory.shape == model.geometry.shape
            live[user].end_turn()
            done[user] += 1
            assert live[user].memory.tobytes() == expected[user % KINDS, done[user]], f"user {user}"
        for session in live.values():
            session.close()
        assert store.stats().memories == USERS
        for user in rng.sample(range(USERS), 2000):
            assert store.snapshot(f"user {user}").memory.tobytes() == expected[user % KINDS, done[user]]
