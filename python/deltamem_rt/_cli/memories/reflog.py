"""`deltamem reflog`: the moves of a memory's branches and tags, and the refs that lead back."""

from __future__ import annotations

import argparse
import sys

from deltamem_rt._cli.arguments import Commands, not_negative
from deltamem_rt._cli.terminal import Terminal, printable
from deltamem_rt._records import stamp

from . import forms
from .place import add_name_argument, add_store_arguments, memory, opened
from .shown import table


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "reflog",
        help="the moves of a memory's branches and tags",
        description="Lists the moves of a memory's branches and tags, the newest first. A rollback to the id under `from` "
        "takes a move back.",
        epilog="--json: name, head, branches, tags, moves (each: number, kind, name, old, new, time, time_ms, why).",
    )
    add_name_argument(parser)
    parser.add_argument("of", nargs="?", metavar="BRANCH_OR_TAG", help="only the moves of this one")
    parser.add_argument(
        "-n", type=not_negative, default=20, metavar="N", help="at most so many; 0 is all (default: %(default)s)"
    )
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with opened(options) as store:
        info = memory(store, options.name)
        moves = store.reflog(options.name, options.of, options.n or sys.maxsize)
    if options.json:
        forms.print_json(forms.of_refs(info) | {"moves": [forms.of_move(move) for move in moves]})
        return 0
    terminal = Terminal()
    rows = [
        [
            stamp(move.time),
            (move.old or "none")[:12],
            (move.new or "none")[:12],
            f"{move.kind} {printable(move.name)}: {move.why}",
        ]
        for move in moves
    ]
    for text in table(("time", "from", "to", "move"), rows, terminal, [terminal.dim, terminal.mark, terminal.mark]):
        terminal.line(text)
    return 0
