"""A memory trained on a decoder of one's own: data are checked, contexts are what the runtime reads, each term of the loss does its part,
recall rises on unseen conversations, a killed run goes on to the same bytes, and the runtime agrees with what comes out."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltamem_export import cli
from deltamem_export.adapter import Adapter
from deltamem_export.backbone import Backbone
from deltamem_export.errors import ExportError
from deltamem_export.finetuning import objective as objectives
from deltamem_export.finetuning import recipe as recipes
from deltamem_export.finetuning.cli import shown
from deltamem_export.finetuning.conversations import Message, Question, read_data
from deltamem_export.finetuning.episodes import Episode, Level, Planner
from deltamem_export.finetuning.objective import TERMS, Objective, Scales, Sums
from deltamem_export.finetuning.recipe import FinetuningRecipe, changed, read_recipe
from deltamem_export.finetuning.rendering import Context, Renderer, pieces
from deltamem_export.finetuning.run import finetune
from deltamem_export.finetuning.trainer import Trainer, schedule
from deltamem_export.reference import attach, scan
from deltamem_export.scan import chunked_scan
from tiny import save_backbone

KEYS = ("dog", "cat", "town", "boat")
VALUES = ("rex", "tom", "oslo", "bruno", "kiel", "ida", "max", "leo")
WORDS = (
    "<pad>",
    "<bos>",
    "<end>",
    "<user>",
    "<bot>",
    "my",
    "is",
    "what",
    "?",
    "ok",
    "never",
    "told",
    "rain",
    "sun",
    "today",
    ".",
)
WORDS += ("be", "brief")
TEMPLATE = (
    "{%- for m in messages -%}"
    "{{- '<' + {'user': 'user', 'assistant': 'bot', 'system': 'bos'}[m['role']] + '> ' + m['content'] + ' <end> ' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<bot> ' -}}{%- endif -%}"
)
SMALL = FinetuningRecipe(rank=8, batch=4, steps=10, rate=1e-2, most_facts=2, evaluate_every=5, checkpoint_every=4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def add_tokenizer(folder: Path) -> Path:
    """Words as tokens, and a chat template that ends every message."""
    vocabulary = {word: i for i, word in enumerate((*WORDS, *KEYS, *VALUES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<bos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`backbone("llama")`: the folder of a tiny random decoder with words as tokens."""
    made: dict[str, Path] = {}

    def get(family: str = "llama") -> Path:
        if family not in made:
            more = {"hidden_size": 64, "num_hidden_layers": 2} if family == "llama" else {}
            made[family] = add_tokenizer(
                save_backbone(tmp_path_factory.mktemp(family.replace(" ", "-")), family, **more)
            )
        return made[family]

    return get


def said(user: str, reply: str = "ok") -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]


def conversation(rng: random.Random, facts: int = 2, untold: bool = False) -> dict[str, Any]:
    """Facts in sessions of their own, one session of talk, and a question for each fact."""
    keys = rng.sample(KEYS, facts + untold)
    values = {k: rng.choice(VALUES) for k in keys[:facts]}
    sessions = [said(f"my {k} is {v}") for k, v in values.items()]
    at = rng.randint(0, facts)
    sessions.insert(
        at, said(f"today {rng.choice(['rain', 'sun'])} {' '.join(rng.choices(['rain', 'sun', 'is'], k=3))}")
    )
    questions: list[dict[str, Any]] = [
        {"question": f"what is my {k} ?", "answer": v, "evidence": [i + (i >= at)]}
        for i, (k, v) in enumerate(values.items())
    ]
    questions += [{"question": f"what is my {k} ?", "answer": "never told", "evidence": []} for k in keys[facts:]]
    return {"sessions": sessions, "questions": questions}


