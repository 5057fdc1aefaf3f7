"""The demo: what it promises in its JSON, that a seed repeats it, that nothing in it is scripted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltamem_rt as dm

TIMES = {
    "turn_ms_by_history",
    "turn_ms_spread_by_history",
    "reread_ms_by_history",
    "reread_how_by_history",
    "history_tokens_per_second",
    "seconds",
}


def demo(deltamem, *arguments: object) -> dict:
    outcome = deltamem("demo", "--json", *arguments)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


SMALL = ("--people", 2, "--facts", 3, "--stream-tokens", 60)


@pytest.mark.parametrize("seed", [7, 2605])
def test_the_memory_answers_and_the_bare_model_guesses(deltamem, seed):
    found = demo(deltamem, "--seed", seed)
    assert found["facts"] == 80
    assert found["recall_with_memory"] >= 0.95
    # Guessing 80 times at chance p scores above p + 3 sqrt(p (1 - p) / 80) once in some hundred runs.
    chance = found["recall_by_chance"]
    assert found["recall_without_memory"] <= chance + 3 * (chance * (1 - chance) / 80) ** 0.5
    assert found["restored_bit_for_bit"] is True
    assert found["streamed_tokens"] >= 10_000
    assert found["memory_bytes"] <= 64 * 1024
    for key in ("turn_ms_by_history", "reread_ms_by_history"):
        assert list(found[key]) == ["0", "1000", "10000", "100000"]
    turn = found["turn_ms_by_history"]
    assert turn["100000"] < 3 * turn["0"] + 1, "a turn after 100k tokens costs what it costs after none"
    assert found["reread_ms_by_history"]["100000"] > 20 * turn["100000"]


@pytest.mark.usefixtures("short_history")
def test_a_seed_repeats_a_run_exactly(deltamem):
    one, two = (demo(deltamem, "--seed", 11, *SMALL) for _ in range(2))
    assert {key: one[key] for key in one.keys() - TIMES} == {key: two[key] for key in two.keys() - TIMES}


@pytest.mark.usefixtures("short_history")
def test_without_a_seed_every_run_draws_afresh(deltamem):
    one, two = (demo(deltamem, *SMALL) for _ in range(2))
    assert one["seed"] != two["seed"]
    assert [row["told"] for row in one["questions"]] != [row["told"] for row in two["questions"]]


@pytest.mark.usefixtures("short_history")
def test_a_conversation_in_locomos_form_streams(deltamem, tmp_path):
    file = tmp_path / "conversation.json"
    session = [{"speaker": "Ada", "text": f"Shall we walk to hill number {i}?"} for i in range(40)]
    file.write_text(json.dumps([{"conversation": {"session_1_date_time": "8 May", "session_1": session}}]))
    found = demo(deltamem, "--seed", 1, "--stream", file, *SMALL)
    assert found["stream"] == "conversation.json"
    assert found["streamed_tokens"] >= 2 * 60


@pytest.mark.usefixtures("short_history")
def test_a_person_sees_memory_no_memory_and_truth_side_by_side(deltamem):
    outcome = deltamem("demo", "--seed", 5, *SMALL)
    assert outcome.code == 0, outcome.err
    for words in ("with memory", "without", "truth", "bit for bit", "tokens of history", "seed 5"):
        assert words in outcome.out
    assert "\x1b" not in outcome.out, "colours belong on a terminal only"


def test_a_bundle_of_token_ids_is_refused_in_one_line(deltamem, parity_bundle):
    outcome = deltamem("demo", parity_bundle("qwen3_tsw_qo"))
    assert outcome.code == 2
    assert "token ids only" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "no messages"), ("[1, 2]", "no messages"), ("[", "not JSON")],
)
def test_a_file_that_is_no_conversation_is_refused(deltamem, tmp_path, content, words):
    file = tmp_path / "talk.json"
    file.write_text(content)
    outcome = deltamem("demo", "--stream", file)
    assert outcome.code == 2
    assert words in outcome.err or "not JSON" in outcome.err


def test_a_missing_stream_is_named(deltamem, tmp_path):
    outcome = deltamem("demo", "--stream", tmp_path / "nowhere.txt")
    assert outcome.code == 2
    assert "nowhere.txt" in outcome.err


def test_more_facts_than_there_are_kinds_is_refused(deltamem):
    outcome = deltamem("demo", "--facts", 10_000)
    assert outcome.code == 2
    assert "--facts 10000" in outcome.err


def test_the_shipped_talk_is_there(bundle: Path):
    assert bundle == dm.default_bundle()
    assert (bundle / "stream.txt").stat().st_size > 1_000
