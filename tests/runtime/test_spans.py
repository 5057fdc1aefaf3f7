"""Bundles that write one mean a message or sentence: the engine against the PyTorch reference, the laws of spans, and text cut into
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import deltamem_rt as dm
from agreement import assert_close
from deltamem_export.adapter import Adapter, AdapterConfig
from deltamem_export.bundle import export_bundle
from deltamem_export.reference import attach
from grafted import Grafted
from interrupted import interrupted
from together import beside_prompts

LOGITS, STATES = 1e-4, 1e-5

# The parity case whose backbone is taken, and the adapter's settings; the first two keep the case's own adapter otherwise.
RULES = {
    "sentences": ("llama_tsw_qo", "sentence_mean", None),
    "messages": ("llama_tsw_qo", "message_mean", None),
    "sentences, three heads, own lambda, every head": (
        "qwen3_tsw_qo",
        "sentence_mean",
        {"num_state_heads": 3, "couple_lambda": False, "delta_heads": ("q", "k", "v", "o")},
    ),
    "sentences, lambda outside, a gate per head, two layers": (
        "qwen3_tsw_qo",
        "sentence_mean",
        {"state_update_mode": "lambda_outside", "rankwise_gates": False, "num_state_heads": 2, "target_layers": (0, 2)},
    ),
    # Without decay the state grows to 10, and how far float32 fixes the logits is a matter of the draw: of seeds 1 to 8 the first is off by
    # 1.1e-4 from float64 in ONNX Runtime's own operators, the others by 7e-5 at most.
    "messages, no lambda": ("smollm3_tsw_qo", "message_mean", {"state_update_mode": "no_lambda", "seed": 2}),
}


@dataclass
class Case:
    """A span bundle, loaded, and what it was made from."""

    model: dm.Model
    bundle: Path
    backbone: Path
    adapter: Adapter


@pytest.fixture(scope="session")
def span_case(parity_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """`span_case("messages")`: that rule's bundle, exported when first asked for."""
    made: dict[str, Case] = {}

    def case(rule: str) -> Case:
        if rule not in made:
            torch.set_num_threads(1)
            name, granularity, settings = RULES[rule]
            backbone = parity_data / name / "backbone"
            if settings is None:
                own = Adapter.load(parity_data / name / "adapter")
                adapter = Adapter(replace(own.config, memory_write_granularity=granularity), own.layers)
            else:
                adapter = random_adapter(backbone, memory_write_granularity=granularity, **settings)
            out = tmp_path_factory.mktemp("spans") / "bundle"
            bundle = export_bundle(backbone, adapter, out, check=False, say=lambda _: None)
            made[rule] = Case(dm.Model.load(bundle, device="cpu"), bundle, backbone, adapter)
        return made[rule]

    return case


def random_adapter(backbone: Path, *, seed: int = 1, **settings: object) -> Adapter:
    """Corrections and gates that are not small, so that a write that goes wrong shows."""
    torch.manual_seed(seed)
    handle = attach(
        AutoModelForCausalLM.from_pretrained(backbone), replace(AdapterConfig(rank=4, alpha=4.0), **settings)
    )
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 1.0))
    return handle.adapter()


@pytest.fixture(params=list(RULES), scope="module")
def every(request: pytest.FixtureRequest, span_case) -> Case:
    return span_case(request.param)


@pytest.fixture(scope="session")
def sentences(span_case) -> Case:
    return span_case("sentences")


@pytest.fixture(scope="session")
def messages(span_case) -> Case:
    return span_case("messages")


def rng_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 250, count, dtype=np.int32)


def rng_spans(count: int, seed: int = 0, mean: int = 9) -> np.ndarray:
    """Spans of about `mean` tokens, ids with gaps, some tokens of none in between."""
    rng = np.random.default_rng(seed)
    spans = np.cumsum(rng.random(count) < 1 / mean, dtype=np.int32) * 3
    return np.where(rng.random(count) < 0.15, -1, spans).astype(np.int32)


