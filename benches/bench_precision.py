"""What each precision costs and gives, in graphs run by Python's own onnxruntime: distance from fp32 in logits and in the
memory's states, how far results depend on the way a stream is cut, size, memory, speed. Two models: the embedded
default, its PyTorch weights taken back out of the committed bundle, and a random one of the shape of a 0.5 B decoder.

    python benches/bench_precision.py [tiny] [large] [--layers N] [--threads N] [--write]

`--write` puts each table between its marks in docs/precision.md; without it they are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from deltamem_export.adapter import Adapter, AdapterConfig, AttentionShape, expected_shapes
from deltamem_export.bundle import export_bundle
from deltamem_export.precision import Precision
from deltamem_export.weights import in_float32

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "models" / "tiny-assistant"
PAGE = ROOT / "docs" / "precision.md"
STATE_TOKENS, TURN = 10_000, 500
COMPARED, CHUNK = 256, 128
PAIRS, SECONDS, DECODED = 7, 4.0, 16

FORMS = [
    Precision("fp32"),
    Precision("fp32", kv="int8"),
    Precision("fp16"),
    Precision("bf16"),
    Precision("int8", 32, 4),
    Precision("int8", 32, 1),
    Precision("int4", 16, 4),
    Precision("int4", 32, 4),
    Precision("int4", 128, 4),
    Precision("int4", 32, 4, symmetric=False),
    Precision("int4", 32, 4, algorithm="rtn"),
    Precision("int4", 32, 4, algorithm="k_quant"),
    Precision("int4", 32, 4, embeddings=True),
    Precision("int4", 32, 4, kv="int8"),
    Precision("int4", 16, 1),
    Precision("int4", 32, 1),
    Precision("int4", 128, 1),
]
# Minutes each on a table of 136 million numbers.
SLOW = [form for form in FORMS if form.algorithm != "default"]


class Run:
    """One sequence on one bundle's graph; `feed` goes on with the turn, `end_turn` drops the KV cache."""

    def __init__(self, bundle: Path, threads: int, graph: Path | None = None) -> None:
        manifest = json.loads((bundle / "deltamem.json").read_text())
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(str(graph or bundle / "model.onnx"), options, ["CPUExecutionProvider"])
        self._outputs = [o.name for o in self._session.get_outputs()]
        types = {i.name: i.type for i in self._session.get_inputs()}
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
        b, m = manifest["backbone"], manifest["memory"]
        self._empty = {
            name: np.zeros((1, b["num_kv_heads"], 0, b["head_dim"]), kinds[kind])
            for name, kind in types.items()
            if name.startswith("past_key_values.")
        }
        self.memory = np.zeros((1, len(m["layers"]), m["heads"], m["rank"], m["rank"]), np.float32)
        self.end_turn()

    def end_turn(self) -> None:
        self._past, self._tokens = dict(self._empty), 0

    def feed(self, ids: np.ndarray, rows: Sequence[int] | None = None) -> np.ndarray:
        """ids [T] → logits of the wanted rows (all if None), [N, V]."""
        self._tokens += len(ids)
        feeds: dict[str, Any] = {
            "input_ids": ids[None].astype(np.int32),
            "attention_mask": np.ones((1, self._tokens), np.int64),
            "write_mask": np.ones((1, len(ids)), np.float32),
            "logits_rows": np.arange(len(ids)) if rows is None else np.asarray(rows, np.int64),
            "past_memory": self.memory,
            **self._past,
        }
        found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        self._past = {name: found[name.replace("past_key_values", "present")] for name in self._past}
        self.memory = found["present_memory"]
        return found["logits"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="tiny, large (default: both)")
    parser.add_argument("--layers", type=int, default=4, help="of the large model's 24 (default 4)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.resident:
        print(resident_here(Path(options.resident), options.threads))
        return 0
    if not options.write:
        print("## precision")
    with tempfile.TemporaryDirectory(prefix="precision.", dir=os.environ.get("TMPDIR")) as scratch:
        for name in options.models or ("tiny", "large"):
            folder = Path(scratch) / name
            folder.mkdir()
            ids = tiny(folder) if name == "tiny" else large(folder, options.layers)
            forms = FORMS if name == "tiny" else [form for form in FORMS if form not in SLOW]
            text = section(name, folder, ids, forms, options)
            if options.write:
                write(name, text)
            else:
                print(f"\n{text}")
    return 0


def section(name: str, folder: Path, ids: np.ndarray, forms: Sequence[Precision], options: argparse.Namespace) -> str:
    rows, exact = [], None
    for form in forms:
        began = time.monotonic()
        bundle = export_bundle(
            folder / "backbone",
            folder / "adapter",
            folder / "bundle",
            form,
            force=True,
            check=False,
            say=lambda _: None,
        )
        if exact is None:
            bundle = bundle.rename(folder / "exact")
            if name == "tiny":
                is_the_default(bundle)
        row, exact = measure(bundle, folder / "exact", form, ids, exact, options.threads)
        rows.append(row)
        print(f"{name} {form.setting}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    layers = f"{options.layers} of its 24 layers, " if name == "large" else ""
    what = {
        "tiny": "### The embedded default (`tiny-assistant`, 1.1 M parameters)",
        "large": f"### A random model of the shape of a 0.5 B decoder ({layers}hidden 896, vocabulary 151,936)",
    }[name]
    head = (
        "| setting | logits: max | mean | KL | next token the same | states | cut | MB | resident MB | decode | prefill |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    return f"{what}\n\nonnxruntime {ort.__version__}, CPU, {threads}.\n\n{head}\n" + "\n".join(rows)


def measure(
    bundle: Path, exact_bundle: Path, form: Precision, ids: np.ndarray, exact: Any, threads: int
) -> tuple[str, Any]:
    """One row of the table, and the figures of fp32 that the other rows are measured against."""
    graph = None
    if form.name == "bf16":  # the CPU has no bfloat16: the weights are, the arithmetic is not
        graph = in_float32(bundle / "model.onnx")
    run = Run(bundle, threads, graph)
    found = values(run, ids)
    exact = exact or found
    size = sum(path.stat().st_size for path in bundle.glob("model.onnx*")) / 1e6
    figures = [distance(exact[0], found[0]), states_off(exact[1], found[1]), cut(run, ids)]
    if form.name == "bf16":
        size = (bundle / "model.onnx.data").stat().st_size / 1e6
        speeds = ["CUDA only"] * 3
    else:
        speeds = [f"{resident(bundle, threads):.0f}", *ratios(run, Run(exact_bundle, threads), ids)]
    return (
        f"| `{form.setting}` | {figures[0]} | {figures[1]} | {figures[2]} | {size:,.1f} | {' | '.join(speeds)} |",
        exact,
    )


def values(run: Run, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of 256 tokens of the second turn, and the memory after 10,000 tokens in turns of 500."""
    logits = []
    for start in range(0, STATE_TOKENS, TURN):
        run.end_turn()
        for at in range(start, start + TURN, TURN // 4):
            wanted = start == TURN and len(logits) * (TURN // 4) < COMPARED
            out = run.feed(ids[at : at + TURN // 4], None if wanted else [0])
            logits += [out] if wanted else []
    return np.concatenate(logits)[:COMPARED], run.memory


def distance(want: np.ndarray, found: np.ndarray) -> str:
    off = np.abs(found - want)
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (center(want), center(found)))
    kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    same = float((want.argmax(axis=1) == found.argmax(axis=1)).mean())
    return f"{off.max():.1e} | {off.mean():.1e} | {max(kl, 0.0):.1e} | {same:.1%}"


def center(logits: np.ndarray) -> np.ndarray:
    return logits.astype(np.float64) - logits.max(axis=1, keepdims=True)


def states_off(want: np.ndarray, found: np.ndarray) -> str:
    return f"{np.linalg.norm(found - want) / np.linalg.norm(want):.1e}"


def cut(run: Run, ids: np.ndarray) -> str:
    """The largest difference of logits between one chunk of 64 tokens and the same in pieces, on an empty memory."""
    seen = []
    for cuts in ((), (1, 2, 3, 20, 40)):
        run.end_turn()
        run.memory = np.zeros_like(run.memory)
        seen.append(np.concatenate([run.feed(part) for part in np.split(ids[:64], cuts)]))
    return f"{np.abs(seen[0] - seen[1]).max():.1e}"


def ratios(run: Run, exact: Run, ids: np.ndarray) -> list[str]:
    """How many times as fast as fp32, decode of single tokens behind 128 and prefill of 128; medians of pairs."""
    decode: list[float] = []
    prefill: list[float] = []
    began = time.monotonic()
    while len(decode) < PAIRS or time.monotonic() - began < SECONDS:
        pair = (exact, run) if len(decode) % 2 else (run, exact)
        times = {id(one): timed(one, ids) for one in pair}
        for found, at in ((prefill, 0), (decode, 1)):
            found.append(times[id(exact)][at] / times[id(run)][at])
    return [f"{statistics.median(found):.2f}x" for found in (decode, prefill)]


def timed(run: Run, ids: np.ndarray) -> tuple[float, float]:
    """Seconds for a prefill of 128 tokens, and for 16 single tokens after it."""
    run.end_turn()
    began = time.perf_counter()
    run.feed(ids[:CHUNK], [CHUNK - 1])
    first = time.perf_counter()
    for token in range(CHUNK, CHUNK + DECODED):
        run.feed(ids[token : token + 1])
    return first - began, time.perf_counter() - first


def resident(bundle: Path, threads: int) -> float:
    """MB that a process of its own has resident more, once the bundle is loaded and has run."""
    command = [sys.executable, __file__, "--resident", str(bundle), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident_here(bundle: Path, threads: int) -> float:
    def now() -> int:
        found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found[1]) if found else 0

    before = now()
    run = Run(bundle, threads)
    run.feed(np.arange(CHUNK) % 200, [0])
    run.feed(np.arange(1), [0])
    return (now() - before) * 1024 / 1e6


# ---------------------------------------------------------------------- the two models


def tiny(folder: Path) -> np.ndarray:
    """The embedded default's backbone and adapter as the exporter reads them, and token ids of its stream of talk."""
    from tokenizers import Tokenizer

    manifest = json.loads((TINY / "deltamem.json").read_text())
    found = {n: v.const_value.numpy() for n, v in ir.load(TINY / "model.onnx").graph.initializers.items()}
    b, m = manifest["backbone"], manifest["memory"]
    config = Qwen3Config(
        vocab_size=b["vocab_size"],
        hidden_size=b["hidden_size"],
        intermediate_size=found["model.layers.0.mlp.up_proj.MatMul.weight"].shape[1],
        num_hidden_layers=b["num_layers"],
        num_attention_heads=b["num_attention_heads"],
        num_key_value_heads=b["num_kv_heads"],
        head_dim=b["head_dim"],
        max_position_embeddings=b["context_length"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=manifest["tokens"]["eos"][0],
        pad_token_id=manifest["tokens"]["pad"],
    )
    model = Qwen3ForCausalLM(config)
    width = b["num_kv_heads"] * b["head_dim"]
    weights = {"model.embed_tokens.weight": found["model.embed_tokens.weight"]}
    weights["lm_head.weight"] = found["lm_head.MatMul.weight"].T
    norm = next(n for n in found if "final_norm" in n)
    weights["model.norm.weight"] = found[norm]
    for i in range(b["num_layers"]):
        at = f"model.layers.{i}"
        q, k, v = np.split(found[f"{at}.attn.qkv_proj.MatMul.weight"].T, [-2 * width, -width])
        weights |= {f"{at}.self_attn.{p}_proj.weight": w for p, w in zip("qkv", (q, k, v), strict=True)}
        weights[f"{at}.self_attn.o_proj.weight"] = found[f"{at}.attn.o_proj.MatMul.weight"].T
        weights |= {
            f"{at}.mlp.{p}_proj.weight": found[f"{at}.mlp.{p}_proj.MatMul.weight"].T for p in ("gate", "up", "down")
        }
        weights |= {f"{at}.self_attn.{p}_norm.weight": found[f"{at}.attn.{p}_norm.layernorm.weight"] for p in "qk"}
        weights |= {
            f"{at}.{p}.weight": found[f"{at}.{p}.weight"] for p in ("input_layernorm", "post_attention_layernorm")
        }
    model.load_state_dict({n: torch.from_numpy(w.copy()) for n, w in weights.items()})
    model.save_pretrained(folder / "backbone")

    r, layers = m["rank"], {}
    for i in m["layers"]:
        networks = torch.from_numpy(found[f"deltamem.layers.{i}.networks"].T.copy())  # q, k, v, beta under each other
        corrections = torch.from_numpy(found[f"deltamem.layers.{i}.corrections"].T.copy()) * (r / m["alpha"])
        q, k, v, beta = networks.split([r, r, r, len(networks) - 3 * r])
        delta_q, delta_o = corrections.split([b["num_attention_heads"] * b["head_dim"], b["hidden_size"]])
        bias = torch.from_numpy(found[f"deltamem.layers.{i}.gate_bias"].copy())
        layers[i] = {
            **{f"memory_{p}_proj": w.contiguous() for p, w in zip("qkv", (q, k, v), strict=True)},
            "beta_proj": beta.contiguous(),
            "beta_bias": bias,
            "delta_q_proj": delta_q.contiguous(),
            "delta_o_proj": delta_o.contiguous(),
        }
    settings = AdapterConfig(
        rank=r,
        alpha=m["alpha"],
        state_update_mode=m["update_mode"],
        couple_lambda=m["couple_lambda"],
        rankwise_gates=m["gates"] == "row",
        target_layers=tuple(m["layers"]),
    )
    Adapter(settings, layers).save(folder / "adapter")
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode((TINY / "stream.txt").read_text()).ids
    return np.resize(np.asarray(ids), STATE_TOKENS)


def is_the_default(bundle: Path) -> None:
    """The weights taken out of the committed bundle are those that it was made from: the same digests."""
    made, shipped = (json.loads((b / "deltamem.json").read_text())["fingerprint_parts"] for b in (bundle, TINY))
    if any(made[part] != shipped[part] for part in ("backbone", "adapter", "config")):
        raise SystemExit(f"{TINY}: its weights could not be taken back out of it")


def large(folder: Path, layers: int) -> np.ndarray:
    """Random weights in the shape of Qwen2.5-0.5B, and random token ids."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.03,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "backbone")
    # Gates nearly shut: what is written stays for about a thousand tokens.
    settings = replace(AdapterConfig(rank=8, alpha=16.0), target_layers=())
    shape = AttentionShape(896, 896, 128, 128, 896)
    tensors = {
        name: torch.full(size, -6.0) if name == "beta_bias" else torch.randn(size) * (0.03 if len(size) == 2 else 0.0)
        for name, size in expected_shapes(settings, shape)[0].items()
    }
    Adapter(settings, {i: {n: t.clone() for n, t in tensors.items()} for i in range(layers)}).save(folder / "adapter")
    return np.random.default_rng(0).integers(0, config.vocab_size, STATE_TOKENS)


def write(name: str, text: str) -> None:
    """Puts a model's table between its marks in the page."""
    page = PAGE.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    start, end = page.index(first), page.index(last)
    PAGE.write_text(f"{page[:start]}{first}\n\n{text}\n\n{page[end:]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
