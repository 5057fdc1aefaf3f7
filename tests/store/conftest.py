"""What the store's tests share: the embedded default, facts to tell it, a store of every kind, and a Redis server of their own."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that lives as long as the tests, on a free port, its files in a temporary directory."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("neither redis-server nor valkey-server is installed: apt-get install redis-server")
    folder = tmp_path_factory.mktemp("redis")
    port = free_port()
    options = f"--bind 127.0.0.1 --port {port} --dir {folder} --save '' --appendonly yes --logfile {folder}/log".split()
    server = subprocess.Popen([program, *(word.strip("'") for word in options)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.fail(f"{program} did not start: {(folder / 'log').read_text()}")
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


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
