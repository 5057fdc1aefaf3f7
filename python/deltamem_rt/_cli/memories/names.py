"""`deltamem names`: the memories in a store, with their sizes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deltamem_rt._cli.arguments import Commands
from deltamem_rt._cli.terminal import Terminal, count, printable, size
from deltamem_rt._records import MemoryInfo, stamp
from deltamem_rt.errors import NotFoundError

from . import forms
from .place import add_store_arguments, opened
from .shown import table


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "names",
        help="the memories in a store, with their sizes",
        description="Lists the memories in a store: commits, bytes, branches, the last change (UTC).",
        epilog="--json: place, memories (each: name, head, branches, tags, commits, bytes, max_commits, max_bytes, "
        "when_full, created, changed, expires).",
    )
    parser.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="only names that begin with this")
    parser.add_argument("-q", "--quiet", action="store_true", help="names alone, one a line")
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    terminal = Terminal()
    with opened(options) as store:
        place = store.place
        names = store.names(options.prefix)
        if options.quiet and not options.json:
            # Line by line, without waiting for each to be written: there may be very many.
            sys.stdout.writelines(f"{printable(name)}\n" for name in names)
            return 0
        found = []
        for name in names:
            try:
                found.append(store.info(name))
            except NotFoundError:
                continue  # deleted, or expired, since the names were read
    if options.json:
        forms.print_json({"place": place, "memories": [forms.of_memory(info) for info in found]})
    else:
        _show(found, place, options.prefix, terminal)
    return 0


def _show(found: Sequence[MemoryInfo], place: str, prefix: str, terminal: Terminal) -> None:
    if not found:
        beginning = f" whose name begins with {printable(prefix)!r}" if prefix else ""
        terminal.line(f"no memory{beginning} in {printable(place)}")
        return
    head = ["commits", "bytes", "branches", "changed"]
    rows = [[f"{info.commits:,}", size(info.bytes), f"{len(info.branches):,}", stamp(info.changed)] for info in found]
    if any(info.expires for info in found):
        head.append("expires")
        for row, info in zip(rows, found, strict=True):
            row.append(stamp(info.expires) if info.expires else "")
    rows = [[*row, info.name] for row, info in zip(rows, found, strict=True)]
    for line in table([*head, "name"], rows, terminal, [None, None, None, terminal.dim]):
        terminal.line(line)
    if len(found) > 1:
        memories = f"{len(found):,} memories"
        commits, taken = sum(info.commits for info in found), sum(info.bytes for info in found)
        terminal.line(terminal.dim(f"{memories}, {count(commits, 'commit')}, {size(taken)}"))
