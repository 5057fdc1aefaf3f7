"""The losses of a batch of episodes, window by window. Turns are written into the memory of their conversation, each a context of its own;
questions are read from the state behind them, and what a question writes goes nowhere. Networks and hooks are those of `reference.py`.

Shapes: B conversations, N contexts of a window, W tokens, Q questions, K predicted tokens, V the vocabulary.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltamem_export.finetuning.episodes import Episode, Read
from deltamem_export.finetuning.recipe import FinetuningRecipe
from deltamem_export.finetuning.rendering import Asked, Context
from deltamem_export.reference import MemoryHandle, span_weights
from deltamem_export.scan import chunked_scan
from deltamem_export.training.memory import stream_scan

HARM_TOKENS = 256
"""Tokens a batch on which ours and the frozen model's whole distributions are compared; of more a sample."""
FEW_TOKENS = 1024
"""So many tokens go through the decoder at once, however much of them is padding."""
FROZEN_TOKENS = 16384
"""About as many go through the frozen teacher at once."""
TERMS = ("answer", "unknown", "harm", "margin", "teacher", "anchor", "sparsity")


@dataclass(frozen=True)
class Scales:
    """What each term is a mean over, counted over the whole step: all batches of all processes."""

    told: int
    untold: int
    batches: int
    windows: int

    @classmethod
    def of(cls, batches: Sequence[Sequence[Episode]]) -> Scales:
        reads = [r for batch in batches for e in batch for r in e.reads]
        told = sum(r.told for r in reads)
        return cls(told, len(reads) - told, len(batches), sum(max(len(e.windows) for e in b) for b in batches))


@dataclass
class Sums:
    """Of a step: each term's value, without its weight, and how many questions were answered right."""

    terms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TERMS, 0.0))
    told: int = 0
    told_right: int = 0
    untold: int = 0
    untold_right: int = 0


@dataclass(frozen=True)
class Answered:
    """Of Q questions: logits [K, V] and last hidden vectors [K, D] where the answers are predicted, their targets [K], and the question
    that each belongs to [K]."""

    logits: Tensor
    hidden: Tensor
    targets: Tensor
    owner: Tensor
    count: int

    def losses(self) -> Tensor:
        """Mean cross-entropy of each answer, [Q]."""
        return self._mean(F.cross_entropy(self.logits.float(), self.targets, reduction="none"))

    def right(self) -> Tensor:
        """Whether greedy decoding gives each answer and ends there, bool [Q]."""
        wrong = (self.logits.argmax(-1) != self.targets).float()
        return self._sum(wrong) == 0

    def divergence(self, teacher: Answered) -> Tensor:
        """Mean KL(teacher ‖ ours) of each answer, [Q]."""
        ours, theirs = (F.log_softmax(x.logits.float(), dim=-1) for x in (self, teacher))
        return self._mean(F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1))

    def distance(self, teacher: Answered) -> Tensor:
        """Mean 1 − cosine of the last hidden vectors of each answer, [Q]."""
        return self._mean(1 - F.cosine_similarity(self.hidden.float(), teacher.hidden.float(), dim=-1))

    def _sum(self, each: Tensor) -> Tensor:
        return each.new_zeros(self.count).index_add(0, self.owner, each)

    def _mean(self, each: Tensor) -> Tensor:
        return self._sum(each) / self._sum(torch.ones_like(each))


