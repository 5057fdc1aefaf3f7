"""What the command line's tests share: the command in this process, and the embedded default it talks to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import deltamem_rt as dm
from deltamem_rt._cli import main
from deltamem_rt._cli.demo import cost, report


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def deltamem(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the `deltamem` command in this process: `deltamem("inspect", path)`."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse leaves this way
            code = leaving.code if isinstance(leaving.code, int) else 2
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The embedded default."""
    return dm.default_bundle()


@pytest.fixture
def short_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's cost of a turn over a short history, for tests that are about something else."""
    for module in (cost, report):
        monkeypatch.setattr(module, "MARKS", (0, 100))
