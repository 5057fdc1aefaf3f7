"""Line plots as SVG, to be put into a page as they are: no script, no font, no file beside. It knows nothing of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 200, 16, 48
DODGE = 4.0
"""Pixels between the marks of two series at the same place of an even axis."""


@dataclass(frozen=True)
class Point:
    """A mark with its interval; `x` in units of the axis."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """A line with a name. `dashed` sets it apart from one of the same colour."""

    name: str
    colour: str
    points: Sequence[Point]
    dashed: bool = False


def line_plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_axis: str = "even",
    y_range: tuple[float, float] = (0.0, 1.0),
    y_axis: str = "linear",
) -> str:
    """An SVG element. x_axis: even (one step from each x to the next), linear, or log (x over 0). y_axis: linear, or log (y over 0), from
    and to a half of a power of ten around `y_range`."""
    series = [s for s in series if s.points]
    xs = sorted({p.x for s in series for p in s.points})
    if not xs:
        return ""
    place, ticks = _axis(xs, x_axis)
    height, levels = _heights(y_range, y_axis)
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + 14 + place(x) * (right - LEFT - 28)

    def up(y: float) -> float:
        return float(floor - height(y) * (floor - TOP))

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} by {escape(x_label)}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" fill="#333">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    ]
    for y in levels:
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{up(y):.1f}" y2="{up(y):.1f}" stroke="#e4e4e4"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{_short(y) if y_axis == "log" else f"{y:.4g}"}</text>'
        )
    for x in ticks:
        parts.append(f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{floor}" y2="{floor + 4}" stroke="#999"/>')
        parts.append(f'<text x="{across(x):.1f}" y="{floor + 18}" text-anchor="middle">{_short(x)}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}" stroke="#999"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + floor) / 2
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for number, s in reversed(tuple(enumerate(series))):  # the first lies on top
        shift = (number - (len(series) - 1) / 2) * DODGE if x_axis == "even" else 0.0
        marks = [(across(p.x) + shift, up(p.y), up(p.low), up(p.high)) for p in sorted(s.points, key=lambda p: p.x)]
        dash = ' stroke-dasharray="5 4"' if s.dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in marks)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{s.colour}" stroke-width="2"{dash}/>')
        for x, y, low, high in marks:
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{s.colour}" stroke-width="1.5"/>'
            )
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{"white" if s.dashed else s.colour}" stroke="{s.colour}"/>'
            )
        y = TOP + 10 + number * 20
        parts.append(
            f'<line x1="{right + 14}" x2="{right + 38}" y1="{y}" y2="{y}" stroke="{s.colour}" stroke-width="2"{dash}/>'
        )
        parts.append(f'<text x="{right + 44}" y="{y + 4}">{escape(s.name)}</text>')
    return "".join([*parts, "</svg>"])


def _heights(y_range: tuple[float, float], kind: str) -> tuple[Callable[[float], float], list[float]]:
    """From y to 0..1, and where lines stand."""
    if kind == "log":
        place, levels = _axis(sorted(y_range), "log")
        return (lambda y: min(max(place(y), 0.0), 1.0)), levels
    bottom, top = y_range
    return (lambda y: (min(max(y, bottom), top) - bottom) / (top - bottom)), [
        bottom + (top - bottom) * i / 5 for i in range(6)
    ]


def _axis(xs: list[float], kind: str) -> tuple[Callable[[float], float], list[float]]:
    """From x to 0..1, and where ticks stand."""
    if kind == "even":
        at = {x: i / max(1, len(xs) - 1) if len(xs) > 1 else 0.5 for i, x in enumerate(xs)}
        return at.__getitem__, xs
    low, high = xs[0], xs[-1]
    if kind == "log":
        # From and to a half of a power of ten.
        low, high = math.floor(math.log10(low) * 2) / 2, math.ceil(math.log10(high) * 2) / 2
        high += high == low
        ticks = [10.0**e for e in range(math.ceil(low), math.floor(high) + 1)]
        return (lambda x: (math.log10(x) - low) / (high - low)), ticks
    span = high - low or 1.0
    step = 10 ** math.floor(math.log10(span))
    step *= next(f for f in (0.2, 0.25, 0.5, 1.0, 2.0) if span / (step * f) <= 5.5)
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return (lambda x: (x - low) / span), ticks


def _short(x: float) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if x >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"