class Reference:
    """The PyTorch reference behind `feed` and `end_turn`."""

    def __init__(self, case: Case) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(case.backbone, attn_implementation="eager").eval()
        self.handle = attach(self.model, case.adapter)
        self.handle.reset(1)
        self.end_turn()

    @property
    def memory(self) -> np.ndarray:
        return self.handle.state[0].numpy()

    def end_turn(self) -> None:
        self.past = None

    @torch.no_grad()
    def feed(self, ids: np.ndarray, spans: np.ndarray | str | None, write: bool = True) -> np.ndarray:
        named = spans is None or isinstance(spans, str)
        self.handle.spans = spans if named else torch.from_numpy(spans[None].astype(np.int64))
        self.handle.writes = write
        out = self.model(torch.from_numpy(ids[None].astype(np.int64)), past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        return out.logits[0].numpy()


def test_the_engine_computes_what_the_reference_computes(every: Case) -> None:
    """Turns shorter and longer than a chunk, a turn of two calls, token writes on purpose, writes off, a decoded token."""
    reference = Reference(every)
    long = np.zeros(700, np.int32)  # one span over three chunks
    plan = [
        (40, rng_spans(40, 1), True, True),
        (300, rng_spans(300, 2), True, False),
        (90, rng_spans(90, 3, mean=30), True, True),
        (700, long, True, True),
        (600, rng_spans(600, 4, mean=100), True, True),
        (30, "token", True, False),
        (1, np.array([5], np.int32), True, True),
        (280, None, False, True),
        (20, np.full(20, -1, np.int32), True, True),
    ]
    with every.model.session() as session:
        for step, (count, spans, write, ends) in enumerate(plan):
            ids = rng_ids(count, step)
            wanted = reference.feed(ids, spans, write)
            found = session.feed(ids, write=write, logits=True, spans=spans)
            scale = max(1.0, float(np.abs(reference.memory).max()))
            assert_close(f"step {step}: logits", found, wanted, LOGITS)
            assert_close(f"step {step}: states", session.memory, reference.memory, STATES * scale)
            if ends:
                session.end_turn()
                reference.end_turn()


def weights_of(spans: np.ndarray) -> np.ndarray:
    """float32 [1, S, T], in the order of the ids."""
    rows = [(spans == i) / max(1, (spans == i).sum()) for i in np.unique(spans[spans >= 0])]
    return np.asarray(rows, np.float32).reshape(1, len(rows), len(spans))


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 60) | st.integers(250, 262) | st.integers(500, 800),
    mean=st.sampled_from([1, 4, 40, 400]),
    seed=st.integers(0, 999),
    before=st.integers(0, 300),
)
def test_chunks_of_one_feed_never_change_a_result(sentences: Case, length, mean, seed, before) -> None:
    """Python's onnxruntime, given all tokens and spans in one call of the graph, is the unchunked one."""
    ids, spans = rng_ids(length, seed), rng_spans(length, seed, mean)
    whole = Grafted(sentences.bundle)
    with sentences.model.session() as session:
        told = rng_ids(20, seed + 100)
        session.feed(told, spans="token")
        whole.feed(told)
        session.end_turn()
        whole.end_turn()
        if before:
            session.feed(rng_ids(before, 7), write=False)
            whole.feed(rng_ids(before, 7), write=False)
        found = session.feed(ids, logits=True, spans=spans)
        wanted = whole.feed(ids, spans=weights_of(spans))
        assert_close("logits", found, wanted, LOGITS)
        assert_close("states", session.memory, whole.memory[0], STATES)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 600), cuts=st.lists(st.integers(0, 600), max_size=5))
def test_token_writes_on_purpose_may_be_split_anywhere(messages: Case, length, cuts) -> None:
    ids = rng_ids(length, 3)
    with messages.model.session() as once, messages.model.session() as split:
        wanted = once.feed(ids, logits=True, spans="token")
        edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
        parts = [split.feed(ids[a:b], logits=True, spans="token") for a, b in pairwise(edges)]
        assert_close("logits", np.concatenate(parts), wanted, LOGITS)
        assert_close("states", split.memory, once.memory, STATES)


