"""The manifest `deltamem.json` as Python values: written here for the runtime, read here for a person.
docs/bundle.md is the contract. It knows the format and its digests; it does not know how the other files come
about.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from deltamem_export.errors import ExportError

if TYPE_CHECKING:  # reading a manifest takes neither transformers nor ONNX
    from deltamem_export.adapter import AdapterConfig
    from deltamem_export.backbone import Geometry, Tokens
    from deltamem_export.structure import GraphFacts
    from deltamem_export.text import Text

MANIFEST_FILE = "deltamem.json"
FORMAT = "deltamem-bundle"
FORMAT_VERSION = 1
_NO_DIGEST = "0" * 64


def memory_section(config: AdapterConfig, layers: tuple[int, ...]) -> dict[str, Any]:
    """The memory's shape and rule, under the manifest's names."""
    return {
        "layers": list(layers),
        "heads": config.num_state_heads,
        "rank": config.rank,
        "alpha": config.alpha,
        "update_mode": config.state_update_mode,
        "couple_lambda": config.couple_lambda,
        "gates": "row" if config.rankwise_gates else "head",
        "normalize_qk": config.normalize_qk,
        "delta_heads": list(config.delta_heads),
        "write_granularity": config.memory_write_granularity.removesuffix("_mean"),
    }


def graph_section(facts: GraphFacts, file: str, measured_file: str | None) -> dict[str, Any]:
    """What the runtime must know to run the graph."""
    return {"file": file, "measured_file": measured_file, **{k: _plain(v) for k, v in asdict(facts).items()}}


def graphs(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A bundle's graphs, the first one first, each with its own `device`, `precision`, `precision_setting` and `check`, in the older
    bundles too, which do not say all of them."""
    precision = found["precision"]
    first = {
        "device": "cuda" if precision == "bf16" else "cpu",
        **found["graph"],
        "precision": precision,
        "precision_setting": found.get("precision_setting", precision),
        "check": found.get("check"),
    }
    return [first, *(dict(graph) for graph in found.get("graphs") or [])]


def graph_on(found: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The graph for a device: its own, or one in fp16, which runs on both.

    Raises:
        ExportError: there is none.
    """
    all_of_them = graphs(found)
    own = [g for g in all_of_them if g["device"] == device]
    chosen = next(iter(own or [g for g in all_of_them if g["precision"] == "fp16"]), None)
    if chosen is None:
        there = " and ".join(g["device"] for g in all_of_them)
        raise ExportError(
            f"the bundle's graphs are for {there}, not for {device}; add one with --device {device} --into"
        )
    return chosen


def text_of(found: Mapping[str, Any]) -> Text | None:
    """The bundle's files for text."""
    from deltamem_export.text import Text

    return Text(**found["text"]) if found.get("text") else None


def backbone_section(geometry: Geometry) -> dict[str, Any]:
    """The backbone's sizes."""
    return asdict(geometry)


def tokens_section(tokens: Tokens) -> dict[str, Any]:
    """The special tokens."""
    return {name: _plain(value) for name, value in asdict(tokens).items()}


def fingerprint(parts: Mapping[str, str | None]) -> str:
    """BLAKE3 of the four parts as lower-case hex joined by newlines, 'none' for a missing tokenizer."""
    names = ("backbone", "adapter", "config", "tokenizer")
    return str(blake3("\n".join(parts[name] or "none" for name in names).encode()).hexdigest())


def config_digest(memory: Mapping[str, Any], backbone: Mapping[str, Any]) -> str:
    """BLAKE3 of the memory and backbone sections as JSON with sorted keys and no spaces."""
    text = json.dumps({"memory": memory, "backbone": backbone}, sort_keys=True, separators=(",", ":"))
    return str(blake3(text.encode()).hexdigest())


def file_entry(path: Path) -> dict[str, Any]:
    """Size and BLAKE3 of one file, read and not mapped: a mapped one would count as this process's memory."""
    hasher = blake3()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            hasher.update(part)
    return {"bytes": path.stat().st_size, "blake3": str(hasher.hexdigest())}


def encode(manifest: Mapping[str, Any]) -> bytes:
    """The file's bytes, with its own digest filled in."""
    ordered = {"format": FORMAT, "format_version": FORMAT_VERSION, "digest": _NO_DIGEST, **manifest}
    data = (json.dumps(ordered, indent=2, ensure_ascii=False) + "\n").encode()
    digest = blake3(data).hexdigest()
    return data.replace(_NO_DIGEST.encode(), digest.encode(), 1)


def write(directory: Path, found: Mapping[str, Any]) -> None:
    """Writes the manifest of a bundle, new or as `read` gave it and changed since."""
    sections = {name: value for name, value in found.items() if name not in ("format", "format_version", "digest")}
    (directory / MANIFEST_FILE).write_bytes(encode(sections))


def read(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a bundle, its digest checked.

    Raises:
        FileNotFoundError: the directory holds none.
        ExportError: not JSON, another format or version, or changed since it was written.
    """
    path = Path(directory) / MANIFEST_FILE
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        found = str(manifest["digest"])
        kind, version = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: not a bundle's manifest ({type(error).__name__}: {error})") from error
    if kind != FORMAT or version != FORMAT_VERSION:
        raise ExportError(f"{path}: is {kind!r} version {version!r}, expected {FORMAT!r} version {FORMAT_VERSION}")
    actual = blake3(data.replace(found.encode(), _NO_DIGEST.encode(), 1)).hexdigest()
    if found != actual:
        raise ExportError(f"{path}: its digest is {found}, its bytes give {actual}; it was changed after the export")
    return dict(manifest)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
