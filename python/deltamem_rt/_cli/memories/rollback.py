"""`deltamem rollback`: a branch goes back to an older commit, and how to undo that."""

from __future__ import annotations

import argparse

from deltamem_rt._cli.arguments import Commands
from deltamem_rt._cli.terminal import Terminal
from deltamem_rt.errors import NotFoundError

from . import forms
from .place import add_name_argument, add_store_arguments, again, memory, opened
from .shown import brief, words


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "rollback",
        help="move a memory's branch back to an older commit",
        description="Moves a branch to the commit that REF means. The reflog keeps the move: a rollback to BRANCH@{1} takes "
        "it back.",
        epilog="--json: branch, old (the id it was at), commit (where it is, as in log).",
    )
    add_name_argument(parser)
    parser.add_argument("ref", metavar="REF", help="where to: HEAD~1, a tag, an id, main@{1}")
    parser.add_argument("--branch", metavar="BRANCH", help="the branch to move (default: HEAD)")
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with opened(options, writing=True) as store:
        info = memory(store, options.name)
        branch = options.branch or info.head
        if branch not in info.branches:
            raise NotFoundError(
                f"there is no branch {branch!r} in memory {info.name!r}; there are {', '.join(info.branches) or 'none'}"
            )
        old = info.branches[branch]
        commit = store.show(options.name, options.ref) if branch == info.head else None
        if commit is None or commit.id != old:
            commit = store.rollback(options.name, options.ref, branch=branch)
    if options.json:
        forms.print_json({"branch": branch, "old": old, "commit": forms.of_commit(commit)})
        return 0
    terminal = Terminal()
    if commit.id == old:
        terminal.line(f"{brief(branch)} is at {terminal.mark(commit.short)} already")
        return 0
    terminal.line(
        f"{brief(branch)} went from {terminal.mark(old[:12])} to {terminal.mark(commit.short)}  "
        f"{terminal.fits(words(commit), 43 + len(brief(branch)))}".rstrip()
    )
    other = ["--branch", branch] if options.branch else []
    terminal.line(terminal.dim(f"undo: {again('rollback', options, options.name, old[:12], flags=other)}"))
    return 0
