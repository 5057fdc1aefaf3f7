"""The demo's page: numbered acts with a heading each, and prose that fits the terminal. It knows nothing of what is shown."""

from __future__ import annotations

import textwrap

from deltamem_rt._cli.terminal import Terminal


class Screen:
    """Counts the acts and wraps what is said about them."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.act = 0

    def heading(self, title: str, text: str) -> None:
        """The next act begins."""
        t = self.terminal
        t.progress_done()
        self.act += 1
        t.line()
        t.line(f"  {t.bold(f'{self.act}  {title}')}")
        self.note(text, indent=5)

    def prose(self, text: str) -> None:
        """A sentence or two, over as many lines as they need."""
        for line in self._wrapped(text, 4):
            self.terminal.line(line)

    def note(self, text: str, indent: int = 4) -> None:
        """The same in the background."""
        for line in self._wrapped(text, indent):
            self.terminal.line(self.terminal.dim(line))

    def verdict(self, good: bool, yes: str, no: str) -> str:
        """One of two words in its colour."""
        return self.terminal.good(yes) if good else self.terminal.bad(no)

    def _wrapped(self, text: str, indent: int) -> list[str]:
        return textwrap.wrap(text, self.terminal.width - 2, initial_indent=" " * indent, subsequent_indent=" " * indent)
