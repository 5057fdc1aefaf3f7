"""`deltamem export` and `deltamem import`: a memory as one file, complete with branches and reflog, from store to store."""

from __future__ import annotations

import argparse
from pathlib import Path

from deltamem_rt._cli.arguments import Commands, UsageError
from deltamem_rt._cli.terminal import Terminal, count, printable, size
from deltamem_rt._native import Store
from deltamem_rt._records import MemoryInfo

from . import forms
from .place import add_name_argument, add_store_arguments, is_address, key_of, memory, opened, users_words
from .shown import brief


def add_parser(commands: Commands) -> None:
    """Adds the commands to the parser."""
    parser = commands.add_parser(
        "export",
        help="write a memory to a file",
        description="Writes a memory to a file: complete, with a checksum, not encrypted, the same from every kind of store. "
        "It appears whole or not at all.",
        epilog="--json: path, file_bytes, memory (as in names).",
    )
    add_name_argument(parser)
    parser.add_argument("path", type=Path, metavar="FILE", help="a file that is not there yet")
    add_store_arguments(parser)
    parser.set_defaults(run=export)

    parser = commands.add_parser(
        "import",
        help="read a memory from a file that export wrote",
        description="Reads a memory from a file that export wrote. A store's file that is not there yet is made.",
        epilog="--json: path, made_store, memory (as in names).",
    )
    parser.add_argument("path", type=Path, metavar="FILE", help="what export wrote")
    parser.add_argument("--name", metavar="NAME", help="under another name than its own")
    add_store_arguments(parser)
    parser.set_defaults(run=import_)


def export(options: argparse.Namespace) -> int:
    """Runs `deltamem export`."""
    with opened(options) as store:
        info = memory(store, options.name)
        store.export(options.name, options.path)
    written = options.path.stat().st_size
    if options.json:
        forms.print_json({"path": str(options.path), "file_bytes": written, "memory": forms.of_memory(info)})
    else:
        Terminal().line(f"{_what(info)}, written to {printable(str(options.path))} ({size(written)}, not encrypted)")
    return 0


def import_(options: argparse.Namespace) -> int:
    """Runs `deltamem import`."""
    if not options.path.is_file():
        raise FileNotFoundError(f"there is no file {options.path}; expected what deltamem export wrote")
    place = Path(options.store)
    made = not is_address(options.store) and not place.exists()
    if made and not place.absolute().parent.is_dir():
        raise UsageError(f"there is no directory {place.parent}: make it, or correct --store")
    if made:
        # A file that cannot be read is found before a store is made for it.
        with users_words(), Store.in_memory() as nowhere:
            nowhere.import_(options.path, options.name)
    with users_words(), Store(options.store, key=key_of(options)) if made else opened(options, writing=True) as store:
        name = store.import_(options.path, options.name)
        info = store.info(name)
    if options.json:
        forms.print_json({"path": str(options.path), "made_store": made, "memory": forms.of_memory(info)})
    else:
        where = " into a new store" if made else ""
        Terminal().line(f"{_what(info)}, read from {printable(str(options.path))}{where}")
    return 0


def _what(info: MemoryInfo) -> str:
    branches = f"{len(info.branches):,} branch{'' if len(info.branches) == 1 else 'es'}"
    return f"{brief(info.name)}: {count(info.commits, 'commit')}, {branches}, {count(len(info.tags), 'tag')}"
