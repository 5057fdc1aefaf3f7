"""The Makefile's own words: one clear line where something is missing, and a list of what there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH with the shell's own tools, Python and nothing to build with."""
    for tool in ("sh", "sed", "env", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    (tmp_path / "python3").symlink_to(sys.executable)
    return tmp_path


def program(folder: Path, name: str, prints: str = "", code: int = 0) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\necho '{prints}'\nexit {code}\n")
    path.chmod(0o755)


def need(path: Path, *things: str, python: str = "python3") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(shutil.which("sh")), ".ci/need", python, *things],
        cwd=ROOT,
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
    )


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_nothing_is_said_where_nothing_is_missing(machine):
    for tool in ("cargo", "cc"):
        program(machine, tool)
    program(machine, "rustc", "rustc 1.95.0 (59807616e 2026-04-14)")
    done = need(machine, "python", "rust", "cc")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_python_is_named(machine):
    one_line(need(machine, "python", python="python3.99"), "python3.99", "3.11 or later")


def test_an_old_python_is_named(machine):
    (machine / "python3").unlink()
    (machine / "python3").write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; esac\necho 3.9.2\n')
    (machine / "python3").chmod(0o755)
    one_line(need(machine, "python"), "python3 is 3.9.2", "make PYTHON=")


def test_a_python_that_does_not_run_is_named(machine):
    program(machine, "python3", code=1)
    one_line(need(machine, "python"), "3.11 or later", "make PYTHON=")


def test_a_python_without_venv_is_named(machine):
    (machine / "python3").unlink()
    (machine / "python3").write_text('#!/bin/sh\ncase "$*" in *venv*) exit 1;; esac\nexit 0\n')
    (machine / "python3").chmod(0o755)
    one_line(need(machine, "python"), "python3-venv")


def test_missing_rust_is_named(machine):
    one_line(need(machine, "rust"), "Rust is missing", "1.92 or later")


def test_old_rust_is_named(machine):
    program(machine, "cargo")
    program(machine, "rustc", "rustc 1.75.0 (82e1608df 2023-12-21)")
    one_line(need(machine, "rust"), "1.75.0", "1.92 or later")


def test_a_missing_toolchain_is_named(machine):
    program(machine, "cargo")
    program(machine, "rustc", code=1)
    one_line(need(machine, "rust"), "rustup toolchain install")


def test_a_missing_c_compiler_is_named(machine):
    one_line(need(machine, "cc"), "C compiler", "build-essential")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed, and the tests were started without it")
def test_help_lists_every_command():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in ("setup", "demo", "test", "test-long", "bench", "wheel", "clean"):
        assert f"make {command} " in done.stdout


def test_ci_calls_make_test():
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert "exec make test" in run.read_text()
