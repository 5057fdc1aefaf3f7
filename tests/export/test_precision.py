"""Precisions: every one exports and runs, means what it says, and leaves the memory in float32."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from agreement import assert_close
from deltamem_export import bundle as bundling
from deltamem_export import manifest as manifests
from deltamem_export import streaming
from deltamem_export.adapter import Adapter
from deltamem_export.backbone import Backbone, read_config
from deltamem_export.builder import build
from deltamem_export.bundle import export_bundle
from deltamem_export.check import check
from deltamem_export.errors import ExportError
from deltamem_export.graft import graft
from deltamem_export.kv import sample_ids
from deltamem_export.precision import Precision
from deltamem_export.reference import attach
from deltamem_export.runner import GraphRun
from deltamem_export.sizes import estimate
from deltamem_export.weights import in_float32, stands_for, weights_of
from grafted import Grafted

IDS = np.random.default_rng(0).integers(3, 256, 96)
CUTS = (5, 6, 40)
FORMS = [
    Precision("fp32"),
    Precision("fp16"),
    Precision("bf16"),
    Precision("int8"),
    Precision("int8", 128, 1, symmetric=False),
    Precision("int4"),
    Precision("int4", 16, 1),
    Precision("int4", 128, 1),
    Precision("int4", 256, 4, symmetric=False),
    Precision("int4", 16, 1, symmetric=False),
    Precision("int4", 32, 1, algorithm="rtn"),
    Precision("int4", 16, 1, algorithm="k_quant"),
    Precision("int4", 32, 1, embeddings=True),
    Precision("int4", 16, 4, symmetric=False, embeddings=True),
    Precision("fp32", kv="int8"),
    Precision("int4", 32, 1, kv="int8"),
]
BLOCKS = [form for form in FORMS if form.quantised and form.kv == "float"]
named = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.setting)
in_blocks = pytest.mark.parametrize("form", BLOCKS, ids=lambda form: form.setting)


@pytest.fixture(scope="module")
def case(parity_data: Path) -> Path:
    return parity_data / "qwen3_tsw_qo"


@pytest.fixture(scope="module")
def bundle_of(case: Path, tmp_path_factory: pytest.TempPathFactory):
    """`bundle_of(form)`: exported, compared with transformers on the way, once a module."""
    made: dict[Precision, Path] = {}

    def bundle(form: Precision) -> Path:
        if form not in made:
            out = tmp_path_factory.mktemp("precision") / "bundle"
            made[form] = export_bundle(case / "backbone", case / "adapter", out, form, say=lambda _: None)
        return made[form]

    return bundle


@named
def test_every_precision_exports_runs_and_keeps_its_memory_in_float32(bundle_of, form: Precision) -> None:
    bundle = bundle_of(form)
    manifest = manifests.read(bundle)
    assert manifest["precision"] == form.name
    assert manifest["check"]["max_abs_diff"] <= (0.02 if form.name == "fp16" else 1e-5)
    graph = ir.load(bundle / "model.onnx").graph
    own = [
        node for node in graph if str(node.name).startswith("/deltamem/layers.") and node.op_type == "LinearAttention"
    ]
    assert len(own) == 3
    weights = [v for name, v in graph.initializers.items() if name.startswith("deltamem.layers.")]
    assert len(weights) >= 3 * 2
    assert {v.const_value.dtype for v in weights} == {ir.DataType.FLOAT}
    states = [v for v in (*graph.inputs, *graph.outputs) if "memory" in v.name]
    assert [v.dtype for v in states] == [ir.DataType.FLOAT] * 2
    kv = manifest["graph"]["kv_dtype"]
    assert kv == ("int8" if form.kv == "int8" else {"fp16": "float16", "bf16": "bfloat16"}.get(form.name, "float32"))
    if form.name == "bf16":
        with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
            Grafted(bundle)
        return
    grafted = Grafted(bundle)
    for part in np.split(IDS, CUTS):
        assert np.isfinite(grafted.feed(part)).all()
    assert grafted.memory.dtype == np.float32
    assert np.abs(grafted.memory).max() > 0.01


@pytest.mark.parametrize(
    "form",
    [form for form in FORMS if form.accuracy_level == 1 or form.name in ("fp32", "bf16")],
    ids=lambda form: form.setting,
)
def test_a_bundle_is_the_reference_on_the_weights_that_its_blocks_stand_for(
    case: Path, bundle_of, form: Precision, tmp_path: Path
) -> None:
    """Exact but for the rounding of float32, or of the KV cache where that is in 8 bits."""
    backbone = Backbone.load(case / "backbone")
    built = build(backbone, tmp_path / "built", dataclasses.replace(form, kv="float"))
    backbone.to_float32()
    with weights_of(built, backbone.model, form), torch.inference_mode():
        reference = attach(backbone.model, Adapter.load(case / "adapter"))
        want = backbone.model(torch.from_numpy(IDS[None]), use_cache=False).logits[0].numpy()
        assert reference.state is not None
        states = reference.state.numpy()
    path = bundle_of(form) / "model.onnx"
    if form.name == "bf16":
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(path.with_name(name), tmp_path / name)
        path = in_float32(tmp_path / "model.onnx")
    run = GraphRun(ir.load(path), path.parent, (2, 16))
    logits = run.feed(IDS, CUTS)["logits"]
    loose = form.kv == "int8"
    assert_close("logits", logits, want, 0.5 if loose else 1e-4)
    assert_close("states", run.memory[0], states.reshape(run.memory[0].shape), 0.05 if loose else 1e-5)
    if loose:
        assert np.abs(logits - want).max() > 1e-3


@pytest.mark.parametrize("form", [f for f in FORMS if f.name != "bf16" and f.kv == "float"], ids=lambda f: f.setting)
def test_a_memory_that_corrects_nothing_leaves_the_decoder_as_it_was(
    case: Path, form: Precision, tmp_path: Path
) -> None:
    """The graft against its own ungrafted graph, whatever that graph's accuracy is. In fp16 the CPU rounds only at some
    nodes, and an addition of zeros moves these."""
    backbone = Backbone.load(case / "backbone")
    adapter = Adapter.load(case / "adapter")
    silent = {
        i: {name: t * 0 if name.startswith("delta_") else t for name, t in tensors.items()}
        for i, tensors in adapter.layers.items()
    }
    built = build(backbone, tmp_path, form)
    graft(built, tmp_path / "grafted.onnx", dataclasses.replace(adapter, layers=silent), range(3), 16)
    plain, grafted = (GraphRun(ir.load(path), tmp_path, (2, 16)) for path in (built, tmp_path / "grafted.onnx"))
    tolerance = 5e-3 if form.name == "fp16" else 1e-6
    assert_close("logits", grafted.feed(IDS, CUTS)["logits"], plain.feed(IDS, CUTS)["logits"], tolerance)
    assert np.abs(grafted.memory).max() > 0.01


def test_fingerprints_differ_between_settings(bundle_of) -> None:
    prints = {manifests.read(bundle_of(form))["fingerprint"] for form in FORMS}
    assert len(prints) == len({form.setting for form in FORMS}) == len(FORMS)
    # What earlier bundles were made with keeps its name, or their memories would be refused.
    assert [Precision(name).setting for name in ("fp32", "fp16", "int4")] == ["fp32", "fp16", "int4/32/4"]


@in_blocks
def test_slabs_make_the_bytes_that_the_builder_makes(
    case: Path, form: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone.load(case / "backbone")
    monkeypatch.setattr(streaming, "SLAB_BYTES", 5000)
    slabs = ir.load(build(backbone, tmp_path / "slabs", form))

    def whole(made, _model, target: Path, _say) -> None:
        made.save_model(str(target.parent))

    monkeypatch.setattr("deltamem_export.builder.save_streaming", whole)
    theirs = {str(node.name): node for node in ir.load(build(backbone, tmp_path / "whole", form)).graph}
    compared = 0
    for node in slabs.graph:
        other = theirs.pop(str(node.name))
        assert (node.op_type, len(node.inputs)) == (other.op_type, len(other.inputs))
        for mine, found in zip(node.inputs, other.inputs, strict=True):
            if mine is not None and mine.const_value is not None:
                assert mine.const_value.tobytes() == found.const_value.tobytes(), f"{node.name}: {mine.name}"
                assert mine.const_value.dtype == found.const_value.dtype
                compared += 1
    assert not theirs
    assert compared > 40


def test_blocks_of_another_weight_are_found(case: Path, tmp_path: Path) -> None:
    """The comparison takes what blocks stand for, so that must be the weight: here two layers' blocks change places."""
    backbone = Backbone.load(case / "backbone")
    form = Precision("int4")
    built = build(backbone, tmp_path, form)
    model = ir.load(built)
    first, second = (
        next(n for n in model.graph if n.name == f"/model/layers.{i}/mlp/up_proj/MatMul_Q4") for i in (0, 1)
    )
    for at in (1, 2):
        mine, other = first.inputs[at], second.inputs[at]
        first.replace_input_with(at, other)
        second.replace_input_with(at, mine)
    ir.save(model, built)
    with pytest.raises(ExportError, match=r"layers\.0/mlp/up_proj.*not of this weight"):
        check(backbone, built, form)


