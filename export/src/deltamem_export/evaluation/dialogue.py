"""Tasks over text that people wrote: answers from recorded conversations, how well the next session is predicted with the memory of the
earlier ones, and whether a memory that holds facts does harm to text that needs none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from deltamem_export.evaluation import grading
from deltamem_export.evaluation.contest import READERS, Past, Person
from deltamem_export.evaluation.conversations import Dialogue, Question
from deltamem_export.evaluation.figures import perplexity_ratio
from deltamem_export.evaluation.languages import LISTENED
from deltamem_export.evaluation.prompts import message
from deltamem_export.evaluation.sheet import Sheet
from deltamem_export.evaluation.work import Work

HARM_PEOPLE = 16
HARM_TEXTS = 16
"""Texts that each of them reads."""


def conversation(work: Work, dialogues: Sequence[Dialogue]) -> Sheet:
    """Sessions of a conversation are read one after the other, then questions about all of them come.

    From the second session on each is read twice: with the memory of those before, and with an empty one.
    """
    sheet = Sheet(work.seed)
    with_memory: list[float] = []
    without: list[float] = []
    tokens: list[int] = []
    for number, dialogue in enumerate(dialogues):
        with work.contest.person() as person, work.contest.person() as fresh:
            for index, session in enumerate(dialogue.sessions):
                fresh.session.reset()
                ours = theirs = 0.0
                count = 0
                for user, reply in session:
                    messages = [message("user", user)]
                    if reply != LISTENED:
                        messages.append(message("assistant", reply))
                    one, n = work.contest.likelihood(person.session, messages)
                    if index:
                        two, _ = work.contest.likelihood(fresh.session, messages)
                        ours, theirs, count = ours + one, theirs + two, count + n
                    work.contest.remember(person, Past(user, reply))
                if count:
                    with_memory.append(ours)
                    without.append(theirs)
                    tokens.append(count)
            _questions(work, sheet, number, dialogue, len(dialogues), person)
        work.say(f"{dialogue.name}: {sheet.line('all questions')}")
    if tokens:
        case = "next session, with the memory of the earlier ones over without"
        ratio = perplexity_ratio(with_memory, without, tokens, work.seed)
        sheet.figure(case, None, "memory", "perplexity ratio", ratio)
    return sheet


def _questions(work: Work, sheet: Sheet, number: int, dialogue: Dialogue, of: int, person: Person) -> None:
    wanted = -(-work.size.cases // of)
    questions = list(dialogue.questions)
    if len(questions) > wanted:
        questions = work.rng("conversation", dialogue.name).sample(questions, wanted)
    for who in work.contest.opponents:
        asked = -(-work.size.reader_cases // of) if who in READERS else len(questions)
        for question in questions[:asked]:
            answer = work.contest.ask(who, person, work.language.question(question.text))
            cases = [question.kind] if question.wrong else [question.kind, "all questions"]
            for case in cases:
                for name, value in _grades(question, answer.text).items():
                    sheet.mark(case, None, who, name, number, value)
                sheet.spent(case, None, who, answer, work.contest.kept_bytes(who, person))


def _grades(question: Question, reply: str) -> dict[str, float]:
    if question.wrong:
        return {"the wrong answer not given": not grading.contains(reply, [question.wrong])}
    return {
        "token F1": grading.token_f1(reply, question.answers),
        "answer in the reply": grading.contains(reply, question.answers),
        "exact": grading.equals(reply, question.answers),
    }


def harm(work: Work) -> Sheet:
    """Perplexity of talk that needs no memory, read with 8 or 32 facts held, over the same with an empty memory."""
    sheet = Sheet(work.seed)
    sheet.notes.append(f"text: {work.talk_source}")
    people = min(HARM_PEOPLE, max(2, work.size.cases // HARM_TEXTS))
    for held in (8, 32):
        ours: list[float] = []
        theirs: list[float] = []
        tokens: list[int] = []
        for episode in range(people):
            rng = work.rng("harm", held, episode)
            facts, talk = work.language.draw(rng, held), work.talk_for(rng)
            with work.contest.person() as person, work.contest.person() as fresh:
                work.tell(person, rng, facts)
                state = person.session.snapshot()
                totals, count = [0.0, 0.0], 0
                for _ in range(HARM_TEXTS):
                    text = [message("user", talk.next())]
                    person.session.restore(state)
                    fresh.session.reset()
                    for side, session in enumerate((person.session, fresh.session)):
                        loss, n = work.contest.likelihood(session, text)
                        totals[side] += loss
                    count += n
            ours.append(totals[0])
            theirs.append(totals[1])
            tokens.append(count)
        case = f"{held} facts held, over none"
        sheet.figure(case, held, "memory", "perplexity ratio", perplexity_ratio(ours, theirs, tokens, work.seed))
        sheet.notes.append(
            f"perplexity beside {held} facts, without memory: {math.exp(sum(theirs) / sum(tokens)):.1f} a token"
        )
        work.say(sheet.line(case))
    return sheet
