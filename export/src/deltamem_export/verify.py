"""A bundle beside the checkpoint it was made from: the same tokens through the PyTorch reference on the user's own backbone
and adapter, and through the bundle's graph in Python's onnxruntime. Turns with fresh caches, a prompt in one piece, in
chunks, token by token, and with writes off. It says how far the two are apart in every layer, where they part first, and
whether that is within what the precision allows. It changes nothing on disk.

Two things are asked. Is this the same checkpoint: digests of the files and the parts of the fingerprint, and for weights in
blocks the distance to the backbone's. Does it compute the same: logits and states. A bundle is good when both hold.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from deltamem_export import manifest
from deltamem_export.adapter import Adapter
from deltamem_export.backbone import Backbone
from deltamem_export.bundle import adapter_digest, share_files
from deltamem_export.check import LARGE, TOLERANCES, free_memory, load_graph
from deltamem_export.errors import ExportError, first_line
from deltamem_export.kv import read_scales, with_float_cache
from deltamem_export.precision import ALGORITHMS, BLOCK_SIZES, Precision
from deltamem_export.probe import (
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    LOGITS,
    STATE,
    Difference,
    Differences,
    Place,
    find_grafted,
    find_places,
    hooked,
    kv_layers,
    read_places,
    watched_values,
)
from deltamem_export.reference import attach
from deltamem_export.runner import GraphRun, Ids, Spans, has_cuda
from deltamem_export.structure import find_attentions
from deltamem_export.text import copy_text, text_digest
from deltamem_export.weights import FAR, distances, weights_of

# States are float32 whatever the precision; what reaches them is not. Relative to 1, or to the largest state.
STATE_TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 1e-5}
# By CUDA's operators: logits, states. float32 without TF32 sums in another order; bfloat16 is not widened there and has 3 bits less than
# float16.
_BY_CUDA = {"fp32": (2e-3, 1e-4), "fp16": (TOLERANCES["fp16"], STATE_TOLERANCES["fp16"]), "bf16": (8e-1, 8e-2)}
# The fused graph beside the portable one, in the runtime: the same in float32; over weights in blocks the memory's own are in 16 bits.
# Logits and states, relative as above.
_FUSED = {"fp32": (1e-4, 1e-5), "int8": (2e-2, 5e-3), "int4": (2e-2, 5e-3)}
# The graph with the runtime's own products beside the portable one: both round activations to 8 bits, and a number that is off in the last
# digit falls to the other side now and then, as for another cut of the stream.
_BLOCKS = (3e-1, 1e-1)
TOKENS = 160
MIN_TOKENS = 16
# A window is passed without being asked only if that takes no more tokens than this.
_MOST_TOKENS = 1024
_STEPS = 8
_DIGEST = 64
_DOUBTFUL = 10.0

Float32 = npt.NDArray[np.float32]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Apart:
    """The largest and the mean difference of something, and the tolerance it is held to (None: it is shown only)."""

    max: float
    mean: float
    tolerance: float | None = None

    @property
    def good(self) -> bool:
        return self.tolerance is None or self.max <= self.tolerance

    @property
    def doubtful(self) -> bool:
        """Within the tolerance, or over it by so little that it may be the reference's own rounding."""
        return self.tolerance is None or self.max <= _DOUBTFUL * self.tolerance


