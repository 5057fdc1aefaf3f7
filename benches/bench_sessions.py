"""Many users at once: 1, 4, 8 and 16 sessions decode in threads of their own, against the same sessions one after another.

Prompts are read before the clock starts. Beside the rates stands what the machine does with them: the bytes of weights that the steps of
one after another read from memory, the arithmetic that the tokens take, and what the machine can do of both.

    python benches/bench_sessions.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import deltamem_rt as dm
import models
from deltamem_export.evaluation.plots import Point, Series, line_plot
from measuring import Figures, Ratio, Table, interleaved, reached, save_plot, seconds
from opening import has_option, load

COUNTS = (1, 4, 8, 16)
PROMPT, REPLY = 8, 24
GOALS = {"fp32": 6.0, "int4": 3.0}


class Users:
    """Sessions of one model that have read their prompts; each `decode` gives `tokens` more of every one of them."""

    def __init__(self, model: dm.Model, count: int, room: int) -> None:
        rng = np.random.default_rng(count)
        self._sessions = [model.session() for _ in range(count)]
        self._replies = [
            session.generate(rng.integers(3, 120, PROMPT, dtype=np.int32), max_new_tokens=room)
            for session in self._sessions
        ]
        for reply in self._replies:
            next(reply)

    def in_threads(self, tokens: int) -> Figures:
        """All at once; tokens a second over all of them, from the moment when every thread stands ready."""
        ready = threading.Barrier(len(self._replies) + 1)

        def one(reply: dm.Generation) -> None:
            ready.wait()
            for _ in range(tokens):
                next(reply)

        with ThreadPoolExecutor(len(self._replies)) as pool:
            parts = [pool.submit(one, reply) for reply in self._replies]
            ready.wait()
            began = time.perf_counter()
            for part in parts:
                part.result()
            took = time.perf_counter() - began
        return {"rate": tokens * len(self._replies) / took}

    def one_after_another(self, tokens: int) -> Figures:
        began = time.perf_counter()
        for reply in self._replies:
            for _ in range(tokens):
                next(reply)
        return {"rate": tokens * len(self._replies) / (time.perf_counter() - began)}

    def close(self) -> None:
        for reply, session in zip(self._replies, self._sessions, strict=True):
            reply.close()
            session.close()


def roofs() -> tuple[float, float]:
    """What the machine can do with all threads: bytes a second read from memory, and float32 operations a second in a product."""
    large = torch.zeros(64 << 20)  # 256 MiB
    size = 1536
    a, b = torch.randn(size, size), torch.randn(size, size)
    read = min(seconds(large.sum) for _ in range(5))
    product = min(seconds(lambda: a @ b) for _ in range(5))
    return large.nbytes / read, 2 * size**3 / product


def work(made: models.Made) -> tuple[int, float]:
    """Bytes of weights that a step of one token reads, and operations a token takes. The table of embeddings is not read as a whole."""
    manifest = json.loads((made.bundle / "deltamem.json").read_text())
    config = json.loads((made.backbone / "config.json").read_text())
    c = {name: config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    attention = c["hidden_size"] * config["head_dim"] * (2 * heads + 2 * kv)
    weights = c["num_hidden_layers"] * (attention + 3 * c["hidden_size"] * c["intermediate_size"])
    weights += c["hidden_size"] * c["vocab_size"]
    table = 4 * c["hidden_size"] * c["vocab_size"]
    return manifest["files"]["model.onnx.data"]["bytes"] - table, 2.0 * weights


def bench(
    name: str, precision: str, counts: tuple[int, ...], rounds: int, tokens: int, table: Table
) -> list[tuple[int, Ratio]]:
    made = models.made(name, precision)
    model = load(made.bundle, max_batch=max(counts))
    size, operations = work(made)
    found = []
    for count in counts:
        gc.collect()
        room = 2 * (rounds + 2) * tokens + 2
        users = Users(model, count, room)
        rates = interleaved(
            {"threads": lambda u=users: u.in_threads(tokens), "in turn": lambda u=users: u.one_after_another(tokens)},
            rounds,
        )
        users.close()
        ratio = Ratio.of(rates["threads"]["rate"], rates["in turn"]["rate"])
        alone, together = (float(np.median(rates[who]["rate"])) for who in ("in turn", "threads"))
        goal = reached(ratio.value, GOALS[precision]) if count == max(counts) else "-"
        table.row(
            name,
            precision,
            count,
            f"{together:,.1f} /s",
            f"{alone:,.1f} /s",
            ratio,
            f"{alone * size / 1e9:.1f} GB/s",
            f"{together * operations / 1e9:.0f} G/s",
            goal,
            rounds,
        )
        found.append((count, ratio))
    return found


COLOURS = {"qwen3-0.6b": "#0072b2", "smollm2-135m": "#d55e00", "smoke": "#009e73"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model and few rounds: to see that it runs")
    quick = parser.parse_args().quick
    batched = (
        "in shared steps (`max_batch=16`)" if has_option("max_batch") else "each by its own steps (no `max_batch`)"
    )
    bytes_s, operations_s = roofs()
    print(
        f"## sessions\n\nMany users at once: every session decodes in a thread of its own, {batched}, against the same sessions one "
        f"after another, whose steps use all {os.cpu_count()} cores. Tokens a second over all sessions, {REPLY} tokens of each; steps "
        "at the beginning and the end, which not all share, count. The machine, by PyTorch's sum and product: "
        f"{bytes_s / 1e9:.0f} GB/s read, {operations_s / 1e9:.0f} G float32 operations/s. A single token is bound by reading the "
        "weights; shared steps read them once for all, until the arithmetic is the limit."
    )
    table = Table(
        "model",
        "precision",
        "sessions",
        "at once",
        "one after another",
        "times as many tokens",
        "weights read, one after another",
        "arithmetic, at once",
        "goal",
        "rounds",
    )
    series = []
    names = ("smoke",) if quick else ("qwen3-0.6b", "smollm2-135m")
    for name in names:
        rounds, tokens = {"qwen3-0.6b": (3, REPLY), "smollm2-135m": (5, REPLY)}.get(name, (2, 3))
        for precision in models.PRECISIONS:
            found = bench(name, precision, (1, 3) if quick else COUNTS, rounds, tokens, table)
            points = [Point(count, ratio.value, ratio.low, ratio.high) for count, ratio in found]
            series.append(Series(f"{name}, {precision}", COLOURS[name], points, dashed=precision == "int4"))
    top = max(p.high for s in series for p in s.points)
    svg = line_plot(
        series,
        "sessions at once",
        "times the tokens/s of one after another",
        x_axis="linear",
        y_range=(0.0, float(np.ceil(top))),
    )
    save_plot("sessions", svg, "Throughput of sessions at once, in times of one after another")


if __name__ == "__main__":
    main()
