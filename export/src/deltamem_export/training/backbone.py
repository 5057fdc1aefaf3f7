"""The backbone: a small Qwen3 decoder trained from nothing on the generated English, in context, and then frozen.

Facts and questions stand in one context here, so that it learns to copy, to restate and to say that it does not know; whatever is
remembered beyond a context is the memory's work (`memory.py`). It knows nothing about δ-mem.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from deltamem_export.training.batches import IGNORE, Context, Rows, pack
from deltamem_export.training.language import RELATION_INDEX, RELATIONS, Speaker, Turn
from deltamem_export.training.tokenizer import DECISIVE, REPLY, Codec

KINDS = ("tell", "change", "ask", "unknown", "talk", "text", "induction")
KIND = {name: i for i, name in enumerate(KINDS)}


def acknowledged(rows: Rows) -> Tensor:
    """bool [R, W]: the token read here ends the value of a fact that is being acknowledged; where a memory writes."""
    return rows.said() & (rows.kinds <= KIND["change"])


@dataclass(frozen=True)
class BackboneRecipe:
    """Sizes and schedule. Times in steps, so that a seed repeats a run on any machine."""

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 384
    context: int = 2048
    steps: int = 1400
    rows: int = 16
    width: int = 256
    matrix_rate: float = 4e-3
    vector_rate: float = 4e-3
    warm_up: int = 40
    flat: float = 0.5
    promote: float = 0.85
    most_facts: int = 6
    sharpen_steps: int = 800
    sharpen_layers: tuple[int, ...] = (2, 3)
    sharpen_weight: float = 2.0
    sharpen_odd: float = 0.35
    """Share of values from other relations' pools in the second phase (`Speaker.odd`)."""
    forced: float = 0.15
    """Share of the second phase's contexts in which an answer's value comes from nowhere, as a memory's does."""


