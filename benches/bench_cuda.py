"""The engine on an NVIDIA card, against opponents on the same card in the same run: what the memory costs, many sessions, users that come
and go, steps as CUDA graphs, a turn after a history, memory on the card, and what runs in a step. Without a card it says why there is
none and ends with exit code 77.

    python benches/bench_cuda.py [--quick] [--device DEVICE]

`--device _device_on_cpu` has the processor play the card: to see that the bench runs, not to measure.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import deltamem_rt as dm
import models
from bench_history import a_turn, first_token
from bench_sessions import Users
from deltamem_rt import _native
from deltamem_rt._onnxruntime import find_library, open_cuda_libraries
from launches import launching
from measuring import Figures, Ratio, Table, interleaved, quantity, reached
from opponents import Engine, GenAI, Torch
from run import NO_CARD

TURN, MESSAGE = 256, 24
PROFILED = 16
"""Single tokens in a profile."""


@dataclass(frozen=True)
class Plan:
    """What is measured. `counts`: sessions at once; `marks`: tokens of history."""

    names: tuple[str, ...] = ("qwen3-0.6b", "qwen3-4b")
    precisions: tuple[str, ...] = ("fp16", "int4")
    prompt: int = 512
    tokens: int = 64
    rounds: int = 9
    counts: tuple[int, ...] = (1, 8, 64)
    marks: tuple[int, ...] = (0, 8_192, 32_768, 131_072)


QUICK = Plan(("smoke",), ("fp16",), 32, 4, 2, (1, 3), (0, 256, 512, 4096))


def no_card() -> str | None:
    """Why no card can be measured; None where one answers."""
    library = find_library().path
    open_cuda_libraries(library)
    report = _native.doctor(library)
    return None if report["cuda"] else str(report["cuda_says"])


def load(path: Path, device: str, **options: Any) -> dm.Model:
    return dm.Model.load(path, device=device, verify=False, **options)


def prompts(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 120, count, dtype=np.int32)


def genai_has_cuda() -> bool:
    try:
        version("onnxruntime-genai-cuda")
    except PackageNotFoundError:
        return False
    return True


def bench_cost(made: models.Made, plan: Plan, device: str, table: Table) -> None:
    """A prompt and a token with the memory, against the backbone alone, onnxruntime-genai and PyTorch."""
    model = load(made.bundle, device)
    opponents: dict[str, Any] = {"memory": Engine(model), "backbone alone": Engine(load(made.bare, device))}
    # Who is held against whom, and what is wanted of it.
    pairs: dict[tuple[str, str], float | None] = {("memory", "backbone alone"): 1 / 1.03}
    if model.graph == "fused":
        opponents["portable graph"] = Engine(load(made.bundle, device, graph="portable"))
        pairs |= {("portable graph", "backbone alone"): None, ("memory", "portable graph"): None}
    else:
        print(f"{made.name} at {made.precision}: no fused graph, {model.unfused}", file=sys.stderr)
    on_card = device.startswith("cuda")
    if on_card and genai_has_cuda():
        # Its graph has no memory, and so is held against the engine on the same graph.
        opponents["onnxruntime-genai"] = GenAI(made.genai)
        pairs["backbone alone", "onnxruntime-genai"] = 1.0
    if made.precision.startswith("fp16"):
        opponents["PyTorch with memory"] = Torch(made.backbone, made.adapter, "fp16", "cuda" if on_card else "cpu")
        pairs["memory", "PyTorch with memory"] = 3.0
    prompt = prompts(plan.prompt)
    found = interleaved({name: lambda o=o: o(prompt, plan.tokens) for name, o in opponents.items()}, plan.rounds)
    for figure in ("prefill", "decode"):
        for (ours, name), goal in pairs.items():
            ratio = Ratio.of(found[name][figure], found[ours][figure])
            only_decode = name == "PyTorch with memory"
            judged = (
                "-" if goal is None or (only_decode and figure != "decode") else reached(ratio.value, round(goal, 3))
            )
            mine, theirs = (quantity(found[who][figure]) for who in (ours, name))
            who = f"{ours}, {model.graph} graph" if ours == "memory" else ours
            table.row(made.name, made.precision, figure, f"engine, {who}", mine, name, theirs, ratio, judged)


def bench_sessions(made: models.Made, plan: Plan, device: str, table: Table) -> None:
    """Sessions that decode at once, against the same one after another; and what each holds on the card."""
    model = load(made.bundle, device, max_batch=max(plan.counts))
    for count in plan.counts:
        gc.collect()
        before = card_bytes()
        users = Users(model, count, 2 * (plan.rounds + 2) * plan.tokens + 2)
        held = card_bytes() - before
        rates = interleaved(
            {
                "threads": lambda u=users: u.in_threads(plan.tokens),
                "in turn": lambda u=users: u.one_after_another(plan.tokens),
            },
            plan.rounds,
        )
        users.close()
        ratio = Ratio.of(rates["threads"]["rate"], rates["in turn"]["rate"])
        both = [f"{statistics.median(rates[who]['rate']):,.1f} /s" for who in ("threads", "in turn")]
        per_user = f"{held / count / 2**20:.1f} MiB" if held > 0 else "-"
        table.row(made.name, made.precision, count, *both, ratio, per_user, f"{model.geometry.bytes / 2**10:.1f} KiB")


class Slots:
    """Sessions that each read one token a step, all at once. With `swaps`, in front of each step another one's turn has ended: it gives its
    slot back, which is wiped, and takes one as a user does who comes in, and its state is brought among the others'.
    """

    def __init__(self, model: dm.Model, count: int) -> None:
        self._sessions = [model.session() for _ in range(count)]

    def __call__(self, steps: int, swaps: bool) -> Figures:
        for session in self._sessions:
            session.end_turn()
            session.feed(prompts(8))
        count = len(self._sessions)
        ready = threading.Barrier(count + 1)

        def one(number: int) -> None:
            session = self._sessions[number]
            ready.wait()
            for step in range(steps):
                if swaps and step % count == number:
                    session.end_turn()
                session.feed([5])

        with ThreadPoolExecutor(count) as pool:
            parts = [pool.submit(one, number) for number in range(count)]
            ready.wait()
            began = time.perf_counter()
            for part in parts:
                part.result()
            return {"step": (time.perf_counter() - began) / steps}

    def close(self) -> None:
        for session in self._sessions:
            session.close()


def bench_swaps(made: models.Made, plan: Plan, device: str, table: Table) -> None:
    """What it costs a step of all slots that one user leaves and another comes in."""
    count = max(plan.counts)
    slots = Slots(load(made.bundle, device, max_batch=count), count)
    found = interleaved(
        {"steps": lambda: slots(plan.tokens, swaps=False), "swaps": lambda: slots(plan.tokens, swaps=True)},
        plan.rounds,
    )
    slots.close()
    plain, swapped = (found[who]["step"] for who in ("steps", "swaps"))
    ratio = Ratio.of(plain, swapped)
    judged = reached(ratio.value, round(1 / 1.05, 3))
    table.row(made.name, made.precision, count, quantity(plain), quantity(swapped), ratio, judged)


class Guests:
    """Users who come and go: each has a prompt read and a reply made, both of some length, and leaves; then another comes in that
    thread.
    """

    def __init__(self, model: dm.Model, count: int) -> None:
        self._model, self._count = model, count

    def in_threads(self, tokens: int) -> Figures:
        """Tokens of replies a second over all of them, `tokens` in each thread; prompts take their part of the time."""
        ready = threading.Barrier(self._count + 1)

        def one(number: int) -> None:
            random = np.random.default_rng(number)
            left = tokens
            ready.wait()
            while left > 0:
                count = min(left, int(random.integers(1, max(2, tokens // 2))))
                with self._model.session() as session:
                    session.feed(prompts(int(random.integers(4, 32)), left))
                    for _ in range(count):
                        session.feed([5])
                left -= count

        with ThreadPoolExecutor(self._count) as pool:
            parts = [pool.submit(one, number) for number in range(self._count)]
            ready.wait()
            began = time.perf_counter()
            for part in parts:
                part.result()
            return {"rate": tokens * self._count / (time.perf_counter() - began)}

    def close(self) -> None:
        """Nobody is left."""


def bench_graphs(made: models.Made, plan: Plan, device: str, table: Table) -> None:
    """Single tokens of one session, of all slots, and of users that come and go, with their steps captured as CUDA graphs and without."""
    most = max(plan.counts)
    for count, come_and_go in ((1, False), (most, False), (most, True)):
        engines = {
            name: load(made.bundle, device, max_batch=most, cuda_graphs=captured)
            for name, captured in (("captured", True), ("not", False))
        }
        room = (plan.rounds + 2) * plan.tokens + 2
        users: dict[str, Users | Guests] = {
            name: Guests(model, count) if come_and_go else Users(model, count, room) for name, model in engines.items()
        }
        found = interleaved({name: lambda u=u: u.in_threads(plan.tokens) for name, u in users.items()}, plan.rounds)
        for each in users.values():
            each.close()
        model = engines["captured"]
        ratio = Ratio.of(found["captured"]["rate"], found["not"]["rate"])
        rates = [quantity(found[name]["rate"], "/s") for name in ("captured", "not")]
        stats = model.stats
        share = f"{stats.cuda_graphs} for {stats.captured_steps / stats.steps:.0%} of {stats.steps} steps"
        who = f"{count}, coming and going" if come_and_go else str(count)
        table.row(made.name, made.precision, who, *rates, ratio, str(model.uncaptured or share))


def card_bytes() -> int:
    """What this process holds on the cards, as nvidia-smi counts it; 0 without one."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return 0
    rows = [line.split(",") for line in done.stdout.splitlines()]
    return sum(int(row[1]) << 20 for row in rows if row[0].strip() == str(os.getpid()) and row[1].strip().isdigit())


