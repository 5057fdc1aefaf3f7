"""Tells a session facts or a few tokens, and asks for the facts."""

from __future__ import annotations

import numpy as np

import deltamem_rt as dm
from deltamem_rt._cli.demo.cast import Fact, is_right


def fed(session: dm.Session, seed: int, count: int = 4) -> None:
    """A turn of a few tokens that no two seeds share."""
    session.feed(np.random.default_rng(seed).integers(3, 2000, count))
    session.end_turn()


def tell(session: dm.Session, fact: Fact) -> None:
    """Tells a fact in a turn of its own."""
    session.chat(fact.told, max_new_tokens=32).read()


def knows(model: dm.Model, session: dm.Session, fact: Fact) -> bool:
    """Whether the session would answer the fact's question rightly. It is asked in a session aside."""
    with model.session() as aside:
        aside.restore(session.snapshot())
        return is_right(aside.chat(fact.question, max_new_tokens=32, write=False).read(), fact)