def build_backbone(recipe: BackboneRecipe, end: int, pad: int, seed: int) -> Qwen3ForCausalLM:
    """An untrained decoder of the recipe's size, float32, tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        attention_bias=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0, 0.05 / (2 * recipe.layers) ** 0.5 if deep else 0.05)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = pad
    return model


class DialogueStream:
    """Draws contexts for the backbone; `level` is the most facts one context holds, `unknown` whether never-told questions come."""

    def __init__(self, speaker: Speaker, codec: Codec, recipe: BackboneRecipe, forced: float = 0.0):
        self.speaker, self.codec, self.recipe, self.forced = speaker, codec, recipe, forced
        self.rng: random.Random = speaker.rng
        self.level = 2
        self.unknown = False

    def batch(self, induction: float) -> Rows:
        contexts: list[Context] = []
        tokens = 0
        while tokens < self.recipe.rows * self.recipe.width:
            context = self.induction() if self.rng.random() < induction else self.context()
            contexts.append(context)
            tokens += min(len(context.ids), self.recipe.width)
        return pack(contexts, self.recipe.width, self.codec.pad, self.recipe.rows)

    def context(self) -> Context:
        if self.forced and self.rng.random() < self.forced:
            return self.forced_answer()
        roll = self.rng.random()
        if roll < 0.62:
            turns = self.dialogue()
        elif roll < 0.72:
            turns = [self.speaker.tell(*self.speaker.draw_facts(1)[0], change=self.rng.random() < 0.3)]
        elif roll < 0.78 and self.unknown:
            turns = [self.speaker.ask(self.speaker.draw_facts(1)[0][0], None)]
        elif roll < 0.9:
            turns = [self.speaker.talk() for _ in range(self.rng.randint(1, 3))]
        else:
            turns = [self.speaker.long_talk()]
        return Context.of_dialogue(
            [(self.codec.turn(t), KIND[t.kind], RELATION_INDEX.get(t.relation, -1)) for t in turns]
        )

    def dialogue(self) -> list[Turn]:
        """Facts, changes, talk, then questions about them (and about what was never told) in random order."""
        draw, speaker = self.rng.random, self.speaker
        count = self.rng.randint(1, self.level)
        extra = self.rng.randint(1, 1 + count // 2) if self.unknown else 0
        pairs = speaker.draw_facts(count + extra)
        facts, strangers = dict(pairs[:count]), [r for r, _ in pairs[count:]]
        turns = []
        for relation, value in facts.items():
            turns.append(speaker.tell(relation, value))
            if draw() < 0.25:
                turns.append(speaker.talk())
        if draw() < 0.25:
            relation = self.rng.choice(list(facts))
            facts[relation] = speaker.draw_value(relation, unlike=facts[relation])
            turns.append(speaker.tell(relation, facts[relation], change=True))
        questions = [speaker.ask(r, v) for r, v in facts.items()] + [speaker.ask(r, None) for r in strangers]
        self.rng.shuffle(questions)
        return turns + questions

    def forced_answer(self) -> Context:
        """A question answered with a value that stands nowhere before: not to be predicted, but to be gone on from."""
        relation, value = self.speaker.draw_facts(1)[0]
        turn = self.speaker.ask(relation, value)
        context = Context.of_turn(self.codec.turn(turn), KIND["ask"], RELATION_INDEX[relation.name])
        targets = [
            IGNORE if tag == DECISIVE else target for target, tag in zip(context.targets, context.tags, strict=True)
        ]
        return replace(context, targets=targets)

    def induction(self) -> Context:
        """Random tokens said twice: only copying predicts the second half."""
        length = self.rng.randint(6, 40)
        first = [self.rng.randrange(5, self.recipe.vocabulary) for _ in range(length)]
        ids = first + first
        targets = [IGNORE] * (length - 1) + ids[length:]
        return Context(
            ids[:-1], targets, [REPLY] * (len(ids) - 1), [KIND["induction"]] * (len(ids) - 1), [-1] * (len(ids) - 1)
        )


SHARPNESS = 8.0
"""Times a cosine, the logit of a relation in the second phase: the loss is .02 only where the cosine is one."""


class _Reading(nn.Module):
    """What a memory must be able to read from one layer's input, asked for by linear heads during the second phase."""

    def __init__(self, hidden: int):
        super().__init__()
        self.relation = nn.Linear(hidden, len(RELATIONS), bias=False)
        self.value = nn.Linear(hidden, hidden)
        self.told = nn.Linear(hidden, 1)

    def loss(self, x: Tensor, rows: Rows, embedding: Tensor) -> tuple[Tensor, float, float]:
        """x [R, W, hidden], embedding [vocabulary, hidden]. Returns the sum of the three losses, and the shares of relations and of
        values that are read right."""
        real = rows.targets != IGNORE
        about = (rows.tags == DECISIVE) & (rows.relations >= 0)
        said = acknowledged(rows)
        where = about | said
        # In a memory's own form, so that its keys come out as near to one axis a relation as can be.
        guess = SHARPNESS * F.normalize(self.relation(x[where]).tanh(), dim=-1)
        relation = F.cross_entropy(guess, rows.relations[where])
        names = self.value(x[said]) @ embedding.detach().T
        value = F.cross_entropy(names, rows.ids[said])
        told = self.told(x).squeeze(-1)
        balance = torch.where(said, (real & ~said).sum() / said.sum().clamp_min(1) / 4, 1.0)
        gate = F.binary_cross_entropy_with_logits(told[real], said[real].float(), weight=balance[real])
        return (
            relation + value + gate,
            float((guess.argmax(-1) == rows.relations[where]).float().mean()),
            float((names.argmax(-1) == rows.ids[said]).float().mean()),
        )


