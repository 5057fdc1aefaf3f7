"""How what a store says looks to a person: a commit in a line, its labels, tables. All of it is foreign text and is made harmless here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from deltamem_rt._cli.terminal import Terminal, columns, printable, shorten
from deltamem_rt._records import Commit, MemoryInfo, stamp

Style = Callable[[str], str]


def words(commit: Commit) -> str:
    """What a commit says of itself: its message's first line, or else its meta."""
    first = commit.message.strip().partition("\n")[0]
    return printable(first) or (compact(commit.meta) if commit.meta else "")


def compact(meta: object) -> str:
    """A meta in one line."""
    return printable(json.dumps(meta, ensure_ascii=False))


def labels(info: MemoryInfo, commit: str, terminal: Terminal) -> tuple[str, int]:
    """`(HEAD -> main, what-if, tag: v1)` in colour for what stands on a commit, and how many columns it takes; nothing, and 0, where
    nothing does."""
    found: list[tuple[str, str]] = []
    for branch, at in info.branches.items():
        if at == commit:
            name = printable(branch)
            if branch == info.head:
                found.insert(0, (f"HEAD -> {name}", terminal.accent("HEAD -> ") + terminal.good(name)))
            else:
                found.append((name, terminal.good(name)))
    found += [(f"tag: {printable(tag)}",) * 2 for tag, at in info.tags.items() if at == commit]
    if not found:
        return "", 0
    coloured = terminal.mark(", ").join(text if "tag: " not in plain else terminal.mark(text) for plain, text in found)
    return terminal.mark("(") + coloured + terminal.mark(")"), 2 + columns(", ".join(plain for plain, _ in found))


def line(commit: Commit, info: MemoryInfo, terminal: Terminal, used: int = 0) -> str:
    """A commit in a line, of which `used` columns are taken: id, time, labels, words."""
    said, width = labels(info, commit.id, terminal)
    text = f"{terminal.mark(commit.short)}  {terminal.dim(stamp(commit.time))}  "
    used += 12 + 2 + 19 + 2
    if said:
        text += said + " "
        used += width + 1
    text += terminal.fits(words(commit), used)
    return text.rstrip()


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], terminal: Terminal, styles: Sequence[Style | None] = ()
) -> Iterable[str]:
    """Lines of a table: numbers to the right, the last column to the left and cut to the terminal's width."""
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(columns(row[at]) for row in cells) for at in range(len(head) - 1)]
    used = sum(widths) + 2 * len(widths)
    for number, row in enumerate(cells):
        text = [" " * (width - columns(cell)) + cell for cell, width in zip(row, widths, strict=False)]
        text.append(terminal.fits(row[-1], used))
        if number == 0:
            yield terminal.bold("  ".join(text).rstrip())
        else:
            yield "  ".join(
                style(cell) if style and cell else cell
                for cell, style in zip(text, [*styles, *[None] * (len(text) - len(styles))], strict=True)
            ).rstrip()


def brief(text: str, width: int = 40) -> str:
    """A name inside a sentence."""
    return shorten(text, width)
