"""Where tasks write what happened, case by case, and what becomes of it: rows of figures with intervals and costs. It knows no model."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from typing import Any

from deltamem_export.evaluation.contest import Answer
from deltamem_export.evaluation.figures import Figure

Row = dict[str, Any]
"""{"case", "x", "against", "figures": {name: {value, low, high, n}}, "cost": {tokens_read, seconds, kept_bytes}}, all JSON."""


@dataclass
class _Cell:
    x: float | None
    marks: dict[str, dict[Hashable, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    answers: list[Answer] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    more: dict[str, Figure] = field(default_factory=dict)


class Sheet:
    """The rows of one task."""

    def __init__(self, seed: int = 0) -> None:
        self.notes: list[str] = []
        self.failures: list[str] = []
        self._seed = seed
        self._cells: dict[tuple[str, str], _Cell] = {}

    def mark(self, case: str, x: float | None, who: str, figure: str, episode: Hashable, value: float) -> None:
        """One graded case of a figure, 0 to 1. Cases of one episode share a state and are resampled together."""
        self._cell(case, x, who).marks[figure][episode].append(float(value))

    def spent(self, case: str, x: float | None, who: str, answer: Answer, kept: int) -> None:
        """What a question took."""
        cell = self._cell(case, x, who)
        cell.answers.append(answer)
        cell.kept.append(kept)

    def figure(self, case: str, x: float | None, who: str, name: str, figure: Figure) -> None:
        """A figure that was computed elsewhere."""
        self._cell(case, x, who).more[name] = figure

    def sums(self, case: str, who: str, figure: str) -> dict[Hashable, float]:
        """What each episode's cases of a figure add up to."""
        cell = self._cells.get((case, who))
        return {} if cell is None else {episode: sum(values) for episode, values in cell.marks[figure].items()}

    def rows(self) -> list[Row]:
        """All rows, in the order they were begun."""
        return [self._row(case, who, cell) for (case, who), cell in self._cells.items()]

    def line(self, case: str) -> str:
        """The first figure of each row of a case, for a person who waits."""
        shown: list[str] = []
        for row in (self._row(c, who, cell) for (c, who), cell in self._cells.items() if c == case):
            name, figure = next(iter(row["figures"].items()))
            shown.append(
                f"{row['against']} {figure['value']:.3f}" + (f" ({name}, n {figure['n']})" if not shown else "")
            )
        return f"{case}: {', '.join(shown)}"

    def _cell(self, case: str, x: float | None, who: str) -> _Cell:
        return self._cells.setdefault((case, who), _Cell(x))

    def _row(self, case: str, who: str, cell: _Cell) -> Row:
        figures = {
            name: asdict(Figure.resampled([sum(v) for v in of.values()], [len(v) for v in of.values()], self._seed))
            for name, of in cell.marks.items()
            if of
        }
        row: Row = {"case": case, "x": cell.x, "against": who, "figures": figures, "cost": {}}
        figures.update({name: asdict(figure) for name, figure in cell.more.items()})
        if cell.answers:
            row["cost"] = {
                "tokens_read": round(statistics.fmean(a.tokens_read for a in cell.answers), 1),
                "seconds": round(statistics.median(a.seconds for a in cell.answers), 5),
                "kept_bytes": round(statistics.fmean(cell.kept)),
            }
        return row
