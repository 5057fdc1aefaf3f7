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
    add_name_argument(parser)
    parser.add_argument("ref", nargs="?", metavar="BRANCH", help="the branch to make, use or delete")
    parser.add_argument("at", nargs="?", metavar="REF", help="make it at this commit (default: HEAD)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--use", action="store_true", help="make BRANCH the one that HEAD means")
    what.add_argument("-d", "--delete", action="store_true", help="delete BRANCH; the reflog still knows where it was")
    add_store_arguments(parser)
    parser.set_defaults(run=run, kind="branch")

    parser = commands.add_parser(
        "tag",
        help="a memory's tags: list, make, delete",
        description="Lists a memory's tags; with TAG it makes one.",
        epilog="--json: name, head, branches, tags, as they are afterwards.",
    )
    add_name_argument(parser)
    parser.add_argument("ref", nargs="?", metavar="TAG", help="the tag to make or delete")
    parser.add_argument("at", nargs="?", metavar="REF", help="make it at this commit (default: HEAD)")
    parser.add_argument("-d", "--delete", action="store_true", help="delete TAG; the reflog still knows where it was")
    add_store_arguments(parser)
    parser.set_defaults(run=run, kind="tag", use=False)


def run(options: argparse.Namespace) -> int:
    """Runs either command."""
    if options.ref is None and (options.use or options.delete):
        raise UsageError(f"{'--use' if options.use else '--delete'} wants a {options.kind}'s name")
    if options.at is not None and (options.use or options.delete):
        raise UsageError(f"{options.at} is one name too many: {'--use' if options.use else '--delete'} takes one")
    with opened(options, writing=options.ref is not None) as store:
        before = memory(store, options.name)
        done = "" if options.ref is None else _change(store, before, options)
        info = store.info(options.name)
        commits = {
            at: store.show(options.name, at)
            for at in (info.branches if options.kind == "branch" else info.tags).values()
        }
    if options.json:
        forms.print_json(forms.of_refs(info))
        return 0
    terminal = Terminal()
    if options.ref is not None:
        terminal.line(done)
    else:
        _list(info, commits, options.kind, terminal)
    return 0


def _change(store: Store, before: MemoryInfo, options: argparse.Namespace) -> str:
    name, ref, kind = options.name, options.ref, options.kind
    if options.use:
        store.switch(name, ref)
        return f"HEAD is {brief(ref)} now" if ref != before.head else f"HEAD is {brief(ref)} already"
    if options.delete:
        (store.delete_branch if kind == "branch" else store.delete_tag)(name, ref)
        at = (before.branches if kind == "branch" else before.tags).get(ref, "")
        return f"{kind} {brief(ref)} deleted; it was at {at[:12]}\nundo: {again(kind, options, name, ref, at[:12])}"
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