def write(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = random.Random(0)
    return write(tmp_path / "data.jsonl", [conversation(rng, untold=i % 2 == 0) for i in range(40)])


def trainer(folder: Path, data: Path, recipe: FinetuningRecipe = SMALL, seed: int = 0) -> Trainer:
    train, held_out = read_data(data).split(recipe.held_out)
    return Trainer(Backbone.load(folder), recipe, train, held_out, seed)


def shake(handle: Any) -> None:
    """Weights that are not small, so that the memory does something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 1.0))


# ---------------------------------------------------------------------- data

GOOD = {"sessions": [said("my dog is rex")], "questions": [{"question": "what is my dog ?", "answer": "rex"}]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is a list, expected an object"),
        ({"sessions": GOOD["sessions"]}, "questions is missing"),
        (GOOD | {"sesions": []}, "sesions is not known; did you mean sessions?"),
        (GOOD | {"sessions": []}, "sessions is empty"),
        (GOOD | {"sessions": [[]]}, "sessions[0] is empty"),
        (GOOD | {"sessions": [["hello"]]}, "sessions[0][0] is a string"),
        (
            GOOD | {"sessions": [[{"role": "Ann", "content": "x"}]]},
            "sessions[0][0].role is 'Ann', expected system or user",
        ),
        (GOOD | {"sessions": [[{"role": "user", "content": " "}]]}, "sessions[0][0].content is empty"),
        (GOOD | {"questions": [{"question": "x"}]}, "questions[0] has neither of answer and answers"),
        (GOOD | {"questions": [{"question": "x", "answer": 3}]}, "questions[0].answer is a number"),
        (
            GOOD | {"questions": [{"question": "x", "answer": "y", "evidence": [1]}]},
            "evidence names session 1, expected 0 to 0",
        ),
        (
            GOOD | {"questions": [{"question": "x", "answer": "y", "evidence": "0"}]},
            "expected a list of session numbers",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: Any, words: str, capsys: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    assert cli.main(["train", "--data", str(path), "--check-data"]) == 2
    error = capsys.readouterr().err
    assert "line 3: " in error
    assert words in error


def test_good_data_are_counted_and_split_by_their_content(tmp_path: Path, data: Path, capsys: Any) -> None:
    assert cli.main(["train", "--data", str(data), "--check-data"]) == 0
    assert "good" in capsys.readouterr().out
    read = read_data(data)
    lines = data.read_text().splitlines()
    counts = read.counts()
    assert counts["conversations"] + counts["repeated"] == 40
    assert (counts["questions"], counts["evidence_not_said"]) == (counts["with_evidence"] + counts["never_told"], 0)
    train, held_out = read.split(0.2)
    assert len(held_out) == -(-len(read.conversations) // 5)
    # Another order, and lines twice: the same conversations are held out.
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(reversed([*lines, *lines])) + "\n")
    again = read_data(mixed)
    assert again.counts()["repeated"] == 40 + counts["repeated"]
    assert {c.digest for c in again.split(0.2)[1]} == {c.digest for c in held_out}
    assert not {c.digest for c in train} & {c.digest for c in held_out}
    with pytest.raises(ExportError, match="none left to train on"):
        read_data(write(tmp_path / "one.jsonl", [GOOD])).split(0.1)


# ---------------------------------------------------------------------- settings


def test_a_recipe_in_yaml_changes_what_it_names_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: paper-tsw\nrank: 16\nlayers: [1, 3]\nrate: 1\n")
    mine = read_recipe(path)
    assert mine == replace(recipes.PAPER, rank=16, layers=(1, 3), rate=1.0)
    for text, words in (
        ("rnak: 3", "setting rnak is not known; did you mean rank?"),
        ("base: paper-tws", "did you mean paper-tsw?"),
        ("rank: eight", "setting rank is 'eight', expected a whole number"),
        ("couple_lambda: 1", "expected true or false"),
        ("write: word", "expected token or message or sentence"),
        ("held_out: 2", "expected 0 to 0.9"),
        ("- rank", "expected settings"),
        ("rank: !!python/object/apply:os.getcwd []", "is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ExportError) as error:
            read_recipe(path)
        assert words in str(error.value)


def test_the_papers_recipes_hold_the_papers_facts() -> None:
    for name, write_, heads in (("paper-tsw", "token", 1), ("paper-ssw", "message", 1), ("paper-msw", "token", 4)):
        r = recipes.RECIPES[name]
        assert (r.write, r.heads) == (write_, heads)
        assert (r.written_tokens, r.read_tokens, r.context) == (8192, 512, "message")
        assert (r.rate, r.warm_up, r.weight_decay, r.epochs, r.batch * r.accumulate) == (2e-4, 0.1, 0.0, 1.0, 32)
        assert (r.teacher_weight, r.sparsity_weight, r.sparsity_target) == (0.02, 0.01, 0.05)
        assert (r.state_only, r.beta_bias) == (0.2, -1.5)
        assert r.margin_weight > 0
        assert r.anchor_weight > 0


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule(i, 100, 0.1) for i in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.001


# ---------------------------------------------------------------------- tokens


def rendered(folder: Path, recipe: FinetuningRecipe = SMALL) -> tuple[Renderer, Callable[[Context], str]]:
    renderer = Renderer(Backbone.load(folder), recipe)
    return renderer, lambda context: renderer.tokenizer.decode(context.ids)


def test_a_turn_is_what_the_runtime_reads(backbone: Callable[..., Path]) -> None:
    renderer, text = rendered(backbone())
    turn = renderer.turn([Message("user", "my dog is rex"), Message("assistant", " ok ")])
    assert text(turn) == "<user> my dog is rex <end> <bot> ok"
    assert text(renderer.turn([Message("user", "today rain")])) == "<user> today rain <end>"
    assert text(renderer.turn([Message("assistant", "ok")])) == "<bot> ok"
    asked = renderer.asked(Question("what is my dog ?", "never told", None))
    assert text(asked.context) == "<user> what is my dog ? <end> <bot> never told"
    assert renderer.tokenizer.decode(asked.targets) == "never told <end>"
    # A turn that stays in context; a user without a reply becomes one message with the question.
    assert text(renderer.asked(Question("what ?", "ok", None), [Message("user", "today sun")]).context) == (
        "<user> today sun what ? <end> <bot> ok"
    )


def test_spans_cover_messages_and_sentences(backbone: Callable[..., Path]) -> None:
    turn = [
        Message("system", "be brief"),
        Message("user", "my dog is rex . today rain"),
        Message("assistant", "ok . ok"),
    ]
    renderer, text = rendered(backbone(), replace(SMALL, write="message"))
    context = renderer.turn(turn)
    assert text(context) == "<bos> be brief <end> <user> my dog is rex . today rain <end> <bot> ok . ok"
    assert context.spans == (*[-1] * 4, *[0] * 9, -1, 1, 1, 1)
    assert renderer.turn(turn[2:]).spans == (0, 0, 0, 0)
    assert renderer.turn(turn[1:2]).spans == (0,) * 9
    context = rendered(backbone(), replace(SMALL, write="sentence"))[0].turn(turn)
    assert context.spans == (*[-1] * 5, *[0] * 5, 1, 1, -1, -1, 2, 2, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four; five: six", ["One.", " Two!", " Three?", " Four;", " five:", " six"]),
        (
            'He said "Go!" (now.) \u201cWhy?\u201d I went.',
            ['He said "Go!"', " (now.)", " \u201cWhy?\u201d", " I went."],
        ),
        ("3.14 and a.b:c, e.g. this", ["3.14 and a.b:c, e.g.", " this"]),
        ("a\nb\n\nc\n\n\nd", ["a\nb", "\n\nc", "\n\n\nd"]),
        ("kept \n\nwith", ["kept ", "\n\nwith"]),
        ("  \n\n One. ", ["  \n\n One. "]),
        ("(a) b", ["(a) b"]),
    ],
)
def test_sentences_are_the_runtimes(text: str, expected: list[str]) -> None:
    assert [text[a:b] for a, b in pieces(text, 0)] == expected


# ---------------------------------------------------------------------- episodes


def test_the_longest_sessions_go_first_and_evidence_stays(backbone: Callable[..., Path], tmp_path: Path) -> None:
    entry = {
        "sessions": [
            said("today " + "rain " * 30),
            said("my dog is rex"),
            said("today sun"),
            said("today " + "sun " * 9),
        ],
        "questions": [{"question": "what is my dog ?", "answer": "rex", "evidence": [1]}],
    }
    renderer, text = rendered(backbone(), replace(SMALL, harm_turns=3))
    encoded = renderer.conversation(read_data(write(tmp_path / "d.jsonl", [entry])).conversations[0])
    planner = Planner(renderer, renderer.recipe, [encoded])
    sizes = [encoded.tokens(i) for i in range(4)]
    assert planner.least(encoded) == sizes[1]
    for tokens, sessions in (
        (sizes[1], [1]),
        (sum(sizes[1:3]), [1, 2]),
        (sum(sizes[1:]), [1, 2, 3]),
        (sum(sizes), [0, 1, 2, 3]),
    ):
        plan = planner.plan(encoded, 1, tokens, random.Random(0))
        assert plan is not None
        assert [c for w in plan.windows for c in w.contexts] == [encoded.turns[i][0] for i in sessions]
        assert all("dog" not in text(c) for c in plan.harmless)
    assert planner.plan(encoded, 1, sizes[1] - 1, random.Random(0)) is None
    # Where evidence is not said, nothing is dropped.
    del entry["questions"][0]["evidence"]
    whole = renderer.conversation(read_data(write(tmp_path / "d.jsonl", [entry])).conversations[0])
    assert planner.least(whole) == sum(sizes)
    assert planner.plan(whole, 1, sum(sizes) - 1, random.Random(0)) is None
    data = write(tmp_path / "d.jsonl", [entry, entry | {"sessions": entry["sessions"] * 2}])
    with pytest.raises(ExportError, match="none of the 1 conversations fits 8 written tokens"):
        trainer(backbone(), data, replace(SMALL, written_tokens=8))


def test_questions_come_behind_their_evidence(backbone: Callable[..., Path], data: Path) -> None:
    recipe = replace(SMALL, bptt_tokens=10)
    made = trainer(backbone(), data, recipe)
    rng = random.Random(0)
    later = 0
    for encoded in made.train:
        plan = made.planner.plan(encoded, 2, 8192, rng)
        assert plan is not None
        assert len(plan.windows) == 3
        seen: list[Context] = []
        for window in plan.windows:
            seen += window.contexts
            for read in (r for r in window.reads if r.told):
                value = read.asked.context.ids[-1]
                assert any(value in c.ids for c in seen)
                later += not any(value in c.ids for c in window.contexts)
    assert later > 5


def test_the_level_grows_with_right_answers_only() -> None:
    recipe = replace(SMALL, most_facts=8, written_tokens=4096)
    level = Level(1.0, 512.0)
    for _ in range(20):
        level.learn(recipe, 1, 4)
    assert (level.facts, level.tokens) == (1.0, 512.0)
    for _ in range(100):
        level.learn(recipe, 4, 4)
    assert (level.facts, level.tokens) == (8.0, 4096.0)


# ---------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    ("family", "write_"),
    [
        ("llama", "sentence"),
        *((f, w) for f in ("llama", "mistral", "phi3", "gemma2", "lfm2") for w in ("token", "message")),
    ],
)
def test_a_window_at_once_is_the_turns_one_by_one(
    backbone: Callable[..., Path], data: Path, family: str, write_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "llama":
        monkeypatch.setattr(objectives, "FEW_TOKENS", 0)  # more than half of it padding: in several calls
    recipe = replace(SMALL, write=write_, layers=(1,) if family == "lfm2" else ())
    made = trainer(backbone(family), data, recipe)
    shake(made.handle)
    objective, handle = made.objective, made.handle
    contexts = [[c for s in e.turns for c in s][: 2 + i] for i, e in enumerate(made.train[:2])]
    contexts[1].insert(1, Context(contexts[1][0].ids * 4, contexts[1][0].spans * 4))
    if family == "llama":
        assert len(objective._calls([[*contexts[0], Context((), ()), Context((), ())], contexts[1]])) > 1
    with torch.no_grad():
        states, _ = objective.write(contexts, objective.zero(2))
        asked = [e.alone[0] for e in made.train[:2]]
        answered = objective.read(asked, states)
    handle.scan = scan
    at = 0
    for row, question, state in zip(contexts, asked, states, strict=True):
        handle.reset(1)
        with torch.no_grad():
            for context in row:
                handle.spans = torch.tensor([context.spans]) if write_ != "token" else None
                objective.model(input_ids=torch.tensor([context.ids]), use_cache=False)
            assert handle.state is not None
            assert (handle.state[0] - state).abs().max() < 1e-5
            assert state.abs().max() > 0.1
            handle.spans = torch.tensor([question.context.spans]) if write_ != "token" else None
            logits = objective.model(input_ids=torch.tensor([question.context.ids]), use_cache=False).logits[0]
        wanted = logits[question.start - 1 :]
        assert (answered.logits[at : at + len(wanted)] - wanted).abs().max() < 1e-4
        at += len(wanted)
    assert at == len(answered.logits)


def test_a_cut_of_the_stream_cuts_gradients_and_nothing_else(backbone: Callable[..., Path], data: Path) -> None:
    losses, slopes = [], []
    for tokens in (8192, 10):
        made = trainer(backbone(), data, replace(SMALL, bptt_tokens=tokens, harm_weight=0.0))
        shake(made.handle)
        sums = Sums()
        episode = made.planner.plan(made.train[0], 2, 8192, random.Random(1), at_end=True)
        assert episode is not None
        made.objective.step([episode], Scales.of([[episode]]), random.Random(0), sums)
        losses.append(sums.terms["answer"])
        slopes.append(torch.cat([p.grad.flatten() for p in made.parameters if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (slopes[0] - slopes[1]).abs().max() > 1e-3


def only(term: str, **more: Any) -> FinetuningRecipe:
    weights: dict[str, Any] = {f"{name}_weight": float(name == term) for name in TERMS}
    return changed(SMALL, weights | {"harm_turns": 1} | more)


def term_of(made: Trainer, term: str, episodes: list[Episode]) -> float:
    sums = Sums()
    made.optimizer.zero_grad()
    made.objective.step(episodes, Scales.of([episodes]), random.Random(0), sums)
    return sums.terms[term]


@pytest.mark.parametrize("term", TERMS)
def test_every_term_sees_a_bad_memory_and_training_on_it_alone_mends_it(
    backbone: Callable[..., Path], data: Path, term: str
) -> None:
    made = trainer(backbone(), data, only(term))
    episodes = [e for e in (made.planner.plan(x, 2, 8192, random.Random(i)) for i, x in enumerate(made.train[:4])) if e]
    untouched = term_of(made, term, episodes)
    shake(made.handle)
    with torch.no_grad():
        for name, parameter in made.handle.named_parameters():
            if name.endswith("beta_bias"):
                parameter.fill_(1.0)
    bad = term_of(made, term, episodes)
    if term == "harm":
        assert untouched == 0.0
    elif term == "margin":
        # An unused memory answers no better with its state than without one.
        assert untouched == pytest.approx(made.recipe.margin)
    elif term == "sparsity":
        assert untouched == pytest.approx(0.25, abs=0.1)  # σ(−1) is .27, the target .05
    assert bad > 1e-3
    for _ in range(25):
        term_of(made, term, episodes)
        made.optimizer.step()
    assert term_of(made, term, episodes) < 0.8 * bad


def test_the_teacher_is_the_frozen_model_that_sees_the_sessions(
    backbone: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(backbone(), data, only("teacher"))
    shake(made.handle)
    encoded = next(e for e in made.train if e.conversation.questions[0].told)
    taught = made.renderer.taught(encoded, 0, range(len(encoded.turns)))
    answered = made.objective.frozen([taught])
    monkeypatch.setattr(objectives, "FROZEN_TOKENS", 1)
    apart = made.objective.frozen([encoded.alone[0], taught])
    assert (apart.logits[-len(taught.targets) :] - answered.logits).abs().max() < 1e-5
    assert apart.owner.tolist() == [0] * len(encoded.alone[0].targets) + [1] * len(taught.targets)
    made.handle.detach_hooks()
    plain = made.objective.model(input_ids=torch.tensor([taught.context.ids])).logits[0, taught.start - 1 :]
    assert torch.equal(answered.logits.argmax(-1), plain.argmax(-1))
    assert (answered.logits - plain).abs().max() < 1e-5
    for session in encoded.conversation.sessions:
        words = " ".join(session[0].content.split())
        assert words in made.renderer.tokenizer.decode(taught.context.ids)
    # Too long a context loses sessions without evidence first.
    made.renderer.recipe = replace(made.recipe, teacher_tokens=len(taught.context.ids) - 1)
    shorter = made.renderer.tokenizer.decode(made.renderer.taught(encoded, 0, range(len(encoded.turns))).context.ids)
    question = encoded.conversation.questions[0]
    assert question.evidence is not None
    assert encoded.conversation.sessions[question.evidence[0]][0].content in shorter


# ---------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def learnt(
    backbone: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    """One fact of four keys and eight values: data, adapter, card."""
    folder = tmp_path_factory.mktemp("learnt")
    rng = random.Random(0)
    data = write(folder / "data.jsonl", [conversation(rng, 1) for _ in range(400)])
    recipe = replace(SMALL, rank=16, batch=16, steps=160, evaluate_every=80, held_out=0.15)
    torch.set_num_threads(1)
    card = finetune(backbone(), data, folder / "adapter", recipe, say=lambda _: None)
    return data, folder / "adapter", card


def test_recall_of_unseen_conversations_rises_and_the_state_is_why(
    backbone: Callable[..., Path], learnt: tuple[Path, Path, dict[str, Any]]
) -> None:
    data, adapter, card = learnt
    untrained, best = card["figures"]["untrained"], card["figures"]["best"]
    assert untrained["recall"] <= 0.2
    assert best["recall"] >= 0.9
    assert best["loss"] < 0.5 * untrained["loss"]
    with (adapter / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(-1, 160))
    losses = [float(line["loss"]) for line in lines[1:]]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    # The same questions from empty memories and from each other's: chance is one of eight.
    made = trainer(backbone(), data, replace(SMALL, rank=16, held_out=0.15))
    handle = attach_again(made, Adapter.load(adapter))
    right = {"own": 0, "empty": 0, "another's": 0}
    states = []
    with torch.no_grad():
        for episode in made.measured:
            state = made.objective.zero(1)
            for window in episode.windows:
                state, _ = made.objective.write([window.contexts], state)
            states.append(state)
        for i, episode in enumerate(made.measured):
            asked = [r.asked for r in episode.reads]
            for name, state in (("own", states[i]), ("empty", made.objective.zero(1)), ("another's", states[i - 1])):
                right[name] += int(made.objective.read(asked, state).right().sum())
    n = len(made.measured)
    assert handle.config.rank == 16
    assert right["own"] / n == pytest.approx(best["recall"], abs=1e-9)
    assert right["empty"] / n < 0.45
    assert right["another's"] / n < 0.45


def attach_again(made: Trainer, adapter: Adapter) -> Any:
    made.handle.detach_hooks()
    handle = attach(made.objective.model, adapter, chunked_scan)
    made.objective = Objective(made.objective.model, handle, made.recipe, made.renderer.pad)
    return handle


def test_the_card_says_what_was_done(learnt: tuple[Path, Path, dict[str, Any]]) -> None:
    data, adapter, card = learnt
    assert json.loads((adapter / "card.json").read_text()) == card
    read = read_data(data)
    assert card["data"]["blake3"] == read.digest
    assert (
        card["data"]["trained_on"] + card["data"]["held_out"]
        == card["data"]["conversations"]
        == len(read.conversations)
    )
    assert card["steps"] == 160
    assert card["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {p.name for p in adapter.iterdir()} == {
        "adapter.safetensors", "delta_mem_config.json", "card.json", "metrics.csv"
    }  # fmt: skip


def test_the_trained_adapter_is_a_bundle_that_the_runtime_agrees_with(
    backbone: Callable[..., Path], learnt: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    import deltamem_rt as dm
    from deltamem_export.bundle import export_bundle

    data, adapter, _ = learnt
    model = dm.Model.load(export_bundle(backbone(), adapter, tmp_path / "bundle", say=lambda _: None), device="cpu")
    made = trainer(backbone(), data, replace(SMALL, rank=16, held_out=0.15))
    handle = attach_again(made, Adapter.load(adapter))
    told = 0
    for held_out in made.measured[:8]:
        with model.session() as session, torch.no_grad():
            state = made.objective.zero(1)
            for context in (c for w in held_out.windows for c in w.contexts):
                session.feed(np.asarray(context.ids, dtype=np.int32))
                session.end_turn()
                state, _ = made.objective.write([[context]], state)
            assert np.abs(session.memory - state[0].numpy()).max() < 1e-5
            asked = held_out.reads[0].asked
            question, answer = (
                made.renderer.tokenizer.decode(ids) for ids in (asked.context.ids[1:7], asked.targets[:-1])
            )
            assert question == "what is my dog ? <end>"[:8] + question[8:]
            reply = session.chat(question.removesuffix(" <end>").strip(), max_new_tokens=4).read()
            told += reply.strip() == answer
            right = made.objective.read([asked], state).right()
            assert (reply.strip() == answer) == bool(right[0])
    assert handle.state is not None
    assert told >= 6


def test_a_killed_run_goes_on_to_the_same_bytes(
    backbone: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_: list[str] = []
    recipe = replace(SMALL, most_facts=4, promote=0.0)  # the curriculum moves, so its state matters
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finetune(backbone(), data, whole, recipe, say=said_.append)
    step = Trainer.step

    def falls(self: Trainer) -> dict[str, float]:
        if self.done == 7:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", falls)
    with pytest.raises(KeyboardInterrupt):
        finetune(backbone(), data, killed, recipe, say=said_.append)
    assert not (killed / "adapter.safetensors").exists()
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(ExportError, match="is of another run"):
        finetune(backbone(), data, killed, replace(recipe, rank=4), say=said_.append)
    finetune(backbone(), data, killed, recipe, say=said_.append)
    assert "going on at step 4 of 10" in said_
    assert (killed / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    assert without_time(killed) == without_time(whole)
    finetune(backbone(), data, killed, recipe, say=said_.append)
    assert said_[-1].endswith("this run is done already")
    other = tmp_path / "other"
    finetune(backbone(), data, other, recipe, seed=1, say=said_.append)
    assert (other / "adapter.safetensors").read_bytes() != (whole / "adapter.safetensors").read_bytes()


def without_time(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["paper-tsw", "paper-ssw", "paper-msw"])
def test_the_papers_recipes_run_with_every_term(
    backbone: Callable[..., Path], data: Path, name: str, tmp_path: Path
) -> None:
    recipe = replace(recipes.RECIPES[name], accumulate=4, steps=2, dtype="fp32", rate=1e-2)
    card = finetune(backbone(), data, tmp_path / "out", recipe, name=name, say=lambda _: None)
    assert card["name"] == name
    assert card["figures"]["best"]["n_told"] > 0
    lines = without_time(tmp_path / "out")[1:]
    for term in ("answer", "unknown", "margin", "teacher", "anchor", "sparsity"):
        assert float(lines[0][term]) > 0, term
        assert lines[0][term] != lines[1][term], term
    assert {line["harm"] for line in lines} == {""}  # no weight, so not computed


def test_a_backbone_in_bfloat16_trains_a_memory_in_float32(backbone: Callable[..., Path], data: Path) -> None:
    made = trainer(backbone(), data, replace(SMALL, dtype="bf16"))
    before = {n: p.clone() for n, p in made.objective.model.named_parameters()}
    losses = [made.step()["answer"] for _ in range(10)]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in made.parameters} == {torch.float32}
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    assert all(torch.equal(p, before[n]) for n, p in made.objective.model.named_parameters())


def alone_of_two(rank: int, port: int, arguments: Sequence[Any]) -> None:
    """One process as the launcher starts it: the environment says who it is."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    finetune(*arguments, say=lambda _: None)


def test_two_processes_do_what_one_does(backbone: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    recipe = replace(SMALL, batch=2, accumulate=4, steps=4)
    context = torch.multiprocessing.get_context("fork")  # what is imported already need not be imported again
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    arguments = (backbone(), data, tmp_path / "two", recipe)
    both = [context.Process(target=alone_of_two, args=(rank, port, arguments)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    finetune(backbone(), data, tmp_path / "one", recipe, say=lambda _: None)
    assert json.loads((tmp_path / "two" / "card.json").read_text())["processes"] == 2
    two, one = (dict(Adapter.load(tmp_path / name).tensors()) for name in ("two", "one"))
    # Sums in another order; Adam makes 1e-7 of a gradient that is nearly zero into a part of a step.
    assert max(float((two[k] - one[k]).abs().mean()) for k in one) < 1e-4
    for a, b in zip(without_time(tmp_path / "two"), without_time(tmp_path / "one"), strict=True):
        assert float(a["loss"] or 0) == pytest.approx(float(b["loss"] or 0), rel=1e-3)
        assert float(a["held_out_loss"] or 0) == pytest.approx(float(b["held_out_loss"] or 0), rel=1e-3)


# ---------------------------------------------------------------------- the command line


def test_options_change_the_recipe_and_wrong_ones_are_told(
    backbone: Callable[..., Path], data: Path, tmp_path: Path, capsys: Any
) -> None:
    common = ["train", "--backbone", str(backbone()), "--data", str(data)]
    for more, words in (
        (["--out", str(tmp_path / "x"), "--recipe", "paper-tws"], "did you mean paper-tsw?"),
        (["--out", str(tmp_path / "x"), "--rank", "0"], "setting rank is 0, expected 1 to 128"),
        (["--out", str(tmp_path / "x"), "--layers", "5"], "target_layers"),
        (["--out", str(tmp_path / "x"), "--delta-heads", "q,w"], "delta_heads"),
        ([], "--out is missing"),
    ):
        assert cli.main([*common, *more]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["train", "--recipe", "paper-tsw", "--out", str(tmp_path / "x")]) == 2
    assert "needs --backbone" in capsys.readouterr().err
    out = tmp_path / "out"
    settings = ["--rank", "4", "--layers", "1", "--delta-heads", "q,v", "--gates", "row", "--no-couple-lambda"]
    settings += ["--update-mode", "standard", "--alpha", "2", "--heads", "2", "--steps", "1", "--context", "message"]
    assert cli.main([*common, "--out", str(out), *settings]) == 0
    config = Adapter.load(out).config
    assert (config.rank, config.alpha, config.num_state_heads, config.target_layers) == (4, 2.0, 2, (1,))
    assert (config.delta_heads, config.rankwise_gates, config.couple_lambda) == (("q", "v"), True, False)


def test_a_backbone_without_a_template_is_told_so(data: Path, tmp_path: Path) -> None:
    folder = add_tokenizer(save_backbone(tmp_path / "plain", "llama"))
    for path in folder.glob("chat_template*"):
        path.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ExportError, match=r"line 1: .*chat_template\.jinja"):
        trainer(folder, data)


def test_the_page_shows_every_setting_with_its_default() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    for f in fields(FinetuningRecipe):
        assert f"| `{f.name}` | {shown(f.default)} | {f.metadata['help']}" in page, f.name
