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
REPEATS = 7


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
    _with_memory(model, turns, message, budget_s, cost, progress)
    _by_rereading(model, turns, message, budget_s, cost, progress)
    return cost


def _with_memory(
    model: Model,
    turns: list[list[int]],
    message: str,
    budget_s: float,
    cost: Cost,
    progress: Callable[[str], None],
) -> None:
    streaming = 0.0
    with model.session() as session:
        _first_token(session, message)  # the first run of a process pays for what is made once
        session.reset()
        at = 0
        for mark in MARKS:
            while cost.streamed_tokens < mark and streaming < budget_s:
                begin = time.perf_counter()
                session.feed(turns[at])
                session.end_turn()
                streaming += time.perf_counter() - begin
                cost.streamed_tokens += len(turns[at])
                at += 1
                progress(f"streaming the history: {cost.streamed_tokens:,} of {MARKS[-1]:,} tokens")
            if cost.streamed_tokens < mark:
                break
            times = [_first_token(session, message) for _ in range(REPEATS)]
            cost.turn_ms[mark] = statistics.median(times) * 1e3
            cost.turn_spread_ms[mark] = (min(times) * 1e3, max(times) * 1e3)
    cost.tokens_per_second = cost.streamed_tokens / streaming if streaming else 0.0


def _first_token(session: Session, message: str) -> float:
    begin = time.perf_counter()
    session.chat(message, max_new_tokens=1).read()
    return time.perf_counter() - begin


def _by_rereading(
    model: Model,
    turns: list[list[int]],
    message: str,
    budget_s: float,
    cost: Cost,
    progress: Callable[[str], None],
) -> None:
    history = [token for turn in turns for token in turn]
    prompt = model.encode(message)
    room = model.context_length - len(prompt) - 1
    with model.session() as session:
        for mark in MARKS:
            if mark <= room:
                times = []
                for _ in range(3):
                    session.reset()
                    times.append(_read_again(session, history[:mark], prompt))
                cost.reread_ms[mark] = statistics.median(times) * 1e3
                cost.reread_how[mark] = "measured in one context"
        spent, read = 0.0, 0
        for mark in (mark for mark in MARKS if mark > room):
            while read < mark and spent < budget_s:
                piece = history[read : min(read + room, mark)]
                session.reset()
                begin = time.perf_counter()
                session.feed(piece, write=False)
                session.end_turn()
                spent += time.perf_counter() - begin
                read += len(piece)
                progress(f"reading the history again: {read:,} of {MARKS[-1]:,} tokens")
            answer = cost.reread_ms[0] / 1e3
            if read >= mark:
                cost.reread_ms[mark] = (spent + answer) * 1e3
                cost.reread_how[mark] = f"measured in pieces of {room:,} tokens, summed: a lower bound"
            else:
                cost.reread_ms[mark] = (spent * mark / read + answer) * 1e3
                cost.reread_how[mark] = f"extrapolated from {read:,} tokens read in pieces of {room:,}: a lower bound"
        session.reset()


def _read_again(session: Session, history: list[int], prompt: list[int]) -> float:
    begin = time.perf_counter()
    if history:
        session.feed(history, write=False)
    session.generate(prompt, max_new_tokens=1, write=False).read()
    elapsed = time.perf_counter() - begin
    session.end_turn()
    return elapsed