def test_token_writes_in_a_span_bundle_are_those_of_the_token_bundle(messages: Case, parity_bundle) -> None:
    ids = rng_ids(300)
    token = dm.Model.load(parity_bundle("llama_tsw_qo"))
    with token.session() as plain, messages.model.session() as spans:
        assert_close("logits", spans.feed(ids, logits=True, spans="token"), plain.feed(ids, logits=True), LOGITS)
        assert_close("states", spans.memory, plain.memory, STATES)
        with_word = plain.feed(ids[:7], logits=True, spans="token")
        assert with_word.shape == (7, 256)


def test_all_tokens_of_a_call_read_the_state_from_before_it(every: Case) -> None:
    ids, spans = rng_ids(520, 5), rng_spans(520, 5)
    with every.model.session() as writing, every.model.session() as reading:
        for session in (writing, reading):
            session.feed(rng_ids(30, 6), spans=rng_spans(30, 6))
            session.end_turn()
        before = writing.memory
        found = writing.feed(ids, logits=True, spans=spans)
        wanted = reading.feed(ids, logits=True, write=False)
        assert_close("logits", found, wanted, STATES)
        assert np.array_equal(reading.memory, before)
        assert np.abs(writing.memory - before).max() > 1e-3, "nothing was written, so nothing was compared"
        # What was written is read by the next call.
        again, silent = (
            writing.feed(ids[:20], logits=True, write=False),
            reading.feed(ids[:20], logits=True, write=False),
        )
        assert np.abs(again - silent).max() > 1e-3


def test_a_span_of_one_token_is_a_token_write(every: Case) -> None:
    with every.model.session() as one, every.model.session() as other:
        for token, seed in zip(rng_ids(12, 8).tolist(), range(12), strict=True):
            a = one.feed([token], logits=True, spans=[seed])
            b = other.feed([token], logits=True, spans="token")
            assert_close("logits", a, b, STATES)
            assert_close("states", one.memory, other.memory, STATES)


def test_only_the_grouping_of_ids_counts(sentences: Case) -> None:
    ids = rng_ids(300, 9)
    spans = np.sort(rng_spans(300, 9, mean=40).clip(0))
    shifted = spans * 1000 + 2**30
    with sentences.model.session() as a, sentences.model.session() as b:
        first = a.feed(ids, logits=True, spans=spans)
        second = b.feed(ids, logits=True, spans=shifted.astype(np.int64))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(a.memory, b.memory)


@settings(max_examples=10, deadline=None)
@given(
    order=st.lists(st.booleans(), min_size=4, max_size=10),
    lengths=st.lists(st.integers(1, 300), min_size=5, max_size=5),
    turns=st.booleans(),
)
def test_interleaved_sessions_equal_each_alone_bit_for_bit(sentences: Case, order, lengths, turns) -> None:
    def play(session: dm.Session, at: int) -> np.ndarray:
        length = lengths[at % len(lengths)]
        ids, spans = rng_ids(length, at), rng_spans(length, at)
        logits = session.feed(ids, logits=True, spans="token" if at % 3 == 2 else spans)
        if turns or session.position > 1500:  # a turn holds 2,048 tokens
            session.end_turn()
        return logits

    with sentences.model.session() as first, sentences.model.session() as second:
        found = [(pick, at, play((first, second)[pick], at)) for at, pick in enumerate(order)]
        memories = (first.memory, second.memory)
    for pick in (False, True):
        with sentences.model.session() as alone:
            for mine, at, logits in found:
                if mine == pick:
                    np.testing.assert_array_equal(play(alone, at), logits)
            np.testing.assert_array_equal(alone.memory, memories[pick])


