"""`deltamem demo`: people tell a frozen model facts, the context of each turn is dropped, other talk goes by, and it is asked.

Nothing is scripted: people, facts and phrasings are drawn from the bundle's demo.json by a seed. The same questions go to the same model
without its memory; a new process takes one memory over in the middle; and the price of a turn is measured while the history grows.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import secrets
import time
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
from deltamem_rt._native import Model, Session

from . import cost
from .cast import Person, chance, draw, is_right, read_relations
from .report import Report, Row, Told
from .restart import play, restart
from .talk import Talk, read_messages

MAX_NEW_TOKENS = 32
RESTART_TOKENS = 256
COST_BUDGET_S = 30.0


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="watch a frozen model remember",
        description="Facts are told in turns whose context is dropped; other talk goes by; then the questions come, with memory, without, "
        "and the truth beside. Exit code 1: a restarted process did not hold the same memory.",
        epilog="deltamem demo --seed 7 --stream conversation.json",
    )
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--seed", type=not_negative, metavar="N", help="repeat a run: who tells what, and what goes by")
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
    people = draw(read_relations(_beside(model, "demo.json")), rng, options.people, options.facts)
    starts = [rng.randrange(len(talk.messages)) for _ in people]
    # With --json the story goes nowhere.
    report = Report(Terminal(io.StringIO() if options.json else None))
    report.begin(model, seed, loading_s, people)

    sessions = [model.session() for _ in people]
    _tell(people, sessions, report)
    first = people[0].facts[0]
    again = restart(model, sessions[0], talk.turns(RESTART_TOKENS), first.question, MAX_NEW_TOKENS, options.threads)
    report.restarted(again)
    streamed = _stream(sessions, talk, starts, options.stream_tokens, stream.name, report)
    rows = _ask(model, people, sessions, report)
    by_chance = chance(people)
    report.all_asked(rows, by_chance)
    memory_bytes = sessions[0].memory.nbytes
    for session in sessions:
        session.close()
    price = cost.measure(model, talk, first.question, COST_BUDGET_S, report.progress)
    report.priced(price)
    seconds = time.perf_counter() - began
    report.end(memory_bytes, seconds)

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
            "memory_bytes": memory_bytes,
            "turn_ms_by_history": _by_mark(price.turn_ms),
            "turn_ms_spread_by_history": _by_mark(price.turn_spread_ms),
            "reread_ms_by_history": _by_mark(price.reread_ms),
            "reread_how_by_history": _by_mark(price.reread_how),
            "stream": stream.name,
            "stream_tokens_per_person": options.stream_tokens,
            "streamed_tokens": streamed + again.tokens,
            "history_tokens": price.streamed_tokens,
            "history_tokens_per_second": round(price.tokens_per_second),
            "restored_bit_for_bit": again.same_bytes,
            "seconds": round(seconds, 2),
            "questions": [row.as_json() for row in rows],
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0 if again.same_bytes else 1


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
