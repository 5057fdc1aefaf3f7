"""What the runtime takes of a machine: memory, the time to load and to import, the wheel's size, and Python's share of a streamed token.

RAM is measured in processes of their own; `resident` is VmRSS, `own` the part of it that is no file (RssAnon).

    python benches/bench_footprint.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import deltamem_rt as dm
import models
from measuring import Figures, Ratio, Table, interleaved, quantity, seconds

SESSIONS = 32


def weighed(bundle: Path, tokens: int = 0) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("weighing.py")), str(bundle), str(tokens), str(SESSIONS)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


# ---------------------------------------------------------------------- the parts


def bench_ram(names: tuple[str, ...], many: int) -> None:
    print(
        f"\n### RAM\n\nProcesses of their own with one model, after turns of 128 tokens; more sessions: the mean of {SESSIONS}, each "
        "with a turn of 16 tokens behind it, and in one. A turn's cache begins with 256 tokens; its logits are a row of the vocabulary."
    )
    table = Table(
        "model",
        "precision",
        "bare backbone",
        "with memory",
        "more",
        "goal",
        "own, more",
        "a session between turns",
        "in a turn",
        "its state + cache + logits",
    )
    for name in names:
        for precision in models.PRECISIONS:
            made = models.made(name, precision)
            bare, ours = weighed(made.bare), weighed(made.bundle)
            (rss, anon), (base, base_anon) = ours["after turns"], bare["after turns"]
            more = rss / base
            needed = sum(ours[part] for part in ("state", "cache", "logits"))
            table.row(
                name,
                precision,
                f"{base:,.0f} MiB",
                f"{rss:,.0f} MiB",
                f"**{(more - 1) * 100:+.1f} %**",
                "≤ +1 %: " + ("reached" if more <= 1.01 else "**missed**"),
                f"{anon - base_anon:+,.1f} MiB",
                f"{ours['between turns']:,.2f} MiB",
                f"{ours['in a turn']:,.2f} MiB",
                f"{needed:,.2f} MiB",
            )
    found = weighed(dm.default_bundle(), many)
    (rss, anon), (later, later_anon) = found["after turns"], found["after many"]
    print(
        f"\nThe embedded default after {many:,} tokens in turns of 1,000: {later:,.1f} MiB resident, {later_anon:,.1f} own, against "
        f"{rss:,.1f} and {anon:,.1f} after five of them.",
        flush=True,
    )


def bench_load(names: tuple[str, ...], rounds: int) -> None:
    print(
        "\n### Load, import, wheel\n\nLoads with the files in the system's cache; `checked` reads every byte and compares digests."
    )
    table = Table("what", "first", "median of the next", "goal", "rounds")
    bundles = {"the embedded default": dm.default_bundle()}
    bundles |= {
        f"{name}, {precision}": models.made(name, precision).bundle for name in names for precision in models.PRECISIONS
    }
    for name, path in bundles.items():
        for checked in (True, False):
            times = [seconds(lambda p=path, c=checked: dm.Model.load(p, verify=c)) for _ in range(rounds + 1)]
            label = f"load {name}{', checked' if checked else ', verify=False'}"
            table.row(label, quantity(times[0]), quantity(times[1:]), "-", rounds)
    code = "import numpy, time; t = time.perf_counter(); import deltamem_rt; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(2 * rounds + 1)
    ]
    median = float(np.median(times[1:]))
    verdict = "reached" if median <= 0.15 else "**missed**"
    table.row(
        "import deltamem_rt, NumPy not counted",
        quantity(times[0]),
        quantity(median),
        f"≤ 0.15 s: {verdict}",
        2 * rounds,
    )
    wheels = sorted((models.ROOT / "dist").glob("deltamem_rt-*.whl"))
    if wheels:
        size = wheels[0].stat().st_size
        verdict = "reached" if size <= 10_000_000 else "**missed**"
        table.row("the wheel", f"{size:,} bytes", "-", f"≤ 10,000,000: {verdict}", 1)
    else:
        table.row("the wheel", "none in dist/: `make wheel` builds it", "-", "≤ 10,000,000", 0)


class Streamed:
    """One reply of the embedded default, taken in three ways. `token`: seconds a token; `share`: what of it is neither the graph's
    nor the sampler's by the engine's own clock."""

    def __init__(self, tokens: int) -> None:
        self._model = dm.Model.load(dm.default_bundle())
        self._tokens = tokens
        self._prompt = np.array([5, 6, 7], np.int32)

    def _reply(self, session: dm.Session) -> dm.Generation:
        return session.generate(self._prompt, max_new_tokens=self._tokens, temperature=5.0, seed=3)

    def _figures(self, reply: dm.Generation, took: float) -> Figures:
        stats = reply.stats
        if stats.tokens < self._tokens // 2:
            raise RuntimeError(f"the reply ended after {stats.tokens} tokens; take another seed")
        rate = stats.tokens_per_second
        inside = (stats.tokens - 1) / rate if rate else float("nan")
        return {"token": took / (stats.tokens - 1), "share": (took - inside) / (stats.tokens - 1)}

    def by_iterating(self) -> Figures:
        with self._model.session() as session:
            reply = self._reply(session)
            next(reply)
            took = seconds(lambda: [None for _ in reply])
            return self._figures(reply, took)

    def by_reading(self) -> Figures:
        """The Rust loop: no piece of text crosses into Python before the end."""
        with self._model.session() as session:
            reply = self._reply(session)
            next(reply)
            took = seconds(reply.read)
            return self._figures(reply, took)

    def by_asyncio(self) -> Figures:
        async def all_of_it(reply: dm.Generation) -> float:
            await anext(aiter(reply))
            began = time.perf_counter()
            async for _ in reply:
                pass
            return time.perf_counter() - began

        with self._model.session() as session:
            reply = self._reply(session)
            return self._figures(reply, asyncio.run(all_of_it(reply)))


def bench_streaming(tokens: int, rounds: int) -> None:
    print(
        f"\n### Streaming from Python\n\nA reply of the embedded default, up to {tokens} tokens at a temperature that hardly lets it end. "
        "The Rust loop is `read()`. *Outside*: time a token beyond graph and sampler, by the engine's own clock: text, the way to Python "
        "and back, and the step that reads the reply's last token, shared out."
    )
    streamed = Streamed(tokens)
    found = interleaved(
        {
            "the Rust loop": streamed.by_reading,
            "`for piece in reply`": streamed.by_iterating,
            "`async for piece in reply`": streamed.by_asyncio,
        },
        rounds,
        pause=0.005,
    )
    base = found["the Rust loop"]
    table = Table("how", "a token", "over the Rust loop", "times as long", "outside", "goal", "rounds")
    for how, figures in found.items():
        over = float(np.median([a - b for a, b in zip(figures["token"], base["token"], strict=True)]))
        goal = "-"
        if how.startswith("`for"):
            goal = "≤ 20 µs: " + ("reached" if over <= 20e-6 else "**missed**")
        ratio = Ratio.of(figures["token"], base["token"]) if figures is not base else "-"
        table.row(how, quantity(figures["token"]), quantity(over), ratio, quantity(figures["share"]), goal, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model and few rounds: to see that it runs")
    quick = parser.parse_args().quick
    names = ("smoke",) if quick else ("qwen3-0.6b", "smollm2-135m", "embedded")
    print("## footprint\n\nWhat the runtime takes of a machine.")
    bench_streaming(16 if quick else 250, 3 if quick else 31)
    bench_load(names, 1 if quick else 3)
    bench_ram(names, 2_000 if quick else 1_000_000)


if __name__ == "__main__":
    main()