def bench_history(made: models.Made, plan: Plan, device: str, table: Table) -> None:
    """The first token of a turn after a history that the memory has read, against reading the history again."""
    model, bare = load(made.bundle, device), load(made.bare, device)
    message, read = prompts(MESSAGE, 1), 0
    with model.session() as session:
        for mark in plan.marks:
            while read < mark:
                session.feed(prompts(min(TURN, mark - read), read))
                session.end_turn()
                read += TURN
            a_turn(session, message)
            ours = [a_turn(session, message) for _ in range(plan.rounds)]
            if mark + MESSAGE + 2 > bare.context_length:
                table.row(made.name, made.precision, f"{mark:,}", quantity(ours), "over its context", "-", "-")
                continue
            again = []
            for _ in range(3):
                with bare.session() as other:
                    again.append(first_token(other, np.concatenate([prompts(mark, 2), message])))
            ratio = statistics.median(again) / statistics.median(ours)
            goal = reached(ratio, 64) if mark == 32_768 else "-"
            table.row(
                made.name, made.precision, f"{mark:,}", quantity(ours), quantity(again), f"**{ratio:,.1f}x**", goal
            )


def bench_profile(made: models.Made, device: str, table: Table) -> None:
    """What runs in a step of one token: ONNX Runtime's own profile of the engine's runs, in a process of its own."""
    graphs = [("fused", made.bundle)] if load(made.bundle, device).graph == "fused" else []
    for name, bundle in (*graphs, ("portable", made.bundle), ("backbone alone", made.bare)):
        graph = name if bundle == made.bundle else "portable"
        with tempfile.TemporaryDirectory() as folder:
            code = (
                "import sys, numpy as np, deltamem_rt as dm\n"
                "options = {'device': sys.argv[2], 'graph': sys.argv[3], 'verify': False, 'max_batch': 1}\n"
                "with dm.Model.load(sys.argv[1], **options).session() as session:\n"
                f"    session.feed(np.arange(3, 67, dtype=np.int32))\n    for _ in range({PROFILED}): session.feed([5])\n"
            )
            subprocess.run(
                [sys.executable, "-c", code, str(bundle), device, graph],
                env={**os.environ, "DELTAMEM_PROFILE": str(Path(folder) / "profile")},
                check=True,
            )
            events = json.loads(next(Path(folder).glob("profile*.json")).read_text())
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        # The prompt's run and the tokens' have the same nodes.
        runs = PROFILED + 1
        places = Counter(e["args"].get("provider", "?") for e in nodes)
        moved = sum(e["args"].get("op_name", "").startswith("Memcpy") for e in nodes)
        kernels = sum(e.get("cat") == "Kernel" for e in events)
        busy: Counter[str] = Counter()
        for event in nodes:
            busy[event["args"].get("op_name", "?")] += event["dur"]
        most = ", ".join(f"{operator} {time / runs / 1e3:.2f} ms" for operator, time in busy.most_common(4))
        where = ", ".join(
            f"{place.removesuffix('ExecutionProvider')} {count / runs:.0f}" for place, count in places.items()
        )
        table.row(
            made.name,
            made.precision,
            name,
            f"{len(nodes) / runs:.0f}",
            launching(bundle, graph).told(),
            where,
            f"{moved / runs:.1f}",
            f"{kernels / runs:.0f}" if kernels else "not told by this build",
            most,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model and few rounds: to see that it runs")
    parser.add_argument("--device", default="cuda", help="where to run (default: %(default)s)")
    options = parser.parse_args()
    if options.device.startswith("cuda") and (why := no_card()) is not None:
        print(f"no card answers here, so nothing was measured: {why}", file=sys.stderr)
        raise SystemExit(NO_CARD)
    plan = QUICK if options.quick else Plan()
    print("## cuda\n\nRandom weights. " + " · ".join(f"`{name}`: {models.SHAPES[name].says}." for name in plan.names))
    print(
        f"\nTF32 is off. Prompts of {plan.prompt} tokens, then {plan.tokens} single ones, greedy; opponents take turns, medians of "
        f"{plan.rounds} rounds, the ratio's range in brackets: the opponent's time over the engine's."
    )
    if options.device.startswith("cuda") and not genai_has_cuda():
        print("\nonnxruntime-genai's CUDA wheel, onnxruntime-genai-cuda, is not installed, so it is no opponent here.")
    all_made = [models.made(n, p, device="cuda") for n in plan.names for p in plan.precisions]
    table = Table("model", "precision", "what", "engine", "time", "opponent", "its time", "ratio", "goal")
    for made in all_made:
        bench_cost(made, plan, options.device, table)
        gc.collect()
    print(
        "\n### Many sessions\n\nTokens a second over all of them, in threads of their own, against one after another."
    )
    table = Table("model", "precision", "sessions", "at once", "in turn", "ratio", "on the card, each", "of it state")
    for made in all_made:
        bench_sessions(made, plan, options.device, table)
        gc.collect()
    print(
        "\n### Users that come and go\n\nA step of one token of each session, and one in front of which one user's turn has ended and "
        "another takes a slot; the first over the second, goal 5 % more at most."
    )
    table = Table("model", "precision", "slots", "a step", "with a swap", "ratio", "goal")
    for made in all_made:
        bench_swaps(made, plan, options.device, table)
        gc.collect()
    print(
        "\n### Steps as CUDA graphs\n\nTokens a second with `cuda_graphs=True` against without; users that come and go have "
        "prompts read in between."
    )
    table = Table("model", "precision", "sessions", "captured", "not captured", "ratio", "captures")
    for made in all_made:
        bench_graphs(made, plan, options.device, table)
        gc.collect()
    print(f"\n### A turn after a history\n\nSeconds to the first token of the reply to {MESSAGE} tokens.")
    table = Table("model", "precision", "history", "memory", "reading again", "ratio", "goal")
    for made in all_made:
        bench_history(made, plan, options.device, table)
        gc.collect()
    print(
        "\n### A step\n\nNodes of one run by ONNX Runtime's profile, those of the exported graph that launch kernels, where they ran, "
        "those that copy between host and card, kernel launches where the build tells them, and the operators that take most on the "
        "host's clock."
    )
    table = Table("model", "precision", "graph", "nodes", "of the graph", "where", "copies", "launches", "most time")
    for made in all_made:
        bench_profile(made, options.device, table)


if __name__ == "__main__":
    main()
