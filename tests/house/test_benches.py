"""The benches still run, on models as small as can be; no time is asked for. What they compare is the same work: the backbone alone is the
bundle's backbone bit for bit, and onnxruntime-genai says the same tokens on its graph."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltamem_export.evaluation.plots import Point, Series, line_plot

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ("cost", "history", "sessions", "waiting", "scan", "footprint")


@pytest.fixture
def benches(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benches"))


@pytest.fixture
def made(benches):
    import models

    return lambda precision: models.made("smoke", precision)


def test_every_bench_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_PLOTS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other where others use the cores
    code = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benches')!r})\n"
        "sys.argv[1:] = ['--quick']\n"
        f"for name in {BENCHES!r}:\n"
        "    importlib.import_module(f'bench_{name}').main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"^## (\w+)", done.stdout, re.MULTILINE) == list(BENCHES)
    for table in re.findall(r"(?:^\|.*\n)+", done.stdout, re.MULTILINE):
        widths = {row.count("|") for row in table.splitlines()}
        assert len(widths) == 1, table
        assert len(table.splitlines()) > 2, table
    assert {path.name for path in tmp_path.iterdir()} == {"turn-cost.svg", "sessions.svg"}


def test_the_bench_of_a_card_runs_with_the_processor_in_its_place_and_says_when_there_is_no_card(emulator):
    def bench(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "benches" / "bench_cuda.py"), "--quick", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = bench("--device", "_device_on_cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    tables = re.findall(r"(?:^\|.*\n)+", done.stdout, re.MULTILINE)
    assert len(tables) == 6
    assert all(len({row.count("|") for row in table.splitlines()}) == 1 and table.count("\n") > 2 for table in tables)
    assert "over its context" in tables[4]
    for row in ("engine, memory, fused graph", "engine, portable graph"):
        assert row in tables[0]
    # Nodes that launch kernels: the fused graph has the backbone's, and the memories' Concat.
    graphs = {row.split(" | ")[2]: int(row.split(" | ")[4].split()[0]) for row in tables[5].splitlines()[2:]}
    assert list(graphs) == ["fused", "portable", "backbone alone"]
    assert graphs["fused"] == graphs["backbone alone"] + 1
    assert graphs["portable"] > graphs["fused"] + 2 * 25
    hidden = bench()
    if hidden.returncode != 0:
        assert (hidden.returncode, hidden.stdout) == (77, "")
        assert "no card answers here, so nothing was measured: " in hidden.stderr


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_backbone_alone_is_what_a_strength_of_zero_leaves(made, precision):
    from opening import load

    found, ids = made(precision), np.arange(3, 60, dtype=np.int32)
    with load(found.bundle).session(strength=0.0) as session:
        silent = session.feed(ids, logits=True)
    with load(found.bundle).session() as session:
        heard = session.feed(ids, logits=True)
    # A strength runs on the measured graph, whose products are ONNX Runtime's.
    with load(found.bare, graph="portable").session() as session:
        bare = session.feed(ids, logits=True)
        assert not session.memory.any()
    np.testing.assert_allclose(bare, silent, rtol=0, atol=1e-6)
    assert np.abs(bare - heard).max() > 1e-3


def test_onnxruntime_genai_says_the_same_tokens_on_its_graph(made):
    import onnxruntime_genai as genai

    from opening import load

    found, ids = made("fp32"), np.arange(3, 60, dtype=np.int32)
    model = genai.Model(str(found.genai))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=90, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(ids)
    for _ in range(20):
        generator.generate_next_token()
    with load(found.bare).session() as session:
        reply = session.generate(ids, max_new_tokens=20)
        reply.read()
    assert list(generator.get_sequence(0))[len(ids) :] == reply.token_ids


def test_one_section_is_written_anew_and_the_others_stay(benches):
    import run

    old = run.page("# Benchmarks\n\nold head", {"store": "## Stores\n\nkept", "cost": "## cost\n\nold"})
    new = run.page("# Benchmarks\n\nnew head", {**run.sections(old), "cost": "## cost\n\nnew", "other": "## other"})
    assert run.sections(new) == {"cost": "## cost\n\nnew", "store": "## Stores\n\nkept", "other": "## other"}
    assert re.findall(r"^## (\w+)", new, re.MULTILINE) == ["cost", "Stores", "other"]
    assert new.startswith("# Benchmarks\n\nnew head\n")


def test_the_page_can_be_read_back_and_names_benches_that_exist(benches):
    import run

    text = run.PAGE.read_text(encoding="utf-8")
    found = run.sections(text)
    assert run.page(text[: text.index("<!-- bench: ")], found) == text
    assert all((ROOT / "benches" / f"bench_{name}.py").is_file() for name in found if name != run.CARGO)


def test_a_bench_that_fails_is_named_in_its_section(benches, tmp_path):
    import run

    section, code = run.run("broken", [sys.executable, "-c", "print('## broken'); raise SystemExit(3)"], tmp_path)
    assert code == 3
    assert "failed with exit code 3" in section


def test_decades_are_equally_high_on_a_logarithmic_axis():
    points = [Point(10.0**e, 10.0**e, 10.0**e, 10.0**e) for e in range(4)]
    svg = line_plot([Series("a", "#000", points)], "x", "y", x_axis="log", y_axis="log", y_range=(1.0, 1000.0))
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg)]
    assert np.diff(heights) == pytest.approx([np.diff(heights)[0]] * 3, abs=0.11)
    assert np.diff(heights)[0] < 0
