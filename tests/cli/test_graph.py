"""`log --graph`: the drawing, as text compared whole, and that it holds for any history."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_rt._cli.memories.graph import draw, in_order


def drawn(parents: dict[str, str]) -> str:
    """The drawing of commits with one-letter parents, newest first: {"b": "a", "a": ""}."""
    lines = []
    for one in draw({commit: list(of_one) for commit, of_one in parents.items()}):
        lines += [f"{one.before} {one.commit}", *one.below]
    return "\n".join(lines)


LINEAR = r"""
* c
* b
* a
"""

TWO_BRANCHES = r"""
* x
* y
| * z
|/
* a
"""

THREE_BRANCHES = r"""
* x
| * y
|/
| * z
|/
* a
"""

MERGED = r"""
* m
|\
| * y
| * x
* | b
|/
* a
"""

MERGED_TWICE = r"""
* n
|\
| * z
* | m
|\ \
| * | y
| |/
* | b
|/
* a
"""

MERGED_AT_ONCE_WITH_ITS_PARENT = r"""
* m
|\
| * b
|/
* a
"""

CRISS_CROSS = r"""
* m
|\
| | * n
| |/|
|/| |
| |/
* | x
| * y
|/
* a
"""

CRISS_CROSS_MERGED = r"""
* t
|\
| * n
| |\
* | | m
|\| |
| |/
|/|
| * x
* | y
|/
* a
"""

ACROSS_A_LANE = r"""
* p
| * q
| | * r
| |/
|/|
| | * t
| |/
| * s
|/
* a
"""

INTO_A_LANE_FAR_LEFT = r"""
* p
| * q
| | * r
| | | * m
| | |/|
| |/| |
|/| | |
| | | | * n
| | | |/
| | | * d
| | |/
| | * c
| |/
| * b
|/
* a
"""

OTHERS_MOVE_UP = r"""
* m
|\
* | x
| | * n
| | |\
| | | * z
| | |/
| |/|
| * | y
|/ /
| * p
|/
* a
"""

UNRELATED = r"""
* x
* r

* y
* s
"""

UNRELATED_BESIDE_ANOTHER = r"""
* m
|\
| * r
|
* x
| * y
|/
* s
"""

CUT_OFF = r"""
* m
|\
| * y
* | x
"""


@pytest.mark.parametrize(
    ("parents", "picture"),
    [
        ({"c": "b", "b": "a", "a": ""}, LINEAR),
        ({"x": "y", "z": "a", "y": "a", "a": ""}, TWO_BRANCHES),
        ({"x": "a", "y": "a", "z": "a", "a": ""}, THREE_BRANCHES),
        ({"m": "by", "b": "a", "y": "x", "x": "a", "a": ""}, MERGED),
        ({"n": "mz", "m": "by", "z": "a", "y": "a", "b": "a", "a": ""}, MERGED_TWICE),
        ({"m": "ab", "b": "a", "a": ""}, MERGED_AT_ONCE_WITH_ITS_PARENT),
        ({"m": "xy", "n": "yx", "x": "a", "y": "a", "a": ""}, CRISS_CROSS),
        ({"t": "mn", "m": "yx", "n": "xy", "x": "a", "y": "a", "a": ""}, CRISS_CROSS_MERGED),
        ({"p": "a", "q": "s", "r": "a", "t": "s", "s": "a", "a": ""}, ACROSS_A_LANE),
        (
            {"p": "a", "q": "b", "r": "c", "m": "da", "n": "d", "d": "c", "c": "b", "b": "a", "a": ""},
            INTO_A_LANE_FAR_LEFT,
        ),
        ({"m": "xy", "n": "pz", "x": "a", "y": "a", "p": "a", "z": "y", "a": ""}, OTHERS_MOVE_UP),
        ({"x": "r", "y": "s", "r": "", "s": ""}, UNRELATED),
        ({"m": "xr", "r": "", "x": "s", "y": "s", "s": ""}, UNRELATED_BESIDE_ANOTHER),
        ({"m": "xy", "x": "q", "y": "p"}, CUT_OFF),
    ],
)
def test_histories_are_drawn(parents, picture):
    assert f"\n{drawn(parents)}\n" == picture


def test_a_line_keeps_its_colour_until_it_meets_another():
    lines = [
        text
        for one in draw(
            {"m": ["b", "y"], "b": ["a"], "y": ["a"], "a": []},
            lambda hue, character: f"{hue}" if character != "*" else "*",
        )
        for text in (one.before, *one.below)
    ]
    assert lines == ["*", "01", "0 *", "* 1", "01", "*"]


@st.composite
def histories(draw_: st.DrawFn) -> dict[str, list[str]]:
    """Commits with up to two parents, children first; some parents are not there."""
    count = draw_(st.integers(1, 25))
    found: dict[str, list[str]] = {}
    for number in range(count):
        older = [str(other) for other in range(number + 1, count + 2)]
        found[str(number)] = draw_(st.lists(st.sampled_from(older), max_size=2, unique=True))
    return found


@given(histories())
@settings(max_examples=60)
def test_any_history_is_drawn_once_and_children_first(parents):
    order = in_order(parents)
    assert sorted(order) == sorted(parents)
    place = {commit: at for at, commit in enumerate(order)}
    for commit, of_one in parents.items():
        assert all(place[commit] < place[parent] for parent in of_one if parent in place)


@given(histories())
@settings(max_examples=60)
def test_lines_are_there_exactly_for_what_is_still_to_come(parents):
    """In a commit's row stands one line for each commit that was named as a parent and has not been drawn, and the row's own star."""
    pending: list[str] = []
    for one in draw(parents):
        if one.commit not in pending:
            pending.append(one.commit)
        assert one.before.count("*") == 1
        assert len(one.before.replace(" ", "")) == len(pending)
        assert one.width == 2 * len(pending)
        pending.remove(one.commit)
        pending += [parent for parent in dict.fromkeys(parents[one.commit]) if parent not in pending]
    assert sorted(pending) == sorted({parent for of_one in parents.values() for parent in of_one} - parents.keys())


@given(histories())
@settings(max_examples=60)
def test_each_line_goes_on_from_the_row_above(parents: dict[str, Sequence[str]]):
    """Under every character there is one that takes its line on: no line begins or breaks off between two commits."""
    rows = [text for one in draw(parents) for text in (one.before, *one.below)]
    for above, below in pairwise(rows):
        for column, character in enumerate(below):
            if character == "|":
                # A line that was straight, that came down to here, or a commit's own.
                assert any(
                    above[at : at + 1] in marks
                    for at, marks in ((column, ("|", "*")), (column - 1, ("\\",)), (column + 1, ("/",)))
                ), rows
            elif character in "/\\":
                from_column = column + (1 if character == "/" else -1)
                assert any(
                    above[at : at + 1] in marks
                    for at, marks in ((from_column, ("|", "*")), (from_column - 1, ("\\",)), (from_column + 1, ("/",)))
                ), rows
