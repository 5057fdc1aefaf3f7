"""`deltamem inspect PATH`: a bundle, a snapshot or an adapter, for a person. It reads headers and sizes, and runs no model."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from deltamem_rt._native import Snapshot

from .arguments import Commands, UsageError
from .terminal import Terminal, count, pairs, shorten, size

_HEADER_LIMIT = 100 * 1024 * 1024
"""The safetensors format's own limit for a header: nothing longer is read."""

_WRITES = {
    "token": "each token by itself",
    "message": "the mean of each message; token ids need spans (id of each token's message), a reply's tokens write by themselves",
    "sentence": "the mean of each sentence; token ids need spans (id of each token's sentence), a reply's tokens write by themselves",
}
"""What one write covers, for people."""


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="describe a bundle, a snapshot file or an adapter",
        description="Describes a bundle's directory, a snapshot file (as /save in chat or Snapshot.to_bytes writes it), or an adapter.",
    )
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    path: Path = options.path
    terminal = Terminal()
    if path.is_dir():
        if (path / "deltamem.json").is_file():
            manifest = _json(path / "deltamem.json")
            problems = _files_that_differ(path, manifest)
            if options.json:
                print(json.dumps({"kind": "bundle", "manifest": manifest, "problems": problems}, indent=2))
            else:
                _show_bundle(path, manifest, problems, terminal)
            return 1 if problems else 0
        if (path / "delta_mem_config.json").is_file():
            return _adapter(path, options.json, terminal)
        raise UsageError(
            f"{path} is a directory with no deltamem.json (a bundle) and no delta_mem_config.json (an adapter)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    metadata, tensors = _safetensors_header(path)
    if metadata.get("format") == "deltamem-snapshot":
        return _snapshot(path, options.json, terminal)
    return _tensor_file(path, metadata, tensors, options.json, terminal)


# ---------------------------------------------------------------- bundle


def _files_that_differ(path: Path, manifest: dict[str, Any]) -> list[str]:
    """What is missing or of another size than the manifest says. Digests are compared by `Model.load`."""
    problems = []
    for name, expected in _section(manifest, "files").items():
        file = path / name
        wanted = expected.get("bytes") if isinstance(expected, dict) else None
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif wanted is not None and file.stat().st_size != wanted:
            problems.append(f"{name} has {file.stat().st_size} bytes, and the manifest says {wanted}")
    return problems


def _show_bundle(path: Path, manifest: dict[str, Any], problems: list[str], terminal: Terminal) -> None:
    backbone, memory, graph = (_section(manifest, name) for name in ("backbone", "memory", "graph"))
    layers, heads, rank = memory.get("layers") or [], memory.get("heads", 0), memory.get("rank", 0)
    text = _section(manifest, "text")
    terminal.line(
        f"{terminal.bold(str(manifest.get('name', path.name)))}  a bundle, format {manifest.get('format_version', '?')}"
    )
    rows = [
        ("fingerprint", str(manifest.get("fingerprint", "-"))),
        (
            "backbone",
            f"{backbone.get('architecture', '?')}, {backbone.get('num_layers', '?')} layers of {backbone.get('hidden_size', '?')}, "
            f"vocabulary {backbone.get('vocab_size', '?')}, context {backbone.get('context_length', '?')} tokens",
        ),
        (
            "memory",
            f"{size(4 * len(layers) * heads * rank * rank)} a user: {count(len(layers), 'layer')} ({_ranges(layers)}) x "
            f"{count(heads, 'head')} x {rank} x {rank}, float32",
        ),
        (
            "rule",
            f"{memory.get('update_mode', '?')}, {'coupled' if memory.get('couple_lambda') else 'own'} lambda, a gate per "
            f"{memory.get('gates', '?')}, alpha {memory.get('alpha', '?')}, corrects {', '.join(memory.get('delta_heads') or ['?'])}",
        ),
        ("writes", _WRITES.get(str(memory.get("write_granularity")), str(memory.get("write_granularity", "?")))),
        *_graph(manifest, graph),
        (
            "text",
            f"yes{'' if text.get('chat_template') else ', without a chat template'}" if text else "no: token ids only",
        ),
        *(
            row
            for further in manifest.get("graphs") or []
            if isinstance(further, dict)
            for row in _graph(further, further, f" on {further.get('device', '?')}")
        ),
        (
            "made by",
            ", ".join(f"{name} {version}" for name, version in _section(manifest, "made_by").items()) or "-",
        ),
    ]
    for line in pairs(rows):
        terminal.line(line)
    terminal.line("  files")
    files = _section(manifest, "files")
    for line in pairs([(name, size(int(entry.get("bytes", 0)))) for name, entry in files.items()], indent="    "):
        terminal.line(line)
    for problem in problems:
        terminal.line(terminal.bad(f"  {problem}"))


def _graph(said: dict[str, Any], graph: dict[str, Any], where: str = "") -> list[tuple[str, str]]:
    """A graph's rows. said: where its precision and its check stand."""
    precision = str(said.get("precision", "?"))
    device = graph.get("device", "cuda" if precision == "bf16" else "cpu")
    checked, more = _checked(_section(said, "check")), graph.get("not_checked")
    if more and not said.get("check"):
        checked, more = f"no: {more}", None
    return [
        (f"precision{where}", precision if where else f"{precision}, for {device}"),
        (f"inside a turn{where}", _turn(graph)),
        (f"checked{where}", f"{checked}; {more}" if more else checked),
    ]


def _turn(graph: dict[str, Any]) -> str:
    """What a turn carries, and drops at its end."""
    layers = graph.get("kv_layers") or []
    parts = [
        f"a KV cache of {count(len(layers), 'layer')} ({_ranges(layers)}) in {graph.get('kv_dtype', '?')}"
        f"{'' if graph.get('shared_kv') else ', past and present in separate buffers'}"
        if layers
        else "no KV cache"
    ]
    parts += [
        f"{state.get('input', '?')} {state.get('dtype', '?')} {state.get('shape', '?')}"
        for state in graph.get("states") or []
        if isinstance(state, dict)
    ]
    return "; ".join(parts)


def _checked(check: dict[str, Any]) -> str:
    """What the exporter compared the graph with."""
    if not check:
        return "no: exported with --no-check, so nothing shows that the graph computes what its origin does"
    what = "in the logits"
    if check.get("method") == "layers":
        what = "layer by layer on sampled inputs, the whole model was never run"
    return (
        f"{check.get('tokens', '?')} tokens against {check.get('against', '?')}: largest difference {what}: "
        f"{check.get('max_abs_diff', '?')} (allowed {check.get('tolerance', '?')})"
    )


# ---------------------------------------------------------------- snapshot


def _snapshot(path: Path, as_json: bool, terminal: Terminal) -> int:
    snapshot = Snapshot.from_bytes(path.read_bytes())
    norms = [float(norm) for norm in np.linalg.norm(snapshot.memory.reshape(snapshot.memory.shape[0], -1), axis=1)]
    facts = {
        "kind": "snapshot",
        "fingerprint": snapshot.fingerprint,
        "tokens_seen": snapshot.tokens_seen,
        "turns": snapshot.turns,
        "shape": list(snapshot.memory.shape),
        "memory_bytes": snapshot.memory.nbytes,
        "norms": norms,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    terminal.line(f"{terminal.bold(path.name)}  a snapshot, {size(path.stat().st_size)}")
    layers, heads, rank, _ = snapshot.memory.shape
    rows = [
        ("fingerprint", snapshot.fingerprint),
        ("seen", f"{count(snapshot.tokens_seen, 'token')} in {count(snapshot.turns, 'turn')}"),
        (
            "memory",
            f"{size(snapshot.memory.nbytes)}: {count(layers, 'layer')} x {count(heads, 'head')} x {rank} x {rank}, float32",
        ),
        ("norm by layer", ", ".join(f"{norm:.3g}" for norm in norms)),
    ]
    for line in pairs(rows):
        terminal.line(line)
    return 0


# ---------------------------------------------------------------- adapter


def _adapter(path: Path, as_json: bool, terminal: Terminal) -> int:
    config = _json(path / "delta_mem_config.json")
    weights = next(
        (path / name for name in ("adapter.safetensors", "delta_mem_adapter.pt") if (path / name).is_file()),
        None,
    )
    tensors: dict[str, Any] = {}
    if weights is not None and weights.suffix == ".safetensors":
        _, tensors = _safetensors_header(weights)
    if as_json:
        print(
            json.dumps(
                {
                    "kind": "adapter",
                    "config": config,
                    "weights": weights and weights.name,
                    "tensors": tensors,
                },
                indent=2,
            )
        )
        return 0 if weights else 1
    terminal.line(f"{terminal.bold(path.resolve().name)}  an adapter")
    for line in pairs([(key, json.dumps(value)) for key, value in config.items()]):
        terminal.line(line)
    if weights is None:
        terminal.line(
            terminal.bad("  neither adapter.safetensors nor delta_mem_adapter.pt lies beside the configuration")
        )
        return 1
    terminal.line(f"  {weights.name}: {size(weights.stat().st_size)}")
    if weights.suffix == ".pt":
        terminal.line("  (a PyTorch file: deltamem-export reads it; nothing is unpickled here)")
    _show_tensors(tensors, terminal)
    return 0


def _tensor_file(
    path: Path, metadata: dict[str, str], tensors: dict[str, Any], as_json: bool, terminal: Terminal
) -> int:
    if as_json:
        print(json.dumps({"kind": "tensors", "metadata": metadata, "tensors": tensors}, indent=2))
        return 0
    terminal.line(f"{terminal.bold(path.name)}  {len(tensors)} tensors, {size(path.stat().st_size)}")
    for line in pairs([(key, shorten(value, terminal.width - 30)) for key, value in metadata.items()]):
        terminal.line(line)
    _show_tensors(tensors, terminal)
    return 0


def _show_tensors(tensors: dict[str, Any], terminal: Terminal) -> None:
    for line in pairs(
        [(name, f"{entry.get('dtype')} {entry.get('shape')}") for name, entry in tensors.items()],
        indent="    ",
    ):
        terminal.line(line)


# ---------------------------------------------------------------- files


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds {type(found).__name__}, and a JSON object is expected")
    return found


def _section(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    section = manifest.get(name)
    return section if isinstance(section, dict) else {}


def _safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata, and name -> dtype and shape, of a safetensors file, from its header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        room = os.fstat(file.fileno()).st_size - 8
        try:
            if not 2 <= length <= min(room, _HEADER_LIMIT):
                raise ValueError
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            tensors = {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UsageError(
                f"{path} is neither a bundle's directory nor a safetensors file (snapshot or adapter)"
            ) from None
    return {str(key): str(value) for key, value in metadata.items()}, tensors


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)
