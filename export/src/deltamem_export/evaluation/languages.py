"""What people say in the evaluation: facts told, changed and asked for, and how a reply is graded.

Two of them. `tiny` is the language of the embedded default with its held-out pairs and phrasings (training/language.py). `plain` is for
any other bundle: plain sentences whose values are names made up by the seed, so that no training data can hold them. It knows nothing of
models.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

from deltamem_export.errors import ExportError
from deltamem_export.training.language import (
    LISTENING,
    RELATIONS,
    Relation,
    Speaker,
    is_correct,
    mentions,
    says_unknown,
)
from deltamem_export.training.words import POOLS, TALK

LISTENED = LISTENING
"""What stands as the reply to talk in an opponent's history."""


@dataclass(frozen=True)
class Fact:
    """One thing that one person tells."""

    relation: Relation
    value: str


@dataclass(frozen=True)
class Chain:
    """Two facts whose answer takes both: who is my sister, and where does that person live."""

    told: tuple[str, str]
    question: str
    answer: Fact


class Language(ABC):
    """What both languages share. `held_out` says whether there are pairs and phrasings kept out of training."""

    name: str
    relations: tuple[Relation, ...]
    held_out: bool

    def draw(
        self, rng: random.Random, count: int, pairs: str = "any", among: tuple[Relation, ...] | None = None
    ) -> list[Fact]:
        """`count` facts of different relations (of `among`, or of all), fewer where there are not as many."""
        chosen = among or self.relations
        if pairs == "held-out":
            chosen = tuple(r for r in chosen if r.held_out_values)
        return [Fact(r, self._value(rng, r, pairs)) for r in rng.sample(chosen, min(count, len(chosen)))]

    def changed(self, rng: random.Random, fact: Fact) -> Fact:
        """The same relation with another value."""
        return Fact(fact.relation, rng.choice([v for v in fact.relation.values if v != fact.value]))

    @abstractmethod
    def tell(self, rng: random.Random, fact: Fact, change: bool = False, phrasing: str = "any") -> str:
        """A message that tells a fact, or that it changed."""

    @abstractmethod
    def ask(self, rng: random.Random, relation: Relation, phrasing: str = "any") -> str:
        """A question for a relation."""

    def question(self, text: str) -> str:
        """A question in any words as it is put to the model."""
        return text

    @abstractmethod
    def talk(self, rng: random.Random) -> str:
        """A message that tells nothing about the speaker."""

    def right(self, fact: Fact, reply: str) -> bool:
        """Exact: the value stands in the reply as a word, and neither another value of its relation nor that it is not known."""
        return is_correct(fact.relation, fact.value, reply)

    @abstractmethod
    def invents_nothing(self, relation: Relation, reply: str) -> bool:
        """Whether the reply to a question about what was never told is as it should be."""

    def chains(self, rng: random.Random, count: int) -> list[Chain]:
        """`count` pairs of facts with a question over both."""
        people = tuple(r for r in self.relations if r.name in PEOPLE)
        places = self._places()
        home = Relation("two steps", "", places, ("{value}",), ("",))
        facts = self.draw(rng, count, among=people)
        while len({fact.value for fact in facts}) < count:  # two people of one name would have two homes
            facts = self.draw(rng, count, among=people)
        chains = []
        for fact, place in zip(facts, rng.sample(places, count), strict=True):
            who = fact.relation.name.removesuffix(" name")
            told = (self.tell(rng, fact), f"{fact.value} lives in {place}.")
            chains.append(Chain(told, self.question(f"In which place does my {who} live?"), Fact(home, place)))
        return chains

    @abstractmethod
    def _places(self) -> tuple[str, ...]:
        """Names of places, for questions over two facts."""

    @abstractmethod
    def _value(self, rng: random.Random, relation: Relation, pairs: str) -> str:
        """A value of a relation; `pairs`: which ones may come."""


class TinyEnglish(Language):
    """The generated English that the embedded default was trained on, as an evaluation may use it.

    pairs: trained, held-out (never told together in training) or any; phrasing: trained or held-out.
    """

    name = "tiny"
    relations = RELATIONS
    held_out = True

    def tell(self, rng: random.Random, fact: Fact, change: bool = False, phrasing: str = "trained") -> str:
        return Speaker(rng, evaluation=True).tell(fact.relation, fact.value, change, _tiny(phrasing)).user

    def ask(self, rng: random.Random, relation: Relation, phrasing: str = "trained") -> str:
        return Speaker(rng, evaluation=True).ask(relation, None, _tiny(phrasing)).user

    def talk(self, rng: random.Random) -> str:
        return Speaker(rng, evaluation=True).talk().user

    def invents_nothing(self, relation: Relation, reply: str) -> bool:
        return says_unknown(reply) and not any(mentions(reply, value) for value in relation.values)

    def _places(self) -> tuple[str, ...]:
        return POOLS["place"]

    def _value(self, rng: random.Random, relation: Relation, pairs: str) -> str:
        return Speaker(rng, evaluation=True).draw_value(relation, pairs)


