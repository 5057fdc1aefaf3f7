"""`deltamem demo`: people tell a frozen model facts, the context of each turn is dropped, other talk goes by, and it is asked.

Every turn is a commit to a store: looked at, branched and merged, rolled back, and there again when a process is killed. Nothing is
scripted: people, facts and phrasings are drawn from the bundle's demo.json by a seed. The same questions go to the same model without
its memory, and the price of a turn is measured while the history grows.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_rt._cli.arguments import (
    Commands,
    UsageError,
    add_model_arguments,
    load_model,
    needs_text,
    not_negative,
    positive,
)
from deltamem_rt._cli.terminal import Terminal
from deltamem_rt._default import default_bundle
from deltamem_rt._native import Model, Session, Snapshot, Store

from . import cost
from .aside import MAX_NEW_TOKENS
from .branches import WhatIf, what_if
from .cast import Fact, Person, chance, contradict, draw, draw_more, is_right, read_relations
from .commits import Committed, committed
from .history import show_branched, show_committed, show_survived, show_undone
from .killed import killed_as_json, reopen, work_and_die
from .report import Report, Row, Told
from .screen import Screen
from .talk import Talk, play, read_messages
from .undo import Undone, mislead_and_undo, undone_as_json

BRANCH_FACTS = 8
"""Facts that each person's two branches are told, half on each."""

KILLED_TOKENS = 256
"""Of the talk that the killed process reads, again and again, a commit a turn."""

KILLED = "person-1-killed"
"""The memory that it goes on with: a fork of the first person's."""

