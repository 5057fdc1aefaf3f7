"""The fused graph for CUDA, with the processor as the card: its driver and its compiler are an emulator's (tests/emulated.py), so that the
memory's own kernels run, launched as on a card. Here what a card's way of going about it adds: steps of many sessions, growing caches,
rollbacks, captures, 16 bits, and what happens where the kernels cannot be had. The goldens are in test_parity.py, the variants of the rule
in tests/export/test_grafts.py, the kernels alone in rust/deltamem-cuda.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deltamem_rt as dm
import emulated
from agreement import assert_close
from emulated import ON_DEVICE
from together import beside_prompts

LOGITS, STATES = 1e-4, 1e-5
# Beside the portable graph in 16 bits, whose corrections are rounded once more: logits, states.
NARROW = (2e-2, 1e-3)
LAYERS = 3


def load(bundle: Path, graph: str = "fused", **options: object) -> dm.Model:
    model = dm.Model.load(bundle, device=ON_DEVICE, graph=graph, threads=1, **options)
    assert model.graph == graph
    return model


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, count, dtype=np.int32)


@pytest.fixture(scope="module")
def models(device_bundle: Callable[[str], Path]) -> tuple[dm.Model, dm.Model]:
    """The fused graph and the portable one."""
    bundle = device_bundle("qwen3_tsw_qo")
    fused = load(bundle)
    assert fused.unfused is None
    return fused, load(bundle, "portable")


@pytest.fixture(scope="module")
def narrow(golden_case, emulator, tmp_path_factory) -> Callable[[str, str], Path]:
    """`narrow(case, "fp16")`: a bundle for CUDA alone."""
    from deltamem_export.bundle import export_bundle
    from deltamem_export.precision import Precision

    def bundle(case: str, form: str) -> Path:
        source, out = golden_case(case), tmp_path_factory.mktemp("narrow") / form
        # CUDA rounds no activations to 8 bits, so neither shall the CPU in its place.
        precision = Precision(form, 32, 1, device="cuda")
        return export_bundle(source / "backbone", source / "adapter", out, precision, check=False, say=lambda _: None)

    return bundle


def talk(model: dm.Model) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits and states: over the first capacity of 256 tokens twice, in chunks and in single tokens; a turn that only reads."""
    logits, states = [], []
    with model.session() as session:
        for turn, counts in enumerate([(5,), (250, 1, 1, 1, 1, 1, 1, 1, 1), (300, 220)]):
            for part, count in enumerate(counts):
                logits.append(session.feed(ids(count, 10 * turn + part), logits=True))
            states.append(session.memory.copy())
            session.end_turn()
        logits.append(session.feed(ids(9, 77), write=False, logits=True))
        states.append(session.memory.copy())
        np.testing.assert_array_equal(states[-1], states[-2])
    return logits, states


