"""Many users at once: 1, 4, 8 and 16 replies in shared steps against the same replies one after another, and how long a reply
waits for its next token while another session reads a long prompt. Random weights in the shape of Qwen3-0.6B or SmolLM2-135M,
made here; interleaved runs, medians.

    python benches/bench_batching.py [qwen3-0.6b] [smollm2-135m] [--layers N] [--tokens N] [--pairs N] [--threads N] [--bundles DIR]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import deltamem_rt as dm

SESSIONS = (1, 4, 8, 16)
PROMPT = 16


def backbone(name: str, layers: int | None, folder: Path) -> tuple[int, int, int]:
    """Saves a random decoder of that shape; layers, hidden size, and the size of q."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    torch.manual_seed(0)
    common = {"max_position_embeddings": 4096, "tie_word_embeddings": True, "initializer_range": 0.03}
    if name == "qwen3-0.6b":
        config = Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=layers or 28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            **common,
        )
    elif name == "smollm2-135m":
        config = LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers or 30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            **common,
        )
    else:
        raise SystemExit(f"there is no shape {name!r}; there are qwen3-0.6b and smollm2-135m")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return config.num_hidden_layers, config.hidden_size, config.num_attention_heads * config.head_dim


def bundle(name: str, layers: int | None, precision: str, folder: Path) -> Path:
    """A bundle of random weights, a memory of rank 8 in every layer."""
    import torch

    from deltamem_export.adapter import Adapter, AdapterConfig, AttentionShape, expected_shapes
    from deltamem_export.bundle import export_bundle
    from deltamem_export.precision import Precision

    out = folder / f"{name}-{layers or 'all'}-{precision}"
    if out.exists():
        return out
    with tempfile.TemporaryDirectory(prefix="batching.", dir=folder) as scratch:
        source = Path(scratch) / "backbone"
        count, hidden, q = backbone(name, layers, source)
        settings = replace(AdapterConfig(rank=8, alpha=16.0), target_layers=())
        shape = AttentionShape(hidden, q, 8, 8, q)
        tensors = {
            part: torch.full(size, -6.0) if part == "beta_bias" else torch.randn(size) * (0.03 if len(size) == 2 else 0)
            for part, size in expected_shapes(settings, shape)[0].items()
        }
        adapter = Adapter(settings, {i: {part: t.clone() for part, t in tensors.items()} for i in range(count)})
        adapter.save(Path(scratch) / "adapter")
        form = Precision("int4", 32, 4) if precision == "int4" else Precision(precision)
        export_bundle(source, Path(scratch) / "adapter", out, form, check=False, say=lambda _: None)
    return out


def replies(model: dm.Model, count: int, tokens: int) -> float:
    """Seconds for `tokens` more tokens of each of `count` replies, made at the same time, from behind their prompts."""
    vocab = model.manifest["backbone"]["vocab_size"]
    began: list[float] = []
    start = threading.Barrier(count, action=lambda: began.append(time.perf_counter()))

    def one(seed: int) -> None:
        with model.session() as session:
            session.feed(np.random.default_rng(seed).integers(3, vocab, PROMPT, dtype=np.int32))
            start.wait()
            for token in np.random.default_rng(seed + 100).integers(3, vocab, tokens, dtype=np.int32):
                session.feed([token])

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began[0]


def bench_sessions(title: str, together: dm.Model, after: dm.Model, tokens: int, pairs: int) -> None:
    replies(together, 2, 2)
    replies(after, 2, 2)
    for count in SESSIONS:
        rows = []
        for _ in range(pairs):
            before = together.stats
            batched = replies(together, count, tokens)
            now = together.stats
            one_by_one = replies(after, count, tokens)
            share = (now.step_tokens - before.step_tokens) / (now.steps - before.steps)
            rows.append((one_by_one / batched, batched, one_by_one, share))
        ratios = sorted(row[0] for row in rows)
        _, ours, theirs, share = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"| {title} | {count} | {count * tokens / ours:.1f} | {count * tokens / theirs:.1f} | "
            f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {share:.1f} | {ours / tokens * 1e3:.1f} | {pairs} |",
            flush=True,
        )


def bench_waiting(title: str, model: dm.Model, prompt: int) -> None:
    """The time between two tokens of a reply, alone and while another session reads a prompt."""
    vocab = model.manifest["backbone"]["vocab_size"]
    long = np.random.default_rng(0).integers(3, vocab, prompt, dtype=np.int32)
    done, reading = threading.Event(), threading.Event()
    gaps: dict[bool, list[float]] = {False: [], True: []}

    def streams() -> None:
        with model.session() as session:
            last = None
            for _ in session.generate(long[:PROMPT], max_new_tokens=3000, temperature=1.0, seed=1):
                now = time.perf_counter()
                if last is not None:
                    gaps[reading.is_set()].append((now - last) * 1e3)
                last = now
                if done.is_set():
                    break

    thread = threading.Thread(target=streams)
    thread.start()
    while len(gaps[False]) < 20:
        time.sleep(0.01)
    reading.set()
    with model.session() as session:
        began = time.perf_counter()
        session.feed(long)
        beside = time.perf_counter() - began
    done.set()
    thread.join()
    with model.session() as session:
        began = time.perf_counter()
        session.feed(long)
        alone = time.perf_counter() - began
    print(
        f"| {title} | {prompt} | {statistics.median(gaps[False]):.1f} | {statistics.median(gaps[True]):.1f} | {max(gaps[True]):.1f} | "
        f"{alone * 1e3:.0f} | {beside * 1e3:.0f} | {len(gaps[True])} |",
        flush=True,
    )


def head(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=["smollm2-135m"])
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--precisions", nargs="*", default=["fp32", "int4"])
    parser.add_argument("--tokens", type=int, default=16, help="of each reply")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bundles", type=Path, help="where the bundles are kept for the next run")
    options = parser.parse_args()
    print("## many users at once\n")
    with tempfile.TemporaryDirectory(prefix="batching.", dir=os.environ.get("TMPDIR")) as scratch:
        folder = options.bundles or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        models = []
        for shape in options.shapes:
            for precision in options.precisions:
                path = bundle(shape, options.layers, precision, folder)
                title = f"{shape}{f', {options.layers} layers' if options.layers else ''}, {precision}"
                load = {"threads": options.threads, "verify": False}
                models.append((title, path, load))
        print("Replies at the same time, in shared steps (`max_batch=16`) and one after another (`max_batch=1`).\n")
        head(
            "model",
            "sessions",
            "tokens/s together",
            "one after another",
            "times as fast",
            "sessions in a step",
            "ms a step",
            "pairs",
        )
        for title, path, load in models:
            together, after = dm.Model.load(path, **load), dm.Model.load(path, max_batch=1, **load)
            bench_sessions(title, together, after, options.tokens, options.pairs)
            del together, after
        print("\nA reply while another session reads a prompt: the time between two of its tokens.\n")
        head(
            "model",
            "prompt, tokens",
            "alone, median ms",
            "beside it, median ms",
            "beside it, most ms",
            "prompt alone, ms",
            "prompt beside it, ms",
            "tokens",
        )
        for title, path, load in models:
            model = dm.Model.load(path, **load)
            bench_waiting(title, model, 1024)
            del model


if __name__ == "__main__":
    main()
