"""Training works in the small: the loss falls, a seed repeats, packing and the stream keep turns apart, an interrupted run goes on."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltamem_export.adapter import Adapter
from deltamem_export.reference import attach
from deltamem_export.training import evaluate
from deltamem_export.training.addresses import _aim, _ridge
from deltamem_export.training.backbone import KIND, DialogueStream, build_backbone, forward_rows, train_backbone
from deltamem_export.training.batches import IGNORE, Context, pack
from deltamem_export.training.language import Speaker
from deltamem_export.training.memory import MemoryTrainer, stream_scan, train_memory
from deltamem_export.training.recipe import RECIPES, corpus, run_recipe
from deltamem_export.training.tokenizer import DECISIVE, Codec, train_tokenizer

SMOKE = RECIPES["smoke"]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(train_tokenizer(corpus(Speaker(random.Random(0)), 300), SMOKE.backbone.vocabulary))


def backbone(codec: Codec, seed: int = 0) -> torch.nn.Module:
    return build_backbone(SMOKE.backbone, codec.end, codec.pad, seed)


def test_the_backbones_loss_falls_and_a_seed_repeats(codec: Codec) -> None:
    def losses() -> list[float]:
        return [line.loss for line in train_backbone(backbone(codec), Speaker(random.Random(1)), codec, SMOKE.backbone)]

    first = losses()
    assert sum(first[-3:]) < 0.95 * sum(first[:3])
    assert first == losses()


def test_the_memory_trains_repeats_and_leaves_the_backbone_alone(codec: Codec, tmp_path: Path) -> None:
    recipe = replace(SMOKE.memory, steps=20)

    def trainer() -> MemoryTrainer:
        return MemoryTrainer(backbone(codec), Speaker(random.Random(2)), codec, recipe, seed=5)

    one, two = trainer(), trainer()
    before = {n: p.clone() for n, p in one.model.named_parameters()}
    lines = train_memory(one)
    assert sum(x.loss for x in lines[-4:]) < sum(x.loss for x in lines[:4])
    assert all(torch.equal(p, before[n]) for n, p in one.model.named_parameters())
    # Interrupted after half and taken up by another trainer: the same lines.
    path = tmp_path / "checkpoint"
    half = train_memory(two, limit=10, checkpoint=path, every=10)
    rest = train_memory(trainer(), checkpoint=path, every=10)
    assert [x.loss for x in half + rest] == [x.loss for x in lines]
    one.handle.adapter().save(tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter").config.rank == recipe.rank


def test_turns_packed_in_rows_do_not_see_each_other(codec: Codec) -> None:
    model = backbone(codec).eval()
    speaker = Speaker(random.Random(3))
    contexts = [Context.of_turn(codec.turn(speaker.talk()), 4) for _ in range(6)]
    rows = pack(contexts, 128, codec.pad)
    hidden = forward_rows(model, rows)[rows.segments >= 0]
    alone = torch.cat([model.model(input_ids=torch.tensor([list(c.ids)[:128]])).last_hidden_state[0] for c in contexts])
    assert (hidden - alone).abs().max() < 1e-4


def test_said_is_where_a_value_was_just_read(codec: Codec) -> None:
    speaker = Speaker(random.Random(7))
    turns = [speaker.tell(*speaker.draw_facts(1)[0]) for _ in range(9)] + [speaker.talk() for _ in range(9)]
    random.Random(8).shuffle(turns)
    rows = pack([Context.of_turn(codec.turn(t), KIND[t.kind]) for t in turns], 128, codec.pad)
    values = [codec.encode(f" {t.value}")[-1] for t in turns if t.kind == "tell"]
    assert rows.ids[rows.said()].tolist() == values
    assert (rows.kinds[rows.said()] == KIND["tell"]).all()


def test_a_forced_value_is_not_to_be_predicted(codec: Codec) -> None:
    context = DialogueStream(Speaker(random.Random(9)), codec, SMOKE.backbone).forced_answer()
    following = [*context.ids[1:], codec.end]
    ignored = [i for i, target in enumerate(context.targets) if target == IGNORE]
    assert ignored == [i for i, tag in enumerate(context.tags) if tag == DECISIVE] != []
    assert all(t == f for i, (t, f) in enumerate(zip(context.targets, following, strict=True)) if i not in ignored)


def test_keys_are_aimed_nearer_than_ridge_regression_leaves_them() -> None:
    torch.manual_seed(0)
    kind = torch.randint(0, 6, (600,))
    x = torch.randn(6, 24)[kind] + 0.5 * torch.randn(600, 24)
    y = torch.eye(8)[kind]

    def cosine(matrix: torch.Tensor) -> float:
        return float((torch.nn.functional.normalize((x @ matrix.T).tanh(), dim=-1) * y).sum(-1).mean())

    start = _ridge(x, y, 1.0)
    assert 1 - cosine(_aim(start, x, y, torch.ones(600))) < 0.75 * (1 - cosine(start))


def test_an_episode_at_once_is_the_episode_turn_by_turn(codec: Codec) -> None:
    torch.manual_seed(0)
    model = backbone(codec).eval()
    handle = attach(model, SMOKE.memory.adapter_config())
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.3)
    speaker = Speaker(random.Random(4))
    contexts = [Context.of_turn(codec.turn(speaker.talk()), 4) for _ in range(5)]
    rows = pack(contexts, 128, codec.pad)
    handle.reset(rows.ids.shape[0])
    handle.write_mask, handle.scan = rows.segments >= 0, stream_scan(rows.ids.shape[0])
    with torch.no_grad():
        hidden = forward_rows(model, rows)[rows.segments >= 0]
        assert handle.state is not None
        end = handle.state[:1]
        handle.reset(1)
        handle.write_mask, handle.scan = None, stream_scan(1)
        parts = [model.model(input_ids=torch.tensor([list(c.ids)[:128]])).last_hidden_state[0] for c in contexts]
    assert handle.state is not None
    assert (hidden - torch.cat(parts)).abs().max() < 1e-3
    assert (handle.state - end).abs().max() < 1e-4


def test_the_smoke_recipe_runs_whole_and_is_not_run_twice(tmp_path: Path) -> None:
    said: list[str] = []
    card = run_recipe(SMOKE, tmp_path, say=said.append)
    assert {"backbone", "adapter", "extra"} <= {p.name for p in tmp_path.iterdir()}
    assert card["figures"]["8 facts"]["recall"]["n"] == 8 * SMOKE.episodes
    assert (tmp_path / "backbone" / "chat_template.jinja").is_file()
    weights = (tmp_path / "adapter" / "adapter.safetensors").read_bytes()
    run_recipe(SMOKE, tmp_path, say=said.append)
    assert (tmp_path / "adapter" / "adapter.safetensors").read_bytes() == weights


def test_intervals_are_wilsons() -> None:
    figure = evaluate.Figure.of(95, 100)
    assert (figure.low, figure.high) == (0.8882, 0.9785)
    assert evaluate.Figure.of(0, 0).n == 0