def test_writes_off_needs_no_spans_and_heeds_none(sentences: Case) -> None:
    ids = rng_ids(300, 11)
    with sentences.model.session() as session:
        session.feed(rng_ids(50), spans=rng_spans(50))
        session.end_turn()
        before = session.memory
        results = []
        for spans in (None, "token", rng_spans(300, 12)):
            results.append(session.feed(ids, write=False, logits=True, spans=spans))
            np.testing.assert_array_equal(session.memory, before)
            session.end_turn()
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])


def test_an_interrupted_feed_leaves_the_session_as_it_was(sentences: Case) -> None:
    ids, spans = rng_ids(1800, 13), np.zeros(1800, np.int32)
    with sentences.model.session() as session:
        session.feed(rng_ids(30), spans=rng_spans(30))
        before = session.snapshot().to_bytes()
        for attempt in range(20):
            caught = interrupted(lambda: session.feed(ids, spans=spans), 0.004 * (attempt + 1))
            if caught and session.position == 30:
                assert session.snapshot().to_bytes() == before
                # And it goes on as one that was never interrupted.
                with sentences.model.session() as other:
                    other.feed(rng_ids(30), spans=rng_spans(30))
                    a, b = (each.feed(ids[:400], logits=True, spans=spans[:400]) for each in (session, other))
                    np.testing.assert_array_equal(a, b)
                    np.testing.assert_array_equal(session.memory, other.memory)
                return
            session.reset()
            session.feed(rng_ids(30), spans=rng_spans(30))
    pytest.fail("twenty feeds were never interrupted")


# What cannot be


BAD = [
    (None, ValueError, r"one mean a sentence.*pass spans.*spans=\"token\".*write=False"),
    ([0, 0], ValueError, "2 ids for 3 tokens"),
    ([0, 1, 0], ValueError, r"spans\[2\] is 0, below the 1"),
    ([0, -2, 1], ValueError, r"spans\[1\] is -2"),
    ([0, 0, 2**40], ValueError, rf"spans\[2\] is {2**40}"),
    (np.array([0, 0, 2**40]), ValueError, rf"spans\[2\] is {2**40}"),
    (np.zeros((1, 3), np.int32), ValueError, r"spans: found an array of shape \[1, 3\], expected shape \[T\]"),
    (np.zeros(3), TypeError, "spans: found an array of float64, expected int32 or int64"),
    (np.zeros(3, bool), TypeError, "spans: found an array of bool"),
    ([0, 1.5, 2], TypeError, "spans: found float at index 1, expected a span id"),
    ([0, True, 2], TypeError, "spans: found a bool at index 1"),
    (7, TypeError, 'spans: found int, expected "token", a list of span ids'),
    ("sentence", ValueError, 'spans is "sentence", expected "token"'),
]


@pytest.mark.parametrize(("spans", "error", "message"), BAD)
@pytest.mark.parametrize("write", [True, False])
def test_spans_that_do_not_fit(sentences: Case, spans, error, message, write) -> None:
    with sentences.model.session() as session:
        session.feed(rng_ids(5), spans="token")
        before = session.snapshot().to_bytes()
        if spans is None and not write:
            session.feed([3, 4, 5], write=False)
            return
        with pytest.raises(error, match=message):
            session.feed([3, 4, 5], write=write, spans=spans)
        with pytest.raises(error, match=message):
            session.generate([3, 4, 5], write=write, spans=spans)
        assert session.snapshot().to_bytes() == before
        assert session.position == 5


@pytest.mark.parametrize("ids", [[], [7], [7, 8]])
def test_there_is_no_silent_fallback_at_any_length(messages: Case, ids) -> None:
    with messages.model.session() as session, pytest.raises(ValueError, match="one mean a message"):
        session.feed(ids)


def test_a_token_bundle_takes_no_span_ids(ids_model: dm.Model) -> None:
    with ids_model.session() as session:
        for write in (True, False):
            with pytest.raises(ValueError, match="writes per token"):
                session.feed([3, 4], write=write, spans=[0, 0])
        with pytest.raises(ValueError, match="writes per token"):
            session.generate([3, 4], spans=[0, 0])
        assert session.position == 0


