"""What a turn costs when the history has grown: with a memory that goes on, and by reading the history again.

Both sides are timed on the same model with the same message, from the call to the first token of the reply. The memory's session has
streamed the whole history; the other reads it anew. What does not fit into the model's context is read in pieces of the context's
length and their times are summed, which is less than one long context would take (attention grows with the length): a lower bound.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deltamem_rt._native import Model, Session

from .talk import Talk

MARKS = (0, 1_000, 10_000, 100_000)
REPEATS = 21
"""Turns timed at each mark; the figure is their median."""

REREADS = 3
"""The same for the re-reading, where a single one may take seconds."""


@dataclass
class Cost:
    """Milliseconds by tokens of history, and for the re-reading how each was come by."""

    turn_ms: dict[int, float] = field(default_factory=dict)
    turn_spread_ms: dict[int, tuple[float, float]] = field(default_factory=dict)
    reread_ms: dict[int, float] = field(default_factory=dict)
    reread_how: dict[int, str] = field(default_factory=dict)
    streamed_tokens: int = 0
    tokens_per_second: float = 0.0


def measure(model: Model, talk: Talk, message: str, budget_s: float, progress: Callable[[str], None]) -> Cost:
    """Times a turn at each mark. `budget_s` bounds each side; marks of the memory's side that it does not reach are left out."""
    cost = Cost()
    turns = talk.turns(MARKS[-1])
    prompt = model.encode(message)
    with model.session() as session:
        _turn(session, [], prompt)  # the first run of a session pays for its buffers
        session.reset()
        _with_memory(session, turns, prompt, budget_s, cost, progress)
        session.reset()
        room = model.context_length - len(prompt) - 1
        _by_rereading(session, [token for turn in turns for token in turn], prompt, room, budget_s, cost, progress)
    return cost


def _with_memory(
    session: Session,
    turns: list[list[int]],
    prompt: list[int],
    budget_s: float,
    cost: Cost,
    progress: Callable[[str], None],
) -> None:
    streaming = 0.0
    coming = iter(turns)
    for mark in MARKS:
        while cost.streamed_tokens < mark and streaming < budget_s:
            turn = next(coming)
            begin = time.perf_counter()
            session.feed(turn)
            session.end_turn()
            streaming += time.perf_counter() - begin
            cost.streamed_tokens += len(turn)
            progress(f"streaming the history: {cost.streamed_tokens:,} of {MARKS[-1]:,} tokens")
        if cost.streamed_tokens < mark:
            break
        times = [_turn(session, [], prompt) for _ in range(REPEATS)]
        cost.turn_ms[mark] = statistics.median(times) * 1e3
        cost.turn_spread_ms[mark] = (min(times) * 1e3, max(times) * 1e3)
    cost.tokens_per_second = cost.streamed_tokens / streaming if streaming else 0.0


def _by_rereading(
    session: Session,
    history: list[int],
    prompt: list[int],
    room: int,
    budget_s: float,
    cost: Cost,
    progress: Callable[[str], None],
) -> None:
    for mark in (mark for mark in MARKS if mark <= room):
        times = [_turn(session, history[:mark], prompt) for _ in range(REPEATS if mark == 0 else REREADS)]
        cost.reread_ms[mark] = statistics.median(times) * 1e3
        cost.reread_how[mark] = "measured in one context"
    spent, read = 0.0, 0
    for mark in (mark for mark in MARKS if mark > room):
        while read < mark and spent < budget_s:
            piece = history[read : min(read + room, mark)]
            begin = time.perf_counter()
            session.feed(piece, write=False)
            session.end_turn()
            spent += time.perf_counter() - begin
            read += len(piece)
            progress(f"reading the history again: {read:,} of {MARKS[-1]:,} tokens")
        if read >= mark:
            seconds = spent
            cost.reread_how[mark] = f"measured in pieces of {room:,} tokens, summed: a lower bound"
        else:
            seconds = spent * mark / read
            cost.reread_how[mark] = f"extrapolated from {read:,} tokens, read in pieces of {room:,}: a lower bound"
        cost.reread_ms[mark] = seconds * 1e3 + cost.reread_ms[0]


def _turn(session: Session, history: list[int], prompt: list[int]) -> float:
    """Seconds of one whole turn: the history (if any) and the message are read, the first token of the reply is made."""
    begin = time.perf_counter()
    if history:
        session.feed(history, write=False)
    session.generate(prompt, max_new_tokens=1, write=not history).read()
    session.end_turn()
    return time.perf_counter() - begin
