"""Packing: contexts of different lengths set side by side in rows of one width, with what training must know of every token.

A context is what attention may see at once: one turn in a stream whose memory carries, or a whole dialogue in the backbone's training.
It knows turns as ids, and nothing about models or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamem_export.training.tokenizer import DECISIVE, EncodedTurn

IGNORE = -100


@dataclass(frozen=True)
class Context:
    """Tokens that attend to each other: inputs, and for each the next token, and that one's tag, kind of turn and relation.

    Kinds and relations are numbers chosen by the caller; a relation of −1 is none.
    """

    ids: Sequence[int]
    targets: Sequence[int]
    tags: Sequence[int]
    kinds: Sequence[int]
    relations: Sequence[int]

    @classmethod
    def of_turn(cls, encoded: EncodedTurn, kind: int, relation: int = -1) -> Context:
        """One turn as a context: all of it but the end token is fed, and the end token is the last target."""
        length = len(encoded.ids) - 1
        return cls(encoded.ids[:-1], encoded.ids[1:], encoded.tags[1:], [kind] * length, [relation] * length)

    @classmethod
    def of_dialogue(cls, turns: Sequence[tuple[EncodedTurn, int, int]]) -> Context:
        """Several turns in one context, end tokens fed in between."""
        ids = [i for encoded, _, _ in turns for i in encoded.ids]
        tags = [t for encoded, _, _ in turns for t in encoded.tags]
        kinds = [kind for encoded, kind, _ in turns for _ in encoded.ids]
        relations = [relation for encoded, _, relation in turns for _ in encoded.ids]
        return cls(ids[:-1], ids[1:], tags[1:], kinds[1:], relations[1:])


@dataclass(frozen=True)
class Rows:
    """[R, W] each: ids, targets (IGNORE on padding), tags, kinds, relations and segments (−1 on padding), positions in the context."""

    ids: Tensor
    targets: Tensor
    tags: Tensor
    kinds: Tensor
    relations: Tensor
    segments: Tensor
    positions: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same change to every field."""
        return Rows(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: str) -> Rows:
        return self.each(lambda t: t.to(device))

    def said(self) -> Tensor:
        """bool [R, W]: the token read here is the last decisive one of its reply."""
        before = torch.roll(self.tags, 1, dims=1) == DECISIVE
        before[:, 0] = False
        same = torch.roll(self.segments, 1, dims=1) == self.segments
        return before & same & (self.tags != DECISIVE) & (self.segments >= 0)

    def attention_mask(self) -> Tensor:
        """bool [R, 1, W, W]: a token sees the tokens of its own context up to itself."""
        same = self.segments.unsqueeze(-1) == self.segments.unsqueeze(-2)
        width = self.ids.shape[1]
        return (same & torch.ones(width, width, dtype=torch.bool, device=same.device).tril()).unsqueeze(1)


def pack(contexts: Sequence[Context], width: int, pad: int, rows: int | None = None) -> Rows:
    """Contexts in their order into rows of `width`; a context never straddles two rows, and one that is longer is cut.

    `rows` asks for exactly that many: missing ones are padding, contexts beyond them are dropped.
    """
    placed: list[list[Context]] = [[]]
    used = 0
    for context in contexts:
        length = min(len(context.ids), width)
        if used + length > width:
            placed.append([])
            used = 0
        placed[-1].append(context)
        used += length
    count = len(placed) if rows is None else rows
    filled: dict[str, NDArray[np.int64]] = {
        name: np.full((count, width), fill, dtype=np.int64)
        for name, fill in (
            ("ids", pad),
            ("targets", IGNORE),
            ("tags", 0),
            ("kinds", -1),
            ("relations", -1),
            ("segments", -1),
            ("positions", 0),
        )
    }
    segment = 0
    for r, row in enumerate(placed[:count]):
        at = 0
        for context in row:
            n = min(len(context.ids), width)
            for name in ("ids", "targets", "tags", "kinds", "relations"):
                filled[name][r, at : at + n] = getattr(context, name)[:n]
            filled["segments"][r, at : at + n] = segment
            filled["positions"][r, at : at + n] = np.arange(n)
            at += n
            segment += 1
    return Rows(**{name: torch.from_numpy(array) for name, array in filled.items()})