class Objective:
    """A frozen decoder with its memory, and the weights of the terms."""

    def __init__(self, model: Any, handle: MemoryHandle, recipe: FinetuningRecipe, pad: int):
        self.model, self.handle, self.recipe, self.pad = model, handle, recipe, pad
        self.device = next(handle.parameters()).device
        handle.scan = chunked_scan

    # ------------------------------------------------------------------ the decoder

    def write(self, contexts: Sequence[Sequence[Context]], state: Tensor) -> tuple[Tensor, Tensor]:
        """Writes contexts [B][N] into states [B, L, H, r, r]. Returns the new states and the mean β over what was written, a scalar."""
        count = max(map(len, contexts))
        even = [[*row, *([Context((), ())] * (count - len(row)))] for row in contexts]
        self.handle.record = True
        betas: list[Tensor] = []
        weights: list[Tensor] = []
        for start, stop in self._calls(even):
            ids, spans, mask = self._rows([c for row in even for c in row[start:stop]])
            # The contexts are the batch for attention, one stream for the memory.
            self.handle.scan = stream_scan(stop - start)
            state = self._run(ids, spans, mask, state.repeat_interleave(stop - start, dim=0))[:: stop - start]
            if self.handle.config.writes_spans:
                mask = span_weights(torch.where(mask, spans, -1)).any(-1)
            self._betas(mask, betas, weights)
        self.handle.scan = chunked_scan
        self.handle.record, self.handle.recorded = False, {}
        return state, sum(betas, start=state.new_zeros(())) / sum(weights, start=state.new_zeros(())).clamp_min(1)

    def read(self, questions: Sequence[Asked], state: Tensor) -> Answered:
        """Reads each question from its own state, [Q, L, H, r, r]."""
        return self._read(questions, state, writes=True)

    def frozen(self, questions: Sequence[Asked]) -> Answered:
        """What the frozen model answers, without a memory. Contexts may be long, so they go in groups."""
        groups: list[list[Asked]] = [[]]
        for question in questions:
            if groups[-1] and len(question.context.ids) * (len(groups[-1]) + 1) > FROZEN_TOKENS:
                groups.append([])
            groups[-1].append(question)
        with torch.no_grad():
            parts = [self._read(group, self.zero(len(group)), writes=False) for group in groups]
        firsts = [sum(p.count for p in parts[:i]) for i in range(len(parts))]
        return Answered(
            torch.cat([p.logits for p in parts]),
            torch.cat([p.hidden for p in parts]),
            torch.cat([p.targets for p in parts]),
            torch.cat([p.owner + first for p, first in zip(parts, firsts, strict=True)]),
            len(questions),
        )

    def zero(self, count: int) -> Tensor:
        self.handle.reset(count)
        assert self.handle.state is not None
        return self.handle.state

    # ------------------------------------------------------------------ the terms

    def step(
        self, batch: Sequence[Episode], scales: Scales, rng: random.Random, sums: Sums, backward: bool = True
    ) -> None:
        """All windows of a batch: gradients are added to the memory's parameters, values to `sums`."""
        weights = {name: float(getattr(self.recipe, f"{name}_weight")) for name in TERMS}
        state = self.zero(len(batch))
        count = max(len(e.windows) for e in batch)
        for at in range(count):
            windows = [e.windows[at] if at < len(e.windows) else None for e in batch]
            state, beta = self.write([w.contexts if w else () for w in windows], state.detach())
            terms = {"sparsity": (beta - self.recipe.sparsity_target).abs() / scales.windows}
            reads = [(b, r) for b, w in enumerate(windows) if w for r in w.reads]
            if reads:
                terms |= self._answers(reads, state, scales, sums)
            if at == count - 1 and any(e.harmless for e in batch):
                terms["harm"] = self._harm(batch, state, rng) / scales.batches
            loss = sum(
                (weights[name] * value for name, value in terms.items() if weights[name]), start=state.new_zeros(())
            )
            if backward and loss.requires_grad:
                loss.backward()
            for name, value in terms.items():
                sums.terms[name] += float(value.detach())

    def _answers(
        self, reads: Sequence[tuple[int, Read]], state: Tensor, scales: Scales, sums: Sums
    ) -> dict[str, Tensor]:
        asked = [r.asked for _, r in reads]
        rows = torch.tensor([b for b, _ in reads], device=self.device)
        told = torch.tensor([r.told for _, r in reads], device=self.device)
        answered = self.read(asked, state[rows])
        losses, right = answered.losses(), answered.right()
        sums.told += int(told.sum())
        sums.untold += int((~told).sum())
        sums.told_right += int((right & told).sum())
        sums.untold_right += int((right & ~told).sum())
        all_questions = scales.told + scales.untold
        terms = {
            "answer": losses[told].sum() / max(1, scales.told),
            "unknown": losses[~told].sum() / max(1, scales.untold),
        }
        if self.recipe.margin_weight and told.any() and torch.is_grad_enabled():
            keep = [i for i, (_, r) in enumerate(reads) if r.told]
            some = [asked[i] for i in keep]
            at = rows[told]
            behind = losses[told]
            worse = [self.read(some, other).losses() for other in (self.zero(len(keep)), self._corrupted(state)[at])]
            hinges = sum((F.relu(self.recipe.margin + behind - w).sum() for w in worse), start=behind.new_zeros(()))
            terms["margin"] = hinges / (2 * max(1, scales.told))
        taught = [r.taught for _, r in reads if r.taught]
        if taught:
            teacher = self.frozen(taught)
            terms["teacher"] = answered.divergence(teacher).sum() / all_questions
            terms["anchor"] = answered.distance(teacher).sum() / all_questions
        return terms

    def _corrupted(self, state: Tensor) -> Tensor:
        """Another conversation's state; alone in a batch, its own, turned."""
        return state.detach().roll(1, dims=0) if len(state) > 1 else state.detach().mT.flip(-1)

    def _harm(self, batch: Sequence[Episode], state: Tensor, rng: random.Random) -> Tensor:
        """KL(frozen ‖ ours) on turns that need no memory, a mean over their tokens."""
        pairs = [(b, c) for b, e in enumerate(batch) for c in e.harmless]
        ids, spans, mask = self._rows([c for _, c in pairs])
        places = mask.nonzero()
        if len(places) > HARM_TOKENS:
            chosen = torch.tensor(sorted(rng.sample(range(len(places)), HARM_TOKENS)), device=self.device)
            places = places[chosen]
        with torch.no_grad():
            frozen, _ = self._logits(ids, spans, mask, self.zero(len(pairs)), places, writes=False)
        ours, _ = self._logits(ids, spans, mask, state[[b for b, _ in pairs]], places)
        return F.kl_div(
            F.log_softmax(ours.float(), dim=-1),
            F.log_softmax(frozen.float(), dim=-1),
            log_target=True,
            reduction="batchmean",
        )

    # ------------------------------------------------------------------ inside

    def _read(self, questions: Sequence[Asked], state: Tensor, writes: bool) -> Answered:
        ids, spans, mask = self._rows([q.context for q in questions])
        places = [(n, q.start - 1 + i) for n, q in enumerate(questions) for i in range(len(q.targets))]
        where = torch.tensor(places, device=self.device)
        logits, hidden = self._logits(ids, spans, mask, state, where, writes)
        targets = torch.tensor([t for q in questions for t in q.targets], device=self.device)
        return Answered(logits, hidden, targets, where[:, 0], len(questions))

    def _calls(self, even: Sequence[Sequence[Context]]) -> list[tuple[int, int]]:
        """Which contexts of each stream go through the decoder together: neighbours, while padding is less than what is padded."""
        count = len(even[0])
        if self.handle.config.writes_spans:
            # All tokens of a call read the state from before it, so the contexts of a stream go one after another.
            return [(i, i + 1) for i in range(count)]
        lengths = [[len(row[i].ids) for row in even] for i in range(count)]
        calls: list[tuple[int, int]] = []
        start = real = width = 0
        for i, column in enumerate(lengths):
            real, width = real + sum(column), max(width, *column)
            padded = width * len(even) * (i + 1 - start)
            if i > start and padded > max(2 * real, FEW_TOKENS):
                calls.append((start, i))
                start, real, width = i, sum(column), max(column)
        return [*calls, (start, count)] if count else []

    def _rows(self, contexts: Sequence[Context]) -> tuple[Tensor, Tensor, Tensor]:
        """ids and spans int64 [R, W], and bool [R, W]: a token, not padding. Padding stands behind: causal attention never sees it."""
        width = max(1, *(len(c.ids) for c in contexts))
        ids = [[*c.ids, *([self.pad] * (width - len(c.ids)))] for c in contexts]
        spans = [[*c.spans, *([-1] * (width - len(c.spans)))] for c in contexts]
        lengths = torch.tensor([len(c.ids) for c in contexts], device=self.device)
        mask = torch.arange(width, device=self.device) < lengths[:, None]
        return torch.tensor(ids, device=self.device), torch.tensor(spans, device=self.device), mask

    @contextlib.contextmanager
    def _given(self, spans: Tensor, mask: Tensor, state: Tensor, writes: bool) -> Iterator[None]:
        handle = self.handle
        handle.state, handle.write_mask, handle.writes = state, mask, writes
        handle.spans = spans if handle.config.writes_spans else None
        try:
            yield
        finally:
            handle.write_mask, handle.spans, handle.writes = None, None, True

    def _run(self, ids: Tensor, spans: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        """The decoder without its head. Returns the states behind."""
        with self._given(spans, mask, state, writes=True):
            self.model.model(input_ids=ids, use_cache=False)
        assert self.handle.state is not None
        return self.handle.state

    def _logits(
        self, ids: Tensor, spans: Tensor, mask: Tensor, state: Tensor, where: Tensor, writes: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Logits [K, V] and last hidden vectors [K, D] at the places [K, 2] of (row, column) alone: only they go through the head, and what
        a family does behind it (scaling, soft caps) is done to them."""
        taken: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            taken.append(args[0][where[:, 0], where[:, 1]])
            return (taken[0][None],)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(take)
        try:
            with self._given(spans, mask, state, writes):
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            hook.remove()
        return logits, taken[0]

    def _betas(self, written: Tensor, betas: list[Tensor], weights: list[Tensor]) -> None:
        """Adds up β over what was written [B, T] of every layer."""
        for proposal in self.handle.recorded.values():
            beta = proposal.beta_logit.sigmoid().mean(dim=(-1, -2))
            betas.append((beta * written).sum())
            weights.append(written.sum().to(beta.dtype))