@dataclass(frozen=True)
class Layer:
    """One layer: None where the graph has no such place, or the layer no memory."""

    layer: int
    attention_input: Apart | None
    attention_output: Apart | None
    state: Apart | None


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        bundle, backbone, adapter: the paths.
        precision: the compared graph's, with all its settings (`int4/32/4`).
        device: what the compared graph is for.
        run_by: what ran it, `cpu` or `cuda`.
        tokens: how many were compared.
        calls: each call in words.
        identity: what is not the checkpoint that was exported, in words; empty if all of it is.
        logits, states: None where the two cannot be run side by side at all.
        same_next_token: of `tokens` positions.
        layers: every layer with attention.
        fused: how far the fused graph is from the portable one in logits and in states, both in the runtime; None where there is none,
            or it was not run (that for CUDA takes a card).
        blocks: the same of the graph with the runtime's own products in blocks.
        first: where the two part first, in words; None if they do not.
        notes: what a reader should know of how it was compared.
    """

    bundle: str
    backbone: str
    adapter: str
    precision: str
    tokens: int
    calls: tuple[str, ...]
    identity: tuple[str, ...]
    logits: Apart | None
    states: Apart | None
    same_next_token: int
    layers: tuple[Layer, ...]
    first: str | None
    notes: tuple[str, ...]
    fused: tuple[Apart, Apart] | None = None
    blocks: tuple[Apart, Apart] | None = None
    device: str = "cpu"
    run_by: str = "cpu"

    @property
    def computes_the_same(self) -> bool:
        both = self.logits is not None and self.states is not None and self.logits.good and self.states.good
        return both and all(apart.good for own in (self.fused, self.blocks) for apart in own or ())

    @property
    def good(self) -> bool:
        return self.computes_the_same and not self.identity

    @property
    def verdict(self) -> str:
        if self.good:
            return "good: the bundle is this checkpoint and computes what it computes"
        if self.logits is None:
            return "differs: the bundle was made from another model"
        if self.computes_the_same:
            return "differs: the numbers agree, but this is not bit for bit what was exported"
        return f"differs, first at {self.first}"

    def to_json(self) -> str:
        """One object; an infinite difference is null."""
        found = asdict(self) | {"good": self.good, "verdict": self.verdict}
        return json.dumps(_finite(found), ensure_ascii=False, indent=2)

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" for {self.device}, run by {self.run_by}"
        lines = [
            f"bundle     {self.bundle} ({self.precision}{where})",
            f"backbone   {self.backbone}",
            f"adapter    {self.adapter}",
            "identity   " + ("\n           ".join(self.identity) or "the checkpoint that was exported"),
        ]
        if self.logits is not None and self.states is not None:
            lines += [f"compared   {self.tokens} tokens: " + "\n           ".join(self.calls), "", *self._table(), ""]
            lines += [
                f"logits     {_show(self.logits)}; the same next token at {self.same_next_token} of {self.tokens} positions",
                f"states     {_show(self.states)}",
                f"first      {self.first or 'no place differs'}",
            ]
            for name, own in (("fused", self.fused), ("blocks", self.blocks)):
                if own is not None:
                    lines.insert(-1, f"{name:<10} logits {_show(own[0])}; states {_show(own[1])}")
        return "\n".join([*lines, *(f"note       {note}" for note in self.notes), self.verdict])

    def _table(self) -> list[str]:
        heads = ("attention input", "attention output", "state")
        lines = [
            "layer  " + "".join(f"{head:<22}" for head in heads).rstrip(),
            "       " + ("max       mean        " * len(heads)).rstrip(),
        ]
        for layer in self.layers:
            found = (layer.attention_input, layer.attention_output, layer.state)
            cells = (f"{a.max:<10.1e}{a.mean:<12.1e}" if a else f"{'-':<22}" for a in found)
            lines.append(f"{layer.layer:<7}" + "".join(cells).rstrip())
        return lines


def verify(
    bundle: str | os.PathLike[str],
    backbone: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Adapter,
    *,
    text: str | None = None,
    tokens: int | None = None,
    device: str | None = None,
    say: Say = lambda _: None,
) -> Report:
    """Compares a bundle with the checkpoint it was made from.

    Args:
        bundle: the bundle's directory.
        backbone: the Hugging Face folder.
        adapter: the adapter's folder, or one in memory.
        text: run through the bundle's tokenizer; pseudo-random ids if there is none.
        tokens: the most tokens to compare; all of the text, or 160 (and more than a small window), if not given.
        device: whose graph to compare, where the bundle has several: `cpu` or `cuda`; its first if not given. The graph for CUDA is
            run by CUDA where this onnxruntime has it, else by the CPU, which the report says.
        say: gets a line before each long step.

    Raises:
        FileNotFoundError: a folder or file that must be there is not.
        ExportError, AdapterError: the three cannot be read, or the adapter does not fit the backbone.
    """
    directory = Path(bundle)
    found = manifest.read(directory)
    device = device or manifest.graphs(found)[0]["device"]
    entry = manifest.graph_on(found, device)
    run_by = "cuda" if device == "cuda" and has_cuda() else "cpu"
    graph = directory / entry["file"]
    if not graph.is_file():
        raise FileNotFoundError(f"{graph}: not found; the bundle is not whole")
    say("hashing the bundle's files")
    identity = list(_damaged(directory, found["files"]))
    say(f"reading {backbone}")
    body = Backbone.load(backbone, any_family=True)
    memory = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    layers = memory.check_backbone(body.shapes)
    identity += strangers(directory, found, body, memory, layers)
    precision = _precision(entry, fingerprint_setting(directory, found, body), device)
    report = Report(
        bundle=str(directory),
        backbone=str(backbone),
        adapter=str(adapter) if not isinstance(adapter, Adapter) else adapter.source,
        precision=precision.setting,
        tokens=0,
        calls=(),
        identity=tuple(identity),
        logits=None,
        states=None,
        same_next_token=0,
        layers=(),
        first=None,
        notes=(),
        device=device,
        run_by=run_by,
    )
    if not _comparable(found, body, memory, layers):
        return report
    ids, notes = _ids(directory, found, body, text, tokens)
    if precision.quantised:
        notes.append("the reference has the weights that the graph's blocks stand for; activations are float32 in both")
    if precision.kv == "int8":
        notes.append(
            "the KV cache was compared in the type of the activations: 8 bits round it, which the reference does not"
        )
    if device == "cuda" and run_by == "cpu":
        notes.append(
            "this onnxruntime has no CUDA, so the CPU ran the graph for it: CUDA's own operators were not compared"
        )
    if precision.name == "bf16" and run_by == "cpu":
        notes.append("bfloat16 was widened to float32: the CPU has none")
    turns = _turns(ids, memory.config.writes_spans)
    wrong = _wrong_blocks(graph, body, precision)
    reference = partial(_reference, memory, graph, precision, turns, kv_layers(ir.load(graph).graph))
    say("running the reference")
    want = reference(body)
    sizes = (body.geometry.num_kv_heads, body.geometry.head_dim)
    del body
    gc.collect()
    got, inside = _bundle(graph, precision, sizes, turns, layers, run_by, say)

    logits, states = _judge(want, got, precision, run_by)
    exactly = run_by == "cpu" and precision.arithmetic != "fp16"
    if not (logits.good and states.good) and logits.doubtful and states.doubtful and exactly:
        exact = _exact(backbone, reference, say)
        if exact is None:
            notes.append(
                "over by little, and there is no memory to tell with a reference in float64 whose rounding it is"
            )
        else:
            own = _judge(exact, want, precision, run_by)
            logits, states = (
                replace(found, tolerance=max(found.tolerance or 0.0, 2 * rounding.max))
                for found, rounding in zip(_judge(exact, got, precision, run_by), own, strict=True)
            )
            notes.append(
                f"over by little, so held to the reference in float64; the one in float32 is {own[0].max:.2g} (logits) and "
                f"{own[1].max:.2g} (states) away from it, and the bundle may be twice as far"
            )
    differences = Differences()
    for expected, values in zip(want, inside, strict=True):
        differences.add(expected, values)
    first = None
    if not (logits.good and states.good) or wrong:
        at = differences.first(_limits(precision, run_by)[0] / LARGE)
        first = "; ".join(wrong) or (differences.where(at.place) if at else "no place inside; only the sum is over")
    own: dict[str, tuple[Apart, Apart] | None] = {}
    for name in ("fused", "blocks"):
        if entry["device"] == device and entry.get(f"{name}_file") is not None:
            if device != run_by:
                notes.append(f"the {name} graph was not run: its operator runs on a card alone")
                continue
            say(f"running the {name} graph in the runtime")
            apart, note = _beside_portable(directory, name, turns, precision, device)
            own[name] = apart
            notes += [note] if note else []
            if apart is not None and not all(a.good for a in apart) and first is None:
                first = f"the {name} graph; the portable one computes the same"
    return replace(
        report,
        fused=own.get("fused"),
        blocks=own.get("blocks"),
        tokens=len(ids),
        calls=tuple(call.name for turn in turns for call in turn),
        identity=(*report.identity, *wrong),
        logits=logits,
        states=states,
        same_next_token=sum(
            int((a[_LOGITS].argmax(-1) == b[_LOGITS].argmax(-1)).sum()) for a, b in zip(want, got, strict=True)
        ),
        layers=tuple(_layers(differences)),
        first=first,
        notes=tuple(notes),
    )


# ---------------------------------------------------------------------- the same checkpoint?


def _damaged(directory: Path, files: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            yield f"the bundle's {name} is missing"
        elif manifest.file_entry(path) != entry:
            yield f"the bundle's {name} is not the file that was exported: its bytes have changed"


def fingerprint_setting(directory: Path, found: Mapping[str, Any], body: Backbone) -> str | None:
    """The setting at which this backbone has the digest that the bundle's fingerprint was made of; None: it is another backbone."""
    said = found.get("fingerprint_setting")
    for setting in [said] if said else _possible_settings(found, directory / found["graph"]["file"]):
        if body.digest(setting) == found["fingerprint_parts"]["backbone"]:
            return str(setting)
    return None


