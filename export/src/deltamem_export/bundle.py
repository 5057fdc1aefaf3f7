"""From a backbone and an adapter to a bundle on disk, whole or not at all: everything is made in a hidden
directory beside the target, synced, and renamed. It conducts; how each part is made is in the module of that
part. docs/bundle.md describes the result.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from deltamem_export import manifest
from deltamem_export.adapter import Adapter
from deltamem_export.backbone import Backbone, digest_tensors, read_config
from deltamem_export.builder import build
from deltamem_export.calibration import Stream, learn
from deltamem_export.check import Check, choose_method, free_memory
from deltamem_export.check import check as check_graph
from deltamem_export.errors import ExportError, first_line
from deltamem_export.external import link, share_weights
from deltamem_export.fused import further_graphs, own_files
from deltamem_export.graft import graft
from deltamem_export.inventory import check_island
from deltamem_export.kv import quantise_kv, sample_ids
from deltamem_export.mapping import GraphMapping, bring
from deltamem_export.plain import spell_out
from deltamem_export.precision import Precision
from deltamem_export.sizes import Needs, estimate, refuse_too_large
from deltamem_export.structure import FindAttentions, find_attentions
from deltamem_export.text import Text, copy_text, text_digest

Say = Callable[[str], None]
# Writes further files into the bundle's directory before it is sealed, and returns their names.
ExtraFiles = Callable[[Path], list[str]]


def export_bundle(
    backbone: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Adapter,
    out: str | os.PathLike[str],
    precision: Precision | str | Sequence[Precision | str] = "fp32",
    *,
    name: str | None = None,
    force: bool = False,
    check: bool | str = True,
    onnx: str | os.PathLike[str] | None = None,
    mapping: GraphMapping | None = None,
    extra_files: ExtraFiles | None = None,
    calibration: Stream | None = None,
    say: Say | None = None,
) -> Path:
    """Exports a bundle and returns its path.

    Args:
        backbone: a Hugging Face model folder.
        adapter: an adapter's folder, or one in memory.
        out: the bundle's directory; its parent must exist.
        precision: of the backbone, and what device the graph is for; the memory is float32 always. Several: a graph for each, on
            different devices. The one for the CPU is the bundle's first, and the fingerprint is taken at the first one's setting.
        name: for people; the directory's name if not given.
        force: replace what is at `out`.
        check: how the built graph is compared with transformers first: "whole" or "layers"; True: `whole` if both models
            fit into memory, else `layers`; False: not at all, which the manifest says.
        onnx: a decoder ONNX of this backbone to graft onto, in place of one that the builder writes; `precision` says what
            it is in (fp32 or fp16).
        mapping: what to know of that graph's names; what it does not say is found by the weights.
        extra_files: called with the bundle's directory before it is sealed.
        calibration: conversations to learn from what healthy memories look like; without them the bundle gives no verdict.
        say: gets a line before each long step; on stderr, with the time, if not given.

    Raises:
        FileNotFoundError: a folder or file that must be there is not.
        ExportError, AdapterError: the inputs do not make a bundle; nothing is left behind.
    """
    target = Path(os.path.abspath(out))
    first, *further = in_order(precision)
    if further and onnx is not None:
        raise ExportError("a decoder ONNX of your own makes one graph; give one precision")
    say = say or say_on_stderr()
    _refuse_existing(target, force)

    folder = Path(backbone)
    _refuse_too_large(folder, [first, *further], target, onnx is not None, bool(check), say)
    say(f"reading {backbone}")
    body = Backbone.load(backbone, any_family=onnx is not None)
    memory = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    layers = memory.check_backbone(body.shapes)

    with workshop(target) as (work, bundle):
        text = copy_text(body.directory, bundle, body.geometry.vocab_size, body.tokens.bos, body.tokens.eos)
        made = make_graph(body, memory, layers, first, work, bundle, "model", check, text, onnx, mapping, say)
        extra = extra_files(bundle) if extra_files is not None else []

        memory_section = manifest.memory_section(memory.config, layers)
        backbone_section = manifest.backbone_section(body.geometry)
        say("hashing the weights")
        parts = {
            "backbone": body.digest(made.setting),
            "adapter": adapter_digest(memory),
            "config": manifest.config_digest(memory_section, backbone_section),
            "tokenizer": text_digest(bundle, text),
        }
        graph = made.section
        known = {"memory": memory_section, "graph": graph, "precision": first.name}
        graph |= further_graphs(bundle, known, "model")
        if graph["not_fused"]:
            say(f"no fused graph: {graph['not_fused']}")
        graph["files"] = sorted([*graph["files"], *own_files(graph)])
        files = [*graph["files"], *extra]
        if text is not None:
            files += [name for name in (text.tokenizer, text.chat_template) if name]
        say("sealing the bundle")
        sealed: dict[str, Any] = {
            "name": name or target.name,
            "fingerprint": manifest.fingerprint(parts),
            "fingerprint_parts": parts,
            "fingerprint_setting": made.setting,
            "backbone": backbone_section,
            "memory": memory_section,
            "graph": graph,
            "precision": first.name,
            "precision_setting": first.setting,
            "tokens": manifest.tokens_section(body.tokens),
            "text": asdict(text) if text is not None else None,
            "files": {file: manifest.file_entry(bundle / file) for file in sorted(set(files))},
            "check": asdict(made.check) if made.check is not None else None,
            "made_by": {
                package: version(package)
                for package in ("deltamem-export", "onnxruntime-genai", "onnxruntime", "torch", "transformers")
            },
        }
        for number, other in enumerate(further):
            del body  # what a comparison has widened
            body = Backbone.load(backbone)
            add_to(sealed, bundle, body, memory, layers, other, work / str(number), check, text, say)
        manifest.write(bundle, sealed)
        if calibration is not None:
            say(f"calibrating on {calibration.description}")
            manifest.write(bundle, {**sealed, "health": learn(bundle, calibration)})
        _refuse_strangers(bundle, {*sealed["files"], manifest.MANIFEST_FILE})
        publish(bundle, target, work, force)
    say(f"wrote {target}")
    return target


def in_order(precision: Precision | str | Sequence[Precision | str]) -> list[Precision]:
    """The graphs to be made, the CPU's first.

    Raises:
        ExportError: two for one device, or none.
    """
    given = [precision] if isinstance(precision, Precision | str) else list(precision)
    wanted = [Precision(p) if isinstance(p, str) else p for p in given]
    devices = [p.device for p in wanted]
    if not wanted or len(set(devices)) != len(devices):
        raise ExportError(f"graphs for {', '.join(devices) or 'no device'}: a bundle has one for each device")
    return sorted(wanted, key=lambda p: p.device != "cpu")


@dataclass(frozen=True)
class Made:
    """One graph in a bundle's directory.

    Attributes:
        section: what the manifest says of it, but for the fused graph.
        setting: what the backbone's digest is taken with: the precision's setting, and the scales of a cache in 8 bits.
        check: None where it was not compared.
    """

    section: dict[str, Any]
    setting: str
    check: Check | None


def make_graph(
    body: Backbone,
    memory: Adapter,
    layers: Sequence[int],
    precision: Precision,
    work: Path,
    bundle: Path,
    stem: str,
    check: bool | str,
    text: Text | None,
    onnx: str | os.PathLike[str] | None,
    mapping: GraphMapping | None,
    say: Say,
) -> Made:
    """Builds, compares and grafts one graph: `<stem>.onnx`, its weights and `<stem>.measured.onnx` in the bundle's directory.

    Raises:
        ExportError: it cannot be built, is not what transformers computes, or cannot be grafted.
    """
    if onnx is None:
        say(f"building the decoder ({precision.setting} for {precision.device})")
        find: FindAttentions = find_attentions
        built = build(body, work, precision, say)
    else:
        say(f"taking in {onnx}")
        built, find = bring(Path(onnx), work, body.model, mapping or GraphMapping())
    # CUDA's GroupQueryAttention takes 16 bits alone.
    plain = precision.device == "cuda" and precision.arithmetic == "fp32"
    checked, unable = None, None
    if check:
        method, why = choose_method(body, built, precision) if check is True else (str(check), "as asked for")
        say(f"comparing the built graph with transformers ({method}: {why})")
        compared = built.with_name("plain.onnx") if plain else built
        if plain:
            spell_out(built, compared)
        try:
            checked = check_graph(body, compared, precision, method, find)
            say(f"they differ by {checked.max_abs_diff:.2g} at most (tolerance {checked.tolerance:.2g})")
        except NoKernel as error:
            if precision.device == "cpu":
                raise ExportError(
                    f"{body.directory}: the CPU cannot run the built graph ({first_line(error)})"
                ) from error
            unable = first_line(error)
    say(f"grafting the memory onto {len(layers)} layers")
    graph, measured = bundle / f"{stem}.onnx", bundle / f"{stem}.measured.onnx"
    facts = graft(built, graph, memory, layers, body.geometry.head_dim, measured, find)
    if plain:
        for path in (graph, measured):
            spell_out(path, path)
        facts = replace(facts, shared_kv=False)
    not_checked = None
    if precision.device == "cuda":
        check_island(graph)
        check_island(measured)
        not_checked = _not_checked(precision, checked is not None, unable)
        say(not_checked)
    setting = precision.setting
    if precision.kv == "int8":
        say("calibrating the KV cache in 8 bits")
        ids = sample_ids(bundle / text.tokenizer if text is not None else None, body.geometry.vocab_size)
        ids = ids[: body.geometry.context_length]
        scales, moved = quantise_kv([graph, measured], ids, (body.geometry.num_kv_heads, body.geometry.head_dim))
        facts = replace(facts, kv_dtype="int8")
        setting = f"{setting}/{scales.digest}"
        say(f"it moves the logits by {moved:.2g} at most over {len(ids)} tokens")
    section = {
        "device": precision.device,
        **manifest.graph_section(facts, graph.name, measured.name),
        "logits_dtype": "float32",
        "files": sorted([graph.name, f"{graph.name}.data", measured.name]),
        "not_checked": not_checked,
    }
    return Made(section, setting, checked)


def add_to(
    found: dict[str, Any],
    bundle: Path,
    body: Backbone,
    memory: Adapter,
    layers: Sequence[int],
    precision: Precision,
    work: Path,
    check: bool | str,
    text: Text | None,
    say: Say,
) -> None:
    """Makes a further graph in a bundle's directory and enters it into its manifest `found`, which keeps its fingerprint. A
    graph for the CPU becomes the first. Weights that another graph has, bit for bit, are on disk once.

    Raises:
        ExportError: as `make_graph`.
    """
    graphs = manifest.graphs(found)
    stem = f"model.{precision.device}"
    twin = found["graph"] if precision.name == "fp16" and found["precision"] == "fp16" else None
    if twin is not None:
        say(f"the graph in fp16 is the one for {twin.get('device', 'cpu')}, which has operators for both")
        entry, checked = {**twin, "device": precision.device}, found["check"]
        entry["files"] = sorted({twin["file"], f"{twin['file']}.data", twin["measured_file"]})
        entry["not_checked"] = _not_checked(precision, checked is not None) if precision.device == "cuda" else None
    else:
        made = make_graph(body, memory, layers, precision, work, bundle, stem, check, text, None, None, say)
        entry, checked = made.section, asdict(made.check) if made.check is not None else None
        names = [bundle / str(entry[name]) for name in ("file", "measured_file")]
        shared = share_weights(names, bundle / f"{stem}.onnx.data", [bundle / graph["file"] for graph in graphs])
        entry["files"] = sorted(
            {*entry["files"], *shared.files}
            - (set() if (bundle / f"{stem}.onnx.data").exists() else {f"{stem}.onnx.data"})
        )
        say(f"{shared.bytes} bytes of its weights are those of another graph, {shared.own} are its own")
    known = {"memory": found["memory"], "graph": entry, "precision": precision.name}
    entry |= further_graphs(bundle, known, stem)
    if entry["not_fused"]:
        say(f"no fused graph for {precision.device}: {entry['not_fused']}")
    entry["files"] = sorted([*entry["files"], *own_files(entry)])
    own = {"precision": precision.name, "precision_setting": precision.setting, "check": checked}
    if precision.device == "cpu":
        found |= {"graphs": manifest.graphs(found), "graph": entry} | own
    else:
        found["graphs"] = [*found.get("graphs", []), {**entry, **own}]
    found["files"] = dict(
        sorted({**found["files"], **{name: manifest.file_entry(bundle / name) for name in entry["files"]}}.items())
    )


def add_graph(
    bundle: str | os.PathLike[str],
    backbone: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Adapter,
    precision: Precision | str | Sequence[Precision | str],
    *,
    check: bool | str = True,
    say: Say | None = None,
) -> Path:
    """Adds graphs for further devices to an exported bundle, which is replaced whole or not at all. Its fingerprint and its memories stay.

    Args:
        bundle: the bundle's directory.
        backbone, adapter: what it was made from.
        precision: as for `export_bundle`.
        check: as for `export_bundle`.
        say: as for `export_bundle`.

    Raises:
        FileNotFoundError: there is no bundle, or a folder that must be there is not.
        ExportError, AdapterError: the bundle has a graph for that device, or was made from something else.
    """
    from deltamem_export.verify import strangers

    say = say or say_on_stderr()
    target = Path(os.path.abspath(bundle))
    wanted = in_order(precision)
    _refuse_devices(target, manifest.read(target), wanted)
    _refuse_too_large(Path(backbone), wanted, target, False, bool(check), say)
    with remade(target) as (new, found):
        with tempfile.TemporaryDirectory(dir=new.parent) as scratch:
            for number, one in enumerate(wanted):
                say(f"reading {backbone}")
                body = Backbone.load(backbone)
                memory = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
                layers = memory.check_backbone(body.shapes)
                others = strangers(target, found, body, memory, layers)
                if others:
                    raise ExportError(
                        f"{target}: was made from something else, so its memories would not fit: {'; '.join(others)}"
                    )
                text = manifest.text_of(found)
                add_to(found, new, body, memory, layers, one, Path(scratch) / str(number), check, text, say)
        _refuse_strangers(new, set(found["files"]))
    say(f"wrote {target}")
    return target


def _refuse_too_large(
    folder: Path, precisions: Sequence[Precision], target: Path, any_family: bool, check: bool, say: Say
) -> None:
    """Says what the graphs take, which are made one after another, before any work is done."""
    if not (folder / "config.json").is_file():
        return  # reading the backbone says it better
    config = read_config(folder, any_family=any_family)
    each = [estimate(folder, config, precision, check) for precision in precisions]
    needs = Needs(max(n.memory for n in each), sum(n.disk for n in each))
    settings = " and ".join(precision.setting for precision in precisions)
    say(refuse_too_large(needs, free_memory(), target, f"{folder} at {settings}"))


def _refuse_devices(target: Path, found: Mapping[str, Any], wanted: Sequence[Precision]) -> None:
    there = manifest.graphs(found)
    for precision in wanted:
        old = next((graph for graph in there if graph["device"] == precision.device), None)
        if old is not None:
            raise ExportError(
                f"{target}: has a graph for {precision.device} ({old['precision_setting']}); choose another --device, or export a bundle "
                "of its own with --out"
            )


def _not_checked(precision: Precision, checked: bool, unable: str | None = None) -> str:
    """What of a graph for CUDA was not compared, in words. unable: what ONNX Runtime said where the CPU cannot run it."""
    if unable is not None:
        return f"the CPU cannot run it ({unable}), so its structure alone was checked; `deltamem-export verify` on a GPU compares it"
    if not checked:
        return "exported with --no-check"
    if precision.name == "bf16":
        return "compared on the CPU, widened to float32: neither 16-bit arithmetic nor CUDA's operators were run"
    return "compared on the CPU: CUDA's operators were not run"


def adapter_digest(adapter: Adapter) -> str:
    """BLAKE3 over the tensors that change results, 64 hex digits: an unused correction is no part of what a
    memory means."""
    used = {f"delta_{p}_proj" for p in adapter.config.delta_heads}
    return digest_tensors(
        {
            key: tensor
            for key, tensor in adapter.tensors()
            if not key.rsplit(".", 1)[1].startswith("delta_")
            or key.rsplit(".", 1)[1] in used
            or key.endswith(("delta_scale_raw", "delta_o_rmsnorm_weight"))
        }
    )


# ---------------------------------------------------------------------- whole or not at all


def _refuse_existing(target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such directory; the bundle is made beside its final place")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target}: is not a directory; choose another --out")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise ExportError(f"{target}: exists and is not empty; choose another --out, or replace it with --force")
        if not (target / manifest.MANIFEST_FILE).is_file():
            raise ExportError(
                f"{target}: is not a bundle ({manifest.MANIFEST_FILE} is missing), so --force does not replace it"
            )


@contextlib.contextmanager
def workshop(target: Path) -> Iterator[tuple[Path, Path]]:
    """A hidden directory beside the target, with room for work and for the bundle; gone at the end, however
    it ends."""
    root = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        work, bundle = root / "work", root / "bundle"
        work.mkdir()
        bundle.mkdir()
        yield work, bundle
    finally:
        shutil.rmtree(root, ignore_errors=True)


def share_files(source: Path, target: Path, found: Mapping[str, Any]) -> None:
    """Gives the files that a bundle's manifest names a second name in another directory. Who changes one unlinks it there first."""
    for name in found["files"]:
        link(source / name, target / name)


