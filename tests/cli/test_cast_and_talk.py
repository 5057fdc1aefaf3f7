"""The demo's parts that need no model: who tells what, when a reply counts as right, and which files are conversations."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_rt._cli.arguments import UsageError
from deltamem_rt._cli.demo.cast import Fact, Relation, chance, contradict, draw, draw_more, is_right, read_relations
from deltamem_rt._cli.demo.talk import Talk, read_messages

COLOURS = ("blue", "dark blue", "red", "sea green")
RELATIONS = [
    Relation("coat", COLOURS, ("My coat is {value}.",), ("What colour is my coat?",)),
    Relation("hat", COLOURS, ("My hat is {value}.", "I wear a {value} hat."), ("And my hat?", "My hat is?")),
]


def fact(value: str) -> Fact:
    return Fact("coat", value, f"My coat is {value}.", "What colour is my coat?", COLOURS)


@pytest.mark.parametrize(
    ("value", "reply", "right"),
    [
        ("blue", "Your coat is blue.", True),
        ("blue", "BLUE!", True),
        ("blue", "Your coat is bluer.", False),
        ("blue", "Your coat is dark blue.", False),
        ("dark blue", "Your coat is dark blue.", True),
        ("dark blue", "Your coat is dark, blue.", True),
        ("dark blue", "Your coat is dark.", False),
        ("blue", "Blue or red.", False),
        ("sea green", "The sea is green.", False),
        ("red", "", False),
    ],
)
def test_a_reply_is_right_when_it_says_the_value_and_no_other(value, reply, right):
    assert is_right(reply, fact(value)) is right


def test_who_says_the_value_and_that_it_does_not_know_is_not_right():
    known = replace(fact("blue"), unknown=("I don't know",))
    assert is_right("Your coat is blue.", known)
    assert not is_right("Your coat is blue... i don't know yet.", known)


@given(st.sampled_from(COLOURS), st.sampled_from(COLOURS))
def test_naming_any_other_value_is_wrong(value, other):
    assert is_right(f"It is {value}, no, {other}.", fact(value)) is (value == other)


def test_a_seed_draws_the_same_people_and_another_seed_others():
    def people(seed: int):
        return draw(RELATIONS, random.Random(seed), people=5, facts=2)

    assert people(1) == people(1)
    assert people(1) != people(2)


def test_nobody_tells_the_same_kind_of_fact_twice():
    for person in draw(RELATIONS, random.Random(0), people=20, facts=2):
        assert len({fact.relation for fact in person.facts}) == 2
        assert all(fact.value in fact.told for fact in person.facts)


def test_more_facts_are_of_kinds_that_were_not_told():
    relations = [replace(RELATIONS[0], name=str(number)) for number in range(9)]
    person = draw(relations, random.Random(0), people=1, facts=4)[0]
    for wanted, drawn in ((2, 2), (3, 2), (4, 4), (8, 4)):
        more = draw_more(relations, random.Random(1), person, wanted)
        assert len({fact.relation for fact in (*person.facts, *more)}) == 4 + drawn
    assert draw_more(relations[:5], random.Random(1), draw(relations[:5], random.Random(0), 1, 4)[0], 8) == ()


def test_a_false_fact_is_of_the_same_kind_and_question_with_another_value():
    for seed in range(50):
        fact = draw(RELATIONS, random.Random(seed), people=1, facts=1)[0].facts[0]
        false = contradict(RELATIONS, random.Random(seed), fact)
        assert (false.relation, false.question, false.values) == (fact.relation, fact.question, fact.values)
        assert false.value != fact.value
        assert false.value in false.told
        assert not is_right(f"It is {false.value}.", fact)


def test_chance_is_one_in_the_number_of_values():
    assert chance(draw(RELATIONS, random.Random(0), people=3, facts=2)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"relations": []}',
        '{"relations": [{"name": "x"}]}',
        '{"relations": [{"name": "x", "values": ["a", "b"], "tell": ["no place"], "ask": ["?"]}]}',
        '{"relations": [{"name": "x", "values": ["a"], "tell": ["{value}"], "ask": ["?"]}]}',
    ],
)
def test_a_file_of_facts_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "demo.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"demo\.json"):
        read_relations(file)


SAID = ["Ada: Hello.", "Bob: Good day."]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("talk.txt", "Ada: Hello.\n\n  Bob:  Good day. \n"),
        ("talk.json", json.dumps(SAID)),
        ("talk.json", json.dumps([{"role": "Ada", "content": "Hello."}, {"role": "Bob", "content": "Good day."}])),
        (
            "talk.json",
            json.dumps({"messages": [{"role": "Ada", "content": "Hello."}, {"role": "Bob", "content": "Good day."}]}),
        ),
        (
            "locomo.json",
            json.dumps(
                [
                    {
                        "qa": [{"question": "not part of the talk"}],
                        "conversation": {
                            "speaker_a": "Ada",
                            "session_2": [{"speaker": "Bob", "text": "Good day."}],
                            "session_1": [{"speaker": "Ada", "text": "Hello."}],
                        },
                    }
                ]
            ),
        ),
    ],
)
def test_every_form_of_conversation_gives_its_messages_in_order(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    assert read_messages(file) == SAID


def test_locomos_dates_are_part_of_the_talk(tmp_path):
    file = tmp_path / "locomo.json"
    file.write_text(json.dumps({"session_1_date_time": "8 May", "session_1": [{"speaker": "Ada", "text": "Hello."}]}))
    assert read_messages(file) == ["[8 May]", "Ada: Hello."]


class Letters:
    """A tokenizer of letters, in the place of a model."""

    context_length = 40

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@given(st.integers(0, 500), st.integers(0, 10))
def test_talk_goes_round_until_there_are_tokens_enough(tokens, start):
    turns = Talk(Letters(), ["first", "second", "x" * 30]).turns(tokens, start)  # type: ignore[arg-type]
    assert sum(map(len, turns)) == tokens
    assert all(0 < len(turn) <= Letters.context_length // 2 for turn in turns)
