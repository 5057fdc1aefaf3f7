"""Tells a session facts and asks for them."""

from __future__ import annotations

import deltamem_rt as dm
from deltamem_rt._cli.demo.cast import Fact, is_right


def tell(session: dm.Session, fact: Fact) -> None:
    """Tells a fact in a turn of its own."""
    session.chat(fact.told, max_new_tokens=32).read()


def knows(model: dm.Model, session: dm.Session, fact: Fact) -> bool:
    """Whether the session would answer the fact's question rightly. It is asked in a session aside."""
    with model.session() as aside:
        aside.restore(session.snapshot())
        return is_right(aside.chat(fact.question, max_new_tokens=32, write=False).read(), fact)