def test_a_quantised_weight_tells_whose_it_is(case: Path, tmp_path: Path) -> None:
    built = build(Backbone.load(case / "backbone"), tmp_path, Precision("int4", embeddings=True))
    found = {node: source for node, source, _ in stands_for(built)}
    attention = "model.layers.2.self_attn"
    assert found["/model/layers.2/attn/qkv_proj/MatMul_Q4"] == (
        f'[["{attention}.q_proj.weight", 0, 64], ["{attention}.k_proj.weight", 0, 32], ["{attention}.v_proj.weight", 0, 32]]'
    )
    assert found["/model/embed_tokens/Gather_Q4"] == '[["model.embed_tokens.weight", 0, 256]]'
    assert None not in found.values()


# ---------------------------------------------------------------------- the KV cache in 8 bits


@pytest.mark.parametrize("name", ["fp32", "fp16", "int4"])
def test_an_int8_kv_cache_does_not_depend_on_the_split(bundle_of, name: str) -> None:
    """But for a number between two steps of 8 bits that goes the other way for a millionth of difference."""
    form = Precision(name, accuracy_level=1, kv="int8")
    grafted, plain = Grafted(bundle_of(form)), Grafted(bundle_of(dataclasses.replace(form, kv="float")))
    once, states = grafted.feed(IDS), grafted.memory
    assert grafted.past["past_key_values.0.key"].dtype == np.int8
    grafted.reset()
    split = np.concatenate([grafted.feed(part) for part in np.split(IDS, CUTS)])
    assert_close("logits", split, once, 2e-2 if name == "fp16" else 2e-3)
    assert_close("states", grafted.memory, states, 1e-3)
    off = np.abs(once - plain.feed(IDS))
    assert 1e-3 < off.max() < 0.5
    assert off.mean() < 0.05


