"""How long a reply waits for its next token while another session reads a long prompt: chunks of the prompt and steps take turns.

A reply is made in a thread of its own, first alone, then beside the prompt; the prompt is read once more when nothing is beside it.

    python benches/bench_waiting.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import threading
import time

import numpy as np

import deltamem_rt as dm
import models
from measuring import Table, quantity, seconds
from opening import load

PROMPT = 1024
ALONE = 30
"""Tokens of the reply before the prompt comes."""


def bench(
    model: dm.Model, prompt: np.ndarray, rounds: int
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Seconds between two tokens of a reply, alone and beside the prompt; seconds that the prompt takes, alone and beside the reply."""
    gaps: tuple[list[float], list[float]] = ([], [])
    prompts: tuple[list[float], list[float]] = ([], [])

    def read() -> None:
        with model.session() as session:
            session.feed(prompt)

    for turn in range(rounds):
        beside, over, ready = threading.Event(), threading.Event(), threading.Event()

        def reply(
            turn: int = turn,
            beside: threading.Event = beside,
            over: threading.Event = over,
            ready: threading.Event = ready,
        ) -> None:
            with model.session() as session:
                last = None
                for count, _ in enumerate(
                    session.generate(prompt[:8], max_new_tokens=4000, temperature=1.0, seed=turn)
                ):
                    now = time.perf_counter()
                    if last is not None:
                        gaps[beside.is_set()].append(now - last)
                    last = now
                    if count == ALONE:
                        ready.set()
                    if over.is_set():
                        return
            ready.set()

        thread = threading.Thread(target=reply)
        thread.start()
        ready.wait()
        beside.set()
        prompts[1].append(seconds(read))
        over.set()
        thread.join()
        prompts[0].append(seconds(read))
    return gaps[0], gaps[1], prompts[0], prompts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model and few rounds: to see that it runs")
    quick = parser.parse_args().quick
    length = 100 if quick else PROMPT
    print(
        f"## waiting\n\nThe time between two tokens of a reply while another session reads a prompt of {length:,} tokens. It waits for "
        "one chunk of the prompt and one step at most."
    )
    table = Table(
        "model",
        "precision",
        "between two tokens, alone",
        "beside the prompt",
        "the longest",
        "the prompt, alone",
        "beside the reply",
        "tokens beside",
    )
    for name in ("smoke",) if quick else ("qwen3-0.6b", "smollm2-135m"):
        for precision in models.PRECISIONS:
            model = load(models.made(name, precision).bundle)
            vocabulary = model.manifest["backbone"]["vocab_size"]
            prompt = np.random.default_rng(0).integers(3, vocabulary, length, dtype=np.int32)
            alone, beside, free, shared = bench(model, prompt, 1 if quick else 3)
            beside = beside or [float("nan")]
            table.row(
                name,
                precision,
                quantity(alone),
                quantity(beside),
                quantity(max(beside)),
                quantity(free),
                quantity(shared),
                str(len(beside)),
            )
            del model
            gc.collect()


if __name__ == "__main__":
    main()
