"""The shipped bundle, through the runtime: it remembers facts that it was told in turns whose context is gone.

What the card says was measured in PyTorch over more cases; this holds the exported bundle and the Rust engine to it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from deltamem_export.training.demo import demo_facts, stream_text
from deltamem_export.training.evaluate import FIRST_SEED
from deltamem_export.training.language import Speaker, is_correct, says_unknown

dm = pytest.importorskip("deltamem_rt", reason="the runtime is not installed: make setup")
BUNDLE = Path(__file__).resolve().parents[2] / "models" / "tiny-assistant"


@pytest.fixture(scope="module")
def model() -> Any:
    return dm.Model.load(str(BUNDLE), device="cpu")


def conversation(model: Any, seed: int, talk: bool, remember: bool = True) -> tuple[int, int, int]:
    """Eight facts in eight turns, talk, eight questions and two about what was never told: right answers, of how many, invented ones."""
    speaker = Speaker(random.Random(FIRST_SEED + 777_000 + seed), evaluation=True)
    session = model.session()
    drawn = speaker.draw_facts(10, "any")
    facts, strangers = drawn[:8], drawn[8:]
    for relation, value in facts:
        "".join(session.chat(speaker.tell(relation, value).user))
    if talk:
        for line in stream_text().splitlines()[:60]:
            session.feed(f"<|user|>{line}<|end|><|assistant|>")
            session.end_turn()
    if not remember:
        session.reset()
    right = sum(is_correct(r, v, "".join(session.chat(speaker.ask(r, v).user))) for r, v in facts)
    invented = sum(not says_unknown("".join(session.chat(speaker.ask(r, None).user))) for r, _ in strangers)
    return right, len(facts), invented


@pytest.mark.parametrize("talk", [False, True], ids=["at once", "after a streamed conversation"])
def test_eight_facts_in_eight_turns_are_recalled(model: Any, talk: bool) -> None:
    results = [conversation(model, seed, talk) for seed in range(20)]
    right, asked = sum(r for r, _, _ in results), sum(n for _, n, _ in results)
    assert right >= 0.95 * asked, f"{right} of {asked}"
    assert sum(i for _, _, i in results) <= 4


def test_without_its_memory_it_knows_nothing(model: Any) -> None:
    assert sum(conversation(model, seed, talk=False, remember=False)[0] for seed in range(5)) == 0


def test_its_demo_files_are_what_the_language_says() -> None:
    assert json.loads((BUNDLE / "demo.json").read_text(encoding="utf-8")) == demo_facts()
    assert (BUNDLE / "stream.txt").read_text(encoding="utf-8") == stream_text()
