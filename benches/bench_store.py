"""The store against SQLite (Python's own: WAL, synchronous=FULL) with the same state bytes, interleaved in one run, as Markdown.

commit      restore and commit, fsync included, against an INSERT of the state and an UPDATE of the ref in one transaction;
            states of two shapes: the embedded default's, and that of the released adapter for Qwen3-4B (36 layers, rank 8)
open        a process that opens a store of many memories and reads one state: time and resident memory
switch      another memory's session opened, against a SELECT and Session.restore; read before in this process, or never

    python benches/bench_store.py [--quick]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import deltamem_rt as dm
from deltamem_export.adapter import Adapter, AdapterConfig, AttentionShape, expected_shapes
from deltamem_export.bundle import export_bundle

COMMITS = 10
MEMORIES = 100_000
THREADS = 16
READER = """
import sqlite3, sys, time
import deltamem_rt as dm
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4
kind, path, name = sys.argv[1:]
before, began = resident(), time.perf_counter()
if kind == "store":
    place = dm.Store(path)
    place.snapshot(name)
else:
    place = sqlite3.connect(path)
    place.execute("SELECT state FROM states JOIN refs ON refs.head = states.id WHERE refs.name = ?", (name,)).fetchone()
print((time.perf_counter() - began) * 1e3, (resident() - before) / 1024)
"""


def connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE IF NOT EXISTS states (id INTEGER PRIMARY KEY, state BLOB)")
    database.execute("CREATE TABLE IF NOT EXISTS refs (name TEXT PRIMARY KEY, head INTEGER)")
    return database


def insert(database: sqlite3.Connection, name: str, state: bytes) -> None:
    database.execute("BEGIN IMMEDIATE")
    head = database.execute("INSERT INTO states (state) VALUES (?)", (state,)).lastrowid
    database.execute("UPDATE refs SET head = ? WHERE name = ?", (head, name))
    database.execute("COMMIT")


def row(bench: str, ours: list[float], theirs: list[float], unit: str, faster_is_more: bool, goal: str) -> None:
    """One line of the table; over 1x ours is better, pair by pair."""
    pairs = zip(ours, theirs, strict=True)
    ratios = sorted(mine / other if faster_is_more else other / mine for mine, other in pairs)
    print(
        f"| {bench} | {statistics.median(ours):.3f} {unit} | {statistics.median(theirs):.3f} {unit} | "
        f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {goal} | {len(ratios)} |",
        flush=True,
    )


def in_threads(work: Callable[[int], None], threads: int) -> float:
    """Seconds until every thread has done its part, from the moment when all of them are ready."""
    ready = threading.Barrier(threads + 1)

    def one(index: int) -> None:
        ready.wait()
        work(index)

    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(one, index) for index in range(threads)]
        ready.wait()
        began = time.perf_counter()
        for part in parts:
            part.result()
        return time.perf_counter() - began


def states(model: dm.Model, count: int) -> list[dm.Snapshot]:
    with model.session() as session:
        taken = []
        for index in range(count):
            session.feed([5 + index % 50])
            session.end_turn()
            taken.append(session.snapshot())
        return taken


def of_the_released_shape(folder: Path) -> dm.Model:
    """A model whose memory has 36 layers of rank 8; the backbone is as small as can be, its weights do not matter here."""
    torch.manual_seed(0)
    layers, width = 36, 32
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=width,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "backbone")
    settings = AdapterConfig(rank=8, alpha=16.0)
    shapes = expected_shapes(settings, AttentionShape(width, width, width, width, width))[0]
    weights = {index: {name: torch.randn(size) * 0.1 for name, size in shapes.items()} for index in range(layers)}
    return dm.Model.load(export_bundle(folder / "backbone", Adapter(settings, weights), folder / "bundle", check=False))


def bench_commits(model: dm.Model, folder: Path, repeats: int, each: int) -> None:
    snapshots = states(model, repeats * each * 2)
    blobs = [snapshot.to_bytes() for snapshot in snapshots]
    database, turns = connect(folder / "commits.sqlite"), threading.Lock()
    names = [f"user/{index}" for index in range(THREADS)]
    database.executemany("INSERT INTO refs VALUES (?, 0)", [(name,) for name in names])
    rates: dict[tuple[str, int], list[float]] = {}
    with dm.Store(folder / "commits.store") as store:
        sessions = [model.session(name, store=store) for name in names]
        for repeat in range(repeats):
            for at, threads in enumerate((1, THREADS)):
                part = slice((2 * repeat + at) * each, (2 * repeat + at + 1) * each)

                def ours(index: int, part: slice = part) -> None:
                    for snapshot in snapshots[part]:
                        sessions[index].restore(snapshot)
                        sessions[index].commit()

                def theirs(index: int, part: slice = part) -> None:
                    for blob in blobs[part]:
                        with turns:
                            insert(database, names[index], blob)

                both = [("ours", ours), ("theirs", theirs)]
                for who, work in both if repeat % 2 == 0 else reversed(both):
                    rates.setdefault((who, threads), []).append(threads * each / in_threads(work, threads))
        for session in sessions:
            session.close()
    database.close()
    one, many = rates["ours", 1], rates["ours", THREADS]
    size = f"{len(blobs[0]):,} bytes"
    row(f"commits of {size}, 1 session; SQLite", one, rates["theirs", 1], "/s", True, "1.0x")
    row(
        f"commits of {size}, {THREADS} sessions; SQLite, {THREADS} threads in turn",
        many,
        rates["theirs", THREADS],
        "/s",
        True,
        "5x",
    )
    row(f"commits of {size}, {THREADS} sessions; 1 session", many, one, "/s", True, "-")


def build(model: dm.Model, folder: Path, seconds: float, most: int) -> list[str]:
    """As many memories of COMMITS commits as time and disk allow: one is committed, the others are forks of it, which share nothing."""
    snapshots = states(model, COMMITS)
    blobs = [snapshot.to_bytes() for snapshot in snapshots]
    names: list[str] = []
    room = shutil.disk_usage(folder).free // 3  # for the store's file; SQLite's copy and the rest come beside it
    with dm.Store(folder / "many.store") as store:
        with model.session("seed", store=store) as session:
            for snapshot in snapshots:
                session.restore(snapshot)
                session.commit()
        until = time.monotonic() + seconds

        def fork(index: int) -> None:
            for number in range(index, most, THREADS):
                if time.monotonic() > until or (folder / "many.store").stat().st_size > room:
                    return
                store.fork("seed", f"user/{number}")
                names.append(f"user/{number}")

        in_threads(fork, THREADS)
    database = connect(folder / "many.sqlite")
    database.execute("BEGIN")
    for name in names:
        for blob in blobs:
            head = database.execute("INSERT INTO states (state) VALUES (?)", (blob,)).lastrowid
        database.execute("INSERT INTO refs VALUES (?, ?)", (name, head))
    database.execute("COMMIT")
    database.close()
    return names


def bench_open(folder: Path, names: list[str], repeats: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {"store": [], "sqlite": []}
    for repeat in range(repeats):
        for kind, figures in found.items():
            command = [sys.executable, "-c", READER, kind, str(folder / f"many.{kind}"), names[repeat]]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            took, grown = map(float, done.stdout.split())
            figures.append((took, max(grown, 0.01)))
    times, sizes = ([[pair[at] for pair in found[kind]] for kind in found] for at in (0, 1))
    row(f"open and read one of {len(names)} memories; SQLite", *times, "ms", False, "-")
    row(f"resident memory for it, {len(names)} memories; SQLite", *sizes, "MiB", False, "-")


def bench_switch(model: dm.Model, folder: Path, names: list[str], repeats: int) -> None:
    database = connect(folder / "many.sqlite")
    slot = model.session()
    query = "SELECT state FROM states JOIN refs ON refs.head = states.id WHERE refs.name = ?"

    def timed(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e6

    def select(name: str) -> None:
        slot.restore(dm.Snapshot.from_bytes(database.execute(query, (name,)).fetchone()[0]))

    with dm.Store(folder / "many.store") as store:
        for label, goal in (("never read before in this process", "1 ms"), ("read before", "50 µs")):
            ours, theirs = [], []
            for name in names[-repeats:]:
                ours.append(timed(lambda name=name: slot.restore(store.snapshot(name))))
                theirs.append(timed(lambda name=name: select(name)))
            row(f"switch, {label}; SQLite", ours, theirs, "µs", False, goal)
        opened, theirs = [], []
        for name in names[-repeats:]:
            opened.append(timed(lambda name=name: model.session(name, store=store).close()))
            theirs.append(timed(lambda name=name: select(name)))
        row("switch, model.session and close, read before; SQLite", opened, theirs, "µs", False, "50 µs")
    slot.close()
    database.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions and a small store, under 30 s")
    quick = parser.parse_args().quick
    model = dm.Model.load(dm.default_bundle())
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    parent = Path(__file__).resolve().parents[1] / "target"  # a real disk, where the system's folder may be memory
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as place:
        folder = Path(place)
        small = of_the_released_shape(folder)
        gc.collect()
        gc.freeze()  # the exporter's modules are no part of a service: without this the collector looks through them all the time
        print(
            f"## Stores\n\nThe store's file against SQLite {sqlite3.sqlite_version} (WAL, synchronous=FULL), the same state bytes: of the "
            f"embedded default, and of a memory in the shape of the released adapter for Qwen3-4B. Over 1x: ours is better. Medians; the "
            f"ratio is the median of the pairs, with its range. The machine is shared and other work may run beside this; load at the "
            f"start {load}. Files lie in the system's page cache throughout. A commit here is restore, commit; SQLite gets its bytes "
            f"ready made. {today}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
            f"deltamem-rt {dm.__version__}.\n"
        )
        print("| bench; opponent | ours | opponent | ratio | goal | pairs |\n|---|---|---|---|---|---|", flush=True)
        for kind, each in ((model, 30), (small, 60)):
            files = folder / f"commits-{each}"
            files.mkdir()
            bench_commits(kind, files, 3 if quick else 9, each // 3 if quick else each)
        began = time.monotonic()
        names = build(small, folder, 4 if quick else 600, MEMORIES)
        took = time.monotonic() - began
        bench_open(folder, names, 3 if quick else 7)
        bench_switch(small, folder, names, min(len(names) // 2, 50 if quick else 300))
        file = (folder / "many.store").stat().st_size / 2**20
        other = (folder / "many.sqlite").stat().st_size / 2**20
        print(
            f"\nBuilt: {len(names)} memories of {COMMITS} commits (goal {MEMORIES}; building stops after its time or when the disk gets "
            f"full), forks of one, with SQLite's copy in {took:.0f} s; the store's file has {file:.0f} MiB, SQLite's {other:.0f} MiB."
        )


if __name__ == "__main__":
    main()