def assert_alike(found, expected, limits: tuple[float, float]) -> None:
    for what, ours, theirs, limit in zip(("logits", "states"), found, expected, limits, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(what, a, b, limit)


def test_turns_growing_caches_and_reading_alone(models) -> None:
    assert_alike(talk(models[0]), talk(models[1]), (LOGITS, STATES))


@pytest.mark.parametrize(
    ("case", "form"),
    [("qwen3_tsw_qo", "fp16"), ("phi3_tsw_qkvo", "fp16"), ("gemma2_tsw_qo", "fp16"), ("qwen3_tsw_qo", "int4")],
)
def test_in_16_bits_it_is_as_near_as_they_are(case: str, form: str, narrow) -> None:
    bundle = narrow(case, form)
    assert_alike(talk(load(bundle)), talk(load(bundle, "portable")), NARROW)


def test_attention_in_standard_operators_keeps_past_and_present_apart(narrow) -> None:
    bundle = narrow("qwen3_tsw_qo", "fp32")
    model = load(bundle)
    assert model.unbatched is not None
    assert_alike(talk(model), talk(load(bundle, "portable")), (LOGITS, STATES))


@pytest.mark.parametrize("cuts", [[1], [7, 8, 9], [1, 70, 71, 120], list(range(1, 20))])
def test_any_split_of_a_stream_is_the_same_stream(models, cuts: list[int]) -> None:
    tokens = ids(150, 5)
    with models[0].session() as once, models[0].session() as parts:
        whole = once.feed(tokens, logits=True)
        pieces = [parts.feed(part, logits=True) for part in np.split(tokens, cuts)]
        assert_close("logits", np.concatenate(pieces), whole, LOGITS)
        assert_close("states", parts.memory, once.memory, STATES)


def test_sessions_that_step_together_and_some_that_wait(device_bundle) -> None:
    """Slots between two that step belong to sessions that do not, and stay as they are."""
    model = load(device_bundle("qwen3_tsw_qo"), max_batch=8)

    def begun(seed: int) -> dm.Session:
        session = model.session()
        session.feed(ids(20 + seed, seed))
        return session

    def steps(session: dm.Session, seed: int, count: int) -> np.ndarray:
        return np.stack([session.feed([token], logits=True)[0] for token in ids(count, seed)])

    alone = []
    for seed in range(5):
        with begun(seed) as session:
            alone.append((steps(session, seed + 10, 40), steps(session, seed + 20, 3), session.memory.copy()))
    sessions = [begun(seed) for seed in range(5)]
    stepping = (0, 2, 4)
    jobs = [lambda n=n: steps(sessions[n], n + 10, 40) for n in stepping]
    found = dict(zip(stepping, beside_prompts(model, ids(500, 99), jobs), strict=True))
    assert model.stats.largest_step > 1
    for seed, session in enumerate(sessions):
        logits = found[seed] if seed in found else steps(session, seed + 10, 40)
        assert_close("logits", logits, alone[seed][0], STATES)
        assert_close("logits behind them", steps(session, seed + 20, 3), alone[seed][1], STATES)
        assert_close("states", session.memory, alone[seed][2], STATES)
        session.close()


def test_a_rollback_and_a_snapshot_for_the_cpu(models, parity_bundle, tmp_path) -> None:
    cpu = dm.Model.load(parity_bundle("qwen3_tsw_qo"), device="cpu", threads=1)
    with dm.Store(tmp_path / "memories") as store, models[0].session("ada", store=store) as session:
        session.feed(ids(20))
        first, before = session.commit("first"), session.memory.copy()
        session.feed(ids(20, 1))
        session.commit("second")
        assert np.abs(session.memory - before).max() > 1e-3
        session.rollback(first.id)
        np.testing.assert_array_equal(session.memory, before)
        with cpu.session() as other:
            other.restore(session.snapshot())
            assert_close("logits", session.feed(ids(9, 2), logits=True), other.feed(ids(9, 2), logits=True), LOGITS)


def test_steps_as_captures(device_bundle, models) -> None:
    """The processor runs what a card would capture, with the same shapes, places and ids."""
    captures = load(device_bundle("qwen3_tsw_qo"), cuda_graphs=True)
    assert captures.uncaptured is None
    found = []
    for model in (captures, models[1]):
        with model.session() as session:
            session.feed(ids(200))
            found.append([session.feed([token], logits=True) for token in ids(70, 1)] + [session.memory.copy()])
    for a, b in zip(*found, strict=True):
        assert_close("captured", a, b, LOGITS)
    assert captures.stats.captured_steps > 50


def test_a_step_launches_one_kernel_a_layer_and_a_prompt_three(models) -> None:
    with models[0].session() as session:
        session.feed(ids(5))
        for feed, each in (([7], 1), ([8], 1), (ids(60), 3)):
            before = emulated.launches()
            session.feed(feed)
            assert emulated.launches() - before == each * LAYERS
        before = emulated.launches()
    with models[1].session() as session:
        session.feed(ids(5))
    assert emulated.launches() == before, "the portable graph has no kernels of ours"


def test_measures_and_strengths_run_on_a_portable_graph(models) -> None:
    with models[0].session() as fused, models[1].session() as portable:
        for session in (fused, portable):
            session.feed(ids(30))
            session.end_turn()
            session.strength = 0.5
        assert_close("logits", fused.feed(ids(5, 1), logits=True), portable.feed(ids(5, 1), logits=True), LOGITS)
        assert_close("norms", fused.health().norm, portable.health().norm, 1e-3)


# where the kernels cannot be had


def loaded(bundle: Path, graph: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Loads in a process of its own and feeds a few tokens."""
    code = (
        "import sys, logging, deltamem_rt as dm\n"
        "logging.basicConfig(format='%(name)s %(levelname)s %(message)s')\n"
        f"model = dm.Model.load(sys.argv[1], device={ON_DEVICE!r}, graph=sys.argv[2])\n"
        "with model.session() as session: session.feed([5, 6, 7])\n"
        "print(model.graph, model.unfused, sep='\\n')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(bundle), graph],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        # A library that is neither a driver nor a compiler.
        ({emulated.VARIABLE: "/nowhere/libcuda.so"}, "/nowhere/libcuda.so"),
        # A compiler that computes something else: exp in the place of tanh's.
        ({"DELTAMEM_EMULATOR_FLAGS": "-Dtanhf=expf"}, "differ from the rule"),
        ({"DELTAMEM_EMULATOR_FLAGS": "-DRANK=(("}, "compiling the kernels"),
    ],
    ids=["no library", "wrong kernels", "no compiler"],
)
def test_kernels_that_cannot_be_had_leave_the_portable_graph_and_a_warning(
    environment: dict[str, str], words: str, device_bundle, tmp_path
) -> None:
    bundle = device_bundle("qwen3_tsw_qo")
    environment = {**environment, "XDG_CACHE_HOME": str(tmp_path)}
    done = loaded(bundle, "auto", **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    graph, why = done.stdout.split("\n", 1)
    assert graph == "portable"
    assert words in why
    assert "deltamem_rt WARNING graph='auto' runs the portable graph" in done.stderr
    assert words in done.stderr

    insists = loaded(bundle, "fused", **environment)
    assert insists.returncode != 0
    assert "DeviceError: the memory's own kernels cannot be had on cpu: " in insists.stderr
    assert words in insists.stderr
    asked = loaded(bundle, "portable", **environment)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout == 'portable\ngraph="portable" was asked for\n'


def test_what_is_for_the_cpu_alone_is_said(device_bundle) -> None:
    with pytest.raises(dm.BundleError, match=r"graph=\"blocks\": its products run on the processor only"):
        dm.Model.load(device_bundle("qwen3_tsw_qo"), device=ON_DEVICE, graph="blocks")


def test_verify_holds_the_fused_graph_against_the_portable_one(device_bundle) -> None:
    """As `deltamem-export verify --device cuda` does on a card."""
    from deltamem_export import verify
    from deltamem_export.precision import Precision

    bundle, turns = device_bundle("qwen3_tsw_qo"), verify._turns(ids(80), spans=False)
    apart, note = verify._beside_portable(bundle, "fused", turns, Precision("fp32", device="cuda"), ON_DEVICE)
    assert note is None
    assert apart is not None
    assert all(0 < one.max < limit for one, limit in zip(apart, (LOGITS, STATES), strict=True))
