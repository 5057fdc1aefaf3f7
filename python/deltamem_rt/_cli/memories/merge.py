"""`deltamem merge`: one branch into another, without a model, and what it costs."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

from deltamem_rt._changes import MergeResult
from deltamem_rt._cli.arguments import Commands
from deltamem_rt._cli.terminal import Terminal, printable
from deltamem_rt._records import MemoryInfo
from deltamem_rt.errors import MergeWarning

from . import forms
from .place import add_name_argument, add_store_arguments, again, memory, opened
from .shown import brief


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "merge",
        help="merge one branch of a memory into another",
        description="Merges what REF names into a branch: a fast-forward where the branch has nothing of its own, else base + "
        "(ours - base) + (theirs - base). Exit code 1: the branch moved meanwhile, nothing was changed.",
        epilog="--json: branch, case (up-to-date, fast-forward, three-way), commit (as in log), bases, overlap, "
        "loss_ours, loss_theirs, warning (null, or what the figures mean).",
    )
    add_name_argument(parser)
    parser.add_argument("ref", metavar="REF", help="what to merge: a branch, a tag, a commit")
    parser.add_argument("--into", metavar="BRANCH", help="the branch that takes it (default: HEAD)")
    parser.add_argument("-m", "--message", default="", metavar="TEXT", help="the merge commit's message")
    parser.add_argument("--meta", type=_object, metavar="JSON", help="the merge commit's meta: a JSON object")
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with opened(options, writing=True) as store, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", MergeWarning)
        info = memory(store, options.name)
        branch = options.into or info.head
        result = store.merge(options.name, options.ref, into=branch, message=options.message, meta=options.meta)
    warning = next((str(one.message) for one in said if issubclass(one.category, MergeWarning)), None)
    if options.json:
        forms.print_json({"branch": branch, **forms.of_merge(result), "warning": warning})
    else:
        _show(result, branch, warning, _undo(result, branch, info, options), brief(options.ref), Terminal())
    return 0


def _show(result: MergeResult, branch: str, warning: str | None, undo: str, theirs: str, terminal: Terminal) -> None:
    ours = brief(branch)
    if result.case == "up-to-date" or result.commit is None:
        terminal.line(f"{ours} holds all of {theirs} already")
        return
    head = terminal.mark(result.commit.short)
    if result.case == "fast-forward":
        terminal.line(f"{ours} went forward to {head}, as {theirs}: it had nothing of its own")
    else:
        bases = ", ".join(base[:12] for base in result.bases)
        common = f"over their common {bases}" if bases else "which have nothing in common"
        terminal.line(f"merged {theirs} into {ours}: {head}, {common}")
        terminal.line(
            f"overlap of what both wrote {result.overlap:.3f}; facts of {ours} lose {result.loss_ours:.3f}, facts of {theirs} "
            f"{result.loss_theirs:.3f}"
        )
        if warning:
            terminal.line(terminal.mark(f"warning: {printable(warning)}"))
    terminal.line(terminal.dim(f"undo: {undo}"))


def _undo(result: MergeResult, branch: str, info: MemoryInfo, options: argparse.Namespace) -> str:
    """The command that takes the merge back: to the commit by its id, which no later move changes."""
    made = result.commit if result.case == "three-way" else None
    old = made.parents[0] if made else info.branches[branch]
    other = ["--branch", branch] if options.into else []
    return again("rollback", options, options.name, old[:12], flags=other)


def _object(text: str) -> dict[str, Any]:
    """An argument's type: a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return found
