"""`deltamem blame`: which commits the answer to a question comes from. It runs a model, in a session that writes nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from deltamem_rt._changes import Blame
from deltamem_rt._cli.arguments import Commands, needs_text, not_negative, positive
from deltamem_rt._cli.terminal import Terminal, count
from deltamem_rt._default import default_bundle
from deltamem_rt._native import Model
from deltamem_rt._records import MemoryInfo

from . import forms
from .place import add_name_argument, add_store_arguments, memory, opened
from .shown import line

_BAR = 12


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "blame",
        help="which commits the answer to a question comes from",
        description="Asks the memory a question, aside and without writing, and splits what was read for it among the "
        "commits: shares that add up to 1, negative where a commit works against what is read.",
        epilog="--json: question, reply, attribution, tokens, energy, layers, merges, rest, shares (each: share, layers, "
        "commit as in log).",
    )
    add_name_argument(parser)
    parser.add_argument("question", metavar="QUESTION", help="what the fact answers: 'What is my dog called?'")
    parser.add_argument("--ref", metavar="REF", help="ask the memory as it was at REF (default: HEAD)")
    parser.add_argument(
        "--model", type=Path, metavar="BUNDLE", help="the bundle that wrote it (default: the embedded tiny-assistant)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="threads for the model (default: the machine's)")
    parser.add_argument(
        "-n", type=positive, default=1000, metavar="N", help="commits to go back (default: %(default)s)"
    )
    parser.add_argument(
        "--top", type=not_negative, default=10, metavar="N", help="shares to print; 0 is all (default: %(default)s)"
    )
    parser.add_argument(
        "--attribution",
        choices=("difference", "surviving"),
        default="difference",
        help="what each commit moved, or what is left of what it wrote (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=not_negative, default=64, metavar="N", help="longest reply (default: %(default)s)"
    )
    add_store_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with opened(options) as store:
        info = memory(store, options.name)
        at = store.show(options.name, options.ref or "HEAD")
        model = Model.load(options.model or default_bundle(), threads=options.threads)
        needs_text(model)
        session = model.session(options.name, store=store, branch=info.head)
        try:
            if options.ref is not None:
                session.checkout(at.id)
            found = session.blame(
                options.question, options.n, attribution=options.attribution, max_new_tokens=options.max_new_tokens
            )
        finally:
            session.close(discard=True)
    if options.json:
        forms.print_json({"question": options.question, **forms.of_blame(found)})
        return 0
    _show(found, info, options.top, Terminal())
    return 0


def _show(blame: Blame, info: MemoryInfo, top: int, terminal: Terminal) -> None:
    """The reply, and the largest shares with a bar for each."""
    if blame.reply is not None:
        terminal.line(terminal.bold(terminal.fits(blame.reply)))
    shares = sorted(blame.shares, key=lambda share: -abs(share.share))
    printed, others = (shares[:top], shares[top:]) if top else (shares, [])
    for share in printed:
        bar = ("#" * max(0, min(_BAR, round(_BAR * share.share)))).ljust(_BAR)
        colour = terminal.dim if abs(share.share) < 0.0005 else terminal.good if share.share > 0 else terminal.bad
        before = f"{share.share:+.3f}  {bar}  "
        after = line(share.commit, info, terminal, len(before)) if share.commit else "not committed"
        terminal.line(f"{colour(before)}{after}")
    if others:
        terminal.line(f"{sum(share.share for share in others):+.3f}  {'':{_BAR}}  {count(len(others), 'other commit')}")
    if abs(blame.rest) > 1e-9:
        terminal.line(f"{blame.rest:+.3f}  {'':{_BAR}}  older commits (-n goes further back)")
