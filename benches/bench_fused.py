"""What remembering costs: decode and prefill in one engine, interleaved, on the fused graph, on the portable graph, and on the same decoder
with its memory cut out. Random weights of the shape of Qwen3-0.6B, in fp32 and int4.

    python benches/bench_fused.py [--layers N] [--threads N] [--pairs N] [--precision fp32 int4]

Every figure is a ratio of times to the decoder without a memory, the median over rounds in which each of them ran once, in turn. Beside the
times on the clock stand those that the processor worked, which other programs on the machine move less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import deltamem_rt as dm
from deltamem_export import manifest
from deltamem_export.adapter import Adapter, AdapterConfig, AttentionShape, expected_shapes
from deltamem_export.bundle import export_bundle
from deltamem_export.calibration import link, seal
from deltamem_export.fused import remove_unused
from deltamem_export.nodes import Nodes

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
DECODED, PREFILLS = 16, (128, 512)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=28, help="of the decoder's 28 (default 28), with a vocabulary cut alike"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--precision", nargs="*", default=["fp32", "int4"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head = f"Qwen3-0.6B's shape, {options.layers} layers, {options.threads} threads, medians of {options.pairs}; times the bare decoder"
    print(f"## fused\n\n{head}\n")
    columns = ("precision", "what", "bare", "portable", "fused", "quartiles of fused", "processor: portable", "fused")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory(prefix="fused.", dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        backbone, adapter = random_model(folder, options.layers)
        for precision in options.precision:
            bundle = export_bundle(backbone, adapter, folder / precision, precision, check=False, say=lambda _: None)
            without = bare(bundle, folder / f"{precision}-bare")
            load = lambda path, graph: dm.Model.load(path, threads=options.threads, graph=graph, verify=False)  # noqa: E731
            models = {
                "bare": load(without, "portable"),
                "portable": load(bundle, "portable"),
                "fused": load(bundle, "fused"),
            }
            rows(precision, models, options.pairs)
            del models
            shutil.rmtree(bundle)
            shutil.rmtree(without)
    return 0


def random_model(folder: Path, layers: int) -> tuple[Path, Adapter]:
    """A decoder and an adapter of rank 8 on q and o, as the released one."""
    torch.manual_seed(0)
    # With fewer layers the vocabulary shrinks as much, so that the head's part of a step stays what it is.
    vocabulary = SHAPE["vocab_size"] * layers // 28 // 64 * 64
    config = Qwen3Config(**SHAPE | {"vocab_size": vocabulary}, num_hidden_layers=layers)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "backbone")
    settings = AdapterConfig(rank=8, alpha=16.0, delta_heads=("q", "o"))
    shape = AttentionShape(1024, 2048, 1024, 1024, 1024)
    rng = np.random.default_rng(0)
    tensors = {
        name: torch.from_numpy((rng.standard_normal(size) * 0.02).astype(np.float32))
        for name, size in expected_shapes(settings, shape)[0].items()
    }
    return folder / "backbone", Adapter(settings, {i: dict(tensors) for i in range(layers)})


def bare(bundle: Path, target: Path) -> Path:
    """The same decoder as a bundle whose memory does nothing: every correction is cut out, and the memory is handed on as it is."""
    found = manifest.read(bundle)
    target.mkdir()
    for name in found["files"]:
        link(bundle / name, target / name)
    model = ir.load(bundle / "model.onnx")
    graph = model.graph
    for node in tuple(graph):
        if node.op_type == "Add" and "/deltamem/layers." in (node.name or "") and "/delta_" in (node.name or ""):
            for use in tuple(node.outputs[0].uses()):
                use.node.replace_input_with(use.idx, node.inputs[0])
    at, old = next((n, value) for n, value in enumerate(graph.outputs) if value.name == "present_memory")
    old.name = "cut"
    past = next(value for value in graph.inputs if value.name == "past_memory")
    present = Nodes(graph, "/bare")("Identity", past, name="memory")
    present.name, present.type, present.shape = "present_memory", old.type, old.shape
    graph.outputs[at] = present
    graph.sort()
    remove_unused(graph)
    (target / "model.onnx").unlink()
    ir.save(model, target / "model.onnx")
    found["files"]["model.onnx"] = manifest.file_entry(target / "model.onnx")
    seal(target, found)
    return target


def rows(precision: str, models: Mapping[str, dm.Model], pairs: int) -> None:
    ids = np.random.default_rng(0).integers(3, 5000, 1024).astype(np.int32)
    works: dict[str, Callable[[dm.Session], object]] = {
        f"prefill {n}": lambda s, n=n: s.feed(ids[:n]) for n in PREFILLS
    }
    works["decode"] = lambda s: [s.feed(ids[t : t + 1]) for t in range(DECODED)]
    for what, work in works.items():
        times: dict[str, list[float]] = {name: [] for name in models}
        worked: dict[str, list[float]] = {name: [] for name in models}
        for number in range(pairs + 1):
            # Each of them goes first in its turn.
            for name in sorted(models, key=lambda name: (list(models).index(name) + number) % len(models)):
                with models[name].session() as session:
                    if what == "decode":
                        session.feed(ids[:64])
                    start = time.perf_counter(), time.process_time()
                    work(session)
                    times[name].append(time.perf_counter() - start[0])
                    worked[name].append(time.process_time() - start[1])
        times, worked = ({name: values[1:] for name, values in all_.items()} for all_ in (times, worked))
        ratios, own = (
            {name: [a / b for a, b in zip(all_[name], all_["bare"], strict=True)] for name in models}
            for all_ in (times, worked)
        )
        per = DECODED if what == "decode" else 1
        low, _, high = statistics.quantiles(ratios["fused"], n=4)
        medians = {name: statistics.median(values) for name, values in ratios.items()}
        print(
            f"| {precision} | {what} | {statistics.median(times['bare']) / per * 1e3:.2f} ms | {medians['portable']:.3f}x | "
            f"{medians['fused']:.3f}x | {low:.3f} to {high:.3f} | "
            f"{statistics.median(own['portable']):.3f}x | {statistics.median(own['fused']):.3f}x |",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
