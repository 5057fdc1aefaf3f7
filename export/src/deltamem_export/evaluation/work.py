"""What every task is given: the contest, the language, the talk that goes by, how many cases, and a generator for each episode. It also
holds the three things that all tasks do: tell somebody facts, let talk go by, ask everybody the same questions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deltamem_export.evaluation.contest import READERS, Contest, Person
from deltamem_export.evaluation.languages import LISTENED, Fact, Language
from deltamem_export.evaluation.sheet import Sheet


@dataclass(frozen=True)
class Size:
    """How much is asked. `cases`: questions a row; `reader_cases`: of those who read the history at every question."""

    cases: int = 1_000
    reader_cases: int = 200
    facts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    distances: tuple[int, ...] = (0, 1_000, 10_000, 100_000)
    changes: tuple[int, ...] = (1, 2, 3, 4, 5)
    drift_tokens: int = 1_000_000
    drift_streams: int = 4

    @classmethod
    def quick(cls) -> Size:
        """Enough to see that everything runs; the intervals are wide."""
        return cls(48, 16, (1, 8, 32), (0, 500, 2_000), (1, 3), 8_000, 2)


@dataclass
class Work:
    """One evaluation. `talk`: messages that go by, round and round; empty: the language's own."""

    contest: Contest
    language: Language
    size: Size
    seed: int = 0
    talk: Sequence[str] = ()
    talk_source: str = "generated"
    say: Callable[[str], None] = field(default=lambda _: None)

    def rng(self, *what: object) -> random.Random:
        """A generator of its own for whatever is named. Training draws from integers, so no stream of it is one of these."""
        return random.Random("|".join(map(str, ("evaluation", self.seed, *what))))

    def episodes(self, facts: int) -> range:
        """As many as it takes to ask `cases` questions."""
        return range(math.ceil(self.size.cases / facts))

    def asked(self, who: str, episode: int, facts: int) -> int:
        """How many of an episode's questions this opponent is asked. Readers of the history get fewer, from as many episodes as can be."""
        if who not in READERS:
            return facts
        share = max(1, facts * self.size.reader_cases // self.size.cases)
        return min(facts, share) if episode * share < self.size.reader_cases else 0

    def tell(
        self, person: Person, rng: random.Random, facts: Sequence[Fact], change: bool = False, phrasing: str = "any"
    ) -> None:
        """A turn for each fact."""
        for fact in facts:
            told = self.language.tell(rng, fact, change, phrasing)
            self.contest.tell(person, told, about(fact))

    def hear(self, person: Person, tokens: int, talk: TalkGoingBy) -> int:
        """At least `tokens` tokens of talk; returns how many it were."""
        heard = 0
        while heard < tokens:
            heard += self.contest.hear(person, talk.next(), LISTENED)
        return heard

    def talk_for(self, rng: random.Random) -> TalkGoingBy:
        """Talk from a place of its own."""
        return TalkGoingBy(self.talk, self.language, rng)

    def ask(
        self,
        sheet: Sheet,
        case: str,
        x: float | None,
        person: Person,
        episode: int,
        facts: Sequence[Fact],
        strangers: Sequence[Fact] = (),
        phrasing: str = "any",
        old: dict[str, set[str]] | None = None,
    ) -> None:
        """Asks every opponent for the facts, in an order of its own, and for what was never told; writes down what happened.

        old: for a relation's name the values that it had before; whoever says one of them is marked.
        """
        rng = self.rng("questions", case, episode)
        order = rng.sample(list(facts), len(facts))
        questions = [(fact, self.language.ask(rng, fact.relation, phrasing)) for fact in order]
        unknown = [(fact.relation, self.language.ask(rng, fact.relation, phrasing)) for fact in strangers]
        for who in self.contest.opponents:
            asked = self.asked(who, episode, len(facts))
            for fact, question in questions[:asked]:
                answer = self.contest.ask(who, person, question, about(fact))
                sheet.mark(case, x, who, "recall", episode, self.language.right(fact, answer.text))
                sheet.spent(case, x, who, answer, self.contest.kept_bytes(who, person))
                if answer.found is not None:
                    sheet.mark(case, x, who, "in the prompt", episode, answer.found)
                if old and fact.relation.name in old:
                    said = any(
                        self.language.right(Fact(fact.relation, value), answer.text)
                        for value in old[fact.relation.name]
                    )
                    sheet.mark(case, x, who, "an old value said", episode, said)
            for relation, question in unknown[:asked]:
                answer = self.contest.ask(who, person, question)
                good = self.language.invents_nothing(relation, answer.text)
                sheet.mark(case, x, who, "never told: nothing invented", episode, good)


@dataclass
class TalkGoingBy:
    """Messages one after the other from a random place of the talk, or the language's own without end."""

    messages: Sequence[str]
    language: Language
    rng: random.Random
    at: int = -1

    def next(self) -> str:
        if not self.messages:
            return self.language.talk(self.rng)
        self.at = self.rng.randrange(len(self.messages)) if self.at < 0 else (self.at + 1) % len(self.messages)
        return self.messages[self.at]


def about(fact: Fact) -> tuple[str, str]:
    """What marks the turn that told a fact."""
    return fact.relation.name, fact.value
