"""The tree itself: nothing in it is tied to one machine, and nothing that building makes is tracked."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = {".onnx", ".data", ".npz", ".npy", ".safetensors", ".pt", ".png", ".so"}
# A home or working directory, or a package registry's host. The pieces are put together here so that this file does not hold them.
ONE_MACHINE = re.compile(
    "|".join(
        (
            r"/(?:home|root|Users)" + r"/\w",
            r"/work" + r"/(?:main|shared)",
            r"(?:pypi|files\.pythonhosted|static\.crates|index\.crates)" + r"\.\w",
        )
    )
)


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so nothing says which files are tracked")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_one_machine_or_a_registrys_host(tracked):
    found = []
    for path in tracked:
        if path.suffix in BINARY or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if ONE_MACHINE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_nothing_that_building_makes_is_tracked(tracked):
    made = {".so", ".pyd", ".whl", ".pyc"}
    assert not [str(path) for path in tracked if path.suffix in made or "target" in path.relative_to(ROOT).parts]


def test_every_tracked_file_is_small(tracked):
    assert not [f"{path}: {path.stat().st_size}" for path in tracked if path.stat().st_size > 8 * 1024 * 1024]


def test_the_locks_are_there(tracked):
    names = {str(path.relative_to(ROOT)) for path in tracked}
    assert {"Cargo.lock", "requirements/dev.txt", "requirements/demo.txt", "requirements/build.txt"} <= names
    for lock in ROOT.glob("requirements/*.txt"):
        pins = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
        assert all("==" in pin for pin in pins), lock


def test_one_version_everywhere():
    versions = set()
    for path, pattern in (
        ("Cargo.toml", r'^version = "(.+)"'),
        ("export/pyproject.toml", r'^version = "(.+)"'),
        ("CHANGELOG.md", r"^## (\d+\.\d+\.\d+)"),
    ):
        found = re.search(pattern, (ROOT / path).read_text(), re.MULTILINE)
        assert found, path
        versions.add(found.group(1))
    assert len(versions) == 1, versions