def _tiny(phrasing: str) -> str:
    return "trained" if phrasing == "any" else phrasing


PEOPLE = frozenset(r.name for r in RELATIONS if r.values is POOLS["person"])
NAMED = (
    "sister", "brother", "cousin", "aunt", "uncle", "best friend", "boss", "neighbour", "teacher", "doctor",
    "roommate", "dentist", "dog", "cat", "parrot", "hamster", "horse", "rabbit", "goldfish", "tortoise", "boat",
    "band", "street", "school", "favourite hotel", "sports club", "football team", "village", "bakery", "bookshop",
    "blog", "company", "favourite author", "favourite café", "favourite novel", "favourite singer", "landlord",
    "accountant", "lawyer", "hairdresser", "gardener", "coach", "piano teacher", "pharmacist", "mechanic", "tailor",
    "editor", "manager", "nephew", "niece", "grandfather", "grandmother", "husband's colleague", "hiking group",
    "choir", "board game club", "holiday island", "birthplace", "hometown", "university", "printer", "project",
    "cottage", "sailing school",
)  # fmt: skip
ONSETS = (
    "b", "br", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pr", "r", "s", "sk", "st", "t", "tr", "v", "z",
)  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u", "au", "ei", "ou")
CODAS = ("l", "m", "n", "nd", "r", "rk", "s", "sk", "ss", "th", "x")
POOL = 32
ASKED_PLAINLY = " Answer in a few words. If I have not told you, say that you do not know."


class PlainEnglish(Language):
    """Plain sentences about named people, animals and things, for a model that understands English. The names are made up by the seed."""

    name = "plain"
    held_out = False

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(f"names|{seed}")
        made: dict[str, None] = {}
        while len(made) < POOL * (len(NAMED) + 1):
            made.setdefault(_made_up(rng))
        names = list(made)
        self.relations = tuple(_named(t, tuple(names[i * POOL : (i + 1) * POOL])) for i, t in enumerate(NAMED))
        self._towns = tuple(names[-POOL:])

    def tell(self, rng: random.Random, fact: Fact, change: bool = False, phrasing: str = "any") -> str:
        _needs_tiny(phrasing)
        return ("Correction: " if change else "") + rng.choice(fact.relation.tell).format(value=fact.value)

    def ask(self, rng: random.Random, relation: Relation, phrasing: str = "any") -> str:
        _needs_tiny(phrasing)
        return self.question(rng.choice(relation.ask))

    def question(self, text: str) -> str:
        return text + ASKED_PLAINLY

    def talk(self, rng: random.Random) -> str:
        speaker = Speaker(rng, evaluation=True)
        return " ".join(speaker.fill(rng.choice(TALK["statement"])) for _ in range(rng.randint(1, 4)))

    def invents_nothing(self, relation: Relation, reply: str) -> bool:
        """Only a name of the relation counts as invented: how a model says that it does not know is its own affair."""
        return not any(mentions(reply, value) for value in relation.values)

    def _places(self) -> tuple[str, ...]:
        return self._towns

    def _value(self, rng: random.Random, relation: Relation, pairs: str) -> str:
        _needs_tiny(pairs)
        return rng.choice(relation.values)


def _needs_tiny(which: str) -> None:
    if which != "any":
        raise ExportError(
            f"{which!r} pairs and phrasings are those that the tiny language keeps out of training; nothing is known of what "
            "another bundle was trained on: give --language tiny only for a bundle of the recipe tiny-assistant"
        )


def _made_up(rng: random.Random) -> str:
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(2)]
    return ("".join(syllables) + rng.choice(CODAS)).capitalize()


def _named(thing: str, values: tuple[str, ...]) -> Relation:
    return Relation(
        name=f"{thing} name",
        prefix=f"Your {thing} is called",
        values=values,
        tell=(f"My {thing} is called {{value}}.", f"The name of my {thing} is {{value}}."),
        ask=(f"What is my {thing} called?", f"What is the name of my {thing}?"),
    )
