"""`deltamem verify`: whether everything in a store is as it was written; with --repair, what is whole goes into a new file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltamem_rt._cli.arguments import Commands, UsageError
from deltamem_rt._cli.terminal import Terminal, count, explain, printable
from deltamem_rt._native import Store
from deltamem_rt._records import Damage, RepairReport, VerifyReport
from deltamem_rt.errors import DamagedError, StoreFormatError, UnavailableError

from . import forms
from .place import add_store_arguments, again, is_address, key_of, opened, users_words


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "verify",
        help="look for damage in a store, and save what is whole",
        description="Looks at everything: checksums, each commit's id and parents, each state, each branch, tag and move. It "
        "changes nothing. Exit code 1: something is damaged, each damage on its line.",
        epilog="--json: clean, memories, commits, states, moves, unreachable, damages (each: memory, place, what), "
        "repair (null, or: path, memories, commits, losses). The counts are null where the file does not open.",
    )
    parser.add_argument(
        "--repair",
        type=Path,
        metavar="OUT",
        help="if it is damaged, save what is whole into this new file, with the same key",
    )
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    out = options.repair
    if out is not None and (out.exists() or out.is_symlink()):
        raise FileExistsError(f"{out} is there already; --repair writes a new file: give another path")
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"there is no directory {out.parent}: make it, or correct --repair")
    report, damages = _look(options)
    repaired = None
    if damages and options.repair is not None:
        repaired = _save(options, opens=report is not None)
    if options.json:
        forms.print_json(_form(report, damages, options.repair, repaired))
    else:
        _show(report, damages, repaired, options, Terminal())
    return 1 if damages else 0


def _look(options: argparse.Namespace) -> tuple[VerifyReport | None, tuple[Damage, ...]]:
    """What the store's own inspection says; no report, and one damage, where a file is too broken for one."""
    try:
        with opened(options, strict=True) as store:
            report = store.verify()
            return report, report.damages
    except (DamagedError, StoreFormatError, UnavailableError) as error:
        # A server that does not answer is not damaged; a file that is no store may be anything, unless it is to be repaired.
        if is_address(options.store) or (isinstance(error, StoreFormatError) and options.repair is None):
            raise
        what = explain(error).removeprefix(f"{options.store} is damaged: ").partition("; run verify")[0]
        return None, (Damage(None, options.store, what),)


def _save(options: argparse.Namespace, opens: bool) -> RepairReport:
    """Saves what is whole. A file that opens is asked for what it holds; another one is searched, page by page."""
    key, out = key_of(options), options.repair
    if opens:
        try:
            with _whole_or_not_at_all(out), opened(options) as store:
                return store.repair(out, key=key)
        except (DamagedError, UnavailableError):
            if is_address(options.store):
                raise
    with _whole_or_not_at_all(out), users_words():
        return Store.salvage(options.store, out, key=key)


@contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[None]:
    """Takes away what a failed repair began."""
    try:
        yield
    except BaseException:
        for path in (out, out.with_name(f"{out.name}.journal")):
            path.unlink(missing_ok=True)
        raise


def _form(
    report: VerifyReport | None, damages: Sequence[Damage], out: Path | None, repaired: RepairReport | None
) -> dict[str, Any]:
    counts = ("memories", "commits", "states", "moves", "unreachable")
    return {
        "clean": not damages,
        **{name: report and getattr(report, name) for name in counts},
        "damages": forms.of_damages(damages),
        "repair": repaired
        and {
            "path": str(out),
            "memories": repaired.memories,
            "commits": repaired.commits,
            "losses": forms.of_damages(repaired.losses),
        },
    }


def _show(
    report: VerifyReport | None,
    damages: Sequence[Damage],
    repaired: RepairReport | None,
    options: argparse.Namespace,
    terminal: Terminal,
) -> None:
    for damage in damages:
        terminal.line(terminal.bad("damaged: ") + _of(damage))
    if report is not None:
        looked = ", ".join(
            [
                _memories(report.memories),
                count(report.commits, "commit"),
                count(report.states, "state"),
                count(report.moves, "move"),
            ]
        )
        if report.unreachable:
            looked += f"; {report.unreachable:,} of them named by nothing: deltamem gc removes those"
        terminal.line(f"looked at {looked}")
    if not damages:
        unused = "; nothing to repair" if options.repair else ""
        terminal.line(terminal.good(f"all is as it was written{unused}"))
        return
    if repaired is None:
        if report is not None:
            terminal.line(terminal.bad(f"{count(len(damages), 'damage')} found"))
        terminal.line(f"save what is whole: {again('verify', options, flags=['--repair', 'OUT'])}")
        return
    for loss in repaired.losses:
        terminal.line(terminal.mark("lost or changed: ") + _of(loss))
    terminal.line(
        f"saved {_memories(repaired.memories)}, {count(repaired.commits, 'commit')} into {printable(str(options.repair))}"
    )


def _of(damage: Damage) -> str:
    """A damage in one line, whole: it is to be searched for."""
    memory = "" if damage.memory is None else f"memory {printable(damage.memory)}: "
    return memory + printable(" ".join(f"{damage.place}: {damage.what}".split()))


def _memories(number: int) -> str:
    return f"{number:,} {'memory' if number == 1 else 'memories'}"
