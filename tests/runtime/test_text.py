"""Text in and out of the embedded default: whole characters, stop texts, the chat template, what a person types."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltamem_rt as dm

STRANGE = "Grüße, 世界! 👩‍👩‍👧 naïve café \u202e‏ 𝒳 \U0001f9d1\U0001f3fd‍\U0001f680 e\u0301"


def test_any_text_survives_encode_and_decode(text_model: dm.Model) -> None:
    assert text_model.decode(text_model.encode(STRANGE)) == STRANGE


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_can_be_fed(text_model: dm.Model, text: str) -> None:
    with text_model.session() as session:
        session.feed(text)
        assert session.position == len(text_model.encode(text)) or text_model.manifest["tokens"]["bos"] is not None


def test_pieces_join_to_the_text_and_are_never_empty(chat: dm.Session) -> None:
    reply = chat.generate("My name is", max_new_tokens=60, temperature=2.0, seed=1)
    pieces = list(reply)
    assert "".join(pieces) == reply.text
    assert all(pieces)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_streamed_pieces_equal_the_decoded_tokens(text_model: dm.Model, seed: int) -> None:
    with text_model.session() as session:
        reply = session.generate("👋", max_new_tokens=40, temperature=5.0, seed=seed)
        pieces = list(reply)
        assert "".join(pieces) == text_model.decode(reply.token_ids)
        for piece in pieces:
            piece.encode("utf-8")


def test_a_stop_text_ends_the_reply_and_is_not_in_it(text_model: dm.Model) -> None:
    with text_model.session() as session:
        whole = session.generate("Hello", max_new_tokens=30, temperature=1.0, seed=5).read()
    assert len(whole) > 6
    middle = whole[4:6]
    with text_model.session() as session:
        reply = session.generate("Hello", max_new_tokens=30, temperature=1.0, seed=5, stop=[middle, "never there"])
        assert reply.read() == whole[: whole.index(middle)]
        assert reply.stats.finish_reason == "stop"
    with text_model.session() as session:
        assert session.generate("Hello", max_new_tokens=30, temperature=1.0, seed=5, stop=middle).read() == reply.text


def test_a_chat_ends_its_turn(chat: dm.Session) -> None:
    reply = chat.chat("My dog is called Bruno.", max_new_tokens=40)
    text = reply.read()
    assert text
    assert reply.stats.finish_reason in {"eos", "length"}
    assert chat.position == 0
    assert chat.turns == 1


def test_a_chat_that_was_broken_off_ends_its_turn_at_the_next_call(chat: dm.Session) -> None:
    for _piece in chat.chat("My dog is called Bruno.", max_new_tokens=40):
        break
    assert chat.position > 0
    chat.chat("Hello.", max_new_tokens=40).read()
    assert chat.turns == 2
    assert chat.position == 0


def test_special_tokens_are_not_in_the_text(chat: dm.Session) -> None:
    assert "<|" not in chat.chat("Hello there.", max_new_tokens=60).read()


@pytest.mark.parametrize("text", ["a\ud800b"])
def test_text_that_is_no_unicode(chat: dm.Session, text: str) -> None:
    with pytest.raises(UnicodeEncodeError):
        chat.feed(text)
    with pytest.raises(UnicodeEncodeError):
        chat.chat(text)


def test_what_a_person_is_told_is_remembered(chat: dm.Session) -> None:
    import json

    demo = json.loads((dm.default_bundle() / "demo.json").read_text())
    relation = demo["relations"][0]
    value = relation["values"][0]
    chat.chat(relation["tell"][0].format(value=value)).read()
    chat.chat(demo["small_talk"][0]).read()
    assert value in chat.chat(relation["ask"][0]).read()
    chat.reset()
    assert value not in chat.chat(relation["ask"][0]).read()
