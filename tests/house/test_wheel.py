"""The wheel: small, complete, and quick to import. `make test` builds it first."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import deltamem_rt as dm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = list(ROOT.glob("dist/deltamem_rt-*.whl"))
    if not found:
        pytest.skip("no wheel in dist/; `make wheel` builds it")
    return found[0]


def test_it_is_at_most_10_mb(wheel):
    assert wheel.stat().st_size <= 10_000_000


def test_one_wheel_serves_every_python_from_3_11(wheel):
    assert "-cp311-abi3-" in wheel.name
    assert dm.__version__ in wheel.name


def test_it_holds_the_embedded_default_and_the_stubs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"deltamem_rt/models/tiny-assistant/{path.name}" for path in dm.default_bundle().iterdir() if path.is_file()
    }
    wanted |= {"deltamem_rt/py.typed", "deltamem_rt/_native.pyi", "deltamem_rt/_cli/demo/__init__.py"}
    assert not wanted - names


def test_it_holds_nothing_else_of_the_tree(wheel):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert all(top == "deltamem_rt" or top.startswith("deltamem_rt-") for top in tops), tops


def test_the_import_is_quick():
    code = "import numpy, time; t = time.perf_counter(); import deltamem_rt; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(times) <= 0.15, f"import deltamem_rt took {min(times):.3f} s at best (numpy not counted)"