COST_BUDGET_S = 30.0


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="watch a frozen model remember",
        description="Facts are told in turns whose context is dropped, and every turn is a commit: branched, merged, rolled back, and "
        "still there when the process is killed. Other talk goes by; then the questions come, with memory, without, and the truth beside. "
        "Exit code 1: a rollback or the opened store did not hold the same memory bit for bit, or a commit was lost.",
        epilog="deltamem demo --seed 7 --store memories.db",
    )
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--seed", type=not_negative, metavar="N", help="repeat a run: who tells what, and what goes by")
    parser.add_argument(
        "--store",
        type=Path,
        metavar="PATH",
        help="the file to keep the memories in (default: one that is deleted in the end)",
    )
    parser.add_argument(
        "--stream",
        type=Path,
        metavar="FILE",
        help="the talk in between: text, or JSON (messages, or LoCoMo's form; default: our own)",
    )
    parser.add_argument(
        "--stream-tokens",
        type=not_negative,
        default=1_000,
        metavar="N",
        help="how much of it each person hears (default: %(default)s)",
    )
    parser.add_argument("--people", type=positive, default=10, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--facts",
        type=positive,
        default=8,
        metavar="N",
        help="facts that each person tells (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    began = time.perf_counter()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    model = load_model(options)
    needs_text(model)
    loading_s = time.perf_counter() - began
    stream = options.stream or _beside(model, "stream.txt")
    talk = Talk(model, read_messages(stream))
    rng = random.Random(seed)
    relations = read_relations(_beside(model, "demo.json"))
    people = draw(relations, rng, options.people, options.facts)
    starts = [rng.randrange(len(talk.messages)) for _ in people]
    # Drawn last: a seed's people and talk are what they were before there were stores.
    extra = [draw_more(relations, rng, person, BRANCH_FACTS) for person in people]
    false = [tuple(contradict(relations, rng, fact) for fact in person.facts) for person in people]
    names = [f"person-{person.number}" for person in people]
    # With --json the story goes nowhere.
    report = Report(Screen(Terminal(io.StringIO() if options.json else None)))

    with tempfile.TemporaryDirectory(prefix="deltamem-") as folder:
        place: Path = options.store or Path(folder) / "memories.db"
        with Store(place) as store:
            for name in (*names, KILLED):
                if name in store:
                    raise UsageError(f"{place} holds a memory {name!r} already: give --store a new file")
            report.begin(model, seed, loading_s, people)
            past = _remember(model, store, names, people, extra, false, report)
            store.fork(names[0], KILLED)
        turns = talk.turns(KILLED_TOKENS)
        death = work_and_die(model, place, KILLED, turns, options.threads)
        opening = time.perf_counter()
        with Store(place) as store:
            opening_s = time.perf_counter() - opening
            states = dict(zip([*names, KILLED], [*past.states, past.states[0]], strict=True))
            again = reopen(model, store, opening_s, states, KILLED, death, turns, people[0].facts[0].question)
            show_survived(report.screen, death, again)
            sessions = [model.session(name, store=store, autocommit=True) for name in names]
            streamed = _stream(sessions, talk, starts, options.stream_tokens, stream.name, report)
            rows = _ask(model, people, sessions, report)
            for session in sessions:
                session.close()
    by_chance = chance(people)
    report.all_asked(rows, by_chance)
    price = cost.measure(model, talk, people[0].facts[0].question, COST_BUDGET_S, report.progress)
    report.priced(price)
    seconds = time.perf_counter() - began
    report.end(model.geometry.bytes, seconds, options.store, names[0])

    if options.json:
        result: dict[str, Any] = {
            "bundle": str(model.manifest.get("name") or model.path.name),
            "fingerprint": model.fingerprint,
            "seed": seed,
            "people": len(people),
            "facts": len(rows),
            "recall_with_memory": sum(row.right for row in rows) / len(rows),
            "recall_without_memory": sum(row.blank_right for row in rows) / len(rows),
            "recall_by_chance": by_chance,
            "memory_bytes": model.geometry.bytes,
            **past.as_json(),
            **killed_as_json(death, again),
            "turn_ms_by_history": _by_mark(price.turn_ms),
            "turn_ms_spread_by_history": _by_mark(price.turn_spread_ms),
            "reread_ms_by_history": _by_mark(price.reread_ms),
            "reread_how_by_history": _by_mark(price.reread_how),
            "stream": stream.name,
            "stream_tokens_per_person": options.stream_tokens,
            "streamed_tokens": streamed + again.tokens,
            "history_tokens": price.streamed_tokens,
            "history_tokens_per_second": round(price.tokens_per_second),
            "store": str(options.store) if options.store else None,
            "seconds": round(seconds, 2),
            "questions": [row.as_json() for row in rows],
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0 if again.sound and all(one.same_bytes for one in past.undone) else 1


@dataclass(frozen=True)
class Past:
    """What happened before the kill, and each person's memory as it was then."""

    committed: Committed
    branched: WhatIf
    undone: list[Undone]
    states: list[Snapshot]

    def as_json(self) -> dict[str, Any]:
        """Its part of the JSON output."""
        return {**self.committed.as_json(), **self.branched.as_json(), **undone_as_json(self.undone)}


def _remember(
    model: Model,
    store: Store,
    names: list[str],
    people: list[Person],
    extra: list[tuple[Fact, ...]],
    false: list[tuple[Fact, ...]],
    report: Report,
) -> Past:
    """Everybody tells their facts, a commit a turn; then what a store does with commits."""
    sessions = [model.session(name, store=store, autocommit=True) for name in names]
    _tell(people, sessions, report)
    log = committed(store, names, people[0])
    show_committed(report.screen, log)
    branched = what_if(model, store, names, people, extra, report.progress)
    show_branched(report.screen, branched)
    undone = mislead_and_undo(model, sessions, people, false, report.progress)
    show_undone(report.screen, undone, log)
    states = [session.snapshot() for session in sessions]
    for session in sessions:
        session.close()
    return Past(log, branched, undone, states)


def _tell(people: list[Person], sessions: list[Session], report: Report) -> None:
    """Everybody tells their facts, taking turns, all sessions open at once: what crosses over would show in the answers."""
    began = time.perf_counter()
    for index in range(len(people[0].facts)):
        for person, session in zip(people, sessions, strict=True):
            message = person.facts[index].told
            reply = session.chat(message, max_new_tokens=MAX_NEW_TOKENS).read()
            report.told(Told(person.number, message, reply))
    report.all_told(time.perf_counter() - began)


def _stream(sessions: list[Session], talk: Talk, starts: list[int], tokens: int, source: str, report: Report) -> int:
    """Everybody hears `tokens` tokens of talk, from places of their own in it. Returns how many that were in all."""
    began = time.perf_counter()
    streamed = 0
    for number, (session, start) in enumerate(zip(sessions, starts, strict=True), 1):
        turns = talk.turns(tokens, start)
        play(session, turns)
        streamed += sum(map(len, turns))
        report.streaming(number, len(sessions), streamed)
    report.streamed(source, talk.messages[0], tokens, streamed, time.perf_counter() - began)
    return streamed


def _ask(model: Model, people: list[Person], sessions: list[Session], report: Report) -> list[Row]:
    """Everybody is asked for all they told; the same model is asked the same with an empty memory."""
    rows = []
    report.asking()
    with model.session() as without:
        for person, session in zip(people, sessions, strict=True):
            for fact in person.facts:
                reply = session.chat(fact.question, max_new_tokens=MAX_NEW_TOKENS).read().strip()
                without.reset()
                blank = without.chat(fact.question, max_new_tokens=MAX_NEW_TOKENS).read().strip()
                rows.append(Row(person.number, fact, reply, is_right(reply, fact), blank, is_right(blank, fact)))
                report.asked(rows[-1])
    return rows


def _beside(model: Model, name: str) -> Path:
    """A file of the bundle, or the embedded default's where the bundle has none of its own."""
    own = model.path / name
    if own.is_file():
        return own
    embedded = default_bundle() / name
    if embedded.is_file():
        return embedded
    raise UsageError(f"neither {model.path} nor the embedded default has a {name}, which the demo draws from")


def _by_mark(values: dict[int, Any]) -> dict[str, Any]:
    return {str(mark): round(value, 3) if isinstance(value, float) else value for mark, value in values.items()}
