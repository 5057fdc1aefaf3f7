"""What the store's tests share: the embedded default, facts to tell it, and a store of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import deltamem_rt as dm
from deltamem_rt._cli.demo.cast import Fact, Relation, draw, read_relations

KEY = bytes(range(32))


@pytest.fixture(scope="session")
def model() -> dm.Model:
    """The embedded default."""
    return dm.Model.load(dm.default_bundle(), device="cpu", threads=1)


@pytest.fixture(scope="session")
def relations() -> list[Relation]:
    return read_relations(dm.default_bundle() / "demo.json")


@pytest.fixture
def facts(relations: list[Relation]) -> Callable[..., tuple[Fact, ...]]:
    """`facts(seed, count)`: facts of different relations."""

    def drawn(seed: int, count: int = 8) -> tuple[Fact, ...]:
        return draw(relations, random.Random(seed), 1, count)[0].facts

    return drawn


@pytest.fixture(params=["memory", "file", "file with a key", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dm.Store]:
    """An empty store of every kind."""
    match request.param:
        case "memory":
            opened = dm.Store.in_memory()
        case "file":
            opened = dm.Store(tmp_path / "memories.db")
        case "file with a key":
            opened = dm.Store(tmp_path / "memories.db", key=KEY)
        case _:
            address = request.getfixturevalue("redis_server")
            opened = dm.Store(f"{address}?prefix={tmp_path.name}:")
    with opened:
        yield opened
