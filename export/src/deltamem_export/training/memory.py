"""δ-mem on the frozen backbone, trained state-only: each turn is a context of its own, and only the memory passes from turn to turn.

All turns of an episode go through the decoder at once: attention is cut at the turns' borders, while the scan runs over the whole
stream. Episodes may go on in the next step from a detached state, so that distance costs nothing. The networks are those of
`reference.py`; this module adds the stream, the losses and the curriculum.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from deltamem_export.adapter import AdapterConfig
from deltamem_export.reference import MemoryHandle, attach
from deltamem_export.scan import chunked_scan
from deltamem_export.training.addresses import fit_addresses
from deltamem_export.training.backbone import KIND, acknowledged, forward_rows, schedule
from deltamem_export.training.batches import IGNORE, Context, Rows, pack
from deltamem_export.training.language import BY_NAME, RELATION_INDEX, RELATIONS, Relation, Speaker
from deltamem_export.training.tokenizer import DECISIVE, TEXT, Codec

FITTED = ("memory_k_proj", "memory_q_proj")


@dataclass(frozen=True)
class MemoryRecipe:
    """The memory's shape, the weights of the losses and the curriculum."""

    rank: int = 96
    heads: int = 1
    layers: tuple[int, ...] = (3,)
    update_mode: str = "no_lambda"
    steps: int = 800
    tokens: int = 8192
    width: int = 128
    rate: float = 1e-3
    warm_up: int = 40
    flat: float = 0.4
    unknown_weight: float = 1.0
    reply_weight: float = 2.0
    harm_weight: float = 4.0
    harm_share: float = 0.25
    quiet_weight: float = 0.2
    quiet_logit: float = 12.0
    overlap_weight: float = 0.3
    align_weight: float = 1.0
    first_facts: int = 8
    most_facts: int = 56
    told_questions: int = 12
    unknown_questions: int = 4
    carry: float = 0.4
    many_talk: float = 0.15
    fit: int = 24
    """Turns a relation for the start in closed form (`addresses.py`); 0: projections start at random."""
    fitted_share: float = 0.1
    open_logit: float = 5.0
    """Where the gate starts at an acknowledgement."""
    changes: tuple[float, ...] = (0.0, 0.25, 0.5)
    """Shares of the facts that change in an episode's step, each as likely."""
    odd: float = 0.5
    """Share of values from other relations' pools (`Speaker.odd`)."""

    def adapter_config(self) -> AdapterConfig:
        """alpha = r: with alpha/r = 1/4 nothing was learnt in the study."""
        return AdapterConfig(
            rank=self.rank,
            alpha=float(self.rank),
            num_state_heads=self.heads,
            normalize_qk=True,
            couple_lambda=self.update_mode == "no_lambda",
            state_update_mode=self.update_mode,
            rankwise_gates=False,
            target_layers=self.layers,
            delta_heads=("q", "o"),
        )


@dataclass
class Episode:
    """One user: what they have told so far."""

    facts: dict[Relation, str] = field(default_factory=dict)

    def stream(
        self, speaker: Speaker, codec: Codec, recipe: MemoryRecipe, most: int, unknown: bool, talk: int
    ) -> list[Context]:
        """The next turns: tells, changes and talk, then questions."""
        rng = speaker.rng
        room = max(0, most - len(self.facts))
        count = min(room, most if rng.random() < 0.5 else rng.randint(1, most))
        fresh = [r for r in RELATIONS if r not in self.facts]
        told = rng.sample(fresh, min(count, len(fresh)))
        turns = []
        for relation in told:
            self.facts[relation] = speaker.draw_value(relation)
            turns.append(speaker.tell(relation, self.facts[relation]))
        changes = int(len(self.facts) * rng.choice(recipe.changes) + 0.5) if most > 1 else 0
        later = []
        for relation in rng.sample(list(self.facts), changes):
            self.facts[relation] = speaker.draw_value(relation, unlike=self.facts[relation])
            later.append(speaker.tell(relation, self.facts[relation], change=True))
        turns += later
        for _ in range(talk):  # anywhere; a change stays behind what it changes
            turns.insert(rng.randint(0, len(turns)), speaker.talk())
        known = list(self.facts.items())
        asked = rng.sample(known, min(recipe.told_questions, len(known)))
        asked += rng.choices(known, k=recipe.told_questions - len(asked))  # few facts are asked again, in other words
        questions = [speaker.ask(r, v) for r, v in asked]
        if unknown:
            strangers = [r for r in RELATIONS if r not in self.facts]
            questions += [
                speaker.ask(r, None) for r in rng.sample(strangers, min(recipe.unknown_questions, len(strangers)))
            ]
        rng.shuffle(questions)
        contexts = []
        for turn in turns + questions:
            encoded = codec.turn(turn)
            kind = KIND[turn.kind]
            context = Context.of_turn(encoded, kind, RELATION_INDEX.get(turn.relation, -1))
            if turn.kind == "talk":
                form = rng.random()
                if form < 0.25:  # read, but not answered
                    context = _plain(encoded.ids[: encoded.reply], kind)
                elif form < 0.4:  # plain text, without the template
                    context = _plain(codec.encode(turn.user), kind)
            contexts.append(context)
        return contexts