def _possible_settings(found: Mapping[str, Any], graph: Path) -> Iterator[str]:
    """What an older exporter, which did not say it, may have taken the digest with."""
    name = found["precision"]
    scales = read_scales(graph) if found["graph"]["kv_dtype"] == "int8" else None
    kv = "float" if scales is None else "int8"
    # Without blocks, what blocks can be is left at its defaults.
    blocks = (BLOCK_SIZES, (1, 2, 3, 4), (True, False), ALGORITHMS, (False, True))
    defaults = Precision()
    plain = (defaults.block_size, defaults.accuracy_level, defaults.symmetric, defaults.algorithm, defaults.embeddings)
    for options in itertools.product(*blocks) if Precision(name).quantised else [plain]:
        try:
            precision = Precision(name, *options, kv)
        except ExportError:  # two options that exclude each other
            continue
        yield precision.setting if scales is None else f"{precision.setting}/{scales.digest}"


def _precision(entry: Mapping[str, Any], setting: str | None, device: str) -> Precision:
    """A graph's precision with all its options; of an older bundle, which says its name alone, what the fingerprint was made with."""
    name, kv = entry["precision"], "int8" if entry["kv_dtype"] == "int8" else "float"
    said = entry["precision_setting"]
    if "/" not in said and Precision(name).quantised:
        said = setting
    device = "" if name in ("fp16", "bf16") else device
    if said is None:
        return Precision(name, kv=kv, device=device)
    parts = said.split("/")
    return Precision.parse("/".join(part for part in parts if len(part) < _DIGEST), device)