def test_span_ids_with_text_are_refused(sentences: Case) -> None:
    with sentences.model.session() as session:
        with pytest.raises(ValueError, match=r"text is given.*model\.encode\(\)"):
            session.feed("abc", spans=[0, 0, 0])
        with pytest.raises(ValueError, match="text is given"):
            session.generate("abc", spans=[0, 0, 0])
        with pytest.raises(TypeError):
            session.chat("abc", spans=[0, 0, 0])
        with pytest.raises(ValueError, match='spans is "message", expected "token"'):
            session.chat("abc", spans="message")


# Generating


def test_generated_tokens_are_written_one_by_one(sentences: Case) -> None:
    prompt, spans = rng_ids(300, 14), rng_spans(300, 14)
    with sentences.model.session() as session, sentences.model.session() as by_hand:
        reply = session.generate(prompt, max_new_tokens=6, spans=spans)
        reply.read()
        logits = by_hand.feed(prompt, logits=True, spans=spans)[-1]
        tokens = []
        for _ in range(6):
            tokens.append(int(logits.argmax()))
            logits = by_hand.feed([tokens[-1]], logits=True, spans="token")[-1]
        assert reply.token_ids == tokens
        np.testing.assert_array_equal(session.memory, by_hand.memory)
        # Going on needs no spans: there is no prompt to write.
        assert session.generate(max_new_tokens=2).read() is not None


def test_measuring_a_reply_works_in_a_span_bundle(messages: Case) -> None:
    with messages.model.session() as session:
        session.feed(rng_ids(40), spans=rng_spans(40))
        session.end_turn()
        reply = session.generate(rng_ids(300), max_new_tokens=3, spans=rng_spans(300), measure=True)
        reply.read()
        assert reply.stats.delta_ratio > 1e-4


# Text


BOUNDARY = re.compile(r"(?:(?<=[.!?;:])|(?<=[.!?;:][\"')\]}”’»]))\s+|\n{2,}")
"""The rule with at most one closing mark behind the end of a sentence, for texts that have no more."""


def sentence_starts(text: str) -> list[int]:
    cuts = [match.start() for match in BOUNDARY.finditer(text)]
    return [0, *(cut for cut in cuts if text[:cut].strip() and text[cut:].strip())]


def spans_by_start(offsets: list[tuple[int, int]], starts: list[int]) -> np.ndarray:
    return np.asarray([np.searchsorted(starts, begin, side="right") - 1 for begin, _ in offsets], np.int32)


TEXTS = [
    "My dog is called Bruno. He likes (cold) water! Does he? Yes; mostly: at noon",
    'One line\nanother line.\n\nA paragraph: "Wait!" he said. (So be it.) Then\n\n\nthe end.',
    "Grüße! Ça va? Москва. 世界 👋🏽. naïve — fin.\n",
    "x",
    " \n",
]


@pytest.fixture(scope="session")
def tokenizer(sentences: Case) -> Tokenizer:
    return Tokenizer.from_file(str(sentences.bundle / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_text_writes_its_sentences_or_itself(sentences: Case, messages: Case, tokenizer, text) -> None:
    encoded = tokenizer.encode(text)
    for case, spans in (
        (sentences, spans_by_start(encoded.offsets, sentence_starts(text))),
        (messages, np.zeros(len(encoded.ids), np.int32)),
    ):
        with case.model.session() as by_text, case.model.session() as by_ids:
            a = by_text.feed(text, logits=True)
            b = by_ids.feed(encoded.ids, logits=True, spans=spans)
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(by_text.memory, by_ids.memory)
            # In the middle of a turn too, and as a prompt.
            assert by_text.generate(text, max_new_tokens=3).read() is not None
            by_ids.generate(encoded.ids, max_new_tokens=3, spans=spans).read()
            np.testing.assert_array_equal(by_text.memory, by_ids.memory)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([*"ab.!?;: \n", "\n\n", "é", ". ", "👋", '"', ")"]), max_size=60).map("".join))
