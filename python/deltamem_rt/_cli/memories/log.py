"""`deltamem log`: the commits of a memory, the newest first; with --graph, who came from whom."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from deltamem_rt._cli.arguments import Commands, UsageError, not_negative
from deltamem_rt._cli.terminal import Terminal
from deltamem_rt._records import Commit, MemoryInfo

from . import forms
from .graph import draw
from .place import add_name_argument, add_store_arguments, memory, opened
from .shown import line


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "log",
        help="a memory's commits; --graph draws its history",
        description="Lists the commits that REF reaches, children before parents: id, time (UTC), branches and tags that "
        "stand there, and the message, or else the meta.",
        epilog="A REF is HEAD, a branch, a tag, or 4 or more digits of an id; behind it ~N, ^, ^2, or @{N}: where a "
        "branch was N moves ago. --json: name, head, branches, tags, commits (each: id, parents, generation, "
        "branch, time, time_ms, message, meta, tokens_seen, fingerprint, parts, state, state_bytes), more.",
    )
    add_name_argument(parser)
    parser.add_argument("refs", nargs="*", default=[], metavar="REF", help="where to begin (default: HEAD)")
    parser.add_argument("--all", action="store_true", help="begin at every branch and tag")
    parser.add_argument("--graph", action="store_true", help="draw who came from whom")
    parser.add_argument(
        "-n", type=not_negative, default=20, metavar="N", help="at most so many; 0 is all (default: %(default)s)"
    )
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.all and options.refs:
        raise UsageError("--all begins at every branch and tag: leave it, or REF, away")
    with opened(options) as store:
        info = memory(store, options.name)
        refs = [*info.branches, *info.tags] if options.all else options.refs or ["HEAD"]
        # One more than asked for says whether there are more.
        found = store.log(options.name, refs, options.n + 1 if options.n else sys.maxsize)
    more = bool(options.n) and len(found) > options.n
    found = found[: options.n or None]
    if options.json:
        forms.print_json(forms.of_refs(info) | {"commits": [forms.of_commit(commit) for commit in found], "more": more})
        return 0
    terminal = Terminal()
    for text in _graph(found, info, terminal) if options.graph else (line(commit, info, terminal) for commit in found):
        terminal.line(text)
    if more:
        terminal.line(terminal.dim(f"(the last {options.n}; -n 0 lists all)"))
    return 0


def _graph(found: Sequence[Commit], info: MemoryInfo, terminal: Terminal) -> Iterator[str]:
    commits = {commit.id: commit for commit in found}
    for drawn in draw({commit.id: commit.parents for commit in found}, terminal.hue):
        yield f"{drawn.before} {line(commits[drawn.commit], info, terminal, used=drawn.width)}"
        yield from drawn.below
