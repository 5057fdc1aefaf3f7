"""Bundles on disk: whole or not at all, digests that hold, precisions that run, text files that come along, inputs that are refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM

from agreement import assert_close
from deltamem_export import bundle as bundling
from deltamem_export import manifest as manifests
from deltamem_export.backbone import Backbone
from deltamem_export.builder import build
from deltamem_export.bundle import export_bundle
from deltamem_export.check import check
from deltamem_export.errors import AdapterError, ExportError
from deltamem_export.precision import Precision
from grafted import Grafted

QUIET = {"say": lambda _: None}


@pytest.fixture
def case(parity_data: Path) -> Path:
    return parity_data / "qwen3_tsw_qo"


def export(case: Path, out: Path, **more: object) -> Path:
    return export_bundle(case / "backbone", case / "adapter", out, **({"check": False} | QUIET | more))


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------------- the manifest


def test_a_bundle_is_what_its_manifest_says(parity_bundle) -> None:
    bundle = parity_bundle("qwen3_tsw_qo")
    found = manifests.read(bundle)
    assert leftovers(bundle) == sorted([*found["files"], "deltamem.json"])
    for name, entry in found["files"].items():
        data = (bundle / name).read_bytes()
        assert (len(data), blake3(data).hexdigest()) == (entry["bytes"], entry["blake3"])
    parts = [found["fingerprint_parts"][name] or "none" for name in ("backbone", "adapter", "config", "tokenizer")]
    assert found["fingerprint"] == blake3("\n".join(parts).encode()).hexdigest()
    assert found["memory"]["layers"] == [0, 1, 2]
    assert found["tokens"] == {"bos": 1, "eos": [2], "pad": 0}
    assert found["text"] is None
    assert found["check"]["max_abs_diff"] < 1e-5


def test_a_manifest_that_was_edited_is_refused(case: Path, tmp_path: Path) -> None:
    path = export(case, tmp_path / "b") / "deltamem.json"
    path.write_text(path.read_text().replace('"alpha": 16.0', '"alpha": 61.0'))
    with pytest.raises(ExportError, match="changed after the export"):
        manifests.read(tmp_path / "b")


def test_the_fingerprint_follows_what_changes_a_memorys_meaning(case: Path, tmp_path: Path) -> None:
    """Same inputs, same fingerprint; another precision, another adapter, another. A correction not in use is no part of it."""
    from dataclasses import replace

    from deltamem_export.adapter import Adapter

    adapter = Adapter.load(case / "adapter")
    other = {i: {n: t * 2 if n == "memory_q_proj" else t for n, t in ts.items()} for i, ts in adapter.layers.items()}
    unused = {i: {n: t + 1 if n == "delta_k_proj" else t for n, t in ts.items()} for i, ts in adapter.layers.items()}
    prints = [
        manifests.read(export_bundle(case / "backbone", a, tmp_path / str(n), p, check=False, **QUIET))["fingerprint"]
        for n, (a, p) in enumerate(
            [
                (adapter, "fp32"),
                (replace(adapter, layers=unused), "fp32"),
                (replace(adapter, layers=other), "fp32"),
                (adapter, "fp16"),
            ]
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints[1:])) == 3


def test_the_graph_has_the_inputs_and_outputs_of_the_contract(parity_bundle) -> None:
    bundle = parity_bundle("qwen3_tsw_qo")
    graph = ir.load(bundle / "model.onnx").graph
    shapes = {v.name: (v.dtype, [str(d) if not isinstance(d, int) else d for d in v.shape]) for v in graph.inputs}
    outputs = {v.name: (v.dtype, [str(d) if not isinstance(d, int) else d for d in v.shape]) for v in graph.outputs}
    f32, i32, i64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
    memory = ["batch_size", 3, 1, 8, 8]
    kv = {f"{i}.{part}" for i in range(3) for part in ("key", "value")}
    assert shapes.pop("input_ids") == (i32, ["batch_size", "sequence_length"])
    assert shapes.pop("attention_mask") == (i64, ["batch_size", "total_sequence_length"])
    assert shapes.pop("write_mask") == (f32, ["batch_size", "sequence_length"])
    assert shapes.pop("logits_rows") == (i64, ["rows"])
    assert shapes.pop("past_memory") == (f32, memory)
    assert shapes == {f"past_key_values.{n}": (f32, ["batch_size", 2, "past_sequence_length", 16]) for n in kv}
    assert outputs.pop("logits") == (f32, ["rows", 256])
    assert outputs.pop("present_memory") == (f32, memory)
    assert outputs == {f"present.{n}": (f32, ["batch_size", 2, "total_sequence_length", 16]) for n in kv}
    measured = ir.load(bundle / "model.measured.onnx").graph
    assert [v.name for v in measured.outputs[-3:]] == ["delta_energy", "queries", "gates"]
    assert measured.inputs[-1].name == "strength"
    weights = {v.const_value.location for v in measured.initializers.values() if hasattr(v.const_value, "location")}
    assert weights == {"model.onnx.data"}


# ---------------------------------------------------------------------- precisions


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("case_name", ["qwen3_tsw_qo", "smollm3_tsw_qo", "llama_tsw_qo"])
def test_other_precisions_export_and_run(parity_bundle, parity_data, case_name, precision) -> None:
    bundle = parity_bundle(case_name, precision)
    grafted = Grafted(bundle)
    with np.load(parity_data / case_name / "golden.npz") as golden:
        ids, want, states = golden["turn4_ids"], golden["turn0_logits"], golden["turn0_states"]
        first = grafted.feed(golden["turn0_ids"])
    assert first.dtype == grafted.memory.dtype == np.float32
    if precision == "fp16":
        assert_close("logits", first, want, 0.1)
        assert_close("states", grafted.memory[0], states, 0.01)
    for part in np.array_split(ids, 5):
        assert np.isfinite(grafted.feed(part)).all()
    assert np.isfinite(grafted.memory).all()
    measured = Grafted(bundle, measured=True)
    measured.feed(ids)
    assert np.isfinite(measured.energy).all()
    assert (measured.energy[..., 1] > 0).all()


def test_int4_with_float_activations_does_not_depend_on_the_split(case: Path, tmp_path: Path) -> None:
    grafted = Grafted(export(case, tmp_path / "b", precision=Precision("int4", accuracy_level=1)))
    ids = np.random.default_rng(0).integers(3, 256, 60)
    once = grafted.feed(ids)
    states = grafted.memory
    grafted.reset()
    split = np.concatenate([grafted.feed(part) for part in np.split(ids, [1, 2, 30])])
    assert_close("logits", split, once, 1e-4)
    assert_close("states", grafted.memory, states, 1e-5)


def test_an_unknown_precision_is_refused(case: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fp64"):
        export(case, tmp_path / "b", precision="fp64")
    assert leftovers(tmp_path) == []


def test_a_bfloat16_backbone_in_shards_exports_exactly(make_backbone, make_adapter, tmp_path: Path) -> None:
    source = make_backbone("llama")
    model = AutoModelForCausalLM.from_pretrained(source).bfloat16()
    model.save_pretrained(tmp_path / "bf16", max_shard_size="30KB")
    assert len(list((tmp_path / "bf16").glob("*.safetensors"))) > 1
    bundle = export_bundle(tmp_path / "bf16", make_adapter(source), tmp_path / "b", **QUIET)
    assert manifests.read(bundle)["check"]["max_abs_diff"] < 1e-5


def test_tied_embeddings_export_exactly(make_backbone, make_adapter, tmp_path: Path) -> None:
    source = make_backbone("llama", tie_word_embeddings=True)
    bundle = export_bundle(source, make_adapter(source), tmp_path / "b", **QUIET)
    assert manifests.read(bundle)["check"]["max_abs_diff"] < 1e-5


# ---------------------------------------------------------------------- the check


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_a_graph_that_differs_from_transformers_is_refused(case: Path, tmp_path: Path, precision: str) -> None:
    """As if the builder forgot a norm's epsilon, or one head's scale: here one layer's q norm is 1 % off."""
    backbone = Backbone.load(case / "backbone")
    path = build(backbone, tmp_path, Precision(precision))
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    value = model.graph.initializers["model.layers.1.attn.q_norm.layernorm.weight"]
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array * (1.01 if precision == "fp32" else 2)).astype(array.dtype), name=value.name)
    ir.save(model, path)
    with pytest.raises(ExportError) as error:
        check(backbone, path, Precision(precision))
    for word in ("Qwen3ForCausalLM", "tolerance", "on average", "position"):
        assert word in str(error.value)