def test_any_text_is_fed_as_the_rule_cuts_it(sentences: Case, tokenizer, text) -> None:
    if re.search(r"[.!?;:][\"')\]}”’»]{2,}", text):
        return  # beyond the pattern here; the engine's own tests have it
    encoded = tokenizer.encode(text)
    with sentences.model.session() as by_text, sentences.model.session() as by_ids:
        by_text.feed(text)
        by_ids.feed(encoded.ids, spans=spans_by_start(encoded.offsets, sentence_starts(text)))
        np.testing.assert_array_equal(by_text.memory, by_ids.memory)


@pytest.mark.parametrize("system", [None, "Be brief. Be kind."])
@pytest.mark.parametrize("message", ["My dog is Bruno. He's 5! Ok?", "user", "s", "Ça va? 世界", "  trimmed?  no."])
def test_a_chat_writes_the_message_or_its_sentences(
    sentences: Case, messages: Case, tokenizer, system, message
) -> None:
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    mine, tail = f"<|im_start|>user\n{message}<|im_end|>\n", "<|im_start|>assistant\n"
    encoded = tokenizer.encode(head + mine + tail)
    begins = np.asarray([begin for begin, _ in encoded.offsets])

    inside = (begins >= len(head)) & (begins < len(head + mine))
    whole = np.where(inside, 1, -1).astype(np.int32)
    at = len(head) + len("<|im_start|>user\n")
    starts = [at + start for start in sentence_starts(message)]
    cut = spans_by_start(encoded.offsets, starts)
    cut = np.where((begins >= at) & (begins < at + len(message)), cut, -1).astype(np.int32)
    for case, spans in ((messages, whole), (sentences, cut)):
        with case.model.session() as chatting, case.model.session() as by_hand:
            text = chatting.chat(message, system=system, max_new_tokens=4).read()
            reply = by_hand.generate(encoded.ids, max_new_tokens=4, spans=spans)
            assert reply.read() == text
            by_hand.end_turn()
            np.testing.assert_array_equal(chatting.memory, by_hand.memory)
            assert chatting.turns == 1
            # By token, on purpose.
            chatting.chat(message, system=system, max_new_tokens=4, spans="token").read()
            by_hand.generate(encoded.ids, max_new_tokens=4, spans="token").read()
            by_hand.end_turn()
            np.testing.assert_array_equal(chatting.memory, by_hand.memory)
            before = chatting.memory
            chatting.chat(message, write=False, max_new_tokens=2).read()
            np.testing.assert_array_equal(chatting.memory, before)


def test_the_chat_command_works_with_a_span_bundle(sentences: Case, monkeypatch, capsys) -> None:
    from deltamem_rt._cli import main

    lines = iter(["My dog is called Bruno. He is 5.", "/memory", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _="": next(lines))
    assert main(["chat", str(sentences.bundle), "--max-new-tokens", "4"]) == 0
    assert "tokens seen" in capsys.readouterr().out


def test_tokens_written_one_by_one_in_steps_of_many_are_those_of_each_alone(every: Case) -> None:
    def reads(seed: int) -> tuple[np.ndarray, np.ndarray]:
        with every.model.session() as session:
            ids = rng_ids(7 + seed, seed)
            session.feed(ids, spans=np.arange(len(ids)) // 3)
            logits = [session.feed([token], spans="token", logits=True)[0] for token in rng_ids(20, 50 + seed)]
            return np.stack(logits), session.memory

    alone = [reads(seed) for seed in range(4)]
    assert every.model.unbatched is None
    for _ in range(40):  # steps of a model as small as this are over before the next thread is there, mostly
        found = beside_prompts(every.model, rng_ids(600), [lambda s=seed: reads(s) for seed in range(4)])
        for one, expected in zip(found, alone, strict=True):
            assert_close("logits", one[0], expected[0], LOGITS)
            assert_close("states", one[1], expected[1], STATES)
        if every.model.stats.largest_step > 1:
            return
    pytest.fail(f"no two sessions ever shared a step: {every.model.stats}")
