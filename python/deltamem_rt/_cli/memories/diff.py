"""`deltamem diff`: what changed between two commits, by layer and head."""

from __future__ import annotations

import argparse

from deltamem_rt._changes import Diff
from deltamem_rt._cli.arguments import Commands, UsageError, not_negative
from deltamem_rt._cli.terminal import Terminal

from . import forms
from .place import add_name_argument, add_store_arguments, memory, opened
from .shown import table

# Shorter than a Diff's own words, so that the table fits 80 columns.
_HEAD = ("layer", "head", "before", "after", "change", "cos", "cos chg", "rank", "directions")


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "diff",
        help="what changed between two commits",
        description="Compares the states of two commits by layer and head: norms, the cosine of before and after, that of the "
        "change with what was before (-1: a mere decay), the change's effective rank, and how far its largest "
        "directions moved a read.",
        epilog="--json: a, b (commits as in log; a null: the empty memory), total and heads (norm_before, norm_after, "
        "norm_change, cosine, cosine_of_change, effective_rank; heads also layer, head, directions: each size, "
        "value, key).",
    )
    add_name_argument(parser)
    parser.add_argument("a", nargs="?", metavar="A", help="from this commit (default: the parent of B)")
    parser.add_argument("b", nargs="?", metavar="B", help="to this one (default: HEAD)")
    parser.add_argument("--empty", action="store_true", help="from the empty memory to A")
    parser.add_argument(
        "--directions", type=not_negative, default=3, metavar="N", help="of each head (default: %(default)s)"
    )
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.empty and options.b is not None:
        raise UsageError("--empty takes one commit: it compares with the empty memory")
    with opened(options) as store:
        memory(store, options.name)
        before, after = options.a, options.b or "HEAD"
        if options.empty:
            before, after = None, before or "HEAD"
        elif before is None and store.show(options.name, after).parents:
            before = f"{after}~1"
        found = store.diff(options.name, before, after, directions=options.directions)
    if options.json:
        forms.print_json(forms.of_diff(found))
    else:
        _show(found, Terminal())
    return 0


def _show(diff: Diff, terminal: Terminal) -> None:
    terminal.line(terminal.mark(diff.title))
    *rows, total = table(_HEAD, diff._rows(), terminal)
    for text in rows:
        terminal.line(text)
    terminal.line(terminal.bold(total))
