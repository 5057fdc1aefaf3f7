"""Who is in the demo and what they tell: drawn afresh from the bundle's demo.json by one seed. It knows nothing of models."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltamem_rt._cli.arguments import UsageError


@dataclass(frozen=True)
class Fact:
    """One thing that one person tells and is asked about later."""

    relation: str
    value: str
    told: str
    question: str
    values: tuple[str, ...]
    """Every value that the relation can have: what a guess would choose from."""
    unknown: tuple[str, ...] = ()
    """How the model says that it does not know."""


@dataclass(frozen=True)
class Person:
    """Somebody with facts of their own."""

    number: int
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Relation:
    """A kind of fact: its values, and phrasings to tell it (with a place for the value) and to ask for it."""

    name: str
    values: tuple[str, ...]
    tell: tuple[str, ...]
    ask: tuple[str, ...]
    unknown: tuple[str, ...] = ()


def read_relations(path: Path) -> list[Relation]:
    """The relations of a demo.json. Raises UsageError when the file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        unknown = content.get("unknown", [])
        if not isinstance(unknown, list):
            raise ValueError(f"unknown is {unknown!r}, where a list of phrases is expected")
        relations = [_relation(entry, tuple(map(str, unknown))) for entry in content["relations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no file of facts for the demo: {type(error).__name__}: {error}") from None
    if not relations:
        raise UsageError(f"{path} holds no relations")
    return relations


def _relation(entry: dict[str, Any], unknown: tuple[str, ...]) -> Relation:
    values, tell, ask = (tuple(map(str, entry[key])) for key in ("values", "tell", "ask"))
    relation = Relation(str(entry["name"]), values, tell, ask, unknown)
    if len(set(relation.values)) < 2 or not relation.tell or not relation.ask:
        raise ValueError(f"relation {relation.name!r} needs two values, a way to tell it and a way to ask for it")
    if any("{value}" not in phrase for phrase in relation.tell):
        raise ValueError(f"relation {relation.name!r} has a way to tell it with no place for {{value}}")
    return relation


def draw(relations: list[Relation], rng: random.Random, people: int, facts: int) -> list[Person]:
    """Draws `people` persons with `facts` different relations each; value and phrasings are drawn for each fact."""
    if facts > len(relations):
        raise UsageError(f"--facts {facts} is more than the {len(relations)} kinds of fact that the demo has")
    return [
        Person(number, tuple(_fact(relation, rng) for relation in rng.sample(relations, facts)))
        for number in range(1, people + 1)
    ]


def draw_more(relations: list[Relation], rng: random.Random, person: Person, facts: int) -> tuple[Fact, ...]:
    """Draws up to `facts` more facts, an even number of them, of relations that the person has told nothing of."""
    told = {fact.relation for fact in person.facts}
    left = [relation for relation in relations if relation.name not in told]
    return tuple(_fact(relation, rng) for relation in rng.sample(left, min(facts, len(left)) // 2 * 2))


def contradict(relations: list[Relation], rng: random.Random, fact: Fact) -> Fact:
    """Draws the same kind of fact with another value; it is asked for in the same words."""
    relation = next(relation for relation in relations if relation.name == fact.relation)
    others = [value for value in dict.fromkeys(relation.values) if value != fact.value]
    return replace(_with_value(relation, rng.choice(others), rng), question=fact.question)


def _fact(relation: Relation, rng: random.Random) -> Fact:
    return _with_value(relation, rng.choice(relation.values), rng)


def _with_value(relation: Relation, value: str, rng: random.Random) -> Fact:
    told = rng.choice(relation.tell).replace("{value}", value)
    return Fact(relation.name, value, told, rng.choice(relation.ask), relation.values, relation.unknown)


def is_right(reply: str, fact: Fact) -> bool:
    """Whether the reply says the true value, as whole words, no other value of the same relation, and not also that it does not know."""
    if any(phrase.casefold() in reply.casefold() for phrase in fact.unknown):
        return False
    words = _words(reply)
    said = set()
    # The longest first: who says "dark blue" has not said "blue".
    for value in sorted(fact.values, key=lambda value: -len(_words(value))):
        words, found = _without(words, _words(value))
        if found:
            said.add(value)
    return said == {fact.value}


def chance(people: list[Person]) -> float:
    """What guessing among a relation's values would score on the questions of these people."""
    facts = [fact for person in people for fact in person.facts]
    return sum(1 / len(fact.values) for fact in facts) / len(facts)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _without(words: list[str], wanted: list[str]) -> tuple[list[str], bool]:
    """The words with every occurrence of the `wanted` run taken out, a gap left in its place, and whether there was one."""
    rest: list[str] = []
    found = False
    at = 0
    while at < len(words):
        if wanted and words[at : at + len(wanted)] == wanted:
            rest.append("")
            found = True
            at += len(wanted)
        else:
            rest.append(words[at])
            at += 1
    return rest, found
