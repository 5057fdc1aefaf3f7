"""What the demo shows of telling, asking and cost while it runs, for a person at a terminal. It measures nothing itself."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_rt._cli.terminal import duration, pad, shorten, shorten_middle, size
from deltamem_rt._native import Model

from .cast import Fact, Person
from .cost import MARKS, REPEATS, Cost
from .screen import Screen

NARROW = 100
"""Columns below which the bare model's replies are shown by their mark alone."""

SHOWN = 2
"""People whose answers are shown in full."""


@dataclass(frozen=True)
class Told:
    """A fact as it was told, and what the model said to it."""

    person: int
    message: str
    reply: str


@dataclass(frozen=True)
class Row:
    """One question: the truth, and the replies with memory and without."""

    person: int
    fact: Fact
    reply: str
    right: bool
    blank: str
    blank_right: bool

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in the JSON output."""
        return {
            "person": self.person,
            "relation": self.fact.relation,
            "told": self.fact.told,
            "question": self.fact.question,
            "truth": self.fact.value,
            "with_memory": self.reply,
            "with_memory_right": self.right,
            "without_memory": self.blank,
            "without_memory_right": self.blank_right,
        }


class Report:
    """The demo, told to a person."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.terminal = screen.terminal
        self.facts = 0
        self.people = 0
        self.count = 0

    def begin(self, model: Model, seed: int, loading_s: float, people: list[Person]) -> None:
        """What is about to be seen."""
        show, t = self.terminal.line, self.terminal
        self.people, self.facts = len(people), sum(len(person.facts) for person in people)
        name = model.manifest.get("name") or model.path.name
        weights = sum(file.stat().st_size for file in model.path.glob("model.onnx*"))
        show()
        show(f"  {t.bold('δ-mem: a frozen model that remembers')}    {name}, seed {seed}")
        self.screen.note(
            f"{size(weights)} of weights on {model.device}, loaded in {duration(loading_s)}. They never change; "
            f"a person's memory is {size(model.geometry.bytes)}.",
            indent=2,
        )
        self.screen.heading(
            f"{self.people} {'people tell' if self.people > 1 else 'person tells'} {len(people[0].facts)} facts each",
            "Every message is a turn of its own. When it ends, its context is gone; only the memory goes on.",
        )

    def told(self, turn: Told) -> None:
        """A fact was told."""
        self.count += 1
        if turn.person == 1:
            self.terminal.progress_done()
            self.terminal.line(f"    {self.terminal.accent('person 1')}  {turn.message}")
            self.terminal.line(self.terminal.dim(f"       model  {shorten(turn.reply, self.terminal.width - 16)}"))
        else:
            self.terminal.progress(f"person {turn.person}  {turn.message}   ({self.count} of {self.facts})")

    def all_told(self, seconds: float) -> None:
        """All facts were told."""
        self.terminal.progress_done()
        others = (
            f" The other {self.people - 1} told theirs in between, each to a memory of their own."
            if self.people > 1
            else ""
        )
        self.screen.prose(f"{self.facts} turns in {duration(seconds)}.{others}")

    def streaming(self, person: int, people: int, tokens: int) -> None:
        """Talk goes by."""
        self.terminal.progress(f"person {person} of {people}, {tokens:,} tokens")

    def streamed(self, source: str, opening: str, each: int, tokens: int, seconds: float) -> None:
        """Talk has gone by."""
        self.terminal.progress_done()
        self.screen.heading(
            "Other talk goes by",
            f"Each person hears {each:,} tokens of {source}, from another place in it.",
        )
        self.terminal.line(self.terminal.dim(f"    “{shorten(opening, self.terminal.width - 8)}”"))
        self.terminal.line(
            f"    {tokens:,} tokens in {duration(seconds)}, written into {self.people} {'memories' if self.people > 1 else 'memory'}."
        )

    def asking(self) -> None:
        """The questions begin."""
        t = self.terminal
        question, reply, blank = self._widths()
        self.screen.heading(
            "The questions", "Same model, same words; on the left with the memory, in the middle without one."
        )
        t.line(t.dim(f"{'':4} {'':{question}} {pad('with memory', reply + 2)} {pad('without', blank + 2)} truth"))

    def asked(self, row: Row) -> None:
        """A question was asked and answered, by both."""
        t = self.terminal
        widths = self._widths()
        if row.person > SHOWN:
            t.progress(f"person {row.person}  {row.fact.question}")
            return
        self.terminal.line(
            " ".join(
                (
                    t.accent(pad(str(row.person), 4).rjust(4)),
                    pad(row.fact.question, widths[0]),
                    self._mark(row.right),
                    pad(row.reply, widths[1]),
                    self._mark(row.blank_right),
                    t.dim(pad(row.blank if t.width >= NARROW else "", widths[2])),
                    t.bold(row.fact.value),
                )
            )
        )

    def all_asked(self, rows: list[Row], by_chance: float) -> None:
        """All questions were asked."""
        t = self.terminal
        t.progress_done()
        right, blank = sum(row.right for row in rows), sum(row.blank_right for row in rows)
        t.line()
        self._same_question(rows)
        t.line(
            f"    right of {len(rows)}:  with memory {t.bold(t.good(f'{right} ({right / len(rows):.1%})'))}   "
            f"without {t.bold(f'{blank} ({blank / len(rows):.1%})')}   guessing {by_chance:.1%}"
        )
        wrong = [row for row in rows if not row.right]
        for row in wrong[:3]:
            text = f"wrong: person {row.person}, {row.fact.question} {row.reply} (truth: {row.fact.value})"
            t.line(t.dim(f"    {shorten_middle(text, t.width - 6)}"))

    def _same_question(self, rows: list[Row]) -> None:
        """Two people who were asked for the same thing and told different values: whose memory is it?"""
        t = self.terminal
        right = [row for row in rows if row.right]
        for one, other in itertools.combinations(right, 2):
            if one.fact.relation == other.fact.relation and one.fact.value != other.fact.value:
                t.line(f"    {self.people} people, one model: asked for the same thing, each gets their own.")
                for row in (one, other):
                    text = f"person {row.person}: {row.fact.question}  {row.reply}"
                    t.line(t.dim(f"      {shorten_middle(text, t.width - 8)}"))
                t.line()
                return

    def progress(self, text: str) -> None:
        """A long step goes on."""
        self.terminal.progress(text)

    def priced(self, price: Cost) -> None:
        """The cost of a turn was measured."""
        t = self.terminal
        t.progress_done()
        self.screen.heading(
            "What a turn costs",
            "From the message to the first token of the reply, after so many tokens of history.",
        )
        marks = [mark for mark in MARKS if mark in price.reread_ms]
        t.line(t.dim("    " + pad("tokens of history", 20) + "".join(f"{mark:>13,}" for mark in marks)))
        with_memory = [
            duration(price.turn_ms[mark] / 1e3) if mark in price.turn_ms else "not reached" for mark in marks
        ]
        t.line("    " + pad("with the memory", 20) + t.good("".join(f"{text:>13}" for text in with_memory)))
        stars = {
            how: "*" * number for number, how in enumerate(dict.fromkeys(price.reread_how[mark] for mark in marks))
        }
        again = [duration(price.reread_ms[mark] / 1e3) + stars[price.reread_how[mark]] for mark in marks]
        t.line("    " + pad("reading it again", 20) + "".join(f"{text:>13}" for text in again))
        for how, star in stars.items():
            if star:
                t.line(t.dim(f"    {star} {how}"))
        self.screen.note(
            f"Measured: one session streamed {price.streamed_tokens:,} tokens ({price.tokens_per_second:,.0f} a second) and was timed at "
            f"each mark, median of {REPEATS} turns; reading it again is the same engine and model reading those tokens anew."
        )

    def end(self, memory_bytes: int, seconds: float, store: Path | None, name: str) -> None:
        """The demo is over. `store` is where its memories are kept, None when they are gone."""
        t = self.terminal
        t.line()
        t.line(f"  All of it in {memory_bytes:,} bytes a person and {duration(seconds)}.")
        t.line(f"  Talk to it yourself: {t.bold('deltamem chat')}")
        if store is None:
            t.line(f"  The store is deleted; {t.bold('deltamem demo --store memories.db')} keeps it.")
        else:
            t.line(f"  The memories are kept: {t.bold(f'deltamem log --store {shlex.quote(str(store))} {name}')}")
        t.line()

    def _widths(self) -> tuple[int, int, int]:
        """Columns for the question, the reply with memory, and the reply without; the truth takes what is left."""
        if self.terminal.width < NARROW:
            room = max(48, self.terminal.width - 29)
            return room * 54 // 100, room - room * 54 // 100, 5
        room = self.terminal.width - 26
        question, reply = room * 38 // 100, room * 34 // 100
        return question, reply, room - question - reply

    def _mark(self, right: bool) -> str:
        return self.terminal.good("✓") if right else self.terminal.bad("✗")
