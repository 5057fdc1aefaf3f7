"""Decoders that the builder does not know, brought as ONNX: grafted by their weights or by a mapping, with the same checks, and the same
model as the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config, PretrainedConfig, StableLmConfig

import deltamem_rt as dm
from agreement import assert_close
from deltamem_export.adapter import Adapter
from deltamem_export.bundle import export_bundle
from deltamem_export.errors import ExportError
from deltamem_export.mapping import GraphMapping, bring, mapping_of
from deltamem_export.reference import attach
from grafted import Grafted
from plain_onnx import write_plain_onnx
from tiny import SIZES

LOGITS, STATES = 1e-4, 1e-5
QUIET = {"say": lambda _: None}
EVERY = ("q", "k", "v", "o")

BROUGHT: dict[str, Callable[[], PretrainedConfig]] = {
    "Olmo2ForCausalLM": lambda: Olmo2Config(**SIZES, rms_norm_eps=1e-3),
    "StableLmForCausalLM": lambda: StableLmConfig(**SIZES, use_qkv_bias=True, layer_norm_eps=1e-3),
}


@pytest.fixture(params=BROUGHT)
def brought(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """(backbone folder, its ONNX)."""
    return make(request.param, tmp_path)


@pytest.fixture
def olmo2(tmp_path: Path) -> tuple[Path, Path]:
    return make("Olmo2ForCausalLM", tmp_path)


def make(family: str, tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BROUGHT[family](), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
    backbone = tmp_path / "backbone"
    model.save_pretrained(backbone)
    return backbone, write_plain_onnx(model, tmp_path / "brought.onnx")


def test_a_brought_decoder_becomes_the_same_model(brought, make_adapter, tmp_path) -> None:
    backbone, onnx = brought
    adapter = make_adapter(backbone, delta_heads=EVERY)
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", onnx=onnx, **QUIET)
    manifest = json.loads((bundle / "deltamem.json").read_text())
    assert manifest["check"]["max_abs_diff"] <= 1e-4
    assert manifest["graph"]["shared_kv"] is False
    same_model(bundle, backbone, adapter)


def same_model(bundle: Path, backbone: Path, adapter: Adapter) -> None:
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    handle = attach(model, adapter)
    handle.reset()
    grafted, session = Grafted(bundle), dm.Model.load(bundle).session()
    rng = np.random.default_rng(0)
    with session:
        # Chunks on one cache, tokens one by one, a turn with a fresh cache, a turn that only reads.
        for turn, (pieces, write) in enumerate([((30, 1, 1, 20), True), ((17,), True), ((9,), False)]):
            ids = rng.integers(3, 64, sum(pieces))
            handle.writes = write
            with torch.no_grad():
                want = model(torch.from_numpy(ids[None]), use_cache=False).logits[0].numpy()
            state = handle.state[0].numpy()
            parts = np.split(ids, np.cumsum(pieces)[:-1])
            for who, feed in (
                ("graph", grafted.feed),
                ("engine", lambda part, write: session.feed(part, write, logits=True)),
            ):
                found = np.concatenate([feed(part, write=write) for part in parts])
                assert_close(f"turn {turn}, {who}: logits", found, want, LOGITS)
            for who, memory in (("graph", grafted.memory[0]), ("engine", session.memory)):
                assert_close(
                    f"turn {turn}, {who}: states", memory, state, STATES * max(1.0, float(np.abs(state).max()))
                )
            grafted.end_turn()
            session.end_turn()
    assert np.abs(grafted.memory).max() > 0


def test_a_mapping_says_what_the_weights_cannot(olmo2, make_adapter, tmp_path) -> None:
    """The same graph with names of its own and with its weights taken apart, so that no product has them."""
    backbone, onnx = olmo2
    model = ir.load(onnx)
    attention = model.graph
    copy, find = bring(onnx, tmp_path, AutoModelForCausalLM.from_pretrained(backbone), GraphMapping())
    said = mapping_of(find(ir.load(copy).graph, range(3)))
    for value in (*attention.inputs, *attention.outputs):
        value.name = f"their_{value.name}"
    for node in [node for node in attention if node.op_type == "MatMul"]:
        if node.inputs[1].const_value is not None:  # W = 2 · (W / 2): nothing in the graph is W any more
            weight = node.inputs[1].const_value.numpy()
            half = ir.Value(name=f"{node.name}/half", const_value=ir.tensor(weight / 2, name=f"{node.name}/half"))
            two = ir.Value(name=f"{node.name}/two", const_value=ir.tensor(np.float32(2), name=f"{node.name}/two"))
            for value in (half, two):
                value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), value.const_value.shape
                attention.register_initializer(value)
            double = ir.node("Mul", [half, two])
            double.outputs[0].name = f"{node.name}/double"
            attention.insert_before(node, double)
            node.replace_input_with(1, double.outputs[0])
    theirs = tmp_path / "theirs.onnx"
    ir.save(model, theirs)
    adapter = make_adapter(backbone, target_layers=(0, 2))

    names = {value.name: value.name.removeprefix("their_") for value in (*attention.inputs, *attention.outputs)}
    with pytest.raises(ExportError, match=r"missing input_ids.*\"names\""):
        export_bundle(backbone, adapter, tmp_path / "b", onnx=theirs, **QUIET)
    with pytest.raises(
        ExportError, match=r"layer 0: no product of the graph with the weight of .*name the product in a mapping"
    ):
        export_bundle(backbone, adapter, tmp_path / "b", onnx=theirs, mapping=GraphMapping(names=names), **QUIET)

    file = tmp_path / "mapping.json"
    file.write_text(GraphMapping(said.layers, names).to_json())
    mapping = GraphMapping.load(file)
    assert mapping == GraphMapping(said.layers, names)
    same_model(
        export_bundle(backbone, adapter, tmp_path / "b", onnx=theirs, mapping=mapping, **QUIET), backbone, adapter
    )


def test_a_graph_of_other_weights_is_refused(olmo2, make_adapter, tmp_path) -> None:
    backbone, onnx = olmo2
    adapter = make_adapter(backbone)
    model = ir.load(onnx)
    mlp = next(v for v in model.graph.initializers.values() if list(v.shape or ()) == [32, 48])
    mlp.const_value = ir.tensor(mlp.const_value.numpy() * 1.01, name=mlp.name)
    changed = tmp_path / "changed.onnx"
    ir.save(model, changed)
    with pytest.raises(ExportError, match="differs from transformers"):
        export_bundle(backbone, adapter, tmp_path / "b", onnx=changed, **QUIET)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"layer": {}}', "and nothing else"),
        ('{"layers": {"x": {}}}', "expected a layer number"),
        ('{"layers": {"0": {"p": "a"}}}', "expected a layer number with hidden, q, k, v, o"),
        ('{"layers": {"0": {"q": 3}}}', "expected a value's name"),
        ('{"layers": {"0": {"q": {"value": "a", "start": -1}}}}', "expected a value's name"),
        ('{"names": {"a": 1}}', "expected strings to strings"),
    ],
)
def test_a_mapping_that_is_none_is_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "mapping.json"
    path.write_text(text)
    with pytest.raises(ExportError, match=why):
        GraphMapping.load(path)


def test_names_that_the_graph_does_not_have_are_refused(olmo2, make_adapter, tmp_path) -> None:
    backbone, onnx = olmo2
    adapter = make_adapter(backbone)
    for mapping, why in (
        (GraphMapping(names={"ids": "input_ids"}), "no input or output 'ids'; it has input_ids"),
        (GraphMapping({0: {"q": ("nothing", None)}}), "layers: 0: q: the graph has no value 'nothing'"),
    ):
        with pytest.raises(ExportError, match=why):
            export_bundle(backbone, adapter, tmp_path / "b", onnx=onnx, mapping=mapping, **QUIET)


def test_what_is_no_onnx_is_refused(olmo2, make_adapter, tmp_path) -> None:
    backbone, onnx = olmo2
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(onnx.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"bad\.onnx: cannot be read as ONNX"):
        export_bundle(backbone, make_adapter(backbone), tmp_path / "b", onnx=bad, **QUIET)
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        export_bundle(backbone, make_adapter(backbone), tmp_path / "b", onnx=tmp_path / "none.onnx", **QUIET)
