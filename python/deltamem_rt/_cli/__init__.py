"""The `deltamem` command: it reads arguments, calls one module per command, and turns errors into one line and an exit code.

0: done. 1: it ran and failed. 2: the command line, or a file that it names, is wrong. 130: Ctrl-C. An error that is nobody's fault but
ours keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from deltamem_rt import __version__
from deltamem_rt.errors import BundleError, DeltaMemError, FingerprintError, SnapshotError, TextError

from . import chat, demo, doctor, inspect
from .arguments import UsageError
from .terminal import explain

__all__ = ["main"]

_USERS_MISTAKE = (
    UsageError,
    BundleError,
    FingerprintError,
    SnapshotError,
    TextError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `arguments` defaults to those of the process."""
    parser = argparse.ArgumentParser(
        prog="deltamem",
        description="Language models with a small memory that goes on: look, talk, measure.",
        epilog="deltamem demo is the place to begin.",
    )
    parser.add_argument("--version", action="version", version=f"deltamem-rt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, chat, inspect, doctor):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except _USERS_MISTAKE as error:
        return _say(error, 2)
    except (DeltaMemError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone (`deltamem ... | head`): nothing is left to tell it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _say(error, 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return code


def _say(error: BaseException, code: int) -> int:
    # argparse's own form, so that every error of the command looks alike.
    print(f"deltamem: error: {explain(error)}", file=sys.stderr)
    return code
