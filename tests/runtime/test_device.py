"""A device's memory: states, keys and values that stay there from run to run. The processor plays the device here: the same code,
graphs and ONNX Runtime calls as on a card, with the processor's memory in the place of the card's. Each test holds it against the plain
CPU path, bit for bit, since the same kernels compute both. What a card alone can show carries the marker `cuda`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import deltamem_rt as dm
from agreement import assert_close
from interrupted import interrupted
from sealing import snapshot_with
from together import beside_prompts, together, until_shared

CASES = ("qwen3_tsw_qo", "gemma2_tsw_qo", "mistral_window_tsw_qo")
ON_DEVICE = "_device_on_cpu"


def load(bundle: Path, **options: object) -> dm.Model:
    return dm.Model.load(bundle, threads=1, **options)


@pytest.fixture(scope="module")
def models(parity_bundle: Callable[..., Path]) -> tuple[dm.Model, dm.Model]:
    bundle = parity_bundle("qwen3_tsw_qo")
    return load(bundle, device="cpu"), load(bundle, device=ON_DEVICE)


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, count, dtype=np.int32)


def same(found: object, expected: object) -> None:
    np.testing.assert_array_equal(found, expected)


# the same as on the CPU, bit for bit


@pytest.mark.parametrize("graph", ["portable", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_goldens(case: str, graph: str, parity_bundle, golden_case) -> None:
    with (
        np.load(golden_case(case) / "golden.npz") as golden,
        load(parity_bundle(case), device=ON_DEVICE, graph=graph).session() as session,
    ):
        for t in range(5):
            logits = session.feed(golden[f"turn{t}_ids"], logits=True)
            assert_close(f"turn {t} logits", logits, golden[f"turn{t}_logits"], 1e-4)
            assert_close(f"turn {t} states", session.memory, golden[f"turn{t}_states"], 1e-5)
            session.end_turn()
            assert_close(f"turn {t} states after it", session.memory, golden[f"turn{t}_states"], 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_turns_and_growing_caches(precision: str, parity_bundle) -> None:
    def talk(model: dm.Model) -> list[np.ndarray]:
        found = []
        with model.session() as session:
            # Over the first capacity of 256 tokens twice, in chunks and in single tokens.
            for turn, counts in enumerate([(5,), (250, 1, 1, 1, 1, 1, 1, 1, 1), (300, 400)]):
                for part, count in enumerate(counts):
                    found.append(session.feed(ids(count, 10 * turn + part), logits=True))
                found.append(session.memory)
                session.end_turn()
            session.feed(ids(9, 77), write=False)
            found.append(session.memory)
        return found

    bundle = parity_bundle("qwen3_tsw_qo", precision)
    for found, expected in zip(talk(load(bundle, device=ON_DEVICE)), talk(load(bundle, device="cpu")), strict=True):
        same(found, expected)


def test_a_call_that_fails_leaves_the_state(models) -> None:
    for model in models:
        with model.session() as session:
            session.feed(ids(20))
            before = session.memory
            with pytest.raises(dm.ContextLengthError):
                session.feed(ids(model.context_length))
            with pytest.raises(ValueError, match="outside the vocabulary"):
                session.feed([3, 9999])
            same(session.memory, before)
            assert session.position == 20


def test_snapshots_go_from_one_to_the_other_and_back(models) -> None:
    ends = []
    for first, second in (models, models[::-1]):
        with first.session() as session:
            session.feed(ids(30))
            session.end_turn()
            data = session.snapshot().to_bytes()
            same(dm.Snapshot.from_bytes(data).memory, session.memory)
        with second.session() as session:
            session.restore(dm.Snapshot.from_bytes(data))
            session.feed(ids(30, 1))
            ends.append(session.memory)
            session.reset()
            assert not session.memory.any()
    same(*ends)


def test_a_store_keeps_and_merges_what_lay_on_the_device(models, tmp_path: Path) -> None:
    ends = []
    for number, model in enumerate(models):
        with dm.Store(tmp_path / f"{number}.store") as store, model.session("ada", store=store) as session:
            session.feed(ids(10))
            first = session.commit("first")
            session.branch("other")
            session.feed(ids(10, 1))
            session.commit("second")
            session.checkout("other")
            session.feed(ids(10, 2))
            session.commit("third")
            session.merge("main")
            session.feed(ids(4, 3))
            session.commit("after the merge")
            ends.append(session.memory)
            assert not session.dirty
            session.rollback(first.id)
            assert session.show(first.id).id == first.id
            ends.append(session.memory)
    same(ends[0], ends[2])
    same(ends[1], ends[3])


def test_prefixes_measures_and_strengths(models) -> None:
    def talk(model: dm.Model) -> list[object]:
        prefix = model.prefix(ids(300, 5))
        found: list[object] = []
        for _ in range(2):
            with model.session() as session:
                session.feed(ids(12))
                session.end_turn()
                session.begin(prefix)
                found += [session.feed(ids(3, 1), logits=True), session.memory]
                health = session.health()
                found += [health.delta_ratio, health.norm]
                session.strength = 0.5
                found.append(session.feed(ids(3, 2), logits=True))
        return found

    for found, expected in zip(talk(models[1]), talk(models[0]), strict=True):
        same(found, expected)


def test_many_sessions_in_one_step(parity_bundle) -> None:
    """Slots grow in number and in rows and come free while others go on; each gets what it gets alone, to the rounding of sums."""
    model = load(parity_bundle("qwen3_tsw_qo"), device=ON_DEVICE, max_batch=6)
    assert model.unbatched is None

    ready = threading.Barrier(10)

    def talk(seed: int, meet: threading.Barrier | None = None) -> tuple[np.ndarray, np.ndarray]:
        with model.session() as session:
            session.feed(ids(10 + 31 * seed, seed))  # the longer ones need more than the first capacity
            session.end_turn()
            session.feed(ids(5 + 28 * seed, seed + 50))
            if meet is not None:
                meet.wait(60)  # so that they step together, however busy the machine is
            logits = [session.feed([token], logits=True)[0] for token in ids(25 + 3 * (seed % 4), seed + 100)]
            in_turn = session.memory
            session.end_turn()
            same(session.memory, in_turn)
            return np.stack(logits), in_turn

    alone = [talk(seed) for seed in range(10)]

    def all_of_them() -> None:
        found = together([lambda s=seed: talk(s, ready) for seed in range(10)])
        for (logits, memory), (expected, expected_memory) in zip(found, alone, strict=True):
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
            np.testing.assert_allclose(memory, expected_memory, rtol=0, atol=1e-5)

    until_shared(model, all_of_them)
    # A slot that others had is as a new one.
    same(talk(0)[0], alone[0][0])


def test_turns_that_change_places_keep_their_rows(parity_bundle) -> None:
    """Of five turns the first and the last step together: they are brought side by side, and an idle turn goes where the last one was."""
    model = load(parity_bundle("qwen3_tsw_qo"), device=ON_DEVICE, max_batch=8)

    def steps(session: dm.Session, seed: int, count: int) -> np.ndarray:
        return np.stack([session.feed([token], logits=True)[0] for token in ids(count, seed)])

    def begun(seed: int) -> dm.Session:
        session = model.session()
        session.feed(ids(20 + seed, seed))
        return session

    alone = []
    for seed in range(5):
        with begun(seed) as session:
            alone.append((steps(session, seed + 10, 150), steps(session, seed + 20, 3), session.memory))
    sessions = [begun(seed) for seed in range(5)]
    pair = (0, 4)
    found = dict(
        zip(
            pair,
            beside_prompts(model, ids(500, 99), [lambda n=n: steps(sessions[n], n + 10, 150) for n in pair]),
            strict=True,
        )
    )
    assert model.stats.largest_step == 2
    for seed, session in enumerate(sessions):
        logits = found[seed] if seed in pair else steps(session, seed + 10, 150)
        np.testing.assert_allclose(logits, alone[seed][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(steps(session, seed + 20, 3), alone[seed][1], rtol=0, atol=1e-5)
        np.testing.assert_allclose(session.memory, alone[seed][2], rtol=0, atol=1e-5)
        session.close()


# the best of the logits

SETTINGS: dict[str, dict[str, float | int]] = {
    "greedy": {},
    "top-k": {"temperature": 0.8, "top_k": 5, "seed": 3},
    "top-k, top-p, min-p": {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "seed": 4},
    "nearly all": {"temperature": 1.0, "top_k": 250, "seed": 5},
}
WHOLE_ROWS: dict[str, dict[str, float | int]] = {
    "top-p": {"temperature": 1.0, "top_p": 0.7, "seed": 6},
    "more than there are": {"temperature": 1.0, "top_k": 1000, "seed": 7},
    "all of them": {"temperature": 1.0, "top_k": 256, "seed": 8},
    "penalty": {"repetition_penalty": 1.4},
    "top-k and penalty": {"temperature": 0.9, "top_k": 4, "repetition_penalty": 1.2, "seed": 9},
}
"""What needs every logit: sums over all words, or a penalty on words that may be anywhere."""


def reply(model: dm.Model, prompt: np.ndarray, count: int, **settings: float) -> list[int]:
    with model.session() as session:
        pieces = session.generate(prompt, max_new_tokens=count, **settings)
        for _ in pieces:
            pass
        # The word that ends a reply is chosen too.
        return pieces.token_ids + ([2] if pieces.stats.finish_reason == "eos" else [])


@pytest.fixture(scope="module")
def changed(golden_case, tmp_path_factory) -> Callable[..., Path]:
    """`changed(period=n)`: a bundle whose word n + i has the logit of word i, as the rows of a padded vocabulary have all the same.
    `changed(eos=n)`: one whose replies end with word n."""
    from safetensors.numpy import load_file, save_file

    from deltamem_export.bundle import export_bundle

    def bundle(period: int = 256, eos: int = 2, precision: str = "fp32") -> Path:
        source, made = golden_case("qwen3_tsw_qo"), tmp_path_factory.mktemp("changed")
        shutil.copytree(source / "backbone", made / "backbone")
        weights = made / "backbone" / "model.safetensors"
        tensors = load_file(weights)
        words = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = words[np.arange(len(words)) % period]
        save_file(tensors, weights, metadata={"format": "pt"})
        for config in (made / "backbone").glob("*config.json"):
            config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": eos}))
        return export_bundle(made / "backbone", source / "adapter", made / "bundle", precision, say=lambda _: None)

    return bundle


@pytest.mark.parametrize("max_batch", [1, 16])
@pytest.mark.parametrize("settings", [*SETTINGS, *WHOLE_ROWS])
def test_the_best_logits_give_the_same_ids(settings: str, max_batch: int, models) -> None:
    """And nothing else comes down where they are enough."""
    on_device = load(models[0].path, device=ON_DEVICE, max_batch=max_batch)
    chosen = (SETTINGS | WHOLE_ROWS)[settings]
    found, expected = ([reply(model, ids(9, n), 40, **chosen) for n in range(3)] for model in (on_device, models[0]))
    assert found == expected
    # The last token of each reply is read for whoever goes on from it, with all logits.
    assert on_device.stats.best_rows == (sum(map(len, found)) if settings in SETTINGS else 0)
    assert models[0].stats.best_rows == 0


@pytest.mark.parametrize("period", [8, 128])
def test_equal_logits_are_chosen_between_by_the_lowest_id(period: int, changed) -> None:
    """Two of each, and thirty-two of each, which are more than come down."""
    bundle = changed(period=period)
    cpu, device = load(bundle, device="cpu"), load(bundle, device=ON_DEVICE)
    with cpu.session() as session:
        logits = session.feed(ids(6), logits=True)
        same(logits[:, :-period], logits[:, period:])
    chosen = 0
    for settings in ({}, *({"temperature": 1.5, "top_k": k, "seed": k} for k in (1, 2, 3, 5, 8, 33, 64))):
        found, expected = (reply(model, ids(6), 30, **settings) for model in (device, cpu))
        assert found == expected, settings
        chosen += len(found)
    assert device.stats.best_rows == chosen


def test_one_step_of_sessions_with_different_settings(parity_bundle) -> None:
    """Some need the best, some the whole row, some are asked for logits by their caller."""
    bundle = parity_bundle("qwen3_tsw_qo")
    device, cpu = load(bundle, device=ON_DEVICE, max_batch=16), load(bundle, device="cpu", max_batch=1)
    settings = [*SETTINGS.values(), *WHOLE_ROWS.values()]
    expected = [reply(cpu, ids(9, seed), 40, **each) for seed, each in enumerate(settings)]

    def fed() -> np.ndarray:
        with device.session() as session:
            session.feed(ids(5, 77))
            return np.stack([session.feed([token], logits=True)[0] for token in ids(40, 78)])

    with cpu.session() as session:
        session.feed(ids(5, 77))
        logits = np.stack([session.feed([token], logits=True)[0] for token in ids(40, 78)])
    jobs = [*(lambda s=seed, e=each: reply(device, ids(9, s), 40, **e) for seed, each in enumerate(settings)), fed]
    before = device.stats
    *found, found_logits = until_shared(device, lambda: beside_prompts(device, ids(500, 99), jobs), least=1.0)
    assert found == expected
    np.testing.assert_allclose(found_logits, logits, rtol=0, atol=1e-5)
    rounds, left = divmod(device.stats.best_rows - before.best_rows, sum(map(len, found[: len(SETTINGS)])))
    assert rounds > 0
    assert left == 0


def test_a_reply_goes_on_with_other_settings_from_the_same_logits(models, changed) -> None:
    """Behind a reply that was cut off, one that came to its length, and one that ended by itself, whose last logits nobody has read."""

    def talk(model: dm.Model) -> list[object]:
        found: list[object] = []
        with model.session() as session:
            session.feed(ids(4))
            for settings in ({}, {"temperature": 1.5, "seed": 5}, {"temperature": 1.5, "top_k": 9, "seed": 6}) * 4:
                cut = session.generate(None, max_new_tokens=7, **settings)
                next(cut, None)
                whole = session.generate(None, max_new_tokens=3, **settings)
                for _ in whole:
                    pass
                found += [*cut.token_ids, cut.stats.finish_reason, *whole.token_ids, whole.stats.finish_reason]
            found.append(session.memory.tobytes())
        return found

    expected = talk(models[0])
    assert talk(models[1]) == expected
    # A word that came late is made the one that ends a reply.
    word = [token for token in expected if isinstance(token, int)][9]
    bundle = changed(eos=word)
    expected = talk(load(bundle, device="cpu"))
    assert "eos" in expected
    assert talk(load(bundle, device=ON_DEVICE)) == expected


# steps that a card captures as CUDA graphs: the same shapes and addresses step by step


@pytest.mark.parametrize(
    ("case", "precision"), [*((case, "fp32") for case in CASES), *(("qwen3_tsw_qo", p) for p in ("fp16", "int4"))]
)
def test_steps_of_fixed_shapes_are_the_same(case: str, precision: str, parity_bundle) -> None:
    """Masks padded to the cache's capacity, over a cache that grows, prompts in between, turns and a restored state."""

    def talk(model: dm.Model) -> list[object]:
        found: list[object] = []
        with model.session() as session:
            for turn, count in enumerate((5, 230)):
                session.feed(ids(count, turn))
                found += [session.feed([token], logits=True) for token in ids(40, 10 + turn)]
                found.append(session.memory)
                session.feed(ids(70, 20 + turn), write=turn == 0)
                for settings in (
                    {},
                    {"temperature": 1.2, "top_k": 5, "seed": turn},
                    {"temperature": 0.9, "seed": turn},
                ):
                    pieces = session.generate(None, max_new_tokens=12, **settings)
                    found.append([token for _ in pieces for token in pieces.token_ids])
                session.end_turn()
            session.restore(dm.Snapshot.from_bytes(session.snapshot().to_bytes()))
            found += [session.feed([token], logits=True) for token in ids(6, 30)]
            found.append(session.memory)
        return found

    bundle = parity_bundle(case, precision)
    captures = load(bundle, device=ON_DEVICE, cuda_graphs=True)
    assert captures.uncaptured is None
    for found, expected in zip(talk(captures), talk(load(bundle, device="cpu")), strict=True):
        same(found, expected)
    stats = captures.stats
    # Few sets of addresses come again and again. What is seen for the first two times is not captured yet.
    assert stats.captured_steps > stats.steps / 2 > 60
    assert 0 < stats.cuda_graphs < stats.captured_steps / 4