def strangers(
    directory: Path, found: Mapping[str, Any], body: Backbone, memory: Adapter, layers: Sequence[int]
) -> list[str]:
    """Which parts of a bundle's fingerprint are not those of this backbone and adapter, in words.

    Args:
        directory: the bundle's.
        found: its manifest.
        body, memory: the two.
        layers: those that carry a memory.
    """
    return list(_strangers(directory, found, body, memory, layers))


def _strangers(
    directory: Path, found: Mapping[str, Any], body: Backbone, memory: Adapter, layers: Sequence[int]
) -> Iterator[str]:
    parts = found["fingerprint_parts"]
    if fingerprint_setting(directory, found, body) is None:
        yield "the backbone's weights are not those that were exported (their digest differs)"
    if adapter_digest(memory) != parts["adapter"]:
        yield "the adapter's tensors are not those that were exported (their digest differs)"
    own = {
        "memory": manifest.memory_section(memory.config, tuple(layers)),
        "backbone": manifest.backbone_section(body.geometry),
    }
    for section, values in own.items():
        for name, value in values.items():
            if found[section].get(name) != value:
                yield f"{section}.{name} is {value!r}, in the bundle {found[section].get(name)!r}"
    with tempfile.TemporaryDirectory() as scratch:
        text = copy_text(body.directory, Path(scratch), body.geometry.vocab_size, body.tokens.bos, body.tokens.eos)
        if text_digest(Path(scratch), text) != parts["tokenizer"]:
            yield "the tokenizer or the chat template is not the one that was exported"


def _comparable(found: Mapping[str, Any], body: Backbone, memory: Adapter, layers: Sequence[int]) -> bool:
    """Whether the two have the same sizes, so that they can be run on the same tokens at all."""
    sizes = manifest.backbone_section(body.geometry), manifest.memory_section(memory.config, tuple(layers))
    names = ("hidden_size", "num_layers", "num_attention_heads", "num_kv_heads", "head_dim", "vocab_size")
    backbone = all(found["backbone"][name] == sizes[0][name] for name in names)
    return backbone and all(found["memory"][n] == sizes[1][n] for n in ("layers", "heads", "rank", "write_granularity"))


