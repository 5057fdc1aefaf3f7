"""What a memory costs, and how fast the engine is without one: a prompt of 128 and of 512 tokens, then single tokens, all greedy.

with memory   against the same engine on the same backbone with the memory cut out of its graph (models.py)
the backbone  against onnxruntime-genai's own generator on that graph and those weights, with its own number of threads and with all
with memory   against Hugging Face and PyTorch with the reference memory, at the same precision and at the best of each
where         ONNX Runtime's own profile of the portable graph: the memory's nodes beside the backbone's

    python benches/bench_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

import models
from measuring import Figures, Ratio, Rounds, Table, interleaved, quantity, reached
from node_profile import profile
from opening import load
from opponents import Engine, GenAI, Torch

PROMPTS = (128, 512)
LOADS = 3
"""How often all contestants are loaded anew: where weights come to lie is luck, which costs or saves up to 3 % until the next load."""
CORES = os.cpu_count() or 1
NAMES = ("qwen3-0.6b", "smollm2-135m", "embedded")


class Lengths:
    """How long each is measured: rounds, and tokens that are decoded behind each prompt. `share`: of the rounds, where an opponent is far
    slower or a goal is far away."""

    def __init__(self, name: str, quick: bool, share: float = 1.0) -> None:
        rounds, self.tokens = {"qwen3-0.6b": (9, 10), "smollm2-135m": (12, 16)}.get(name, (30, 64))
        self.loads, self.prompts = LOADS, PROMPTS
        self.rounds = max(LOADS, round(rounds * share / LOADS) * LOADS)
        if quick:
            self.loads, self.rounds, self.tokens, self.prompts = 1, 2, 3, (8, 16)


Contestant = Callable[[np.ndarray, int], Figures]
Makers = Mapping[str, Callable[[], Contestant]]


def both_prompts(contestant: Contestant, lengths: Lengths) -> Figures:
    """One turn: each prompt with its decode."""
    rng = np.random.default_rng(0)
    found = {}
    for length in lengths.prompts:
        prompt = rng.integers(3, 120, length, dtype=np.int32)
        for what, value in contestant(prompt, lengths.tokens).items():
            found[f"{what}, {length} tokens" if what == "prefill" else f"{what} after {length}"] = value
    return found


def measured(makers: Makers, lengths: Lengths) -> Rounds:
    """The rounds of all loads."""
    found: Rounds = {who: {} for who in makers}
    for _ in range(lengths.loads):
        gc.collect()
        contestants = {who: make() for who, make in makers.items()}
        rounds = lengths.rounds // lengths.loads
        part = interleaved({who: partial(both_prompts, one, lengths) for who, one in contestants.items()}, rounds)
        for who, figures in part.items():
            for what, values in figures.items():
                found[who].setdefault(what, []).extend(values)
        del contestants
    gc.collect()
    return found


def quickest(found: Rounds, opponents: Sequence[str], what: str) -> str:
    """Who of them takes the least time for it."""
    return min(opponents, key=lambda who: float(np.median(found[who][what])))


def rate(what: str, values: list[float]) -> str:
    """Tokens a second of one figure."""
    tokens = int(what.split(", ")[1].split()[0]) if what.startswith("prefill") else 1
    return f"{tokens / float(np.median(values)):,.0f} /s"


def bench_memory(names: tuple[str, ...], quick: bool) -> None:
    print(
        "\n### With memory against without\n\nTime of a prompt, and of a token after it. 1x would be a memory for nothing."
    )
    table = Table(
        "model", "precision", "graph", "what", "with memory", "without", "time with / without", "goal", "rounds"
    )
    for name in names:
        for precision in models.PRECISIONS:
            made, lengths = models.made(name, precision), Lengths(name, quick)
            best, bare = load(made.bundle).graph, load(made.bare).graph
            makers: dict[str, Callable[[], Contestant]] = {
                "without": lambda made=made: Engine(load(made.bare)),
                best: lambda made=made: Engine(load(made.bundle)),
            }
            opponents = {best: "without"}
            if best != "portable":
                makers["portable"] = lambda made=made: Engine(load(made.bundle, graph="portable"))
                opponents["portable"] = "without"
            if bare != "portable":
                # Products of the same kind on both sides.
                makers["without, portable"] = lambda made=made: Engine(load(made.bare, graph="portable"))
                opponents["portable"] = "without, portable"
            found = measured(makers, lengths)
            for graph, opponent in opponents.items():
                for what, times in found[graph].items():
                    base = found[opponent][what]
                    ratio = Ratio.of(times, base)
                    goal = reached(ratio.value, 1.03, most=True) if graph == best else "-"
                    table.row(
                        name, precision, graph, what, quantity(times), quantity(base), ratio, goal, lengths.rounds
                    )


def row(
    table: Table,
    labels: tuple[str, ...],
    what: str,
    found: Rounds,
    two: tuple[str, str],
    goal: float,
    lengths: Lengths,
    says: tuple[str, ...] = (),
) -> None:
    """Ours against an opponent: both rates, what there is to say of the opponent, how many times as fast ours is, and the goal."""
    ours, theirs = (found[who][what] for who in two)
    ratio = Ratio.of(theirs, ours)
    cells = (rate(what, ours), rate(what, theirs), *says, ratio, reached(ratio.value, goal))
    table.row(*labels, what, *cells, lengths.rounds)


def bench_genai(names: tuple[str, ...], quick: bool) -> None:
    print(
        "\n### The same graph without memory against onnxruntime-genai\n\nTokens a second; genai's generator runs with its own "
        f"settings (its threads go on spinning, ours sleep after 20 µs) and, of its own number of threads and of {CORES}, with what is "
        "faster here. Making a generator is not counted. Its graph has the same weights and computes the last token's logits alone, as "
        "ours; ours makes pieces of text beside, genai's ids only. The graph `portable` has genai's very operators, `blocks` products of "
        "our own over the same 4-bit weights."
    )
    table = Table(
        *("model", "precision", "our graph", "what", "engine", "onnxruntime-genai", "its threads"),
        *("times as fast", "goal", "rounds"),
    )
    for name in names:
        for precision in models.PRECISIONS:
            made, lengths = models.made(name, precision), Lengths(name, quick)
            graphs = sorted({load(made.bare).graph, "portable"})
            makers: dict[str, Callable[[], Contestant]] = {
                graph: lambda made=made, graph=graph: Engine(load(made.bare, graph=graph)) for graph in graphs
            }
            makers |= {
                "its own": lambda made=made: GenAI(made.genai),
                f"{CORES}": lambda made=made: GenAI(made.genai, threads=CORES),
            }
            found = measured(makers, lengths)
            for graph in graphs:
                for what in found[graph]:
                    best = quickest(found, ("its own", f"{CORES}"), what)
                    row(table, (name, precision, graph), what, found, (graph, best), 1.0, lengths, says=(best,))


def bench_torch(names: tuple[str, ...], quick: bool) -> None:
    print(
        "\n### With memory against Hugging Face and PyTorch with the reference memory\n\nTokens a second, PyTorch with "
        f"{torch.get_num_threads()} threads. The same precision is fp32; "
        "at the best of each ours is int4, theirs what is fastest of fp32, bf16 and dynamic int8."
    )
    table = Table("model", "ours", "theirs", "what", "engine", "PyTorch", "times as fast", "goal", "rounds")
    for name in names:
        made, lengths = models.made(name, "fp32"), Lengths(name, quick, 0.4)
        theirs: dict[str, Callable[[], Contestant]] = {
            form: partial(Torch, made.backbone, made.adapter, form) for form in ("fp32", "bf16", "int8")
        }
        found = measured({"ours": lambda made=made: Engine(load(made.bundle)), "fp32": theirs["fp32"]}, lengths)
        for what in found["ours"]:
            row(table, (name, "fp32", "fp32"), what, found, ("ours", "fp32"), 1.2, lengths)
        made = models.made(name, "int4")
        found = measured({"ours": lambda made=made: Engine(load(made.bundle)), **theirs}, lengths)
        for what in found["ours"]:
            form = quickest(found, tuple(theirs), what)
            row(table, (name, "int4", form), what, found, ("ours", form), 4.0, lengths)


def bench_profile(names: tuple[str, ...], quick: bool) -> None:
    print(
        "\n### Where a memory's time goes\n\nONNX Runtime's profile of the portable graph in Python's own onnxruntime, per step: a token "
        "after 128, and a prompt of 128. Kernel times; what lies between two nodes is not in them, so many small nodes cost more than "
        "their sum. `model` here is all that is not the memory's."
    )
    table = Table("model", "precision", "step", "nodes", "of the memory", "model", "memory", "its largest")
    steps = 2 if quick else 8
    for name in names:
        for precision in models.PRECISIONS:
            made = models.made(name, precision)
            for step, tokens in (("a token", 1), ("128 tokens", 128)):
                found = profile(made.bundle, tokens, steps)
                largest = ", ".join(f"{op} {quantity(time)}" for op, time in found.largest(4))
                table.row(
                    name,
                    precision,
                    step,
                    found.nodes,
                    found.memory_nodes,
                    quantity(found.model_seconds),
                    quantity(found.memory_seconds),
                    largest,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model and few rounds: to see that it runs")
    parser.add_argument("--only", choices=("memory", "genai", "torch", "profile"), help="one part of it")
    parser.add_argument("--models", nargs="+", default=NAMES, help=", ".join(NAMES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # PyTorch's and transformers' own
    names = ("smoke",) if options.quick else tuple(options.models)
    print("## cost\n\nRandom weights with a random adapter of rank 8 on every layer (`benches/models.py`):\n")
    print("\n".join(f"* `{name}`: {models.SHAPES[name].says}" for name in names))
    print(
        "\nMedians over rounds in which all opponents take turns; ratios are medians of the rounds' own, with their range."
    )
    parts = {"memory": bench_memory, "genai": bench_genai, "torch": bench_torch, "profile": bench_profile}
    for part, bench in parts.items():
        if options.only in (None, part):
            bench(names, options.quick)


if __name__ == "__main__":
    main()
