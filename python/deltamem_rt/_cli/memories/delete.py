"""`deltamem delete`: a memory with all its commits, for good, after a question."""

from __future__ import annotations

import argparse
import sys

from deltamem_rt._cli.arguments import Commands, UsageError
from deltamem_rt._cli.terminal import Terminal, count
from deltamem_rt._records import MemoryInfo

from . import forms
from .place import add_name_argument, add_store_arguments, again, is_address, memory, opened
from .shown import brief


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "delete",
        help="delete a memory for good",
        description="Deletes a memory with all its commits, branches and tags. That cannot be undone: export it first. In a "
        "store with a key its key is destroyed; in another one its bytes leave the file with deltamem gc.",
        epilog="--json: deleted (as in names), key_destroyed.",
    )
    add_name_argument(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    asks = sys.stdin.isatty() and sys.stdout.isatty() and not options.json
    if not options.yes and not asks:
        raise UsageError("delete cannot be undone, and there is no terminal to ask on: say --yes if it is meant")
    terminal = Terminal()
    if not options.yes:
        # Asked while nothing is held open: a person may take minutes.
        with opened(options) as store:
            found = memory(store, options.name)
        if not _sure(found, terminal):
            terminal.line("nothing was deleted")
            return 1
    with opened(options, writing=True) as store:
        info = memory(store, options.name)
        encrypted = store.encrypted
        store.delete(options.name)
    if options.json:
        forms.print_json({"deleted": forms.of_memory(info), "key_destroyed": encrypted})
        return 0
    terminal.line(f"{brief(info.name)} deleted, with {count(info.commits, 'commit')}")
    if encrypted:
        terminal.line("its key is destroyed: no copy of the store's bytes can be read any more")
    elif not is_address(options.store):
        terminal.line(terminal.dim(f"its bytes leave the file with: {again('gc', options)}"))
    return 0


def _sure(info: MemoryInfo, terminal: Terminal) -> bool:
    """Whether the name is typed."""
    terminal.line(
        f"{brief(info.name, 512)}: {count(info.commits, 'commit')}, the last change {info.changed:%Y-%m-%d %H:%M} UTC"
    )
    try:
        return input(terminal.prompt("its name again, to delete it for good: ")) == info.name
    except EOFError:
        terminal.line()
        return False
