"""History drawn in characters, as Git draws it: `*` a commit, `|` a line to a commit further down, `|\\` a merge's second parent, `|/` two
lines that meet. It knows ids and who came from whom, nothing of stores and terminals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Parents = Mapping[str, Sequence[str]]
"""Commit's id -> its parents' ids, the branch's own first. A parent that is no key is history that is not drawn: its line stays open."""

Paint = Callable[[int, str], str]
"""Colours a character with the colour of that number."""


def in_order(parents: Parents) -> list[str]:
    """The commits in an order in which each line of history stays together: children before parents, a merge's second parent before its
    first. Of tips, the one that comes first in `parents` comes first.
    """
    children = Counter(parent for of_one in parents.values() for parent in of_one if parent in parents)
    ready = [commit for commit in reversed(list(parents)) if not children[commit]]
    found = []
    while ready:
        commit = ready.pop()
        found.append(commit)
        for parent in parents[commit]:
            if parent in parents:
                children[parent] -= 1
                if not children[parent]:
                    ready.append(parent)
    return found


@dataclass(frozen=True, slots=True)
class Drawn:
    """What stands before a commit's words, and the lines under it that lead to the next commit."""

    commit: str
    before: str
    width: int
    below: tuple[str, ...]


def draw(parents: Parents, paint: Paint = lambda _, character: character) -> Iterator[Drawn]:
    """Draws the commits in the order of `in_order`."""
    drawing = _Drawing(paint)
    order = in_order(parents)
    for commit in order:
        before, width = drawing.commit(commit)
        below = tuple(drawing.leave(parents[commit]))
        yield Drawn(commit, before, width, below if commit != order[-1] else tuple(line for line in below if line))


@dataclass(frozen=True, slots=True)
class _Lane:
    to: str | None
    hue: int


@dataclass(slots=True)
class _Drawing:
    """Lanes from left to right, each with the commit that it leads to. Lane n stands in column 2n; what moves stands between two lanes."""

    paint: Paint
    lanes: list[_Lane] = field(default_factory=list)
    at: int = 0
    hues: int = 0

    def commit(self, commit: str) -> tuple[str, int]:
        """The row of a commit, up to its words, and the row's width."""
        self.at = next((n for n, lane in enumerate(self.lanes) if lane.to == commit), len(self.lanes))
        if self.at == len(self.lanes):
            self.lanes.append(self._lane(commit))
        row = self._straight()
        row[2 * self.at] = "*"
        return self._text(row), 2 * len(self.lanes)

    def leave(self, parents: Sequence[str]) -> Iterator[str]:
        """The rows under the commit, with its lane on the way to its parents."""
        first, *others = parents or (None,)
        self.lanes[self.at] = _Lane(first, self.lanes[self.at].hue)
        for other in others:
            to = next((n for n, lane in enumerate(self.lanes) if lane.to == other and n != self.at), None)
            if to is None:
                yield self._fan_out(other)
            else:
                yield from self._reach(to)
        yield from self._close(self.at)

    def _fan_out(self, parent: str | None) -> str:
        """A new lane right of the commit's; those behind it move over."""
        self.lanes.insert(self.at + 1, self._lane(parent))
        row: dict[int, str | tuple[str, int]] = {2 * n: "|" for n in range(self.at + 1)}
        row |= {2 * n - 1: ("\\", self.lanes[n].hue) for n in range(self.at + 1, len(self.lanes))}
        return self._text(row)

    def _reach(self, to: int) -> Iterator[str]:
        """A line from the commit to a lane that is there, between the lanes on its way."""
        hue = self.lanes[to].hue
        step, gaps = ("\\", range(self.at, to)) if to > self.at else ("/", range(self.at - 1, to - 1, -1))
        for gap in gaps:
            yield self._text(self._straight() | {2 * gap + 1: (step, hue)})

    def _close(self, own: int) -> Iterator[str]:
        """Ends the commit's lane where it leads nowhere or to where another one leads; those behind it move up."""
        lane = self.lanes[own]
        twins = [n for n, other in enumerate(self.lanes) if other.to == lane.to]
        if lane.to is None:
            to, gone = own, own
        elif len(twins) == 2:
            to, gone = twins
        else:
            return
        hue = self.lanes[gone].hue
        moving = {2 * n - 1: ("/", self.lanes[n].hue) for n in range(gone + 1, len(self.lanes))}
        joins = to != gone
        del self.lanes[gone]
        row: dict[int, str | tuple[str, int]] = {2 * n: "|" for n in range(gone)}
        if joins:
            row[2 * gone - 1] = ("/", hue)
        # A first commit's row is left alone, or what is drawn under it would look like its parent.
        yield self._text(row | moving)
        # Further to the left, it crosses the lanes between.
        for gap in range(gone - 2, to - 1, -1):
            yield self._text(self._straight() | {2 * gap + 1: ("/", hue)})

    def _lane(self, to: str | None) -> _Lane:
        self.hues += 1
        return _Lane(to, self.hues - 1)

    def _straight(self) -> dict[int, str | tuple[str, int]]:
        return {2 * n: "|" for n in range(len(self.lanes))}

    def _text(self, row: Mapping[int, str | tuple[str, int]]) -> str:
        """A row of characters by column; one without a colour of its own takes its lane's."""
        text = ""
        for column in range(max(row, default=-1) + 1):
            match row.get(column):
                case None:
                    text += " "
                case "*":
                    text += "*"
                case (character, hue):
                    text += self.paint(hue, character)
                case character:
                    text += self.paint(self.lanes[column // 2].hue, str(character))
        return text
