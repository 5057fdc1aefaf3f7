"""A memory over a million tokens: facts told at the start, changed and asked for along the way, and at marks whether it still takes in new
ones as well as a fresh one does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

import deltamem_rt as dm
from deltamem_export.evaluation.contest import Person
from deltamem_export.evaluation.figures import Figure
from deltamem_export.evaluation.languages import Fact
from deltamem_export.evaluation.sheet import Sheet
from deltamem_export.evaluation.tasks import HELD, STRANGERS
from deltamem_export.evaluation.work import Work, about

SHARES = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0)
"""The marks, as shares of the whole stream."""
CHANGES = 2
"""Own facts that change on the way to each mark."""
NEW = "new facts, in a copy of the memory"
OWN = "own facts, told at the start or changed since"


def drift(work: Work) -> Sheet:
    """Streams of talk in which people hold eight facts; two of these change on the way to every mark.

    At a mark the own facts are asked for, and copies of the memory are told eight facts more and asked for them. The copies tell the same
    at every mark, so that a mark and a fresh memory are compared case by case.
    """
    sheet = Sheet(work.seed)
    marks = sorted({round(work.size.drift_tokens * share) for share in SHARES})
    copies = -(-work.size.cases // (HELD * work.size.drift_streams))
    sheet.notes.append(
        f"talk: {work.talk_source}; {work.size.drift_streams} streams, {copies} copies at every mark of each"
    )
    with work.contest.model.session() as copy:
        for stream in range(work.size.drift_streams):
            for i in range(copies):
                copy.reset()
                _new_facts(work, sheet, "new facts, fresh memory", None, copy, stream, i)
        for stream in range(work.size.drift_streams):
            rng = work.rng("drift", stream)
            facts = _held(work, stream)
            old: dict[str, set[str]] = {fact.relation.name: set() for fact in facts}
            talk, heard = work.talk_for(rng), 0
            with work.contest.person() as person:
                work.tell(person, rng, facts)
                for mark in marks:
                    if mark:
                        half = (mark - heard) // 2
                        heard += work.hear(person, half, talk)
                        _change(work, person, rng.sample(range(HELD), CHANGES), facts, old, rng)
                        heard += work.hear(person, mark - heard, talk)
                    _own_facts(work, sheet, f"{OWN}: {mark:,} tokens", mark, person, stream, facts, old)
                    state = person.session.snapshot()
                    for i in range(copies):
                        copy.restore(state)
                        _new_facts(work, sheet, f"{NEW}: {mark:,} tokens", mark, copy, stream, i)
                    size = float(np.linalg.norm(state.memory))
                    sheet.mark(f"size of the state: {mark:,} tokens", mark, "memory", "Frobenius norm", stream, size)
                    work.say(
                        f"stream {stream + 1} of {work.size.drift_streams}, {sheet.line(f'{NEW}: {mark:,} tokens')}"
                    )
    fresh = sheet.sums("new facts, fresh memory", "memory", "recall")
    for mark in marks:
        case = f"{NEW}: {mark:,} tokens"
        now = sheet.sums(case, "memory", "recall")
        ratio = Figure.paired([now[e] for e in fresh], list(fresh.values()), len(fresh) * HELD, work.seed)
        sheet.figure(case, mark, "memory", "against a fresh memory", ratio)
    return sheet


def _change(
    work: Work, person: Person, which: Sequence[int], facts: list[Fact], old: dict[str, set[str]], rng: random.Random
) -> None:
    for i in which:
        old[facts[i].relation.name].add(facts[i].value)
        facts[i] = work.language.changed(rng, facts[i])
        old[facts[i].relation.name].discard(facts[i].value)
        work.tell(person, rng, [facts[i]], change=True)


def _own_facts(
    work: Work,
    sheet: Sheet,
    case: str,
    mark: int,
    person: Person,
    stream: int,
    facts: list[Fact],
    old: dict[str, set[str]],
) -> None:
    """All opponents; the state moves on between marks only, so an episode is a stream."""
    rng = work.rng("own facts", case, stream)
    for fact in facts:
        question = work.language.ask(rng, fact.relation)
        for who in work.contest.opponents:
            answer = work.contest.ask(who, person, question, about(fact))
            sheet.mark(case, mark, who, "recall", stream, work.language.right(fact, answer.text))
            sheet.spent(case, mark, who, answer, work.contest.kept_bytes(who, person))
            said = any(work.language.right(Fact(fact.relation, v), answer.text) for v in old[fact.relation.name])
            sheet.mark(case, mark, who, "an old value said", stream, said)


def _new_facts(work: Work, sheet: Sheet, case: str, mark: int | None, copy: dm.Session, stream: int, i: int) -> None:
    rng, language, new = work.rng("new facts", stream, i), work.language, work.contest.max_new_tokens
    own = {fact.relation.name for fact in _held(work, stream)}
    drawn = language.draw(rng, HELD * 2 + STRANGERS)
    facts, strangers = drawn[:HELD], [f for f in drawn[HELD:] if f.relation.name not in own][:STRANGERS]
    for fact in facts:
        copy.chat(language.tell(rng, fact), max_new_tokens=new).read()
    for fact in facts:
        reply = copy.chat(language.ask(rng, fact.relation), max_new_tokens=new, write=False).read()
        sheet.mark(case, mark, "memory", "recall", (stream, i), language.right(fact, reply))
    for fact in strangers:
        reply = copy.chat(language.ask(rng, fact.relation), max_new_tokens=new, write=False).read()
        good = language.invents_nothing(fact.relation, reply)
        sheet.mark(case, mark, "memory", "never told: nothing invented", (stream, i), good)


def _held(work: Work, stream: int) -> list[Fact]:
    """What the person of a stream tells at the start."""
    return work.language.draw(work.rng("drift, own facts", stream), HELD)
