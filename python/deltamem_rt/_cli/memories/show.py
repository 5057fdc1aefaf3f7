"""`deltamem show`: one commit, and what it changed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deltamem_rt._changes import Diff
from deltamem_rt._cli.arguments import Commands
from deltamem_rt._cli.terminal import Terminal, pairs, printable, size
from deltamem_rt._records import Commit, MemoryInfo, stamp
from deltamem_rt.errors import FingerprintError, RefError

from . import forms
from .place import add_name_argument, add_store_arguments, memory, opened
from .shown import compact, labels


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "show",
        help="one commit of a memory, and what it changed",
        description="Shows a commit: id, parents, branch, time, model, message, meta, and how far it moved the memory from "
        "each parent.",
        epilog="--json: commit (as in log), refs (branches and tags that stand there), changes (for each parent: parent, "
        "norm_before, norm_after, norm_change, cosine, cosine_of_change, effective_rank; parent null: from the "
        "empty memory).",
    )
    add_name_argument(parser)
    parser.add_argument("ref", nargs="?", default="HEAD", metavar="REF", help="the commit (default: HEAD)")
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with opened(options) as store:
        info = memory(store, options.name)
        commit = store.show(options.name, options.ref)
        changes = []
        for parent in commit.parents or (None,):
            try:
                changes.append(store.diff(options.name, parent, commit.id, directions=0))
            except (RefError, FingerprintError):
                continue  # pruned, or of another model
    if options.json:
        refs = [ref for ref, at in {**info.branches, **info.tags}.items() if at == commit.id]
        said = [{"parent": diff.a and diff.a.id, **forms.of_change(diff.total)} for diff in changes]
        forms.print_json({"commit": forms.of_commit(commit), "refs": refs, "changes": said})
    else:
        _show(commit, changes, info, Terminal())
    return 0


def _show(commit: Commit, changes: Sequence[Diff], info: MemoryInfo, terminal: Terminal) -> None:
    said, _ = labels(info, commit.id, terminal)
    terminal.line(terminal.mark(f"commit {commit.id}"))
    rows = [
        *([("refs", said)] if said else []),
        ("parents", ", ".join(parent[:12] for parent in commit.parents) or "none: the first one"),
        ("branch", printable(commit.branch)),
        ("time", f"{stamp(commit.time)} UTC"),
        ("seen", f"{commit.tokens_seen:,} tokens"),
        ("state", f"{size(commit.state_bytes)}, {commit.state[:12]}"),
        ("model", commit.fingerprint),
    ]
    parts = [f"{name} {part[:12] if part else 'none'}" for name, part in (commit.parts or {}).items()]
    rows += [("", ", ".join(parts[at : at + 2])) for at in range(0, len(parts), 2)]
    if commit.meta:
        rows.append(("meta", compact(commit.meta)))
    for diff in changes:
        change = diff.total
        rows.append(
            (
                "moved",
                f"{change.norm_change:.3f} from {diff.a.short if diff.a else 'nothing'}, norm {change.norm_before:.2f} to "
                f"{change.norm_after:.2f}, cos {change.cosine:.3f}, rank {change.effective_rank:.1f}",
            )
        )
    for text in pairs(rows):
        terminal.line(text)
    if commit.message.strip():
        terminal.line()
        for text in printable(commit.message.strip()).split("\n"):
            terminal.line(f"    {text}".rstrip())