def test_the_check_leaves_the_backbones_weights_alone(case: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(case / "backbone")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    for precision in (Precision("fp16"), Precision("int4")):
        check(backbone, build(backbone, tmp_path / precision.name, precision), precision)
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("where", ["build", "check_graph", "graft", "copy_text", "publish"])
def test_an_export_that_fails_anywhere_leaves_nothing(case: Path, tmp_path: Path, monkeypatch, where: str) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundling, where, fail)
    with pytest.raises(KeyboardInterrupt):
        export(case, tmp_path / "b", check=True)
    assert leftovers(tmp_path) == []


def test_a_failed_replacement_keeps_the_old_bundle(case: Path, tmp_path: Path, monkeypatch) -> None:
    before = manifests.read(export(case, tmp_path / "b", name="old"))
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "bundle":
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="disk gone"):
        export(case, tmp_path / "b", name="new", force=True)
    assert manifests.read(tmp_path / "b") == before
    assert leftovers(tmp_path) == ["b"]


def test_a_terminated_export_leaves_nothing(case: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time, deltamem_export.bundle as b\n"
        "def wait(*_): print('grafting', flush=True); time.sleep(60)\n"
        "b.graft = wait\n"
        "from deltamem_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["bundle", "--backbone", case / "backbone", "--adapter", case / "adapter", "--out", tmp_path / "b"]
    command = [sys.executable, "-c", program, *map(str, arguments), "--no-check"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "grafting\n"
        assert leftovers(tmp_path) != []
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was written" in said
    assert leftovers(tmp_path) == []


def test_a_bundle_is_replaced_only_when_asked_to(case: Path, tmp_path: Path) -> None:
    export(case, tmp_path / "b", name="old")
    with pytest.raises(ExportError, match="--force"):
        export(case, tmp_path / "b")
    export(case, tmp_path / "b", name="new", force=True)
    assert manifests.read(tmp_path / "b")["name"] == "new"
    assert leftovers(tmp_path) == ["b"]


def test_force_replaces_no_directory_that_is_not_a_bundle(case: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ExportError, match="is not a bundle"):
        export(case, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_missing_parent_and_a_file_in_the_way_are_refused(case: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        export(case, tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="not a directory"):
        export(case, tmp_path / "file", force=True)


def test_extra_files_are_sealed_with_the_rest(case: Path, tmp_path: Path) -> None:
    def add(directory: Path) -> list[str]:
        (directory / "demo.json").write_text("{}")
        return ["demo.json"]

    assert manifests.read(export(case, tmp_path / "b", extra_files=add))["files"]["demo.json"]["bytes"] == 2
    with pytest.raises(ExportError, match=r"demo.json"):
        export(case, tmp_path / "c", extra_files=lambda d: add(d)[:0])


# ---------------------------------------------------------------------- text


def test_a_tokenizer_comes_along_with_its_template_and_strings(parity_bundle, parity_data: Path) -> None:
    bundle = parity_bundle("llama_tsw_qo")
    found = manifests.read(bundle)
    source = parity_data / "llama_tsw_qo" / "backbone"
    assert (bundle / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    template = json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    assert (bundle / "chat_template.jinja").read_text() == template
    assert found["text"] == {
        "tokenizer": "tokenizer.json",
        "chat_template": "chat_template.jinja",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    assert found["fingerprint_parts"]["tokenizer"] is not None


@pytest.fixture
def with_text(parity_data: Path, tmp_path: Path) -> Path:
    """A copy of a backbone with a tokenizer, for spoiling."""
    import shutil

    return Path(shutil.copytree(parity_data / "llama_tsw_qo", tmp_path / "case"))


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ([{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        (None, None),
        ("plain", "plain"),
    ],
)
def test_a_chat_template_is_found_wherever_it_is(
    with_text: Path, tmp_path: Path, template: object, want: object
) -> None:
    path = with_text / "backbone" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": template, "bos_token": {"content": "<b>"}}
    path.write_text(json.dumps(settings))
    bundle = export(with_text, tmp_path / "b")
    found = manifests.read(bundle)["text"]
    assert found["bos_token"] == "<b>"
    assert (found["chat_template"] is None) == (want is None)
    if want is not None:
        assert (bundle / "chat_template.jinja").read_text() == want


def test_a_template_file_goes_before_the_tokenizers_settings(with_text: Path, tmp_path: Path) -> None:
    (with_text / "backbone" / "chat_template.jinja").write_text("from a file")
    assert (export(with_text, tmp_path / "b") / "chat_template.jinja").read_text() == "from a file"


def test_a_tokenizer_of_another_model_is_refused(with_text: Path, tmp_path: Path) -> None:
    path = with_text / "backbone" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 5000, "content": "<far>"})
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ExportError, match=r"token id \d+, but the backbone's vocab_size is 256"):
        export(with_text, tmp_path / "b")


def test_a_broken_tokenizer_is_one_clear_error(with_text: Path, tmp_path: Path) -> None:
    (with_text / "backbone" / "tokenizer.json").write_text("{")
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        export(with_text, tmp_path / "b")
    assert leftovers(tmp_path) == ["case"]


# ---------------------------------------------------------------------- backbones that are refused


def test_another_family_is_refused_by_name(with_text: Path, tmp_path: Path) -> None:
    path = with_text / "backbone" / "config.json"
    settings = json.loads(path.read_text()) | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    path.write_text(json.dumps(settings))
    with pytest.raises(
        ExportError, match=r"Olmo2ForCausalLM \(olmo2\) cannot become a bundle.*builder does not know it"
    ):
        export(with_text, tmp_path / "b")


def test_weights_that_are_missing_are_named(with_text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = with_text / "backbone" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"missing keys: model\.layers\.1\.self_attn\.q_proj\.weight"):
        export(with_text, tmp_path / "b")


def test_weights_that_are_not_finite_are_named(with_text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = with_text / "backbone" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.norm\.weight holds NaN"):
        export(with_text, tmp_path / "b")


@pytest.mark.parametrize("damage", ["truncate", "remove", "config"])
def test_a_damaged_backbone_is_one_clear_error(with_text: Path, tmp_path: Path, damage: str) -> None:
    weights = with_text / "backbone" / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "remove":
        weights.unlink()
    else:
        (with_text / "backbone" / "config.json").write_text("{")
    with pytest.raises(ExportError, match=re.escape(str(with_text / "backbone"))):
        export(with_text, tmp_path / "b")
    assert leftovers(tmp_path) == ["case"]


def test_an_adapter_for_another_backbone_is_refused_before_anything_is_built(case, parity_data, tmp_path: Path) -> None:
    other = parity_data / "smollm3_tsw_qo" / "adapter"
    with pytest.raises(AdapterError, match="trained for another backbone"):
        export_bundle(case / "backbone", other, tmp_path / "b", **QUIET)
    assert leftovers(tmp_path) == []
