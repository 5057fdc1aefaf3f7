"""What the generated English promises: seeds repeat, held-out parts stay out of training, answers can be graded exactly."""

from __future__ import annotations

import random

import pytest

from deltamem_export.training import demo, english
from deltamem_export.training.language import (
    BY_NAME,
    RELATIONS,
    UNKNOWN,
    Speaker,
    is_correct,
    is_held_out,
    mentions,
    says_unknown,
)
from deltamem_export.training.memory import Episode, MemoryRecipe
from deltamem_export.training.recipe import corpus
from deltamem_export.training.tokenizer import CHAT_TEMPLATE, DECISIVE, Codec, train_tokenizer


def speaker(seed: int = 0, evaluation: bool = False) -> Speaker:
    return Speaker(random.Random(seed), evaluation=evaluation)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(train_tokenizer(corpus(speaker(), 400), 1500))


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int) -> list[object]:
        s = speaker(seed)
        return [s.talk() for _ in range(50)] + [s.tell(*s.draw_facts(1)[0]) for _ in range(50)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_there_are_enough_relations_values_and_phrasings() -> None:
    assert len(RELATIONS) == len(BY_NAME) >= 48
    assert len({r.prefix for r in RELATIONS}) == len(RELATIONS)
    for r in RELATIONS:
        assert 24 <= len(set(r.values)) == len(r.values)
        assert len(r.tell) >= 4
        assert len(r.ask) >= 4
        assert all("{value}" in t for t in r.tell)


def test_about_a_tenth_of_the_pairs_is_held_out() -> None:
    held = sum(is_held_out(r.name, v) for r in RELATIONS for v in r.values)
    assert 0.07 < held / sum(len(r.values) for r in RELATIONS) < 0.13


def test_training_never_tells_a_held_out_pair_or_phrasing(codec: Codec) -> None:
    s = speaker(3)
    recipe = MemoryRecipe()
    episode = Episode()
    for i in range(200):
        if i % 3 == 0:
            episode = Episode()
        episode.stream(s, codec, recipe, most=16, unknown=True, talk=1)
        assert not any(v in r.values and is_held_out(r.name, v) for r, v in episode.facts.items())
    for r in RELATIONS:
        assert r.tell[r.held_out_tell] not in r.trained_tell
        assert r.ask[r.held_out_ask] not in r.trained_ask
    with pytest.raises(ValueError, match="evaluation only"):
        s.draw_value(RELATIONS[0], "held-out")
    with pytest.raises(ValueError, match="evaluation only"):
        s.tell(RELATIONS[0], "Anna", phrasing="held-out")


def test_odd_values_are_of_other_relations_and_none_is_held_out() -> None:
    odd = Speaker(random.Random(3), odd=0.5)
    strange = 0
    for _ in range(20):
        for r in RELATIONS:
            value = odd.draw_value(r)
            assert not is_held_out(r.name, value)
            strange += value not in r.values
    assert 0.4 < strange / (20 * len(RELATIONS)) < 0.6
    plain, none = Speaker(random.Random(4)), Speaker(random.Random(4), odd=0.0)
    assert [plain.draw_value(r) for r in RELATIONS] == [none.draw_value(r) for r in RELATIONS]


def test_every_trained_phrasing_is_drawn() -> None:
    s = speaker(4)
    seen = set()
    for r in RELATIONS:
        for _ in range(60):
            seen.add(s.tell(r, r.trained_values[0]).user.lower())
            seen.add(s.ask(r, None).user.lower())
    text = "\n".join(seen)
    for r in RELATIONS:
        for template in r.trained_tell:
            assert template.format(value=r.trained_values[0]).rstrip(".").lower() in text
        for template in r.trained_ask:
            assert template.lower() in text


def test_answers_grade_right_and_everything_else_wrong() -> None:
    for r in RELATIONS:
        for v in r.values:
            assert is_correct(r, v, r.answer(v))
            assert is_correct(r, v, r.acknowledgement(v))
        a, b = r.values[:2]
        assert not is_correct(r, a, r.answer(b))
        assert not is_correct(r, a, f"{r.prefix} {a} or {b}.")
        assert not is_correct(r, a, f"{r.prefix} {a}{UNKNOWN}")
        assert not any(mentions(r.unknown, v) for v in r.values)
        assert says_unknown(r.unknown)


def test_any_text_survives_the_tokenizer(codec: Codec) -> None:
    for text in ("Plain words.", "åßç 中文 😀\n\ttabs", "".join(map(chr, range(1, 256)))):
        assert codec.tokenizer.decode(list(codec.encode(text))) == text


def test_a_turn_is_what_the_template_renders(codec: Codec) -> None:
    import jinja2

    s = speaker(5)
    relation, value = s.draw_facts(1)[0]
    for turn in (s.tell(relation, value), s.ask(relation, value), s.ask(relation, None), s.talk()):
        rendered = jinja2.Template(CHAT_TEMPLATE).render(
            messages=[{"role": "user", "content": turn.user}], add_generation_prompt=True
        )
        encoded = codec.turn(turn)
        whole = codec.tokenizer.encode(rendered + turn.reply + "<|end|>").ids
        assert list(encoded.ids) == whole
        assert list(encoded.ids[: encoded.reply]) == codec.prompt(turn.user)
        if turn.kind != "talk":
            decisive = [i for i, tag in zip(encoded.ids, encoded.tags, strict=True) if tag == DECISIVE]
            assert codec.tokenizer.decode(decisive).strip() == (turn.value or "...")


def test_english_is_there_and_repeats() -> None:
    passages = english.passages()
    assert len(passages) > 1000
    assert passages == english.passages()
    assert max(map(len, passages)) <= 600


def test_the_demo_carries_no_held_out_phrasing_and_a_stream_of_its_own() -> None:
    facts = demo.demo_facts()
    assert [r["name"] for r in facts["relations"]] == [r.name for r in RELATIONS]
    for entry in facts["relations"]:
        assert BY_NAME[entry["name"]].tell[BY_NAME[entry["name"]].held_out_tell] not in entry["tell"]
    assert len(facts["small_talk"]) >= 24
    stream = demo.stream_text()
    assert stream == demo.stream_text()
    assert 15_000 < len(stream) < 40_000
