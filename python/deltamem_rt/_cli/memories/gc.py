"""`deltamem gc`: what nothing names any more goes, and its bytes leave the store."""

from __future__ import annotations

import argparse
import math

from deltamem_rt._cli.arguments import Commands
from deltamem_rt._cli.terminal import Terminal, count, size
from deltamem_rt._records import GcReport

from . import forms
from .place import add_store_arguments, opened


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "gc",
        help="take away what nothing names, and give the bytes back",
        description="Takes away expired memories, old moves in reflogs, and commits that no branch, no tag and no move names; "
        "then makes the bytes of all that is gone leave the file.",
        epilog="--json: memories, commits, states, moves (taken away), bytes_before, bytes_after (null with "
        "--no-compact).",
    )
    parser.add_argument(
        "--reflog",
        type=_days,
        metavar="DAYS",
        help="keep moves of so many days; 0: only what branches and tags reach stays (default: 90)",
    )
    parser.add_argument("--no-compact", action="store_true", help="do not write the file anew: the bytes stay in it")
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    seconds = None if options.reflog is None else options.reflog * 86_400
    with opened(options, writing=True) as store:
        report = store.gc(reflog=seconds, compact=not options.no_compact)
    if options.json:
        forms.print_json(
            {
                "memories": report.memories,
                "commits": report.commits,
                "states": report.states,
                "moves": report.moves,
                "bytes_before": report.bytes_before,
                "bytes_after": report.bytes_after,
            }
        )
    else:
        _show(report, Terminal())
    return 0


def _show(report: GcReport, terminal: Terminal) -> None:
    memories = f"{report.memories:,} expired {'memory' if report.memories == 1 else 'memories'}"
    gone = [
        memories if report.memories else "",
        count(report.commits, "commit") if report.commits else "",
        count(report.states, "state") if report.states else "",
        count(report.moves, "move") if report.moves else "",
    ]
    terminal.line(f"taken away: {', '.join(part for part in gone if part) or 'nothing'}")
    if report.bytes_before is not None and report.bytes_after is not None:
        freed = report.bytes_before - report.bytes_after
        terminal.line(
            f"freed {size(freed)}: {size(report.bytes_before)} before, {size(report.bytes_after)} now"
            if freed > 0
            else f"nothing to free: {size(report.bytes_after)}"
        )


def _days(text: str) -> float:
    """An argument's type: days, 0 or more."""
    days = float(text)
    if not 0 <= days < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of days of at least 0")
    return days
