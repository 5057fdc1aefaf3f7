"""The evaluation of a bundle: opponents get what they should, controls and leaks are caught, figures and reports are what they say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from blake3 import blake3

import deltamem_rt as dm
from deltamem_export import cli
from deltamem_export.adapter import Adapter
from deltamem_export.bundle import export_bundle
from deltamem_export.errors import ExportError
from deltamem_export.evaluation import contest as contests
from deltamem_export.evaluation import grading, report, tasks
from deltamem_export.evaluation.contest import Answer, Contest
from deltamem_export.evaluation.conversations import read_dialogues, read_talk
from deltamem_export.evaluation.figures import Figure, perplexity_ratio
from deltamem_export.evaluation.languages import Fact, PlainEnglish, TinyEnglish
from deltamem_export.evaluation.leaks import refuse_leaks, refuse_recorded
from deltamem_export.evaluation.plots import Point, Series, line_plot
from deltamem_export.evaluation.prompts import Prompts, message
from deltamem_export.evaluation.run import choose_language
from deltamem_export.evaluation.work import Size, Work, about
from deltamem_export.training.language import BY_NAME, RELATIONS

SMALL = Size(16, 8, (1, 4), (0, 200), (2,), 400, 1)
LOCOMO = [
    {
        "sample_id": "small",
        "conversation": {
            "session_1_date_time": "1 May 2023",
            "session_1": [{"speaker": "Ann", "text": "I bought a kayak."}, {"speaker": "Bo", "text": "Great!"}],
            "session_2": [{"speaker": "Ann", "text": "The kayak leaks already, what a pity for the summer trip."}],
            "session_3_date_time": "a date without a session",
        },
        "qa": [
            {"question": "What did Ann buy?", "answer": "a kayak", "category": 4},
            {"question": "When?", "answer": 2023, "category": 2},
            {"question": "What did Bo buy?", "adversarial_answer": "a kayak", "category": 5},
        ],
    }
]
SESSIONS = {
    "kind": "conflict resolution",
    "sessions": [[{"role": "user", "content": "My dog is called Rex."}, {"role": "assistant", "content": "Good."}]],
    "questions": [{"question": "What is my dog called?", "answers": ["Rex"]}],
}


@pytest.fixture(scope="module")
def model() -> dm.Model:
    return dm.Model.load(dm.default_bundle(), device="cpu", threads=1)


@pytest.fixture(scope="module")
def contest(model: dm.Model) -> Contest:
    return Contest(model, retrieved=2)


@pytest.fixture
def work(contest: Contest) -> Work:
    return Work(contest, TinyEnglish(), SMALL)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *lines: object) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
        return path

    return write


# opponents ---------------------------------------------------------------------------------------------------------------


def facts_told(contest: Contest, person: contests.Person, count: int = 6) -> list[tuple[Fact, str]]:
    language, rng = TinyEnglish(), random.Random("told")
    facts = language.draw(rng, count)
    for fact in facts:
        contest.tell(person, language.tell(rng, fact), about(fact))
    return [(fact, language.ask(rng, fact.relation)) for fact in facts]


def test_memory_answers_from_the_state_and_none_knows_nothing(contest):
    with contest.person() as person:
        asked = facts_told(contest, person)
        right = {
            who: sum(TinyEnglish().right(f, contest.ask(who, person, q, about(f)).text) for f, q in asked)
            for who in ("memory", "none")
        }
    assert right["memory"] >= 5
    assert right["none"] == 0


def test_asking_changes_nothing_whoever_is_asked(contest):
    with contest.person() as person:
        asked = facts_told(contest, person, 3)
        before = person.session.memory.copy()
        for who in contest.opponents:
            first = [contest.ask(who, person, q).text for _, q in asked]
            assert first[::-1] == [contest.ask(who, person, q).text for _, q in reversed(asked)]
        np.testing.assert_array_equal(person.session.memory, before)
        assert not np.any(contest._empty.memory)


def test_the_context_is_the_whole_history_and_drops_the_oldest_turns_first(contest, model):
    with contest.person() as person:
        asked = facts_told(contest, person)
        answers = [contest.ask("context", person, q, about(f)) for f, q in asked]
        assert all(answer.found for answer in answers)
        messages = [m for p in person.history for m in (message("user", p.user), message("assistant", p.reply))]
        whole = contest.prompts.ids([*messages, message("user", asked[0][1])])
        assert answers[0].tokens_read == len(whole)
        narrow = Contest(model, ("context",), budget=len(whole) // 2)
        cut = [narrow.ask("context", person, q, about(f)) for f, q in asked]
        found = [answer.found for answer in cut]
        assert found == sorted(found)
        assert not found[0]
        assert found[-1]
        assert all(answer.tokens_read <= narrow.budget for answer in cut)


def test_bm25_puts_the_telling_turn_into_the_prompt_and_reads_little(contest):
    with contest.person() as person:
        asked = facts_told(contest, person)
        for _ in range(40):
            contest.hear(person, "It was a quiet evening at the harbour, and the boats came home late.", "I see.")
        answers = [contest.ask("bm25", person, q, about(f)) for f, q in asked]
        context = contest.ask("context", person, asked[0][1])
        assert sum(bool(answer.found) for answer in answers) >= 5
        assert max(answer.tokens_read for answer in answers) < context.tokens_read / 4
        assert contest.ask("bm25", person, "Xylophones?").tokens_read < 20  # shares no word with any turn
        kept = {who: contest.kept_bytes(who, person) for who in contest.opponents}
        assert kept["none"] == 0
        assert kept["memory"] == contest.model.geometry.bytes
        assert kept["memory"] + kept["context"] == kept["memory+context"]
        assert kept["bm25"] > kept["context"] > 1000


def test_likelihood_by_pieces_is_that_of_the_whole_and_a_memory_helps_text_it_has_seen(contest, monkeypatch):
    messages = [message("user", "My dog is called Rex."), message("assistant", "Got it. Your dog is called Rex.")]
    with contest.person() as person:
        whole, n = contest.likelihood(person.session, messages)
        after = person.session.memory.copy()
        person.session.reset()
        monkeypatch.setattr(contests, "LOGITS", 5 * 2048)
        pieces, m = contest.likelihood(person.session, messages)
        assert n == m == len(contest.prompts.ids(messages, reply=False)) - 1
        assert pieces == pytest.approx(whole, abs=1e-3)
        np.testing.assert_allclose(person.session.memory, after, atol=1e-5)
        again, _ = contest.likelihood(person.session, [message("user", "x"), messages[1]])
        person.session.reset()
        fresh, _ = contest.likelihood(person.session, [message("user", "x"), messages[1]])
        assert again < fresh


def test_a_budget_beyond_the_context_is_an_error(model):
    with pytest.raises(ExportError, match="--budget 5000: expected 1 to 2016"):
        Contest(model, budget=5000)


# controls ----------------------------------------------------------------------------------------------------------------


def test_controls_pass_on_a_model_that_remembers(work):
    sheet = tasks.controls(work)
    rows = {row["case"]: row["figures"] for row in sheet.rows()}
    assert sheet.failures == []
    assert rows["own memory"]["recall"]["value"] > 0.8
    assert rows["shuffled: another's memory"]["recall"]["value"] <= 0.2
    assert rows["memory off"]["recall"]["value"] == 0


@pytest.mark.parametrize(
    ("who", "case"),
    [
        ("memory", "shuffled: another's memory"),
        ("none", "memory off"),
        ("memory", "another user's facts"),
    ],
)
def test_controls_fail_a_model_that_answers_without_its_memory(work, monkeypatch, who, case):
    """`who` answers from a crib of what was first told about each relation, whoever asks."""
    crib: dict[str, str] = {}

    def tell(person: object, text: str, told: tuple[str, str]) -> str:
        crib.setdefault(*told)
        return ""

    def ask(asked: str, person: object, question: str, told: object = None) -> Answer:
        for name, value in crib.items():
            if asked == who and any(words[1:].rstrip("?") in question for words in BY_NAME[name].ask):
                return Answer(BY_NAME[name].answer(value), 1, 0.0)
        return Answer("", 1, 0.0)

    monkeypatch.setattr(work.contest, "tell", tell)
    monkeypatch.setattr(work.contest, "ask", ask)
    monkeypatch.setattr(work, "episodes", lambda facts: range(1))
    assert any(line.startswith(f"control failed: {case}: 1.000") for line in tasks.controls(work).failures)


# tasks -------------------------------------------------------------------------------------------------------------------


def test_readers_of_the_history_are_asked_fewer_of_the_same_questions(work):
    sheet = tasks.recall(work)
    n = {(row["case"], row["against"]): row["figures"]["recall"]["n"] for row in sheet.rows()}
    assert n["4 facts", "memory"] == n["4 facts", "bm25"] == 16
    assert n["4 facts", "context"] == n["4 facts", "memory+context"] == 8
    assert {"8 facts, pairs never trained", "8 facts, phrasings never trained"} <= {case for case, _ in n}
    right = {(row["case"], row["against"]): row["figures"]["recall"]["value"] for row in sheet.rows()}
    assert right["4 facts", "memory"] > 0.8
    assert right["4 facts", "none"] == 0


def test_changes_merges_and_two_steps_are_graded_by_the_last_word(work):
    rows = [row for task in (tasks.overwrite, tasks.merge, tasks.relations) for row in task(work).rows()]
    figures = {(row["case"], row["against"]): row["figures"] for row in rows}
    changed = figures["changed 2x", "memory"]
    assert changed["recall"]["value"] > 0.6
    assert changed["an old value said"]["value"] < 0.3
    assert figures["changed 2x", "context"]["in the prompt"]["value"] == 1
    assert figures["4 + 4 merged", "memory"]["recall"]["value"] > 0.6
    assert figures["4 + 4 merged", "context"]["in the prompt"]["value"] == 1
    assert figures["two steps: where does my sister live?", "context"]["recall"]["n"] == 8


def test_the_same_seed_repeats_every_figure(contest):
    def figures(seed: int) -> list[object]:
        return [row["figures"] for row in tasks.overwrite(Work(contest, TinyEnglish(), SMALL, seed)).rows()]

    assert figures(1) == figures(1) != figures(2)
    assert (
        Work(contest, TinyEnglish(), SMALL, 1).rng("a", 0).random()
        != Work(contest, TinyEnglish(), SMALL, 2).rng("a", 0).random()
    )


# languages ---------------------------------------------------------------------------------------------------------------


def test_plain_english_has_names_of_its_own_for_every_seed():
    language = PlainEnglish(1)
    names = [value for relation in language.relations for value in relation.values]
    assert len(language.relations) == 64
    assert len(set(names)) == len(names)
    assert names == [value for relation in PlainEnglish(1).relations for value in relation.values]
    assert len(set(names) & {v for relation in PlainEnglish(2).relations for v in relation.values}) < 40
    rng = random.Random(0)
    fact = language.draw(rng, 1)[0]
    assert fact.value in language.tell(rng, fact)
    assert language.right(fact, f"It is {fact.value}.")
    other = language.changed(rng, fact)
    assert not language.right(fact, f"It is {fact.value} or {other.value}.")
    assert language.invents_nothing(fact.relation, "No idea.")
    assert not language.invents_nothing(fact.relation, f"{fact.value}?")
    with pytest.raises(ExportError, match="nothing is known of what another bundle"):
        language.draw(rng, 1, pairs="held-out")


@pytest.mark.parametrize("language", [TinyEnglish(), PlainEnglish(3)], ids=lambda language: language.name)
def test_two_steps_have_one_answer(language):
    for seed in range(20):
        chains = language.chains(random.Random(seed), 4)
        people = [chain.told[1].split(" lives in ")[0] for chain in chains]
        assert len(set(people)) == 4
        for person, chain in zip(people, chains, strict=True):
            assert person in chain.told[0]
            assert chain.answer.value in chain.told[1]
            assert person not in chain.question


def test_held_out_pairs_are_held_out():
    drawn = TinyEnglish().draw(random.Random(0), 40, "held-out")
    assert all(fact.value in fact.relation.held_out_values for fact in drawn)


# leaks -------------------------------------------------------------------------------------------------------------------

HELD = next(r for r in RELATIONS if r.held_out_values)


def test_trained_pairs_and_phrasings_in_training_data_are_no_leak(written):
    path = written(
        "train.jsonl", {"sessions": [[{"content": HELD.trained_tell[0].format(value=HELD.trained_values[0])}]]}
    )
    assert refuse_leaks(TinyEnglish(), [], [path]) == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            f"Hey! {HELD.trained_tell[0].format(value=HELD.held_out_values[0])}",
            f"{HELD.name} = {HELD.held_out_values[0]}",
        ),
        (HELD.answer(HELD.held_out_values[0]).upper(), f"{HELD.name} = {HELD.held_out_values[0]}"),
        (HELD.tell[HELD.held_out_tell].format(value=HELD.trained_values[0]), "the phrasing"),
        (f"Tell me, {HELD.ask[HELD.held_out_ask]}", "the phrasing"),
    ],
)
def test_what_is_held_out_in_training_data_is_named_with_its_place(written, text, named):
    path = written("train.jsonl", {"harmless": "Hello."}, {"sessions": [[{"role": "user", "content": text}]]})
    with pytest.raises(ExportError, match=r"train\.jsonl, line 2") as raised:
        refuse_leaks(TinyEnglish(), [], [path])
    assert named in str(raised.value)
    assert "train again" in str(raised.value)


def test_a_made_up_name_or_a_question_of_the_data_in_training_data_is_a_leak(written):
    language = PlainEnglish(5)
    name = language.relations[3].values[7]
    path = written("train.jsonl", f"I met {name} yesterday.")
    with pytest.raises(ExportError, match=f"the name '{name}'.*another --seed"):
        refuse_leaks(language, [], [path])
    assert refuse_leaks(PlainEnglish(6), [], [path]) == 1
    dialogues = read_dialogues(written("locomo.json", LOCOMO))
    with pytest.raises(ExportError, match="the question 'What did Ann buy"):
        refuse_leaks(PlainEnglish(6), dialogues, [written("questions.jsonl", {"q": "what did ann buy"})])
    with pytest.raises(ExportError, match="the message 'Ann: The kayak leaks"):
        refuse_leaks(PlainEnglish(6), dialogues, [written("talk.json", LOCOMO[0]["conversation"])])


def test_a_conversation_that_the_card_names_as_training_data_is_refused(written):
    seen, unseen = written("seen.jsonl", SESSIONS), written("unseen.jsonl", SESSIONS, SESSIONS)
    card = {"data": {"file": "elsewhere.jsonl", "blake3": blake3(seen.read_bytes()).hexdigest()}}
    refuse_recorded(card, [unseen])
    refuse_recorded({"data": "generated English"}, [seen])
    with pytest.raises(ExportError, match=r"seen\.jsonl: is what the bundle was trained on"):
        refuse_recorded(card, [unseen, seen])


@pytest.mark.parametrize(("name", "content"), [("x.json", b"{"), ("x.txt", b"\xff\xfe\x00")])
def test_training_data_that_cannot_be_read_is_no_clean_bill(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ExportError, match=name):
        refuse_leaks(TinyEnglish(), [], [tmp_path / name])


# conversations and grades ------------------------------------------------------------------------------------------------


def test_locomo_and_lines_of_sessions_are_read(written):
    (locomo,) = read_dialogues(written("locomo.json", LOCOMO))
    assert [[user for user, _ in session] for session in locomo.sessions] == [
        ["[1 May 2023]", "Ann: I bought a kayak.", "Bo: Great!"],
        ["Ann: The kayak leaks already, what a pity for the summer trip."],
    ]
    assert [(q.answers, q.kind, q.wrong) for q in locomo.questions] == [
        (("a kayak",), "one session", ""),
        (("2023",), "time", ""),
        ((), "not answerable", "a kayak"),
    ]
    (sessions,) = read_dialogues(written("mine.jsonl", SESSIONS))
    assert sessions.sessions == ((("My dog is called Rex.", "Good."),),)
    assert sessions.questions[0].kind == "conflict resolution"
    assert read_talk(written("locomo2.json", LOCOMO))[0].startswith("Ann: I bought a kayak.")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"questions": []}, "sessions"),
        ({"sessions": [[{"role": "robot", "content": "x"}]]}, "robot"),
        ({"sessions": [], "questions": [{"question": "x", "answers": "y"}]}, "must be a list"),
        ("{", "line 2"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_with_its_line(written, line, what):
    path = written("mine.jsonl", SESSIONS, line)
    with pytest.raises(ExportError, match=r"line 2.*sessions") as raised:
        read_dialogues(path)
    assert what in str(raised.value)


def test_answers_in_free_words_are_graded_as_in_squad():
    assert grading.token_f1("The kayak, an old one!", ["kayak"]) == pytest.approx(0.5)
    assert grading.token_f1("nothing", ["a kayak", "Nothing."]) == 1
    assert grading.token_f1("blue", ["kayak"]) == 0
    assert grading.contains("She bought a kayak in May.", ["the kayak"])
    assert not grading.contains("She went kayaking.", ["kayak"])
    assert grading.equals("A kayak.", ["kayak"])


# figures and the report --------------------------------------------------------------------------------------------------


def test_an_interval_knows_that_questions_of_one_episode_go_together():
    alone = Figure.resampled([1, 0] * 50, [1] * 100)
    together = Figure.resampled([10, 0] * 5, [10] * 10)
    assert alone.value == together.value == 0.5
    assert alone.n == together.n == 100
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert Figure.resampled([8] * 10, [8] * 10) == Figure.of(80, 80)
    one = Figure.resampled([7], [8])
    assert one.low < 0.7 < 0.9 < one.high


def test_bootstrap_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        share = rng.beta(8, 2, size=40)  # episodes differ, 0.8 on average
        right = rng.binomial(8, share)
        figure = Figure.resampled(right, [8] * 40, trial)
        held += figure.low <= 0.8 <= figure.high
    assert 180 <= held <= 199


def test_paired_ratios_are_narrower_than_what_they_are_made_of():
    rng = np.random.default_rng(1)
    base = rng.integers(1, 9, 60)
    ratio = Figure.paired(base * 0.5, base, 480)
    assert (ratio.value, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
    assert perplexity_ratio([10.0, 10.0], [10.0, 10.0], [5, 5]).value == 1
    assert perplexity_ratio([0.0, 0.0], [5.0, 5.0], [5, 5]).value == pytest.approx(np.exp(-1), abs=1e-4)


@pytest.mark.parametrize("axis", ["even", "linear", "log"])
def test_a_plot_is_xml_with_every_mark(axis):
    points = [Point(x, 0.5, 0.4, 0.6) for x in (1, 10, 1000)]
    svg = line_plot(
        [Series("memory & <more>", "#000", points), Series("none", "#111", points, dashed=True)], "x", "y", axis
    )
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//{*}circle")) == 6
    assert "memory & <more>" in [text.text for text in root.findall(".//{*}text")]
    assert line_plot([], "x", "y") == ""


def run(*arguments: object) -> int:
    return cli.main(["eval", *map(str, arguments)])


def test_the_command_writes_a_report_that_stands_alone_and_goes_on(tmp_path, written, capsys, monkeypatch):
    monkeypatch.setattr(Size, "quick", lambda: SMALL)
    locomo, mine = written("locomo.json", LOCOMO), written("mine.jsonl", SESSIONS)
    common = ("--report", tmp_path / "report", "--quick", "--cases", 8, "--reader-cases", 4, "--threads", 1)
    common += ("--drift-tokens", 300, "--drift-streams", 1, "--data", locomo, "--data", mine)
    assert run(*common) == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=lambda what: pytest.fail(what))
    assert list(found["tasks"]) == [
        "controls", "recall", "distance", "overwrite", "relations", "merge", "drift", "harm", "conversation",
    ]  # fmt: skip
    cases = {(row["case"], row["against"]): row for task in found["tasks"].values() for row in task["rows"]}
    row = cases["4 facts", "memory"]
    assert row["figures"]["recall"]["n"] == 8
    assert row["cost"]["tokens_read"] < 20
    assert row["cost"]["kept_bytes"] == found["bundle"]["memory_bytes"]
    assert cases["conflict resolution", "memory"]["figures"]["token F1"]["n"] == 1
    assert "the wrong answer not given" in cases["not answerable", "bm25"]["figures"]
    assert ("next session, with the memory of the earlier ones over without", "memory") in cases
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<svg") == 6
    assert "<script" not in page
    assert "<link" not in page
    assert "Controls passed" in page
    capsys.readouterr()
    assert run(*common, "--resume", "--tasks", "recall") == 0  # and the controls, which come with it
    assert capsys.readouterr().err.count("taken from") == 2
    again = json.loads((tmp_path / "report" / "report.json").read_text())
    assert again["tasks"] == found["tasks"]


def test_a_report_of_another_bundle_is_not_gone_on_with(tmp_path, capsys):
    common = ("--report", tmp_path, "--quick", "--cases", 8, "--threads", 1, "--tasks", "merge", "--against", "none")
    assert run(*common) == 0
    found = json.loads((tmp_path / report.JSON_FILE).read_text())
    found["bundle"]["fingerprint"] = "0" * 64
    (tmp_path / report.JSON_FILE).write_text(json.dumps(found))
    assert run(*common, "--resume") == cli.USER_ERROR
    assert "give another --report" in capsys.readouterr().err
    (tmp_path / report.JSON_FILE).write_text("{}")
    assert run(*common, "--resume") == cli.USER_ERROR
    assert "leave out --resume" in capsys.readouterr().err


def test_a_failed_control_is_exit_code_1_and_stands_on_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TinyEnglish, "right", lambda self, fact, reply: True)
    assert run("--report", tmp_path, "--quick", "--cases", 8, "--threads", 1, "--tasks", "controls") == 1
    assert "control failed: shuffled" in capsys.readouterr().err
    assert "control failed: shuffled" in (tmp_path / report.PAGE).read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tasks", "conversation"), "give --data FILE"),
        (("--bundle", "nowhere"), "nowhere"),
        (("--budget", "9999"), "expected 1 to"),
        (("--talk", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_a_person_did_wrong_is_one_line(tmp_path, capsys, arguments, says):
    assert run("--report", tmp_path / "report", "--threads", 1, *arguments) == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_a_leak_is_an_error_of_the_command(tmp_path, written, capsys):
    path = written("train.jsonl", {"text": HELD.answer(HELD.held_out_values[0])})
    assert run("--report", tmp_path / "report", "--training", path) == cli.USER_ERROR
    assert "holds what the evaluation calls unseen" in capsys.readouterr().err


def test_a_bundle_without_a_chat_template_or_of_another_language_is_refused():
    with pytest.raises(ExportError, match="my-bundle has no chat template"):
        Prompts(SimpleNamespace(manifest={"text": None}, path=Path("my-bundle")))
    with pytest.raises(ExportError, match=r"my-bundle: its card names no recipe.*leave out --language tiny"):
        choose_language("tiny", {}, 0, Path("my-bundle"))
    assert choose_language("auto", {}, 0, Path("my-bundle")).name == "plain"


@pytest.mark.parametrize("granularity", ["token", "message_mean"])
def test_another_bundle_is_asked_in_plain_english(tmp_path, parity_data, granularity):
    """Random weights under a tokenizer of characters, which remember nothing: everything runs, and no control is failed."""
    torch.set_num_threads(1)
    source = parity_data / "llama_tsw_qo"
    own = Adapter.load(source / "adapter")
    adapter = Adapter(replace(own.config, memory_write_granularity=granularity), own.layers)
    bundle = export_bundle(source / "backbone", adapter, tmp_path / "bundle", check=False, say=lambda _: None)
    common = ("--quick", "--cases", 4, "--reader-cases", 2, "--threads", 1, "--max-new-tokens", 4)
    assert run("--bundle", bundle, "--report", tmp_path, *common, "--tasks", "controls,overwrite,merge,harm") == 0
    found = json.loads((tmp_path / report.JSON_FILE).read_text())
    assert found["language"] == "plain"
    assert "nothing is known" in found["training"]
    rows = {(row["case"], row["against"]): row["figures"] for row in found["tasks"]["overwrite"]["rows"]}
    assert rows["changed 1x", "context"]["in the prompt"]["value"] == 1


def test_nothing_of_it_imports_pytorch():
    code = "import sys, deltamem_export.evaluation.run; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
