"""`deltamem branch` and `deltamem tag`: list what names commits, make such names, take them away."""

from __future__ import annotations

import argparse

from deltamem_rt._cli.arguments import Commands, UsageError
from deltamem_rt._cli.terminal import Terminal, columns, printable
from deltamem_rt._native import Store
from deltamem_rt._records import Commit, MemoryInfo, stamp

from . import forms
from .place import add_name_argument, add_store_arguments, again, memory, opened
from .shown import brief, words


def add_parser(commands: Commands) -> None:
    """Adds the commands to the parser."""
    parser = commands.add_parser(
        "branch",
        help="a memory's branches: list, make, use, delete",
        description="Lists a memory's branches; with BRANCH it makes one, and HEAD stays where it is.",
        epilog="--json: name, head, branches, tags, as they are afterwards.",
    )
    what = _add_arguments(parser, "branch")
    what.add_argument("--use", metavar="BRANCH", help="make BRANCH the one that HEAD means")

    parser = commands.add_parser(
        "tag",
        help="a memory's tags: list, make, delete",
        description="Lists a memory's tags; with TAG it makes one.",
        epilog="--json: name, head, branches, tags, as they are afterwards.",
    )
    _add_arguments(parser, "tag")
    parser.set_defaults(use=None)


def _add_arguments(parser: argparse.ArgumentParser, kind: str) -> argparse._MutuallyExclusiveGroup:
    add_name_argument(parser)
    parser.add_argument("ref", nargs="?", metavar=kind.upper(), help=f"the {kind} to make")
    parser.add_argument("at", nargs="?", metavar="REF", help="make it at this commit (default: HEAD)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "-d", "--delete", metavar=kind.upper(), help=f"delete {kind.upper()}; its commits stay in reach of the reflog"
    )
    add_store_arguments(parser)
    parser.set_defaults(run=run, kind=kind)
    return what


def run(options: argparse.Namespace) -> int:
    """Runs either command."""
    flag, named = ("--use", options.use) if options.use is not None else ("--delete", options.delete)
    if named is not None and options.ref is not None:
        raise UsageError(
            f"{flag} {named} and {options.ref}: make one {options.kind} or {flag[2:]} one, not both at once"
        )
    changing = options.ref is not None or named is not None
    with opened(options, writing=changing) as store:
        before = memory(store, options.name)
        done = _change(store, before, options) if changing else ""
        info = store.info(options.name)
        refs = info.branches if options.kind == "branch" else info.tags
        commits = {} if changing else {at: store.show(options.name, at) for at in refs.values()}
    if options.json:
        forms.print_json(forms.of_refs(info))
    elif changing:
        Terminal().line(done)
    else:
        _list(info, commits, options.kind, Terminal())
    return 0


def _change(store: Store, before: MemoryInfo, options: argparse.Namespace) -> str:
    name, ref, kind = options.name, options.ref, options.kind
    if options.use is not None:
        store.switch(name, options.use)
        return f"HEAD is {brief(options.use)} {'already' if options.use == before.head else 'now'}"
    if options.delete is not None:
        gone = options.delete
        if kind == "branch" and gone == before.head:
            raise UsageError(f"{gone} is the branch that HEAD means: deltamem branch --use another one first")
        (store.delete_branch if kind == "branch" else store.delete_tag)(name, gone)
        at = (before.branches if kind == "branch" else before.tags).get(gone, "")[:12]
        return f"{kind} {brief(gone)} deleted; it was at {at}\nundo: {again(kind, options, name, gone, at)}"
    commit = (store.branch if kind == "branch" else store.tag)(name, ref, options.at or "HEAD")
    return f"{kind} {brief(ref)} at {commit.short}  {words(commit)}".rstrip()


def _list(info: MemoryInfo, commits: dict[str, Commit], kind: str, terminal: Terminal) -> None:
    refs = info.branches if kind == "branch" else info.tags
    if not refs:
        terminal.line(f"{brief(info.name)} has no {'branches' if kind == 'branch' else 'tags'}")
    width = max((columns(printable(ref)) for ref in refs), default=0)
    for ref, at in refs.items():
        shown = printable(ref)
        space = " " * (width - columns(shown))
        here = kind == "branch" and ref == info.head
        colour = terminal.mark if kind == "tag" else terminal.good if here else str
        commit = commits[at]
        star = "" if kind == "tag" else "* " if here else "  "
        used = len(star) + width + 2 + 12 + 2 + 19 + 2
        terminal.line(
            f"{star}{colour(shown)}{space}  {terminal.mark(commit.short)}  {terminal.dim(stamp(commit.time))}  "
            f"{terminal.fits(words(commit), used)}".rstrip()
        )