def _wrong_blocks(graph: Path, body: Backbone, precision: Precision) -> list[str]:
    """Matrices of the backbone that the graph's blocks are no rounding of."""
    if not precision.quantised:
        return []
    limit = FAR[precision.name]
    return [
        f"{name}: the bundle's blocks are not this matrix rounded (off by {distance:.2g} of its size, where rounding "
        f"takes {limit:g} at most)"
        for name, distance in distances(graph, body.model)
        if not distance <= limit
    ]


# ---------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class _Call:
    name: str
    ids: Ids
    cuts: tuple[int, ...] = ()
    write: bool = True
    spans: Spans | None = None


_LOGITS = Place(None, LOGITS)


def _ids(
    directory: Path, found: Mapping[str, Any], body: Backbone, text: str | None, tokens: int | None
) -> tuple[Ids, list[str]]:
    """The tokens to compare on, and notes for the reader."""
    notes = []
    window = getattr(body.config, "sliding_window", None) or 0
    enough = 3 * window  # two turns of five pass it
    length = tokens or (max(TOKENS, enough) if enough <= _MOST_TOKENS else TOKENS)
    if text is not None and found["text"] is not None:
        tokenizer = Tokenizer.from_file(str(directory / found["text"]["tokenizer"]))
        ids = np.array(tokenizer.encode(text).ids, np.int64)[:tokens]
    else:
        if text is not None:
            notes.append("the bundle has no tokenizer, so the text was not used: the ids are pseudo-random")
        ids = np.random.default_rng(0).integers(0, body.geometry.vocab_size, length)
    if len(ids) < MIN_TOKENS:
        raise ExportError(f"{len(ids)} tokens are too few to compare on; {MIN_TOKENS} or more are needed")
    longest = body.geometry.context_length * 5 // 2
    if len(ids) > longest:
        notes.append(f"the first {longest} of {len(ids)} tokens are compared: a turn of more is beyond the context")
        ids = ids[:longest]
    if window and len(ids) * 2 // 5 <= window:
        notes.append(
            f"no turn was longer than the attention's window of {window} tokens; --tokens {enough} or a longer text would be"
        )
    return ids, notes


