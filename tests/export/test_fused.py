"""The fused graph: where its nodes stand, how many run in a step, that it is added to a bundle without its backbone, and what is said of
one that is wrong. That it computes what the portable graph computes is held where the engine is held against the reference
(tests/runtime, test_grafts.py, test_families.py); its operator alone is held against the rule in rust/deltamem-kernel."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import deltamem_rt as dm
from agreement import assert_close
from deltamem_export import manifest
from deltamem_export.backbone import Backbone
from deltamem_export.builder import build
from deltamem_export.bundle import export_bundle, share_files
from deltamem_export.cli import main
from deltamem_export.external import link
from deltamem_export.precision import Precision
from stepping import last_run, profiled, talk

QUIET = {"say": lambda _: None}
FUSED_FILE = "model.fused.onnx"
LOGITS, STATES = 1e-4, 1e-5
LAYERS = 3  # of each tiny backbone


def copy_of(bundle: Path, target: Path, **graph: object) -> Path:
    """The bundle with changes to its manifest's section `graph`, its files shared."""
    found = manifest.read(bundle)
    target.mkdir()
    share_files(bundle, target, found)
    found["graph"] |= graph
    manifest.write(target, found)
    return target


def memory_nodes(bundle: Path) -> list[ir.Node]:
    return [node for node in ir.load(bundle / FUSED_FILE).graph if node.domain == "deltamem"]


# family → inputs 6 to 12 that the node has, and its outputs
PLACES = {
    "qwen3": ({6, 9, 11, 12}, {1, 2, 3, 4}),  # in the place of Split and both norms; Δo in the residual
    "llama": ({6, 9}, {1, 4}),  # the packed projection, in its place
    "gemma2": ({6}, {1, 4}),  # a norm behind o_proj: Δo by itself
    "granite": ({6}, {1, 4}),  # a factor behind o_proj
}


