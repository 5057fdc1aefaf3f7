"""What a terminal can show: colours where they are wanted, widths, tables, numbers for people. It knows nothing of models."""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO


class Terminal:
    """Writes to one stream, in colour only when it is a terminal and `NO_COLOR` is not set."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stdout
        self.live = self.stream.isatty()
        self.colour = self.live and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        reconfigure = getattr(self.stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")

    def line(self, text: str = "") -> None:
        """Writes one line."""
        print(text, file=self.stream, flush=True)

    def piece(self, text: str) -> None:
        """Writes a part of a line, at once."""
        print(text, end="", file=self.stream, flush=True)

    def progress(self, text: str) -> None:
        """Replaces the current line; writes nothing where the output is no terminal."""
        if self.live:
            print(f"\r\x1b[K    {shorten(text, self.width - 6)}", end="", file=self.stream, flush=True)

    def progress_done(self) -> None:
        """Clears the line that `progress` wrote."""
        if self.live:
            print("\r\x1b[K", end="", file=self.stream, flush=True)

    def bold(self, text: str) -> str:
        """The text, emphasised."""
        return self._sgr("1", text)

    def dim(self, text: str) -> str:
        """The text, in the background."""
        return self._sgr("2", text)

    def good(self, text: str) -> str:
        """The text, in green."""
        return self._sgr("32", text)

    def bad(self, text: str) -> str:
        """The text, in red."""
        return self._sgr("31", text)

    def accent(self, text: str) -> str:
        """The text, in cyan."""
        return self._sgr("36", text)

    def mark(self, text: str) -> str:
        """The text, in yellow."""
        return self._sgr("33", text)

    def hue(self, number: int, text: str) -> str:
        """The text, in one of six colours; numbers that follow each other differ."""
        return self._sgr(str(31 + number % 6), text)

    def fits(self, text: str, used: int = 0) -> str:
        """One line of the text, cut to what is left of the terminal's width; whole where a program reads it."""
        return shorten(text, max(self.width - used, 1) if self.live else sys.maxsize)

    def prompt(self, text: str) -> str:
        """A prompt for `input`, in colour; readline is told which of its characters take no room."""
        return re.sub(r"\x1b\[\d+m", "\x01\\g<0>\x02", self.accent(text))

    def _sgr(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text


def printable(text: str) -> str:
    """What a model said, without the control characters that would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def columns(text: str) -> int:
    """How many columns a terminal needs for the text: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, width: int) -> str:
    """One line of at most `width` columns, with an ellipsis where it was cut."""
    text = printable(" ".join(text.split()))
    if columns(text) <= width:
        return text
    while text and columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def shorten_middle(text: str, width: int) -> str:
    """One line of at most `width` columns, cut in its middle: a sentence often ends with what matters."""
    text = printable(" ".join(text.split()))
    if columns(text) <= width:
        return text
    head = shorten(text, width * 2 // 5)
    tail = text
    while tail and columns(tail) > width - columns(head):
        tail = tail[1:]
    return head + tail


def pad(text: str, width: int) -> str:
    """The text cut in its middle, or filled with spaces, to exactly `width` columns."""
    text = shorten_middle(text, width)
    return text + " " * (width - columns(text))


def pairs(rows: Sequence[tuple[str, str]], indent: str = "  ") -> list[str]:
    """Lines of a name and a value, the values under each other."""
    width = max((columns(name) for name, _ in rows), default=0)
    return [f"{indent}{pad(name, width)}  {value}" for name, value in rows]


def duration(seconds: float) -> str:
    """A time as a person says it: 0.42 ms, 12 ms, 3.1 s, 2 min 5 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    if seconds < 0.0995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def size(count: int) -> str:
    """A number of bytes as a person says it: 512 bytes, 32 KiB, 3.4 MiB."""
    if count < 1024:
        return f"{count} bytes"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024 or unit == "GiB":
            break
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def count(number: int, what: str) -> str:
    """A number and what it counts: 1 turn, 2,000 turns."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def explain(error: BaseException) -> str:
    """An error in one line that steers no terminal; a file's error as words and its name, without the number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return printable(f"{error.filename}: {error.strerror}")
    return printable(" ".join(str(error).split())) or type(error).__name__