def _turns(ids: Ids, spans: bool) -> list[list[_Call]]:
    """Three turns, each with a fresh cache: a prompt, chunks and then token by token, and one that only reads."""
    prompt, mixed, last = np.split(ids, [len(ids) * 2 // 5, len(ids) * 4 // 5])
    steps = min(_STEPS, len(mixed) // 2)
    head, tail = np.split(mixed, [len(mixed) - steps])
    cuts = tuple(sorted({1, len(head) // 3, len(head) * 2 // 3} - {0, len(head)}))
    pieces = f"{len(head)} in {len(cuts) + 1} chunks"
    if spans:  # a call reads the state from before it, so a generated token is a call of its own
        return [
            [_Call(f"{len(prompt)} in spans", prompt, spans=_made_up(prompt))],
            [
                _Call(f"{pieces}, in spans", head, cuts, spans=_made_up(head)),
                *(_Call("1, written as a token", tail[t : t + 1]) for t in range(steps)),
            ],
            [_Call(f"{len(last)}, read only", last, (len(last) // 2,), write=False, spans=_made_up(last))],
        ]
    every = tuple(range(len(head), len(mixed)))
    return [
        [_Call(f"{len(prompt)} in one piece", prompt)],
        [_Call(f"{pieces}, then {steps} one by one", mixed, (*cuts, *every))],
        [_Call(f"{len(last)}, read only", last, (len(last) // 2,), write=False)],
    ]


def _made_up(ids: Ids) -> Spans:
    """Spans of 3 to 9 tokens, every fourth piece in none."""
    rng = np.random.default_rng(len(ids))
    pieces = np.repeat(np.arange(len(ids)), rng.integers(3, 10, len(ids)))[: len(ids)]
    return Spans(np.where(pieces % 4 == 3, -1, pieces).astype(np.int32))


def _reference(
    memory: Adapter,
    graph: Path,
    precision: Precision,
    turns: Sequence[Sequence[_Call]],
    layers: Sequence[int],
    body: Backbone,
    double: bool = False,
) -> list[dict[Place, Float32]]:
    """Every place of every call in PyTorch. A call is one piece here, so that whatever a cut changes is a difference.
    `double`: computed in float64; the backbone is of no use afterwards."""
    body.to_float32()
    found = []
    with weights_of(graph, body.model, precision, far=True), torch.inference_mode():
        handle = attach(body.model, memory)
        if double:
            body.model.double()
            handle.double()
        with hooked(body.model, layers) as places:
            for turn in turns:
                cache = None
                for call in turn:
                    handle.writes = call.write
                    if memory.config.writes_spans:
                        ids = torch.from_numpy(call.spans.ids[None].astype(np.int64)) if call.spans else "token"
                        handle.spans = ids  # type: ignore[assignment]
                    out = body.model(torch.from_numpy(call.ids[None]), past_key_values=cache, use_cache=len(turn) > 1)
                    cache = out.past_key_values if len(turn) > 1 else None
                    assert handle.state is not None
                    state = handle.state.to(torch.float32, copy=True).numpy()
                    states = {Place(i, STATE): state[:, at] for at, i in enumerate(handle.layer_indices)}
                    found.append({**places, **states})
        handle.detach_hooks()
    return found


def _beside_portable(
    directory: Path, name: str, turns: Sequence[Sequence[_Call]], precision: Precision, device: str
) -> tuple[tuple[Apart, Apart] | None, str | None]:
    """How far the graph `fused` or `blocks` is from the portable one, in logits and states, or a note that says why it was not run.
    device: the runtime's, on which both run."""
    try:
        import deltamem_rt as runtime
    except ImportError:
        return (
            None,
            f'the {name} graph was not run: only the runtime can, which is not installed (pip install "deltamem-rt[cpu]")',
        )
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            fused = name == "fused"
            rounded = fused and device == "cpu"
            bundle = _unrounded(directory, Path(scratch) / "bundle", precision) if rounded else directory
            for graph in (name, "portable"):
                values: list[tuple[Float32, Float32]] = []
                with runtime.Model.load(bundle, device=device, verify=False, graph=graph).session() as session:
                    for turn in turns:
                        for call in turn:
                            spans = call.spans.ids if call.spans is not None else None
                            logits = session.feed(call.ids, write=call.write, logits=True, spans=spans)
                            values.append((logits, session.memory.copy()))
                        session.end_turn()
                found.append(values)
        except (runtime.DeltaMemError, ValueError) as error:
            return None, f"the {name} graph was not run: {first_line(error)}"
    aparts = []
    on_card = _BY_CUDA[precision.arithmetic]
    limits = (_FUSED[precision.name] if device == "cpu" else on_card) if fused else _BLOCKS
    for what, limit, unit in zip((0, 1), limits, (LARGE, 1.0), strict=True):
        pairs = [(a[what], b[what]) for a, b in zip(*found, strict=True)]
        off = np.concatenate([np.nan_to_num(np.abs(a - b), nan=np.inf).reshape(-1) for a, b in pairs])
        size = max(float(np.abs(b).max()) for _, b in pairs)
        aparts.append(Apart(float(off.max()), float(off.mean()), limit * max(1.0, size / unit)))
    return (aparts[0], aparts[1]), None


def _unrounded(directory: Path, copy: Path, precision: Precision) -> Path:
    """The bundle, or a copy for the runtime whose graphs keep activations in float32: rounded to 8 bits, a step that is off in the last
    digit falls to the other side now and then, and hides what differs."""
    if not precision.quantised:
        return directory
    found = manifest.read(directory)
    copy.mkdir()
    share_files(directory, copy, found)
    for name in (found["graph"]["file"], found["graph"]["fused_file"]):
        model = load_graph(directory / name, precision)
        (copy / name).unlink()
        ir.save(model, copy / name)
        found["files"][name] = manifest.file_entry(copy / name)
    manifest.write(copy, found)
    return copy


def _exact(
    backbone: str | os.PathLike[str], reference: Callable[..., list[dict[Place, Float32]]], say: Say
) -> list[dict[Place, Float32]] | None:
    """The reference in float64; None where that does not fit into memory."""
    body = Backbone.load(backbone, any_family=True)
    if sum(p.numel() for p in body.model.parameters()) * 8 > free_memory() * 0.9:
        return None
    say("over by little: running the reference in float64, to tell whose rounding it is")
    return reference(body, double=True)


def _bundle(
    graph: Path,
    precision: Precision,
    sizes: tuple[int, int],
    turns: Sequence[Sequence[_Call]],
    layers: Sequence[int],
    run_by: str,
    say: Say,
) -> tuple[list[dict[Place, Float32]], list[dict[Place, Float32]]]:
    """Logits and states of the graph as it is, and every place of the same graph with more outputs, which ONNX Runtime may
    compute in another way.

    Raises:
        ExportError: ONNX Runtime cannot run it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        widened = precision.name == "bf16" and run_by == "cpu"
        folder = Path(scratch) if widened else graph.parent

        def load() -> ir.Model:
            return _load(graph, precision, Path(scratch)) if run_by == "cpu" else ir.load(graph)

        try:
            say("running the bundle")
            got = list(_run(GraphRun(load(), folder, sizes, device=run_by), turns, layers))
            say("running the bundle once more, looking inside")
            model = load()
            places = _places(model.graph, layers)
            inside = GraphRun(model, folder, sizes, watched_values(places), device=run_by)
            return got, list(_run(inside, turns, layers, places))
        except (ExportError, OSError):
            raise
        except Exception as error:  # whatever ONNX Runtime says of a damaged graph
            raise ExportError(f"{graph}: cannot be run ({first_line(error)})") from error


def _run(
    run: GraphRun,
    turns: Sequence[Sequence[_Call]],
    layers: Sequence[int],
    places: Mapping[Place, Any] | None = None,
) -> Iterator[dict[Place, Float32]]:
    """The same calls in the graph, cut into chunks."""
    for turn in turns:
        run.end_turn()
        for call in turn:
            values = run.feed(call.ids, call.cuts, write=call.write, spans=call.spans)
            found = read_places(places or {}, values)
            state = run.memory
            for at, i in enumerate(layers):
                found[Place(i, STATE)] = state[:, at].copy()
            yield found


def _load(graph: Path, precision: Precision, scratch: Path) -> ir.Model:
    """The graph as it is compared: without the roundings that the reference does not have."""
    model = load_graph(graph, precision, scratch)
    if precision.kv == "int8":
        with_float_cache(model.graph)
    return model


def _places(graph: ir.Graph, layers: Sequence[int]) -> dict[Place, Any]:
    try:
        found = find_attentions(graph, kv_layers(graph))
    except ExportError:  # a decoder that the user brought
        found = find_grafted(graph, layers)
    return find_places(graph, found)


# ---------------------------------------------------------------------- how far apart


def _limits(precision: Precision, run_by: str) -> tuple[float, float]:
    """The tolerances of logits and of states."""
    kind = precision.arithmetic
    return _BY_CUDA[kind] if run_by == "cuda" else (TOLERANCES[kind], STATE_TOLERANCES[kind])


def _judge(
    want: Sequence[Mapping[Place, Float32]],
    got: Sequence[Mapping[Place, Float32]],
    precision: Precision,
    run_by: str,
) -> tuple[Apart, Apart]:
    """Logits and states of all calls."""
    found = Differences()
    for expected, values in zip(want, got, strict=True):
        found.add({p: v for p, v in expected.items() if p.what in (LOGITS, STATE)}, values)
    limits = _limits(precision, run_by)
    states = [_apart(d, limits[1], 1.0) for place, d in found.places.items() if place.what == STATE]
    return _apart(found.places[_LOGITS], limits[0], LARGE), _worst(states)


def _apart(found: Difference, tolerance: float, unit: float) -> Apart:
    return Apart(found.max, found.mean, tolerance * max(1.0, found.size / unit))


def _worst(found: Sequence[Apart]) -> Apart:
    """The one that is the furthest over its tolerance, or the closest to it, with the mean of all."""
    worst = max(found, key=lambda apart: apart.max / (apart.tolerance or 1.0))
    return replace(worst, mean=sum(apart.mean for apart in found) / len(found))


def _layers(differences: Differences) -> Iterator[Layer]:
    def at(i: int, what: str) -> Apart | None:
        found = differences.places.get(Place(i, what))
        return Apart(found.max, found.mean) if found else None

    for i in sorted({place.layer for place in differences.places if place.layer is not None}):
        yield Layer(i, at(i, ATTENTION_INPUT), at(i, ATTENTION_OUTPUT), at(i, STATE))


def _show(apart: Apart) -> str:
    return f"max {apart.max:.2g}, mean {apart.mean:.2g}, tolerance {apart.tolerance:.2g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