@pytest.mark.parametrize("family", PLACES)
def test_the_node_takes_in_what_the_family_allows(family, make_backbone, make_adapter, tmp_path) -> None:
    backbone = make_backbone(family)
    adapter = make_adapter(backbone, delta_heads=("q", "o"))
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", check=False, **QUIET)
    nodes = memory_nodes(bundle)
    assert len(nodes) == LAYERS
    for node in nodes:
        inputs = {n for n, value in enumerate(node.inputs) if value is not None}
        outputs = {n for n, value in enumerate(node.outputs) if value.name}
        assert inputs - set(range(6)) == PLACES[family][0]
        assert outputs - {0} == PLACES[family][1]
    assert all(value.name.startswith("deltamem.layers") for node in nodes for value in node.inputs[3:6])
    data = {
        value.const_value.path
        for value in ir.load(bundle / FUSED_FILE).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert {Path(path).name for path in data} == {"model.onnx.data"}, "the weights are on disk once"


def bare(backbone: Path, folder: Path) -> Counter[str]:
    """The nodes of a decode step of the backbone without a memory."""
    folder.mkdir()
    body = Backbone.load(backbone)
    path = build(body, folder, Precision("fp32"))
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {
        value.name: np.zeros((1, body.geometry.num_kv_heads, 1, body.geometry.head_dim), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    feeds |= {"input_ids": np.array([[5]]), "attention_mask": np.ones((1, 2), np.int64)}
    session.run(None, feeds)
    return last_run(json.loads(Path(session.end_profiling()).read_text()))


def test_a_decode_step_runs_so_many_nodes_and_no_more(make_backbone, make_adapter, tmp_path) -> None:
    """Against the backbone alone: one in the place of seven a layer (Split, the norms of q and k, their reshapes), or one more."""
    for family, more in (("qwen3", -6), ("llama", 1)):
        backbone = make_backbone(family)
        bundle = export_bundle(backbone, make_adapter(backbone), tmp_path / family, check=False, **QUIET)
        without = bare(backbone, tmp_path / f"{family}-bare")
        fused, portable = (profiled(bundle, tmp_path / f"{family}-{g}", g) for g in ("fused", "portable"))
        assert fused["MemoryLayer"] == LAYERS
        assert not {op for op in fused | portable if op.startswith("Memcpy")}
        # For all layers together: Concat of the memories; Reshape and Gather of the wanted rows.
        assert sum(fused.values()) <= sum(without.values()) + LAYERS * more + 3, fused - without
        assert sum(portable.values()) <= sum(without.values()) + LAYERS * 26 + 12, portable - without
        assert sum(fused.values()) < sum(portable.values()) - 20 * LAYERS


def test_a_bundle_of_an_older_exporter_runs_as_it_was_and_can_be_given_one(parity_bundle, tmp_path, capsys) -> None:
    bundle = parity_bundle("qwen3_tsw_qo")
    found = manifest.read(bundle)
    old = tmp_path / "old"
    old.mkdir()
    for name in found["files"]:
        if name != FUSED_FILE:
            link(bundle / name, old / name)
    del found["files"][FUSED_FILE], found["graph"]["fused_file"], found["graph"]["not_fused"], found["graph"]["files"]
    manifest.write(old, found)
    ids = np.random.default_rng(0).integers(3, 256, 60)
    model = dm.Model.load(old)
    assert model.graph == "portable"
    want = talk(model, ids)
    with pytest.raises(dm.BundleError, match="deltamem-export fuse"):
        dm.Model.load(old, graph="fused")

    assert main(["fuse", str(old)]) == 0
    assert capsys.readouterr().out == f"fused {old}\n"
    assert (old / FUSED_FILE).read_bytes() == (bundle / FUSED_FILE).read_bytes()
    again = dm.Model.load(old)
    assert (again.graph, again.fingerprint) == ("fused", model.fingerprint)
    for what, found, wanted, limit in zip(("logits", "states"), talk(again, ids), want, (LOGITS, STATES), strict=True):
        assert_close(what, found, wanted, limit)
    assert main(["fuse", str(old)]) == 0, "a second time"
    assert dm.Model.load(old).graph == "fused"


def test_the_embedded_default_can_be_given_one(tmp_path) -> None:
    bundle = copy_of(dm.default_bundle(), tmp_path / "bundle")
    assert main(["fuse", str(bundle)]) == 0
    models = [dm.Model.load(bundle, graph=graph) for graph in ("fused", "portable")]
    for message in ("My dog is called Bruno.", "What is my dog called?"):
        ids = models[0].encode(message)
        (found, memory), (want, wanted) = (talk(model, np.resize(ids, 50)) for model in models)
        assert_close("logits", found, want, LOGITS * max(1.0, float(np.abs(want).max()) / 10))
        assert_close("states", memory, wanted, STATES * max(1.0, float(np.abs(wanted).max())))


def test_a_backbone_in_16_bits_has_none_and_says_why(parity_bundle, tmp_path, capsys) -> None:
    bundle = parity_bundle("qwen3_tsw_qo", "fp16")
    graph = manifest.read(bundle)["graph"]
    assert graph["fused_file"] is None
    assert "16 bits" in graph["not_fused"]
    assert not (bundle / FUSED_FILE).exists()
    assert dm.Model.load(bundle).graph == "portable"
    assert main(["fuse", str(copy_of(bundle, tmp_path / "copy"))]) == 2
    assert "the backbone computes in 16 bits" in capsys.readouterr().err


def test_int4_keeps_the_memorys_weights_in_16_bits_and_stays_close(parity_bundle) -> None:
    bundle = parity_bundle("qwen3_tsw_qo", Precision("int4", 32, 1))
    assert {node.attributes["storage"].as_string() for node in memory_nodes(bundle)} == {"float16"}
    ids = np.random.default_rng(0).integers(3, 256, 60)
    (found, memory), (want, wanted) = (talk(dm.Model.load(bundle, graph=g), ids) for g in ("fused", "portable"))
    assert 0 < np.abs(memory - wanted).max() < 2e-3 * np.abs(wanted).max()
    assert np.abs(found - want).max() < 5e-3 * np.abs(want).max()


def test_what_is_measured_runs_on_the_portable_graph(parity_bundle) -> None:
    model = dm.Model.load(parity_bundle("qwen3_tsw_qo"))
    assert model.graph == "fused"
    for measure, strength, graph in ((False, 1.0, "fused"), (True, 1.0, "portable"), (False, 0.5, "portable")):
        with model.session(strength=strength) as session:
            reply = session.generate([5, 6, 7], max_new_tokens=2, measure=measure)
            reply.read()
            assert reply.stats.graph == graph
            assert f"graph='{graph}'" in repr(reply.stats)
    with pytest.raises(ValueError, match="'auto', 'portable', 'fused' or 'blocks'"):
        dm.Model.load(model.path, graph="quick")


def spoilt(bundle: Path, target: Path, spoil: Callable[[ir.Graph, ir.Node], None]) -> Path:
    """The bundle with its first memory node changed."""
    copy = copy_of(bundle, target)
    model = ir.load(copy / FUSED_FILE)
    spoil(model.graph, next(node for node in model.graph if node.domain == "deltamem"))
    (copy / FUSED_FILE).unlink()
    ir.save(model, copy / FUSED_FILE)
    found = manifest.read(copy)
    found["files"][FUSED_FILE] = manifest.file_entry(copy / FUSED_FILE)
    manifest.write(copy, found)
    return copy


def attribute(name: str, value: object) -> Callable[[ir.Graph, ir.Node], None]:
    return lambda _, node: node.attributes.__setitem__(name, ir.convenience.convert_attribute(name, value))


def constant_of(at: int, shape: tuple[int, ...]) -> Callable[[ir.Graph, ir.Node], None]:
    def spoil(graph: ir.Graph, node: ir.Node) -> None:
        value = ir.Value(name="spoilt", const_value=ir.tensor(np.ones(shape, np.float32), name="spoilt"))
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        graph.register_initializer(value)
        node.replace_input_with(at, value)

    return spoil


SPOILT = {
    "a rank that is not the weights'": (attribute("rank", 7), "corrections holds"),
    "a rank of none": (attribute("rank", 0), "rank is 0"),
    "more heads than memory": (attribute("heads", 1 << 40), "heads is"),
    "a negative layer": (attribute("layer", -1), "layer is -1"),
    "a mode of its own": (
        attribute("update_mode", "sometimes"),
        "update_mode is .sometimes., expected one of standard",
    ),
    "a width that is not the projection's": (attribute("widths", [8, 8, 8, 8]), "holds|does not lie|width"),
    "outputs twice": (attribute("outputs", [1, 1, 3, 4]), "outputs and widths"),
    "columns outside of the constant": (attribute("corrections", [1, 1 << 40, 32, 0]), "does not lie in"),
    "half a correction": (attribute("corrections", [1, 0, 32]), "hold 3 and 3 numbers"),
    "parts of two": (attribute("splits", [32, 32]), "hold 2 and"),
    "networks of another width": (constant_of(3, (5, 3)), "hidden holds 0"),
    "no gates": (constant_of(4, (0,)), "gate_bias holds 0 numbers"),
    "a norm of another width": (constant_of(11, (5,)), "a norm of heads"),
    "a layer that the memory does not have": (
        attribute("layer", 99),
        "past_memory has 3 layers, this node is layer 99",
    ),
    "a mask in the place of the hidden states": (
        lambda _, node: node.replace_input_with(0, node.inputs[1]),
        "hidden is",
    ),
    "a memory in the place of the projection": (
        lambda _, node: node.replace_input_with(6, node.inputs[2]),
        "projection of input 6 is",
    ),
    "networks that are no constant": (
        lambda _, node: node.replace_input_with(3, node.inputs[0]),
        "networks is no constant",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_node_that_does_not_fit_is_an_error_that_says_so_and_ends_nothing(what, parity_bundle, tmp_path) -> None:
    spoil, words = SPOILT[what]
    bundle = spoilt(parity_bundle("qwen3_tsw_qo"), tmp_path / "bundle", spoil)
    with pytest.raises(dm.DeltaMemError, match=words), dm.Model.load(bundle).session() as session:
        session.feed([5, 6, 7])
    with dm.Model.load(bundle, graph="portable").session() as session:
        session.feed([5, 6, 7])


def test_numbers_that_are_none_are_refused_and_the_memory_is_kept(parity_bundle, tmp_path) -> None:
    def spoil(graph: ir.Graph, node: ir.Node) -> None:
        width = node.inputs[4].const_value.size
        constant_of(4, (width,))(graph, node)
        graph.initializers["spoilt"].const_value = ir.tensor(np.full(width, np.nan, np.float32), name="spoilt")

    bundle = spoilt(parity_bundle("qwen3_tsw_qo"), tmp_path / "bundle", spoil)
    with dm.Model.load(bundle).session() as session:
        with pytest.raises(dm.DeltaMemError, match="kept"):
            session.feed([5, 6, 7])
        assert not session.memory.any()
