"""`deltamem chat`: a conversation in the terminal with one session, whose memory can be looked at, saved, loaded and forgotten.

Each message is a turn: its context is dropped when the reply ends, and only the memory goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltamem_rt._native import Model, Session, Snapshot
from deltamem_rt.errors import DeltaMemError

from .arguments import (
    Commands,
    UsageError,
    add_model_arguments,
    load_model,
    needs_text,
    not_negative,
    positive,
)
from .terminal import Terminal, count, explain, pairs, printable, size

_HELP = [
    ("/memory", "what the memory is: bytes, norm by layer, tokens seen"),
    ("/forget", "empty the memory"),
    ("/save FILE", "write the memory to a file"),
    ("/load FILE", "go on with a memory from a file"),
    ("/help", "this list"),
    ("/quit", "leave; Ctrl-D does too. Ctrl-C stops a reply"),
]


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model that remembers",
        description="Talks to a model in the terminal. Every message is a turn of its own: its context is dropped, the memory stays.",
        epilog="In the conversation: " + "; ".join(f"{name}: {what}" for name, what in _HELP),
    )
    add_model_arguments(parser)
    parser.add_argument("--load", type=Path, metavar="FILE", help="begin with a memory that /save wrote")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=256,
        metavar="N",
        help="longest reply (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--top-k", type=not_negative, default=0, metavar="K", help="0 is all (default: %(default)s)")
    parser.add_argument("--seed", type=not_negative, metavar="N", help="repeats a sampled conversation")
    parser.set_defaults(run=run)


@dataclass
class Conversation:
    """One session, how it samples, and where it prints."""

    session: Session
    terminal: Terminal
    sampling: argparse.Namespace

    def answer(self, line: str) -> bool:
        """Deals with one line; False when it was the last."""
        if line.startswith("/"):
            return self.command(line)
        self.reply(line)
        return True

    def reply(self, message: str) -> None:
        """Streams one reply. Ctrl-C stops it; what was read until then stays in the memory, as after any turn."""
        options = self.sampling
        try:
            for piece in self.session.chat(
                message,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                seed=options.seed,
            ):
                self.terminal.piece(printable(piece))
            self.terminal.line()
        except KeyboardInterrupt:
            with undisturbed():
                self.session.end_turn()
                self.terminal.line(self.terminal.dim(" [stopped]"))

    def command(self, line: str) -> bool:
        """Deals with one /command; False when it was /quit."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            for text in pairs(_HELP):
                self.terminal.line(text)
        elif name == "/memory":
            self.show_memory()
        elif name == "/forget":
            self.session.reset()
            self.note("the memory is empty")
        elif name == "/save":
            path = _file(rest, "/save")
            data = self.session.snapshot().to_bytes()
            write_whole(path, data)
            self.note(f"{size(len(data))} written to {path}")
        elif name == "/load":
            path = _file(rest, "/load")
            load(self.session, path)
            self.note(f"{path} loaded: {self.session.tokens_seen:,} tokens seen")
        else:
            raise UsageError(f"there is no {name}; /help lists the commands")
        return True

    def show_memory(self) -> None:
        """Prints what the memory is."""
        memory = self.session.memory
        layers, heads, rank, _ = memory.shape
        rows = [
            (
                "memory",
                f"{memory.nbytes:,} bytes: {count(layers, 'layer')} x {count(heads, 'head')} x {rank} x {rank}, float32",
            ),
            ("tokens seen", f"{self.session.tokens_seen:,} in {count(self.session.turns, 'turn')}"),
        ]
        rows += [(f"norm, layer {layer}", f"{np.linalg.norm(memory[layer]):.4g}") for layer in range(layers)]
        for text in pairs(rows):
            self.terminal.line(text)

    def note(self, text: str) -> None:
        """Prints a line that is ours, not the model's."""
        self.terminal.line(self.terminal.dim(f"[{text}]"))


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    terminal = Terminal()
    model = load_model(options)
    needs_text(model)
    with model.session() as session:
        if options.load is not None:
            load(session, options.load)
        talk = Conversation(session, terminal, options)
        talk.note(
            f"{_name(model)}: {size(session.memory.nbytes)} of memory. Each message is a turn of its own. /help lists the commands"
        )
        interactive = sys.stdin.isatty()
        with contextlib.suppress(ImportError):
            __import__("readline")  # line editing and history, where Python has it
        while True:
            try:
                line = input(terminal.prompt("> ") if interactive else "").strip()
            except EOFError:
                if interactive:
                    terminal.line()
                return 0
            except KeyboardInterrupt:
                terminal.line()
                talk.note("Ctrl-D or /quit leaves")
                continue
            try:
                if line and not talk.answer(line):
                    return 0
            except (UsageError, DeltaMemError, ValueError, OSError) as error:
                if session.position:
                    session.end_turn()
                terminal.line(terminal.bad(f"error: {explain(error)}"))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While it lasts, Ctrl-C does nothing: a second press must not break off what the first one began."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def load(session: Session, path: Path) -> None:
    """Restores a session from a snapshot file."""
    session.restore(Snapshot.from_bytes(path.read_bytes()))


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, durably: beside it first, then renamed over it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _file(rest: str, command: str) -> Path:
    try:
        names = shlex.split(rest)
    except ValueError:
        names = [rest.strip()]
    if len(names) != 1:
        raise UsageError(f"{command} takes one file name (in quotes where it has spaces)")
    return Path(names[0]).expanduser()


def _name(model: Model) -> str:
    return str(model.manifest.get("name") or model.path.name)
