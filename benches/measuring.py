"""How the benches measure: opponents take turns in one run, figures are medians, a ratio is the median over the rounds' own ratios with its
range. Tables and plots come out as Markdown and SVG. It knows no model and no opponent.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAUSE = 0.1
"""Seconds between two opponents' turns: threads that spin when their work is done have stopped by then (genai's go on for 35 ms)."""

Figures = dict[str, float]
"""What one turn of an opponent gives: seconds or a rate, by the name of what was measured."""

Rounds = dict[str, dict[str, list[float]]]
"""Of each opponent and figure, one value a round."""


def interleaved(
    opponents: Mapping[str, Callable[[], Figures]], rounds: int, warm_ups: int = 1, pause: float = PAUSE
) -> Rounds:
    """Has each opponent work once a round, in an order that is turned by one from round to round."""
    names = list(opponents)
    for _ in range(warm_ups):
        for work in opponents.values():
            work()
    found: Rounds = {name: {} for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            for figure, value in opponents[name]().items():
                found[name].setdefault(figure, []).append(value)
    return found


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and their range."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, top: Sequence[float], bottom: Sequence[float]) -> Ratio:
        """Round by round: top over bottom."""
        found = sorted(a / b for a, b in zip(top, bottom, strict=True))
        return cls(statistics.median(found), found[0], found[-1])

    def __str__(self) -> str:
        places = 3 if self.value < 2 else 2 if self.value < 20 else 1 if self.value < 200 else 0
        return f"**{self.value:,.{places}f}x** ({self.low:,.{places}f} to {self.high:,.{places}f})"


def quantity(values: Sequence[float] | float, unit: str = "s") -> str:
    """A median with its unit; seconds in the unit that suits them."""
    value = values if isinstance(values, int | float) else statistics.median(values)
    if unit == "s":
        for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= size or name == "µs":
                value, unit = value / size, name
                break
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{places}f} {unit}"


class Table:
    """A Markdown table that is printed row by row, as the figures come."""

    def __init__(self, *columns: str) -> None:
        self._columns = len(columns)
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def row(self, *cells: object) -> None:
        if len(cells) != self._columns:
            raise ValueError(f"a row has {len(cells)} cells, expected {self._columns}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def reached(value: float, goal: float, most: bool = False) -> str:
    """A goal with what became of it; `most`: the value must not be above it."""
    word = "reached" if (value <= goal if most else value >= goal) else "**missed**"
    return f"{'≤' if most else '≥'} {goal:g}x: {word}"


def save_plot(name: str, svg: str, says: str) -> None:
    """Writes a plot where `run.py` wants it (BENCH_PLOTS) and shows it in the page; printed alone, a bench leaves it out."""
    folder = os.environ.get("BENCH_PLOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.svg").write_text(svg + "\n", encoding="utf-8")
        print(f"\n![{says}](benchmarks/{name}.svg)", flush=True)