def test_many_sessions_in_captured_steps(parity_bundle) -> None:
    bundle = parity_bundle("qwen3_tsw_qo")
    captures, cpu = load(bundle, device=ON_DEVICE, cuda_graphs=True), load(bundle, device="cpu", max_batch=1)

    def talk(model: dm.Model, seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        with model.session() as session:
            session.feed(ids(10 + 40 * seed, seed))
            logits = [session.feed([token], logits=True)[0] for token in ids(30 + 5 * (seed % 3), seed + 100)]
            pieces = session.generate(None, max_new_tokens=20, temperature=0.7, top_k=6, seed=seed)
            for _ in pieces:
                pass
            return np.stack(logits), session.memory, pieces.token_ids

    found = beside_prompts(captures, ids(500, 99), [lambda s=seed: talk(captures, s) for seed in range(8)])
    for seed, (logits, memory, tokens) in enumerate(found):
        expected_logits, expected_memory, expected_tokens = talk(cpu, seed)
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(memory, expected_memory, rtol=0, atol=1e-5)
        assert tokens == expected_tokens
    stats = captures.stats
    assert stats.largest_step > 1
    assert stats.captured_steps < stats.steps
    assert stats.cuda_graphs <= 64
    assert captures.uncaptured is None


class User:
    """Turns of one user, the same whenever they are played again: prompts, single tokens, replies, prefixes, pauses inside a turn, states
    that are held while the session goes on, states that are restored. `long` is how many tokens a prompt may have.
    """

    def __init__(self, seed: int, turns: int = 5, long: int = 40) -> None:
        self.seed, self.turns, self.long = seed, turns, long

    def play(self, model: dm.Model, pause: float = 0.0) -> list[object]:
        random = np.random.default_rng(self.seed)
        some = lambda below: int(random.integers(1, below))  # noqa: E731 - a word for it
        found: list[object] = []
        held: list[tuple[np.ndarray, np.ndarray]] = []
        prefix = model.prefix(ids(some(self.long), self.seed))
        session = model.session()
        for turn in range(self.turns):
            if random.random() < 0.3 and session.position == 0:
                session.begin(prefix)
            session.feed(ids(some(self.long), some(999)), write=random.random() < 0.8)
            for token in ids(some(25), some(999)):
                found.append(session.feed([token], logits=True)[0])
                if random.random() < 0.1:
                    live = np.from_dlpack(session.memory_dlpack())
                    held.append((live, live.copy()))
            # Others step meanwhile, over what this one left in the rows.
            time.sleep(pause * random.random())
            found.append(session.memory.copy())
            for settings in ({}, {"temperature": 0.8, "top_k": 6, "seed": turn}, {"temperature": 0.8, "seed": turn}):
                pieces = session.generate(None, max_new_tokens=some(20), **settings)
                for number, _ in enumerate(pieces):
                    if number == 3:  # whoever reads the reply takes their time, and the logits wait
                        time.sleep(pause * random.random())
                found.append(pieces.token_ids)
            time.sleep(pause * random.random())
            kept = session.snapshot().to_bytes()
            session.feed([5], write=True)
            choice = random.random()
            if choice < 0.5:
                session.end_turn()
            elif choice < 0.7:
                session.restore(dm.Snapshot.from_bytes(kept))
            elif choice < 0.8:
                session.close()
                session = model.session()
            found.append(session.memory.copy())
        for live, copy in held:
            same(live, copy)
        session.close()
        return found + [copy for _, copy in held]


@pytest.fixture(scope="module")
def alike(models) -> bool:
    """Whether this processor's kernels compute a row the same however many rows there are, as all seen do for the goldens' shapes."""
    users = [User(seed) for seed in range(4)]
    batches = load(models[0].path, device="cpu")
    found = together([lambda u=user: u.play(batches) for user in users])
    return all(
        np.array_equal(one, other)
        for user, parts in zip(users, found, strict=True)
        for one, other in zip(parts, user.play(models[0]), strict=True)
    )


def agree(found: list[object], expected: list[object], alike: bool) -> None:
    for one, other in zip(found, expected, strict=True):
        if alike or isinstance(one, list):
            same(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("users", "max_batch", "long"), [(9, 16, 40), (24, 64, 40), (7, 6, 40), (6, 16, 400)])
def test_users_that_come_and_go_in_captured_steps(users: int, max_batch: int, long: int, parity_bundle, alike) -> None:
    """Windows are padded, turns move, caches grow, blocks are more than one: each gets what it gets alone, bit for bit."""
    bundle = parity_bundle("qwen3_tsw_qo")
    captures, cpu = (
        load(bundle, device=ON_DEVICE, cuda_graphs=True, max_batch=max_batch),
        load(bundle, device="cpu", max_batch=1),
    )
    everybody = [User(seed, long=long) for seed in range(users)]
    jobs = [lambda u=user: u.play(captures, 0.02) for user in everybody]
    found = beside_prompts(captures, ids(200), jobs)
    for user, parts in zip(everybody, found, strict=True):
        agree(parts, user.play(cpu), alike)
    stats = captures.stats
    assert stats.largest_step > 1
    assert stats.captured_steps > stats.steps / 2
    assert stats.idle_rows <= stats.step_tokens  # padded to twice the rows at most
    assert (captures.uncaptured, captures.unbatched) == (None, None)


def test_most_steps_are_captured_as_users_come_and_go(parity_bundle) -> None:
    """With few captures: two for each size of a window, and those of windows in the middle."""
    model = load(parity_bundle("qwen3_tsw_qo"), device=ON_DEVICE, cuda_graphs=True, max_batch=64)

    def user(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(12):
            with model.session() as session:
                session.feed(ids(int(random.integers(3, 40)), seed))
                count = int(random.integers(5, 60))
                for _ in session.generate(None, max_new_tokens=count, temperature=1.0, top_k=5, seed=seed):
                    pass
                time.sleep(0.02 * random.random())

    jobs = [lambda s=seed: user(s) for seed in range(20)]
    assert beside_prompts(model, ids(200), jobs) == [None] * 20
    stats = model.stats
    assert stats.steps > 300
    assert stats.largest_step > 8
    assert stats.captured_steps >= 0.9 * stats.steps, stats
    assert stats.cuda_graphs <= 2 * 13, stats


def test_no_row_is_seen_by_another(models, alike) -> None:
    """A memory that overflows leaves NaN in rows of states and keys, which others are padded with and get after it."""
    model = load(models[0].path, device=ON_DEVICE, cuda_graphs=True)
    with models[0].session() as session:
        session.feed(ids(9))
        data = session.snapshot().to_bytes()
    largest = np.full(models[0].geometry.shape, 3e38, np.float32)
    poisoned = dm.Snapshot.from_bytes(snapshot_with(data, largest))
    users = [User(seed) for seed in range(6)]

    def overflows() -> int:
        errors = 0
        for _ in range(12):
            with model.session() as session:
                session.restore(poisoned)
                session.feed([7, 8, 9])
                for token in range(3, 12):
                    session.feed([token])
                try:
                    _ = session.memory
                except dm.NotFiniteError:
                    errors += 1
        return errors

    *found, errors = together([*(lambda u=user: u.play(model, 0.005) for user in users), overflows])
    assert errors == 12
    for user, parts in zip(users, found, strict=True):
        agree(parts, user.play(models[0]), alike)


def test_a_call_that_is_broken_off_gives_back_a_state_that_others_stepped_over(models, alike) -> None:
    model = load(models[0].path, device=ON_DEVICE, cuda_graphs=True)
    stop, users = threading.Event(), [User(seed, turns=2) for seed in range(4)]
    expected = [user.play(models[0]) for user in users]

    def others(number: int) -> None:
        while not stop.is_set():
            agree(users[number].play(model), expected[number], alike)

    broken = 0
    with model.session() as session, models[0].session() as reference, ThreadPoolExecutor(len(users)) as threads:
        playing = [threads.submit(others, number) for number in range(len(users))]
        try:
            for attempt in range(6):
                for token in ids(12, attempt):
                    found = session.feed([token], logits=True)
                    if alike:
                        same(found, reference.feed([token], logits=True))
                    else:
                        np.testing.assert_allclose(found, reference.feed([token], logits=True), rtol=0, atol=1e-5)
                before, position = session.memory_dlpack() if attempt % 2 else None, session.position
                caught = interrupted(lambda: session.feed(ids(1500, 3)), 0.02)
                # A busy processor may bring the key press behind the whole of the call.
                if caught and session.position == position:
                    broken += 1
                    if before is not None:
                        same(np.from_dlpack(before), session.memory)
                else:
                    assert session.position == position + 1500
                    reference.feed(ids(1500, 3))
                    session.end_turn()  # the context has room for one of these
                    reference.end_turn()
                if alike:
                    same(session.memory, reference.memory)
                else:
                    np.testing.assert_allclose(session.memory, reference.memory, rtol=0, atol=1e-5)
        finally:
            stop.set()
        for one in playing:
            one.result(60)
    assert broken > 0
    assert model.stats.captured_steps > 0


def test_logits_that_wait_are_not_written_over(changed) -> None:
    """Thirty-two of each logit: the best are never enough, and each session fetches its whole row while the others go on."""
    bundle = changed(period=8)
    captures, cpu = load(bundle, device=ON_DEVICE, cuda_graphs=True), load(bundle, device="cpu", max_batch=1)

    def replies(model: dm.Model, seed: int) -> list[list[int]]:
        chosen = {"temperature": 1.5, "top_k": 40, "seed": seed}
        return [reply(model, ids(6, seed + n), 40, **chosen) for n in range(8)]

    found = together([lambda s=seed: replies(captures, s) for seed in range(8)])
    assert found == [replies(cpu, seed) for seed in range(8)]
    assert captures.stats.best_rows > 1000
    assert captures.stats.captured_steps > captures.stats.steps / 2


def test_a_turn_that_fills_its_cache_is_not_padded_with(models, alike) -> None:
    """256 tokens, which is the cache's first capacity: there is no row behind them."""
    model = load(models[0].path, device=ON_DEVICE, cuda_graphs=True, max_batch=4)
    users = [User(seed, turns=3, long=20) for seed in range(3)]
    with model.session() as full, models[0].session() as reference:
        for session in (full, reference):
            session.feed(ids(255))
            session.feed([9])
        alone = [user.play(models[0]) for user in users]
        captured = 0.0
        # Two or three at a time meet in few windows, each of which is captured when it is met for the third time.
        for _ in range(12):
            found = together([lambda u=user: u.play(model) for user in users])
            for parts, expected in zip(found, alone, strict=True):
                agree(parts, expected, alike)
            captured = model.stats.captured_steps / model.stats.steps
            if captured > 0.5:
                break
        agree(*([session.feed(ids(5, 1), logits=True), session.memory] for session in (full, reference)), alike)
    assert captured > 0.5
    assert model.unbatched is None


def test_two_models_that_capture(models, alike) -> None:
    both = [load(models[0].path, device=ON_DEVICE, cuda_graphs=True) for _ in range(2)]
    users = [User(seed) for seed in range(8)]
    found = together([lambda u=user, m=both[n % 2]: u.play(m, 0.01) for n, user in enumerate(users)])
    for user, parts in zip(users, found, strict=True):
        agree(parts, user.play(models[0]), alike)
    assert all(model.stats.captured_steps > 0 for model in both)


def test_cuda_graphs_where_there_can_be_none(models, golden_case, tmp_path: Path) -> None:
    from deltamem_export.bundle import export_bundle
    from deltamem_export.precision import Precision

    with pytest.raises(ValueError, match=r"cuda_graphs=True with device='cpu', expected a card"):
        load(models[0].path, device="cpu", cuda_graphs=True)
    assert models[1].uncaptured == "cuda_graphs was not asked for"
    if not answers():
        assert load(models[0].path, cuda_graphs=True).uncaptured == "the graph runs on the CPU"
    source, precision = golden_case("qwen3_tsw_qo"), Precision("fp32", device="cuda")
    apart = export_bundle(source / "backbone", source / "adapter", tmp_path / "apart", precision, say=lambda _: None)
    with pytest.raises(dm.DeltaMemError, match=r"past and present keys and values apart .* leave cuda_graphs out"):
        load(apart, device=ON_DEVICE, cuda_graphs=True)


def test_a_view_of_the_memory_outlives_its_session_and_never_changes(models) -> None:
    with models[1].session() as session:
        session.feed(ids(5))
        held, kept = session.memory, session.memory.copy()
        assert not held.flags.writeable
        live = np.from_dlpack(session.memory_dlpack())
        session.feed(ids(50, 1))
        assert not np.array_equal(session.memory, kept)
    same(held, kept)
    same(live, kept)


# DLPack


@pytest.mark.parametrize("which", [0, 1], ids=["cpu", "device"])
def test_the_live_state_by_dlpack(models, which: int) -> None:
    torch = pytest.importorskip("torch")
    with models[which].session() as session:
        empty = np.from_dlpack(session.memory_dlpack())
        assert empty.shape == session.geometry.shape
        assert not empty.any()
        session.feed(ids(8))
        tensor = session.memory_dlpack()
        assert tensor.__dlpack_device__() == (1, 0)
        array = np.from_dlpack(tensor)
        assert (array.dtype, array.shape) == (np.float32, session.geometry.shape)
        same(array, session.memory)
        assert not array.flags.writeable
        assert np.shares_memory(array, np.from_dlpack(session.memory_dlpack()))
        assert np.shares_memory(array, session.memory) == (which == 0)
        assert torch.from_dlpack(tensor).data_ptr() == array.ctypes.data
        copied = np.from_dlpack(tensor, copy=True)
        assert not np.shares_memory(copied, array)
        del tensor
        capsule = session.memory_dlpack().__dlpack__(max_version=(1, 1))
        assert "dltensor_versioned" in repr(capsule)
        del capsule  # nobody took it
    same(array, copied)
    with models[which].session() as session:
        tensor = session.memory_dlpack()
        for arguments in ({}, {"max_version": (0, 8)}, {"max_version": (1, 0), "dl_device": (2, 0)}):
            with pytest.raises(BufferError):
                tensor.__dlpack__(**arguments)


def test_ids_by_dlpack(models) -> None:
    torch = pytest.importorskip("torch")
    tokens = ids(12)
    with models[0].session() as session:
        expected = session.feed(tokens, logits=True)
        for given in (torch.from_numpy(tokens), torch.from_numpy(tokens.astype(np.int64))):
            session.reset()
            same(session.feed(given, logits=True), expected)
        for given, error, message in (
            (torch.tensor([1.5]), TypeError, "expected int32 or int64"),
            (torch.tensor([[1, 2]]), ValueError, r"expected shape \[T\]"),
            (torch.tensor([1], dtype=torch.bfloat16), TypeError, "NumPy cannot take by DLPack"),
            (torch.tensor([1 << 40]), ValueError, "outside the vocabulary"),
        ):
            with pytest.raises(error, match=message):
                session.feed(given)


# which device


def test_devices_that_are_none(models) -> None:
    for device in ("tpu", "cuda:", "cuda:x", "cuda:-1", "CUDA"):
        with pytest.raises(ValueError, match="expected 'auto', 'cpu' or 'cuda', or 'cuda:1'"):
            dm.Model.load(models[0].path, device=device)


def answers() -> bool:
    from deltamem_rt import _native
    from deltamem_rt._onnxruntime import find_library, open_cuda_libraries

    library = find_library().path
    open_cuda_libraries(library)
    return bool(_native.doctor(library)["cuda"])


def test_without_a_card_cuda_is_refused_with_what_to_do_and_auto_takes_the_cpu(parity_bundle, caplog) -> None:
    if answers():
        pytest.skip("a card answers here")
    bundle = parity_bundle("qwen3_tsw_qo", "fp16")  # its graph is one for both
    with pytest.raises(dm.DeviceError, match=r"found .*expected .*device='cpu'"):
        dm.Model.load(bundle, device="cuda")
    with caplog.at_level(logging.WARNING, "deltamem_rt"):
        model = dm.Model.load(bundle)
    assert model.device == "cpu"
    assert model.placement
    with model.session() as session:
        session.feed(ids(5))


def test_hidden_cards_are_named(parity_bundle) -> None:
    from deltamem_rt._onnxruntime import find_library, has_cuda_provider

    if not has_cuda_provider(find_library().path):
        pytest.skip("this ONNX Runtime has no CUDA, which is what it says first; onnxruntime-gpu has it")
    code = f"import deltamem_rt as dm; dm.Model.load({str(parity_bundle('qwen3_tsw_qo', 'fp16'))!r}, device='cuda')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DeviceError" in done.stderr
    assert 'CUDA_VISIBLE_DEVICES=""' in done.stderr


# on a card


@pytest.fixture(scope="module")
def card(parity_bundle: Callable[..., Path]) -> tuple[dm.Model, dm.Model]:
    """The same 16-bit graph on the CPU and on the first card."""
    if not answers():
        pytest.skip("no card answers here: `deltamem doctor` says why")
    bundle = parity_bundle("qwen3_tsw_qo", "fp16")
    return load(bundle, device="cpu"), load(bundle, device="cuda")


@pytest.mark.cuda
def test_a_card_reads_and_writes_as_the_processor_does(card) -> None:
    cpu, cuda = card
    assert cuda.device == "cuda:0"
    logits, states = [], []
    for model in (cpu, cuda):
        with model.session() as session:
            for turn in range(3):
                logits.append(session.feed(ids(40, turn), logits=True))
                states.append(session.memory)
                session.end_turn()
    for found, expected in zip(logits[3:], logits[:3], strict=True):
        assert_close("logits", found, expected, 2e-2)
    for found, expected in zip(states[3:], states[:3], strict=True):
        assert_close("states", found, expected, 2e-3)


@pytest.mark.cuda
def test_on_a_card_chunks_change_nothing_and_sessions_see_nothing_of_each_other(card) -> None:
    model = card[1]
    tokens = ids(400)

    def memory(*cuts: int) -> np.ndarray:
        with model.session() as session:
            for part in np.split(tokens, cuts):
                session.feed(part)
            return session.memory

    whole = memory()
    assert_close("states in chunks", memory(7, 64, 65, 300), whole, 2e-3)
    for found in together([memory] * 6):
        assert_close("states beside others", found, whole, 2e-3)


@pytest.mark.cuda
def test_from_a_card_to_the_processor_and_back_a_state_at_rest_stays(card) -> None:
    cpu, cuda = card
    with cuda.session() as session:
        session.feed(ids(30))
        session.end_turn()
        there = session.snapshot()
    with cpu.session() as session:
        session.restore(there)
        back = session.snapshot()
    with cuda.session() as session:
        session.restore(back)
        assert session.memory_dlpack().__dlpack_device__() == (2, 0)
        np.testing.assert_allclose(session.memory, there.memory, rtol=0, atol=1e-6)


@pytest.mark.cuda
def test_a_card_that_is_not_there(card) -> None:
    with pytest.raises(dm.DeviceError, match="no card of that number"):
        dm.Model.load(card[0].path, device="cuda:63")


@pytest.mark.cuda
def test_out_of_memory_takes_nothing_away(card) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no card to fill")
    with card[1].session() as session:
        session.feed(ids(20))
        session.end_turn()
        before = session.memory.copy()
        held = []
        try:
            for size in (1 << 30, 1 << 24, 1 << 20):
                while True:
                    try:
                        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                    except torch.OutOfMemoryError:
                        break
            try:
                session.feed(ids(2000 % card[1].context_length, 1))
            except dm.DeviceError as error:
                assert "no memory left" in str(error)  # noqa: PT017 - it may also fit into what ONNX Runtime holds
                np.testing.assert_array_equal(session.memory, before)
        finally:
            held.clear()
            torch.cuda.empty_cache()
        session.feed(ids(5, 2))


@pytest.mark.cuda
@pytest.mark.parametrize("settings", [*SETTINGS, *WHOLE_ROWS])
def test_on_a_card_the_best_logits_are_those_of_the_whole_row(settings: str, card) -> None:
    """Held against the card's own logits, so that the rounding of its products plays no part."""
    model, chosen = card[1], (SETTINGS | WHOLE_ROWS)[settings]
    before = model.stats.best_rows
    tokens = reply(model, ids(9), 40, **chosen)
    assert model.stats.best_rows - before == (len(tokens) if settings in SETTINGS else 0)
    if settings != "greedy":
        return
    with model.session() as session:
        logits = session.feed(ids(9), logits=True)[-1]
        for token in tokens[:-1]:
            # A near tie may fall to the other side in another run of the same card, by no more than its rounding.
            assert logits.max() - logits[token] < 1e-3
            logits = session.feed([token], logits=True)[0]


@pytest.mark.cuda
def test_a_card_chooses_the_lowest_of_equal_logits(card, changed) -> None:
    model = load(changed(period=8, precision="fp16"), device="cuda")
    for top_k in (1, 2, 5):
        tokens = reply(model, ids(6), 30, temperature=1.5, top_k=top_k, seed=top_k)
        # Of thirty-two equal ones the first few are in play, never others.
        assert max(tokens) < 8 * top_k
    assert max(reply(model, ids(6), 30)) < 8


@pytest.mark.cuda
def test_a_card_replays_what_it_computes(card) -> None:
    captures = load(card[0].path, device="cuda", cuda_graphs=True)
    assert captures.uncaptured is None
    found = []
    for model in (card[1], captures):
        with model.session() as session:
            session.feed(ids(200))
            for token in ids(120, 1):
                found.append(session.feed([token], logits=True))
            found.append(session.memory)
    half = len(found) // 2
    for plain, replayed in zip(found[:half], found[half:], strict=True):
        assert_close("replayed", replayed, plain, 2e-3)
    assert captures.uncaptured is None, "a step that could not be captured says why here"
    assert captures.stats.captured_steps > 60
    assert captures.stats.cuda_graphs < 30
