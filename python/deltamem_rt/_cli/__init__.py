"""The `deltamem` command: it reads arguments, calls one module per command, and turns errors into one line and an exit code.

0: done. 1: it ran and failed. 2: the command line, or what it names, is wrong. 130: Ctrl-C. An error that is nobody's fault but ours
keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from deltamem_rt import __version__
from deltamem_rt.errors import (
    BundleError,
    DeltaMemError,
    ExistsError,
    FingerprintError,
    NotFoundError,
    RefError,
    SnapshotError,
    StoreFormatError,
    StoreKeyError,
    TextError,
)

from .arguments import Parser, UsageError
from .terminal import explain

__all__ = ["main"]

_COMMANDS = {
    "demo": "demo",
    "chat": "chat",
    "inspect": "inspect",
    "doctor": "doctor",
    "names": "memories.names",
    "log": "memories.log",
    "show": "memories.show",
    "diff": "memories.diff",
    "blame": "memories.blame",
    "branch": "memories.refs",
    "tag": "memories.refs",
    "merge": "memories.merge",
    "rollback": "memories.rollback",
    "reflog": "memories.reflog",
    "export": "memories.transfer",
    "import": "memories.transfer",
    "delete": "memories.delete",
    "gc": "memories.gc",
    "verify": "memories.verify",
}
"""Each command and the module that adds it to the parser and runs it."""

_USERS_MISTAKE = (
    UsageError,
    BundleError,
    FingerprintError,
    SnapshotError,
    TextError,
    NotFoundError,
    ExistsError,
    RefError,
    StoreKeyError,
    StoreFormatError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `arguments` defaults to those of the process."""
    words = sys.argv[1:] if arguments is None else arguments
    # One command's module is loaded, not all: `deltamem log` waits for no NumPy.
    known = words[:1] if words and words[0] in _COMMANDS else list(_COMMANDS)
    options = parser(known).parse_args(words)
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


def parser(names: Sequence[str] = tuple(_COMMANDS)) -> argparse.ArgumentParser:
    """The parser of these commands; loads their modules."""
    made = argparse.ArgumentParser(
        prog="deltamem",
        description="Language models with a small memory that goes on: look, talk, measure; and memories in a store, as Git has it.",
        epilog="deltamem demo is the place to begin.",
    )
    made.add_argument("--version", action="version", version=f"deltamem-rt {__version__}")
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for module in dict.fromkeys(_COMMANDS[name] for name in names):
        import_module(f".{module}", __package__).add_parser(commands)
    return made


def _say(error: BaseException, code: int) -> int:
    # argparse's own form, so that every error of the command looks alike.
    print(f"deltamem: error: {explain(error)}", file=sys.stderr)
    return code
