"""What a bundle or an adapter is, as text for a person. It reads manifests, settings and sizes; it runs nothing and loads no backbone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deltamem_export import manifest
from deltamem_export.adapter import CONFIG_FILE, Adapter
from deltamem_export.errors import ExportError


def describe(path: str | os.PathLike[str]) -> str:
    """A bundle or an adapter directory, told in a few lines.

    Raises:
        FileNotFoundError: no such directory.
        ExportError, AdapterError: neither of the two, or damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    if (directory / manifest.MANIFEST_FILE).is_file():
        return _bundle(directory)
    if (directory / CONFIG_FILE).is_file():
        return _adapter(directory)
    raise ExportError(
        f"{directory}: neither a bundle ({manifest.MANIFEST_FILE}) nor an adapter ({CONFIG_FILE}) is in this directory"
    )


def _bundle(directory: Path) -> str:
    m = manifest.read(directory)
    b, memory, text = m["backbone"], m["memory"], m["text"]
    state = len(memory["layers"]) * memory["heads"] * memory["rank"] ** 2 * 4
    lines = [
        f"bundle       {m['name']}, format {m['format_version']}, "
        + ", ".join(f"{g['precision']} for {g['device']}" for g in manifest.graphs(m)),
        f"backbone     {b['architecture']}: {b['num_layers']} layers, hidden {b['hidden_size']}, {b['num_attention_heads']} heads "
        f"({b['num_kv_heads']} kv) of {b['head_dim']}, {b['vocab_size']} tokens, context {b['context_length']}",
        *_memory(memory, state),
        *_graphs(manifest.graphs(m)),
        "text         " + (_text(text) if text else "none: takes token ids only"),
        f"fingerprint  {m['fingerprint']}",
        "made by      " + ", ".join(f"{name} {number}" for name, number in m["made_by"].items()),
        "files",
    ]
    for name, entry in m["files"].items():
        found = directory / name
        size = found.stat().st_size if found.is_file() else None
        note = "" if size == entry["bytes"] else "  MISSING" if size is None else f"  DAMAGED: {size} bytes on disk"
        lines.append(f"  {name:<24} {_bytes(entry['bytes']):>10}{note}")
    return "\n".join(lines)


def _graphs(graphs: list[dict[str, Any]]) -> list[str]:
    lines = []
    for graph in graphs:
        several = f"{graph['device']}: " if len(graphs) > 1 else ""
        lines.append(
            f"cache        {several}{graph['kv_dtype']}, {len(graph['kv_layers'])} layers"
            + (", one buffer for past and present" if graph["shared_kv"] else "")
        )
        check = (
            _check(graph["check"])
            if graph["check"]
            else f"no: {graph.get('not_checked') or 'exported with --no-check'}"
        )
        lines.append(f"checked      {several}{check}")
        if graph["check"] and graph.get("not_checked"):
            lines.append(f"             {several}{graph['not_checked']}")
    return lines


def _adapter(directory: Path) -> str:
    adapter = Adapter.load(directory)
    c, layers = adapter.config, sorted(adapter.layers)
    state = len(layers) * c.num_state_heads * c.rank**2 * 4
    parameters = sum(tensor.numel() for _, tensor in adapter.tensors())
    return "\n".join(
        [
            f"adapter      {adapter.source}",
            f"backbone     any with hidden size {adapter.hidden_size} whose projections are as wide as its corrections",
            *_memory(manifest.memory_section(c, tuple(layers)), state),
            f"parameters   {parameters:,} ({_bytes(parameters * 4)} as float32)",
            f"scale        alpha/rank = {c.scaling:g}" + (", trained on top" if c.trainable_delta_scale else ""),
        ]
    )


def _memory(memory: dict[str, Any], state: int) -> list[str]:
    shape = [len(memory["layers"]), memory["heads"], memory["rank"], memory["rank"]]
    rule = memory["update_mode"]
    if rule != "no_lambda":
        rule += ", λ = 1 − β" if memory["couple_lambda"] else ", λ of its own"
    return [
        f"memory       {_bytes(state)}: float32 [{', '.join(map(str, shape))}] (layers, heads, rank, rank)",
        f"layers       {', '.join(map(str, memory['layers']))}",
        f"rule         {rule}; gates per {memory['gates']}; "
        f"{'unit' if memory['normalize_qk'] else 'free'} keys; writes per {memory['write_granularity']}",
        f"corrects     {', '.join(memory['delta_heads'])}",
    ]


def _text(text: dict[str, Any]) -> str:
    return f"{text['tokenizer']}, " + (text["chat_template"] or "no chat template")


def _check(check: dict[str, Any]) -> str:
    what = "each layer alone" if check.get("method") == "layers" else "logits"
    found = f"{what} within {check['max_abs_diff']:.2g} of {check['against']} over {check['tokens']} tokens"
    return f"{found} (tolerance {check['tolerance']:.2g})"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