def _forward(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Last hidden states, and the residual stream before each layer, [R, W, hidden] each."""
    out = model.model(
        input_ids=rows.ids,
        attention_mask=rows.attention_mask(),
        position_ids=rows.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return out.last_hidden_state, out.hidden_states


def forward_rows(model: PreTrainedModel, rows: Rows) -> Tensor:
    """Hidden states of the last layer, [R, W, hidden]."""
    out = model.model(
        input_ids=rows.ids, attention_mask=rows.attention_mask(), position_ids=rows.positions, use_cache=False
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


@dataclass(frozen=True)
class Progress:
    """One line of the metrics: the step, the loss, and recall in context by kind of question."""

    step: int
    loss: float
    told: float
    unknown: float
    text: float
    acknowledged: float
    level: int
    relation: float
    value: float


def train_backbone(
    model: PreTrainedModel,
    speaker: Speaker,
    codec: Codec,
    recipe: BackboneRecipe,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda _: None,
    limit: int | None = None,
    sharpen: bool = False,
) -> list[Progress]:
    """Trains in place for `recipe.steps` (or stops after `limit`), harder contexts as it grows able. Returns one line per step.

    `sharpen=True` is the second phase, `recipe.sharpen_steps` long and at half the rates. It makes readable, at the inputs of the memory's
    layers, what a memory must know there: heads that are thrown away afterwards (`_Reading`) tell the relation where a value is about to
    be said, and relation, value and "this is a fact being acknowledged" where it has just been said. Without them a linear probe reads
    the relation in 0.42 to 0.52 of the cases, and a memory that is addressed from there cannot be better.
    """
    model.to(device).train()
    heads = nn.ModuleDict({str(i): _Reading(recipe.hidden) for i in recipe.sharpen_layers} if sharpen else {}).to(
        device
    )
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    vectors = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    vectors += list(heads.parameters())
    steps = recipe.sharpen_steps if sharpen else recipe.steps
    optimizers = (
        torch.optim.Muon(
            matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(vectors, lr=recipe.vector_rate, betas=(0.9, 0.98), weight_decay=0.0),
    )
    share_of_rate = 0.5 if sharpen else 1.0
    rates = (recipe.matrix_rate * share_of_rate, recipe.vector_rate * share_of_rate)
    stream = DialogueStream(speaker, codec, recipe, recipe.forced if sharpen else 0.0)
    if sharpen:
        stream.level, stream.unknown = 4, True
    lines: list[Progress] = []
    told_mean = unknown_mean = 0.0
    since = 0
    for step in range(min(steps, limit or steps)):
        share = schedule(step, steps, recipe.warm_up, recipe.flat)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
        rows = stream.batch(induction=0.35 if stream.level == 2 else 0.05).to(device)
        hidden, inputs = _forward(model, rows)
        logits = model.lm_head(hidden)
        each = F.cross_entropy(
            logits.flatten(0, 1), rows.targets.flatten(), ignore_index=IGNORE, reduction="none"
        ).view_as(rows.ids)
        real, induced = rows.targets != IGNORE, rows.kinds == KIND["induction"]
        decisive = real & (rows.tags == DECISIVE) & ~induced
        reply = real & (rows.tags == REPLY) & ~induced
        text = real & (rows.tags == 0) & ~induced
        loss = _mean(each, decisive) + _mean(each, reply) + 0.5 * _mean(each, text) + _mean(each, real & induced)
        known = valued = 0.0
        if sharpen:
            for i, head in heads.items():
                at = model.model.layers[int(i)].input_layernorm(inputs[int(i)])
                more, relation_share, value_share = head.loss(at, rows, model.get_input_embeddings().weight)
                loss = loss + recipe.sharpen_weight * more
                known += relation_share / len(heads)
                valued += value_share / len(heads)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

        with torch.no_grad():
            right = logits.argmax(-1) == rows.targets
            told = _share(right, decisive & (rows.kinds == KIND["ask"]))
            unknown = _share(right, decisive & (rows.kinds == KIND["unknown"]))
            acknowledged = _share(right, decisive & (rows.kinds <= KIND["change"]))
            line = Progress(
                step, loss.item(), told, unknown, _mean(each, text).item(), acknowledged, stream.level, known, valued
            )
        told_mean += 0.1 * (told - told_mean)
        unknown_mean += 0.1 * (unknown - unknown_mean)
        since += 1
        if told_mean > recipe.promote and since > 15:
            since = 0
            if stream.level < recipe.most_facts:
                stream.level += 1
            stream.unknown = stream.unknown or stream.level >= 4
        if step > 0.55 * steps:
            stream.unknown = True
        lines.append(line)
        report(line)
    model.eval()
    return lines


def schedule(step: int, steps: int, warm_up: int, flat: float) -> float:
    """Warm-up, flat to the share `flat` of the steps, then cosine to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    start = flat * steps
    if step < start:
        return 1.0
    progress = torch.tensor((step - start) / max(1.0, steps - start))
    return float(0.02 + 0.98 * 0.5 * (1 + torch.cos(progress * torch.pi)))


def _mean(each: Tensor, where: Tensor) -> Tensor:
    return (each * where).sum() / where.sum().clamp_min(1)


def _share(right: Tensor, where: Tensor) -> float:
    return float((right & where).sum() / where.sum().clamp_min(1))


def timer() -> Callable[[], float]:
    start = time.monotonic()
    return lambda: time.monotonic() - start