@contextlib.contextmanager
def remade(bundle: str | os.PathLike[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """An exported bundle to be changed: a directory that shares its files, and its manifest. At the end the manifest is written and the
    directory takes the bundle's place, whole or not at all.

    Raises:
        FileNotFoundError: there is no bundle.
        ExportError: its manifest is damaged.
    """
    target = Path(os.path.abspath(bundle))
    found = manifest.read(target)
    with workshop(target) as (work, new):
        share_files(target, new, found)
        yield new, found
        manifest.write(new, found)
        publish(new, target, work, force=True)


def publish(bundle: Path, target: Path, work: Path, force: bool) -> None:
    """Syncs every file and directory, then renames. What was at the target is moved away first and put back
    if that fails."""
    for path in (*bundle.rglob("*"), bundle):
        _sync(path)
    _refuse_existing(target, force)
    old = work / "replaced"
    replaces = target.exists()
    if replaces:
        os.rename(target, old)
    try:
        os.rename(bundle, target)
    except BaseException:
        if replaces:
            os.rename(old, target)
        raise
    _sync(target.parent)


def _refuse_strangers(bundle: Path, named: set[str]) -> None:
    found = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    if found != named:
        raise ExportError(
            f"extra files: found {sorted(found - named)}, missing {sorted(named - found)}; the hook must name what it writes"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def say_on_stderr() -> Say:
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    return say


def set_threads(threads: int) -> None:
    """How many threads PyTorch and the comparison use."""
    torch.set_num_threads(threads)