def test_calibration_reads_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[unk]": 0, "the": 1, "train": 2, "water": 3}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert set(sample_ids(tmp_path / "tokenizer.json", 64)) == {0, 1, 2, 3}
    assert len(set(sample_ids(None, 64))) > 40


# ---------------------------------------------------------------------- sizes, and what is refused


def test_the_graphs_of_a_bundle_share_one_file_of_weights(bundle_of) -> None:
    bundle = bundle_of(Precision("int4"))
    sizes = {}
    for name in ("model.onnx", "model.measured.onnx"):
        tensors = [v.const_value for v in ir.load(bundle / name).graph.initializers.values()]
        outside = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
        assert {t.location for t in outside} == {"model.onnx.data"}
        sizes[name] = sum(t.length for t in outside)
    assert len(set(sizes.values())) == 1
    whole = (bundle / "model.onnx.data").stat().st_size
    # Nothing lies in the file twice, and nothing that no graph reads, but for what makes weights begin at pages.
    assert sizes["model.onnx"] <= whole <= sizes["model.onnx"] * 1.03


@pytest.mark.parametrize("form", [f for f in FORMS if f.kv == "float"], ids=lambda f: f.setting)
def test_the_disk_that_an_export_needs_is_known_from_the_headers(case: Path, bundle_of, form: Precision) -> None:
    config = read_config(case / "backbone")
    needs = estimate(case / "backbone", config, form, check=False)
    adapter = 3 * 4 * (8 * 64 * 4 + 64 * 8 * 2 + 8)  # float32: networks and corrections of three layers
    found = (bundle_of(form) / "model.onnx.data").stat().st_size - adapter
    assert found * 0.95 <= needs.disk - (64 << 20) <= found * 1.25


def test_an_export_that_will_not_fit_is_refused_before_any_work(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object, **_more: object) -> None:
        raise AssertionError("the backbone was read")

    monkeypatch.setattr(bundling.Backbone, "load", never)
    args = (case / "backbone", case / "adapter", tmp_path / "b", "int4")
    with monkeypatch.context() as patch:
        patch.setattr(bundling, "free_memory", lambda: 100 << 20)
        with pytest.raises(ExportError, match=r"needs about 1\.\d GiB of memory.*0\.1 and .* GiB are free"):
            export_bundle(*args, say=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: _Disk(1 << 20))
        with pytest.raises(ExportError, match=r"GiB of disk.*0\.0 GiB are free.*Make room"):
            export_bundle(*args, say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass
class _Disk:
    free: int


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fp8"}, "precision is 'fp8', expected fp32"),
        ({"name": "int4", "block_size": 48}, "block size is 48, expected 16, 32, 64, 128 or 256"),
        ({"name": "int4", "accuracy_level": 5}, "accuracy level is 5"),
        ({"name": "int4", "algorithm": "gptq"}, "algorithm is 'gptq'"),
        ({"name": "fp16", "symmetric": False}, "fp16 has no blocks"),
        ({"name": "int8", "embeddings": True}, "only int4"),
        ({"name": "fp32", "kv": "int4"}, "the KV cache is 'int4'"),
        ({"name": "bf16", "kv": "int8"}, "calibrated on the CPU"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Precision(**settings)


def test_an_odd_number_of_blocks_with_zero_points_is_refused_where_the_quantiser_fails(
    case: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"1 blocks.*even number only; choose another block size"):
        build(Backbone.load(case / "backbone"), tmp_path, Precision("int4", 64, algorithm="k_quant"))
