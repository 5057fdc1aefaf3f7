"""The models of the benches: random weights in the shapes of known decoders, with a random adapter of rank 8 on every layer, made once by
the exporter into .cache/benches, and of each graph two others over the very same file of weights:

    NAME/backbone, NAME/adapter   as Hugging Face and deltamem-export read them
    NAME/fp32, NAME/int4          the bundle
    NAME/fp32-bare, ...           the same bundle with the memory cut out of its graph: every input and output stays, the state passes
                                  through, so that the engine runs the backbone by the same calls
    NAME/fp32-genai, ...          that graph in the form of onnxruntime-genai: int32 ids, no memory, logits of the last token

Those for CUDA alone lie beside them, in fp16-cuda, int4-cuda, ...

    python benches/models.py [NAME...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

import deltamem_export
from deltamem_export import manifest
from deltamem_export.adapter import Adapter, AdapterConfig, AttentionShape, expected_shapes
from deltamem_export.bundle import export_bundle
from deltamem_export.external import link
from deltamem_export.fused import remove_unused, with_own_products
from deltamem_export.nodes import Nodes
from deltamem_export.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".cache" / "benches"
EDITION = 2
"""Counted up when this file makes the models in another way, so that old ones are made again."""
RANK = 8
PRECISIONS = ("fp32", "int4")
TINY = ROOT / "models" / "tiny-assistant"


@dataclass(frozen=True)
class Shape:
    """A decoder to be filled with random weights. `says`: what the page tells of it."""

    says: str
    make: Callable[[], PreTrainedModel]


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(
        _config(Qwen3Config, 32_768, 1024, 3072, 28, 16, 8, 128, 40_960, rms_norm_eps=1e-6, rope_theta=1e6)
    )


def _qwen3_4b() -> PreTrainedModel:
    return Qwen3ForCausalLM(
        _config(Qwen3Config, 151_936, 2560, 9728, 36, 32, 8, 128, 40_960, rms_norm_eps=1e-6, rope_theta=1e6)
    )


def _smollm2() -> PreTrainedModel:
    return LlamaForCausalLM(_config(LlamaConfig, 49_152, 576, 1536, 30, 9, 3, 64, 40_960, rope_theta=1e5))


def _embedded() -> PreTrainedModel:
    b = json.loads((TINY / manifest.MANIFEST_FILE).read_text())["backbone"]
    return Qwen3ForCausalLM(
        _config(
            Qwen3Config,
            b["vocab_size"],
            b["hidden_size"],
            3 * b["hidden_size"],
            b["num_layers"],
            b["num_attention_heads"],
            b["num_kv_heads"],
            b["head_dim"],
            b["context_length"],
        )
    )


def _smoke() -> PreTrainedModel:
    return Qwen3ForCausalLM(_config(Qwen3Config, 128, 64, 96, 2, 2, 1, 32, 1024))


def _config(kind: type[PretrainedConfig], *sizes: int, **more: Any) -> PretrainedConfig:
    vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim, context = sizes
    return kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,  # a random model must not end by chance
        **more,
    )


SHAPES = {
    "qwen3-0.6b": Shape("Qwen3-0.6B: 28 layers, hidden 1,024; vocabulary cut to 32,768 of 151,936 for memory", _qwen3),
    "qwen3-4b": Shape("Qwen3-4B: 36 layers, hidden 2,560, vocabulary 151,936", _qwen3_4b),
    "smollm2-135m": Shape("SmolLM2-135M: 30 layers, hidden 576, vocabulary 49,152; context raised to 40,960", _smollm2),
    "embedded": Shape("the embedded default: 4 layers, hidden 128, vocabulary 2,048", _embedded),
    "smoke": Shape("2 layers, hidden 64: for tests of the benches alone", _smoke),
}


@dataclass(frozen=True)
class Made:
    """Where the graphs of one model at one precision lie."""

    name: str
    precision: str
    backbone: Path
    adapter: Path
    bundle: Path
    bare: Path
    genai: Path


def made(name: str, precision: str, place: Path = PLACE, device: str = "cpu") -> Made:
    """The model at this precision, for this device; what is missing, or was made by another exporter, is made."""
    home = place / name
    home.mkdir(parents=True, exist_ok=True)
    wanted = precision if device == "cpu" else Precision(precision, device=device)
    precision = precision if device == "cpu" else f"{precision}-{device}"
    found = Made(
        name,
        precision,
        home / "backbone",
        home / "adapter",
        home / precision,
        home / f"{precision}-bare",
        home / f"{precision}-genai",
    )
    stamp, digest = home / f"{precision}.stamp", _sources()
    if stamp.is_file() and stamp.read_text() == digest:
        return found
    began = time.monotonic()
    stamp.unlink(missing_ok=True)
    if not (found.backbone / "config.json").is_file() or not found.adapter.is_dir():
        _save_weights(name, found)
    for path in (found.bundle, found.bare, found.genai):
        shutil.rmtree(path, ignore_errors=True)
    export_bundle(found.backbone, found.adapter, found.bundle, wanted, check=False, say=lambda _: None)
    _write_bare(found)
    _write_genai(found, device)
    stamp.write_text(digest)
    print(f"made {name} at {precision} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def _sources() -> str:
    """A digest of what the graphs depend on: the exporter's own modules, and how this file makes them."""
    hasher = hashlib.sha256(str(EDITION).encode())
    for path in sorted(Path(deltamem_export.__file__).parent.glob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _save_weights(name: str, found: Made) -> None:
    disable_progress_bar()
    torch.manual_seed(0)
    model = SHAPES[name].make().to(torch.bfloat16)
    model.save_pretrained(found.backbone)
    c = model.config
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    settings = AdapterConfig(rank=RANK, alpha=2.0 * RANK)
    shapes = expected_shapes(settings, AttentionShape(c.hidden_size, heads, kv, kv, c.hidden_size))[0]
    weights = {i: {n: torch.randn(size) * 0.02 for n, size in shapes.items()} for i in range(c.num_hidden_layers)}
    Adapter(settings, weights).save(found.adapter)


def _share(source: Path, folder: Path) -> None:
    """The file of weights under a second name."""
    folder.mkdir()
    link(source / "model.onnx.data", folder / "model.onnx.data")


def without_memory(model: ir.Model) -> None:
    """Cuts the memory out of a grafted graph: what was corrected is used as it was, and `present_memory` is `past_memory`."""
    graph = model.graph
    inputs = {v.name: v for v in graph.inputs}
    for node in tuple(graph):
        if node.op_type == "Add" and (node.name or "").startswith("/deltamem/layers."):
            label = str(node.name).rsplit("/", 1)[1]
            if label.startswith("delta_"):
                for use in tuple(node.outputs[0].uses()):
                    use.node.replace_input_with(use.idx, node.inputs[0])
    at = next(n for n, v in enumerate(graph.outputs) if v.name == "present_memory")
    old = graph.outputs[at]
    passed = Nodes(graph, "/bare")("Identity", inputs["past_memory"], name="present_memory")
    passed.shape, passed.type = old.shape, old.type
    graph.outputs[at] = passed
    old.name, passed.name = "/bare/unused", "present_memory"
    graph.sort()
    remove_unused(graph)


def _write_bare(found: Made) -> None:
    _share(found.bundle, found.bare)
    model = ir.load(found.bundle / "model.onnx")
    without_memory(model)
    ir.save(model, found.bare / "model.onnx")
    sealed = manifest.read(found.bundle)
    # Only the plain graph: the bundle's other ones have the memory in them.
    sealed["graph"] = {k: v for k, v in sealed["graph"].items() if not k.endswith("_file")}
    blocks = "model.blocks.onnx"
    has = with_own_products(found.bare / "model.onnx", found.bare / blocks)
    own = [*([blocks] if has else []), "model.onnx", "model.onnx.data"]
    sealed["graph"] |= {"measured_file": None, "strength": False, "gates": False, "files": own}
    sealed["graph"]["blocks_file"] = blocks if has else None
    if "not_fused" in sealed["graph"]:
        sealed["graph"]["not_fused"] = "the memory is cut out of this graph"
    sealed["files"] = {n: manifest.file_entry(found.bare / n) for n in own}
    manifest.write(found.bare, sealed)


def _write_genai(found: Made, device: str) -> None:
    """The bare graph as onnxruntime-genai takes it, pruned to the last token's logits as its own builder's `prune_lm_head` does."""
    _share(found.bundle, found.genai)
    model = ir.load(found.bare / "model.onnx")
    graph = model.graph
    nodes = Nodes(graph, "/genai")
    rows = next(v for v in graph.inputs if v.name == "logits_rows")
    last = nodes.ints([-1])
    for use in tuple(rows.uses()):
        use.node.replace_input_with(use.idx, last)
    at = next(n for n, v in enumerate(graph.outputs) if v.name == "logits")
    flat = graph.outputs[at]
    vocabulary = flat.shape[-1] if flat.shape is not None else None
    flat.name = "/genai/flat"
    logits = nodes("Unsqueeze", flat, nodes.ints([0]), name="logits")
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch_size", 1, vocabulary])
    graph.outputs[at] = logits
    for name, values in (("present_memory", graph.outputs), ("past_memory", graph.inputs)):
        values.pop(next(n for n, v in enumerate(values) if v.name == name))
    for name in ("write_mask", "logits_rows"):
        graph.inputs.pop(next(n for n, v in enumerate(graph.inputs) if v.name == name))
    graph.sort()
    remove_unused(graph)
    ir.save(model, found.genai / "model.onnx")
    b = manifest.read(found.bare)["backbone"]
    caches = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    presents = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    providers: list[dict[str, dict[str, str]]] = [{"cuda": {}}] if device == "cuda" else []
    config = {
        "model": {
            "bos_token_id": 0,
            "eos_token_id": b["vocab_size"] - 1,  # it must have one; who generates looks whether it came
            "pad_token_id": 0,
            "context_length": b["context_length"],
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
                "filename": "model.onnx",
                "head_size": b["head_dim"],
                "hidden_size": b["hidden_size"],
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **caches},
                "outputs": {"logits": "logits", **presents},
                "num_attention_heads": b["num_attention_heads"],
                "num_hidden_layers": b["num_layers"],
                "num_key_value_heads": b["num_kv_heads"],
            },
            "type": b["model_type"],
            "vocab_size": b["vocab_size"],
        },
        "search": {"do_sample": False, "max_length": b["context_length"], "past_present_share_buffer": True},
    }
    (found.genai / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        default=[name for name in SHAPES if name not in ("smoke", "qwen3-4b")],
        help=", ".join(SHAPES),
    )
    for name in parser.parse_args().names:
        for precision in PRECISIONS:
            print(made(name, precision).bundle.relative_to(ROOT))


if __name__ == "__main__":
    main()