def _plain(ids: Sequence[int], kind: int) -> Context:
    """Text that is only read."""
    return Context(ids, (*ids[1:], IGNORE), [TEXT] * len(ids), [kind] * len(ids), [-1] * len(ids))


def stream_scan(rows: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """A scan for `rows` consecutive rows of one stream: the rows are the batch for attention, one long sequence for the memory."""

    def scan(
        q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        width = q.shape[1]

        def joined(x: Tensor) -> Tensor:  # [B·rows, W, H, d] → [B, rows·W, H, d]
            return x.reshape(-1, rows * width, *x.shape[2:])

        reads, new = chunked_scan(*map(joined, (q, k, v, keep, erase, write)), state[::rows])
        return reads.reshape(q.shape), new.repeat_interleave(rows, dim=0)

    return scan


@dataclass(frozen=True)
class MemoryProgress:
    """One line of the metrics."""

    step: int
    loss: float
    told: float
    unknown: float
    harm: float
    quiet: float
    overlap: float
    align: float
    most: float


class MemoryTrainer:
    """Holds the frozen decoder, the memory on it and the state of training; `step` does one optimiser step."""

    def __init__(
        self,
        model: PreTrainedModel,
        speaker: Speaker,
        codec: Codec,
        recipe: MemoryRecipe,
        seed: int,
        device: str = "cpu",
    ):
        torch.manual_seed(seed)
        self.recipe, self.speaker, self.codec, self.device = recipe, speaker, codec, device
        self.rng: random.Random = speaker.rng
        model.to(device).eval().requires_grad_(False)
        self.plain = copy.deepcopy(model)
        self.model = model
        self.handle: MemoryHandle = attach(model, recipe.adapter_config())
        self.handle.record = True
        if recipe.fit:
            fit_addresses(self.plain, self.handle, speaker, codec, recipe.fit, open_logit=recipe.open_logit)
        fitted = [p for n, p in self.handle.named_parameters() if n.rsplit(".", 1)[-1] in FITTED]
        others = [p for n, p in self.handle.named_parameters() if n.rsplit(".", 1)[-1] not in FITTED]
        # What starts in a good place moves slowly.
        self.shares = (recipe.fitted_share if recipe.fit else 1.0, 1.0)
        self.optimizer = torch.optim.AdamW(
            [{"params": fitted}, {"params": others}], lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.most = float(recipe.first_facts)
        self.since = 0
        self.told_mean = self.unknown_mean = 0.0
        self.episodes: list[Episode] = []
        self.state: Tensor | None = None

    def batch(self) -> tuple[Rows, int]:
        """Rows of all episodes, and how many rows an episode has."""
        recipe = self.recipe
        most = int(self.most)
        # The first facts are learnt without distance; then talk, and streams that go on.
        able = most >= 4
        talk = (
            24
            if able and self.rng.random() < recipe.many_talk
            else self.rng.randint(2, 6)
            if able
            else self.rng.randint(0, 3)
        )
        questions = recipe.told_questions + (recipe.unknown_questions if most >= 2 else 0)
        size = max(4, recipe.tokens // (22 * most + 18 * questions + 30 * talk))
        if len(self.episodes) != size or self.state is None:
            self.episodes, self.state = [Episode() for _ in range(size)], None
        streams = []
        for b in range(size):
            if not able or self.rng.random() >= recipe.carry or len(self.episodes[b].facts) > most:
                self.episodes[b] = Episode()
                if self.state is not None:
                    self.state[b] = 0
            streams.append(self.episodes[b].stream(self.speaker, self.codec, recipe, most, most >= 2, talk))
        count = max(pack(stream, recipe.width, self.codec.pad).ids.shape[0] for stream in streams)
        packed = [pack(stream, recipe.width, self.codec.pad, count) for stream in streams]
        return Rows(**{f.name: torch.cat([getattr(p, f.name) for p in packed]) for f in fields(Rows)}).to(
            self.device
        ), count

    def step(self, index: int) -> MemoryProgress:
        recipe, handle = self.recipe, self.handle
        rate = recipe.rate * schedule(index, recipe.steps, recipe.warm_up, recipe.flat)
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = rate * share
        rows, count = self.batch()
        real = rows.targets != IGNORE
        handle.reset(rows.ids.shape[0])
        if self.state is not None:
            handle.state = self.state.repeat_interleave(count, dim=0)
        handle.write_mask = rows.segments >= 0
        handle.scan = stream_scan(count)
        hidden = forward_rows(self.model, rows)
        assert handle.state is not None
        self.state = handle.state[::count].detach().clone()

        replies = real & (rows.tags != TEXT) & (rows.kinds != KIND["talk"])
        logits = self.model.lm_head(hidden[replies])
        each = F.cross_entropy(logits, rows.targets[replies], reduction="none")
        tags, kinds = rows.tags[replies], rows.kinds[replies]
        told = (tags == DECISIVE) & (kinds == KIND["ask"])
        unknown = (tags == DECISIVE) & (kinds == KIND["unknown"])
        rest = ~told & ~unknown
        harm = self._harm(rows, hidden, real)
        quiet, overlap, align = self._gates_and_keys(rows)
        # Quiet comes in once three facts are held; a gate that must be shut before it has learnt to open never opens.
        ramp = min(1.0, max(0.0, (self.most - 2.0) / 2.0))
        loss = (
            _mean(each, told)
            + recipe.unknown_weight * _mean(each, unknown)
            + recipe.reply_weight * _mean(each, rest)
            + recipe.harm_weight * harm
            + recipe.quiet_weight * ramp * quiet
            + recipe.overlap_weight * overlap
            + recipe.align_weight * align
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            right = logits.argmax(-1) == rows.targets[replies]
            told_share = float((right & told).sum() / told.sum().clamp_min(1))
            unknown_share = float((right & unknown).sum() / unknown.sum().clamp_min(1)) if unknown.any() else 1.0
        self._promote(told_share, unknown_share)
        return MemoryProgress(
            index,
            loss.item(),
            told_share,
            unknown_share,
            harm.item(),
            quiet.item(),
            overlap.item(),
            align.item(),
            self.most,
        )

    def save(self, path: Path, step: int) -> None:
        """Writes whole or not at all."""
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "step": step,
                "memory": self.handle.layers.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": self.rng.getstate(),
                "episodes": [{r.name: v for r, v in e.facts.items()} for e in self.episodes],
                "state": self.state,
                "curriculum": (self.most, self.since, self.told_mean, self.unknown_mean),
            },
            partial,
        )
        partial.replace(path)

    def load(self, path: Path) -> int:
        """Takes up where `save` left off. Returns the step to go on with."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        self.handle.layers.load_state_dict(saved["memory"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.setstate(saved["random"])
        self.episodes = [
            Episode({BY_NAME[name]: value for name, value in facts.items()}) for facts in saved["episodes"]
        ]
        self.state = saved["state"]
        self.most, self.since, self.told_mean, self.unknown_mean = saved["curriculum"]
        return int(saved["step"])

    def _promote(self, told: float, unknown: float) -> None:
        """More facts once these are known: most ← 1.15 most + .35, at least 8 steps apart."""
        self.told_mean += 0.2 * (told - self.told_mean)
        self.unknown_mean += 0.2 * (unknown - self.unknown_mean)
        self.since += 1
        if self.since >= 8 and self.told_mean > (0.9 if self.most >= 8 else 0.8) and self.unknown_mean > 0.8:
            self.most = min(float(self.recipe.most_facts), 1.15 * self.most + 0.35)
            self.since = 0

    def _harm(self, rows: Rows, hidden: Tensor, real: Tensor) -> Tensor:
        """KL to the frozen model on the talk of some rows."""
        talk = real & (rows.kinds == KIND["talk"])
        having = talk.any(dim=1).nonzero().flatten()
        if len(having) == 0:
            return hidden.new_zeros(())
        wanted = max(1, int(self.recipe.harm_share * rows.ids.shape[0]))
        chosen = having[
            torch.tensor(self.rng.sample(range(len(having)), min(wanted, len(having))), device=having.device)
        ]
        subset = rows.each(lambda t: t[chosen])
        where = talk[chosen]
        with torch.no_grad():
            base = F.log_softmax(self.plain.lm_head(forward_rows(self.plain, subset)[where]), dim=-1)
        ours = F.log_softmax(self.model.lm_head(hidden[chosen][where]), dim=-1)
        return F.kl_div(ours, base, log_target=True, reduction="batchmean")

    def _gates_and_keys(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Writes anywhere but behind an acknowledged value; overlap of the keys of different relations; queries away from their keys."""
        written = acknowledged(rows)
        quiet_where = (rows.segments >= 0) & ~written
        asked = (rows.kinds == KIND["ask"]) & (rows.tags == DECISIVE)
        # Only the first decisive token of an answer asks by its relation alone.
        asked = asked & ~torch.cat((torch.zeros_like(asked[:, :1]), asked[:, :-1]), dim=1)
        quiet, overlap, align = (rows.ids.new_zeros((), dtype=torch.float32) for _ in range(3))
        index = rows.relations.clamp_min(0)
        for proposal in self.handle.recorded.values():
            logit = proposal.beta_logit.mean(dim=(-1, -2))
            excess = F.relu(logit + self.recipe.quiet_logit)[quiet_where]
            quiet = quiet + excess.mean()
            beta = proposal.beta_logit.sigmoid().mean(dim=(-1, -2))
            keys = proposal.k.flatten(-2)  # [R, W, H·r]
            weight = (beta * written).unsqueeze(-1)
            table = keys.new_zeros(len(RELATIONS), keys.shape[-1]).index_add(
                0, index[written], (weight * keys)[written]
            )
            present = torch.zeros(len(RELATIONS), dtype=torch.bool, device=keys.device).index_fill(
                0, index[written], True
            )
            mean = F.normalize(table[present], dim=-1)
            gram = mean @ mean.T
            n = gram.shape[0]
            if n > 1:
                overlap = (
                    overlap
                    + (gram.square().sum() - gram.diagonal().square().sum()) / (n * (n - 1)) * self.recipe.rank / 4
                )
            known = asked & present[index]
            if known.any():
                place = present.cumsum(0) - 1
                align = (
                    align
                    + (
                        1 - (F.normalize(proposal.q.flatten(-2)[known], dim=-1) * mean[place[index[known]]]).sum(-1)
                    ).mean()
                )
            # Keys of one relation, wherever it is told, are one key.
            own = F.normalize(keys, dim=-1)[written]
            align = align + (
                (1 - (own * mean[(present.cumsum(0) - 1)[index[written]]]).sum(-1)) * weight.squeeze(-1)[written]
            ).sum() / weight.sum().clamp_min(1e-6)
        layers = len(self.handle.recorded)
        return quiet / layers, overlap / layers, align / layers


def train_memory(
    trainer: MemoryTrainer,
    report: Callable[[MemoryProgress], None] = lambda _: None,
    limit: int | None = None,
    checkpoint: Path | None = None,
    every: int = 100,
) -> list[MemoryProgress]:
    """Trains for the recipe's steps (or stops after `limit`). Returns one line per step.

    With `checkpoint`, everything that the next step depends on is written there every `every` steps, and read from there at the start.
    """
    lines: list[MemoryProgress] = []
    start = trainer.load(checkpoint) if checkpoint is not None and checkpoint.is_file() else 0
    for index in range(start, min(trainer.recipe.steps, limit or trainer.recipe.steps)):
        lines.append(trainer.step(index))
        report(lines[-1])
        if checkpoint is not None and (index + 1) % every == 0:
            trainer.save(checkpoint, index + 1)
    trainer.handle.record = False
    trainer.handle.recorded = {}
    return lines


def _mean(each: Tensor, where: Tensor) -> Tensor:
    return (each * where).sum() / where.sum().clamp_min(1)
