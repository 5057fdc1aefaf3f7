"""Graphs for CUDA, as far as a machine without a GPU can tell: what they are made of, that they compute what transformers computes where
the CPU can run them, and that the graphs of one bundle stand under one fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import deltamem_rt as dm
from deltamem_export import bundle as bundling
from deltamem_export import manifest
from deltamem_export.backbone import Backbone
from deltamem_export.builder import build
from deltamem_export.bundle import add_graph, export_bundle
from deltamem_export.check import check
from deltamem_export.cli import main
from deltamem_export.errors import ExportError
from deltamem_export.fused import _in_groups
from deltamem_export.inventory import check_island
from deltamem_export.nodes import Nodes
from deltamem_export.plain import spell_out
from deltamem_export.precision import Precision
from deltamem_export.runner import has_cuda
from deltamem_export.verify import verify
from deltamem_rt._cli import main as deltamem

IDS = np.random.default_rng(0).integers(3, 256, 90)
# What the CPU's runs of them may differ by from transformers, and how their keys and values are kept.
FORMS = {
    "fp32": (1e-5, "float32"),
    "fp16": (2e-2, "float16"),
    "bf16": (1e-5, "bfloat16"),  # widened
    "int8": (2e-2, "float16"),
    "int4": (2e-2, "float16"),
}
CASES = ("qwen3_tsw_qo", "gemma2_tsw_qo", "mistral_window_tsw_qo", "phi3_tsw_qkvo", "smollm3_tsw_qo")


def export(case: Path, out: Path, *precisions: Precision | str) -> Path:
    return export_bundle(case / "backbone", case / "adapter", out, precisions, say=lambda _: None)


def add(case: Path, bundle: Path, *precisions: Precision | str) -> Path:
    return add_graph(bundle, case / "backbone", case / "adapter", precisions, say=lambda _: None)


@pytest.fixture(scope="module")
def case(parity_data: Path) -> Path:
    return parity_data / "qwen3_tsw_qo"


@pytest.fixture(scope="module")
def two_graphs(golden_case, tmp_path_factory: pytest.TempPathFactory):
    """`two_graphs("fp16")`: the first golden's bundle with a graph in fp32 for the CPU and one in fp16 for CUDA."""
    made: dict[tuple[str, str], Path] = {}

    def bundle(form: str, name: str = CASES[0]) -> Path:
        if (form, name) not in made:
            out = tmp_path_factory.mktemp("two") / "bundle"
            made[form, name] = export(golden_case(name), out, Precision(form, device="cuda"), "fp32")
        return made[form, name]

    return bundle


def talk(bundle: Path) -> tuple[np.ndarray, np.ndarray]:
    with dm.Model.load(bundle, device="cpu").session() as session:
        logits = session.feed(IDS.astype(np.int32), logits=True)
        return logits, session.memory.copy()


# ---------------------------------------------------------------------- one bundle, two graphs


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_for_cuda_stands_beside_the_cpus_under_one_fingerprint(two_graphs, parity_bundle, form: str) -> None:
    bundle, alone = two_graphs(form), parity_bundle(CASES[0])
    found, before = manifest.read(bundle), manifest.read(alone)
    assert found["fingerprint"] == before["fingerprint"]
    first, cuda = manifest.graphs(found)
    assert (first["device"], found["precision"], cuda["device"], cuda["precision"]) == ("cpu", "fp32", "cuda", form)
    tolerance, kv = FORMS[form]
    assert (cuda["kv_dtype"], cuda["logits_dtype"], cuda["shared_kv"]) == (kv, "float32", form != "fp32")
    assert (cuda["fused_file"], cuda["not_fused"]) == ("model.cuda.fused.onnx", None)
    assert cuda["blocks_file"] is None
    assert cuda["check"]["max_abs_diff"] <= tolerance
    assert "CUDA's operators" in cuda["not_checked"]
    assert {*first["files"], *cuda["files"]} == set(found["files"])
    for graph in (first, cuda):
        assert {graph["file"], graph["measured_file"]} < set(graph["files"])

    # The runtime of today reads it, and runs what it always ran, bit for bit.
    for got, want in zip(talk(bundle), talk(alone), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_the_memorys_island_is_float32_with_casts_at_its_edge_alone(two_graphs, form: str) -> None:
    bundle = two_graphs(form)
    cuda = manifest.graph_on(manifest.read(bundle), "cuda")
    found = check_island(bundle / cuda["file"])
    layers = range(3)
    wide = form == "fp32"
    assert found.casts_in == (() if wide else tuple(f"/deltamem/layers.{i}/hidden" for i in layers))
    out = () if wide else {f"/deltamem/layers.{i}/delta_{p}/Cast" for i in layers for p in "qo"}
    assert set(found.casts_out) == set(out)
    assert found.nodes["LinearAttention"] == 3
    assert check_island(bundle / cuda["measured_file"]).nodes["LinearAttention"] == 3
    graph = ir.load(bundle / cuda["file"]).graph
    kinds = {node.op_type for node in graph}
    assert ("GroupQueryAttention" in kinds) == (not wide), "CUDA's takes 16 bits alone"
    assert ("MatMulNBits" in kinds) == form.startswith("int")
    weights = [v.const_value.dtype for n, v in graph.initializers.items() if n.startswith("deltamem.layers.")]
    assert set(weights) == {ir.DataType.FLOAT}


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "int4"])
def test_verify_compares_the_graph_for_cuda_and_says_what_ran_it(two_graphs, case: Path, form: str) -> None:
    report = verify(two_graphs(form), case / "backbone", case / "adapter", device="cuda", tokens=100)
    assert report.good, str(report)
    assert report.device == "cuda"
    assert report.run_by == ("cuda" if has_cuda() else "cpu")
    assert any("CUDA's own operators were not compared" in note for note in report.notes) == (not has_cuda())
    assert report.logits is not None
    if not has_cuda():
        assert report.logits.max <= FORMS[form][0] * 1.5, "a cached turn in chunks, with a memory"
    assert verify(two_graphs(form), case / "backbone", case / "adapter", tokens=60).device == "cpu"


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "int4"])
def test_verify_by_cuda_agrees_with_transformers(two_graphs, golden_case, form: str, name: str) -> None:
    if not has_cuda():
        pytest.skip("this onnxruntime has no CUDA provider: install onnxruntime-gpu on a machine with an NVIDIA GPU")
    report = verify(
        two_graphs(form, name), golden_case(name) / "backbone", golden_case(name) / "adapter", device="cuda"
    )
    assert (report.run_by, report.good) == ("cuda", True), str(report)
    assert report.fused is not None, "the runtime ran the fused graph beside the portable one"
    if form == "fp16":
        assert report.logits is not None
        assert report.logits.max <= 2e-2
        assert report.same_next_token >= 0.95 * report.tokens


def test_a_graph_is_added_to_a_bundle_that_is_in_use(case: Path, tmp_path: Path, capsys) -> None:
    bundle = tmp_path / "bundle"
    source = ["--backbone", str(case / "backbone"), "--adapter", str(case / "adapter")]
    assert main(["bundle", *source, "--precision", "int4", "--out", str(bundle)]) == 0
    before = manifest.read(bundle)
    want = talk(bundle)
    add_to = ["bundle", *source, "--device", "cuda", "--into", str(bundle)]
    assert main(add_to) == 0
    found = manifest.read(bundle)
    assert found["fingerprint"] == before["fingerprint"]
    assert [(g["device"], g["precision_setting"]) for g in manifest.graphs(found)] == [
        ("cpu", "int4/32/4"),
        ("cuda", "fp16"),
    ]
    assert found["graphs"][0]["fused_file"] == "model.cuda.fused.onnx"
    assert {name: found["files"][name] for name in before["files"]} == before["files"]
    for got, expected in zip(talk(bundle), want, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert verify(bundle, case / "backbone", case / "adapter", tokens=60).good

    capsys.readouterr()
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    for words in ("int4 for cpu, fp16 for cuda", "cuda: float16, 3 layers", "cuda: compared on the CPU"):
        assert words in shown
    assert main(add_to) == 2
    assert "has a graph for cuda (fp16)" in capsys.readouterr().err
    assert manifest.read(bundle) == found


def test_the_runtimes_inspect_shows_each_graph_and_what_of_it_was_not_compared(two_graphs, capsys) -> None:
    assert deltamem(["inspect", str(two_graphs("bf16"))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "precision fp32, for cpu",
        "precision on cuda bf16",
        "inside a turn on cuda a KV cache of 3 layers (0-2) in bfloat16",
        "; compared on the CPU, widened to float32",
    ):
        assert words in shown


def test_a_cpus_graph_added_to_a_bundle_for_cuda_becomes_its_first_and_its_memories_stay(
    case: Path, tmp_path: Path
) -> None:
    bundle = export(case, tmp_path / "bundle", "bf16")
    before = manifest.read(bundle)
    assert [g["device"] for g in manifest.graphs(before)] == ["cuda"]
    with pytest.raises(dm.BundleError, match="bf16"):
        dm.Model.load(bundle, device="cpu")
    add(case, bundle, "fp32")
    found = manifest.read(bundle)
    assert [(g["device"], g["precision"]) for g in manifest.graphs(found)] == [("cpu", "fp32"), ("cuda", "bf16")]
    assert found["graph"]["fused_file"] == "model.cpu.fused.onnx"
    assert (found["fingerprint"], found["fingerprint_setting"]) == (before["fingerprint"], "bf16")
    assert dm.Model.load(bundle, device="cpu").fingerprint == before["fingerprint"]
    for device in ("cpu", "cuda"):
        assert verify(bundle, case / "backbone", case / "adapter", device=device, tokens=60).good


def test_a_bundle_of_an_older_exporter_takes_a_graph_too(parity_bundle, case: Path, tmp_path: Path) -> None:
    old = shutil.copytree(parity_bundle(CASES[0], "int4"), tmp_path / "old")
    found = manifest.read(old)
    for name in ("device", "logits_dtype", "files", "not_checked"):
        del found["graph"][name]
    del found["fingerprint_setting"], found["precision_setting"]
    manifest.write(old, found)
    assert verify(old, case / "backbone", case / "adapter", tokens=60).precision == "int4/32/4"
    add(case, old, Precision("fp16", device="cuda"))
    now = manifest.read(old)
    assert now["fingerprint"] == found["fingerprint"]
    assert now["graph"]["file"] == found["graph"]["file"]
    assert talk(old)[1].any()
    assert verify(old, case / "backbone", case / "adapter", device="cuda", tokens=60).good


def test_a_graph_of_something_else_is_refused_and_the_bundle_stays(
    two_graphs, golden_case, case: Path, tmp_path: Path
) -> None:
    bundle = export(case, tmp_path / "bundle", "fp32")
    before = (bundle / manifest.MANIFEST_FILE).read_bytes()
    other = tmp_path / "adapter"
    shutil.copytree(case / "adapter", other)
    settings = json.loads((other / "delta_mem_config.json").read_text())
    (other / "delta_mem_config.json").write_text(json.dumps(settings | {"alpha": 2.0}))
    with pytest.raises(ExportError, match=r"made from something else.*memory.alpha is 2.0"):
        add_graph(bundle, case / "backbone", other, Precision("fp16", device="cuda"), say=lambda _: None)
    assert (bundle / manifest.MANIFEST_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".bundle*")), "nothing is left behind"


# ---------------------------------------------------------------------- the fused graph

TYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "int8": "FLOAT16", "int4": "FLOAT16"}
# Nodes that a layer has more than the backbone alone, in the fused graph. Where Split takes a packed projection apart, the node stands in
# its place. Δo goes into the residual, unless a norm stands between, before which it has to be added.
EXTRA = {
    "qwen3_tsw_qo": 0,
    "llama_tsw_qo": 1,
    "smollm3_tsw_qo": 1,
    "phi3_tsw_qkvo": 1,
    "gemma2_tsw_qo": 2,
    "mistral_window_tsw_qo": 1,
}
# And for all layers together: Concat of the memories, Reshape and Gather of the wanted rows; the cast of their logits to float32, which the
# builder has in bf16.
EXTRA_IN_ALL = {"fp32": 3, "fp16": 4, "bf16": 3, "int4": 4}


def fused_graph(bundle: Path) -> tuple[ir.Graph, list[ir.Node]]:
    entry = manifest.graph_on(manifest.read(bundle), "cuda")
    graph = ir.load(bundle / entry["fused_file"]).graph
    return graph, [node for node in graph if node.domain == "deltamem"]


@pytest.mark.parametrize("form", FORMS)
def test_the_fused_node_takes_the_decoders_tensors_in_their_own_type(two_graphs, form: str) -> None:
    bundle = two_graphs(form)
    graph, nodes = fused_graph(bundle)
    assert [node.op_type for node in nodes] == ["DeviceMemoryLayer"] * 3
    for node in nodes:
        given = {n: value.dtype.name for n, value in enumerate(node.inputs) if value is not None}
        made = {n: value.dtype.name for n, value in enumerate(node.outputs) if value.name}
        own = dict.fromkeys(range(1, 6), "FLOAT")
        assert given == {**own, **dict.fromkeys((0, 6, 9), TYPES[form])}
        assert made == {0: "FLOAT", 5: "FLOAT", **dict.fromkeys((1, 2, 3, 4), TYPES[form])}
        assert not {"storage", "spans", "q_epsilon", "k_epsilon"} & set(node.attributes)
        assert not node.outputs[5].uses(), "room to work in, which ONNX Runtime plans"
    assert check_island(bundle / "model.cuda.fused.onnx").nodes["DeviceMemoryLayer"] == 3
    assert not {node.op_type for node in graph} & {"If", "Loop", "Scan"}, "no step could be captured"
    casts = [node for node in graph if node.op_type == "Cast" and node.name.startswith("/deltamem/layers")]
    assert not casts, "no cast stands around it"
    data = {v.const_value.path for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)}
    assert {Path(path).name for path in data} <= {"model.onnx.data", "model.cuda.onnx.data"}, (
        "no weight is on disk twice"
    )


@pytest.mark.parametrize("form", EXTRA_IN_ALL)
@pytest.mark.parametrize("name", EXTRA)
def test_the_fused_graph_has_so_many_nodes_more_than_the_backbone(golden_case, tmp_path, name: str, form: str) -> None:
    source, precision = golden_case(name), Precision(form, device="cuda")
    bundle = export_bundle(
        source / "backbone", source / "adapter", tmp_path / "bundle", precision, check=False, say=lambda _: None
    )
    built = build(Backbone.load(source / "backbone"), tmp_path / "bare", precision)
    if form == "fp32":
        spell_out(built, built)

    def count(graph: ir.Graph) -> int:
        return sum(node.op_type != "Constant" for node in graph)

    bare = count(ir.load(built).graph)
    layers = len(manifest.read(bundle)["memory"]["layers"])
    fused, portable = (count(graph) - bare for graph in (fused_graph(bundle)[0], ir.load(bundle / "model.onnx").graph))
    assert fused == layers * EXTRA[name] + EXTRA_IN_ALL[form]
    assert portable >= layers * 28


@pytest.mark.parametrize(
    ("layers", "joins"), [(1, []), (28, []), (32, []), (36, [18, 18]), (37, []), (80, [20] * 4), (1024, [32] * 32)]
)
def test_memories_of_many_layers_are_joined_in_groups_that_a_capture_can_have(layers: int, joins: list[int]) -> None:
    """CUDA's Concat takes 32 inputs of equal size by value; of others it is told by a copy from the host."""
    graph = ir.Graph((), (), nodes=(), opset_imports={"": 22})
    states = [ir.Value(name=f"state/{n}") for n in range(layers)]
    found = _in_groups(graph, states)
    assert [len(node.inputs) for node in graph] == joins
    if joins:
        assert [value.producer() for value in found] == list(graph)
        found = [value for node in graph for value in node.inputs]
    assert list(found) == states


def test_every_familys_graph_in_16_bits_is_fused(every_family, make_backbone, make_adapter, tmp_path) -> None:
    """With all of q, k, v and o corrected; that it computes the same is held in float32 by test_families.py."""
    backbone = make_backbone(every_family)
    adapter = make_adapter(backbone, delta_heads=("q", "k", "v", "o"))
    precision = Precision("bf16", device="cuda")
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", precision, check=False, say=lambda _: None)
    found = manifest.read(bundle)
    assert found["graph"]["not_fused"] is None
    graph, nodes = fused_graph(bundle)
    assert len(nodes) == len(found["memory"]["layers"])
    left = {node.op_type for node in graph if node.name.startswith("/deltamem/layers")}
    assert left <= {"DeviceMemoryLayer", "Add"}
    for node in nodes:
        laid = node.attributes["corrections"].as_ints()
        assert sum(laid[2::4]) == node.inputs[5].shape[1], "every column of the corrections is laid somewhere"


def test_spans_and_large_ranks_are_not_fused_and_the_manifest_says_why(case: Path, make_adapter, tmp_path) -> None:
    for options, words in (
        ({"memory_write_granularity": "sentence_mean"}, "writes by spans"),
        ({"rank": 72}, "its rank is 72, and the fused operator for CUDA has up to 64"),
        (
            {"rank": 32, "num_state_heads": 33},
            "its heads times rank are 1056, and the fused operator for CUDA has up to 1024",
        ),
    ):
        out = tmp_path / str(len(words))
        adapter = make_adapter(case / "backbone", **options)
        both = [Precision("fp16", device="cuda"), "fp32"]
        export_bundle(case / "backbone", adapter, out, both, check=False, say=lambda _: None)
        cpu, cuda = manifest.graphs(manifest.read(out))
        assert (cpu["not_fused"], cuda["fused_file"]) == (None, None)
        assert words in cuda["not_fused"]
        assert not list(out.glob("*cuda.fused*"))


def test_a_bundle_of_an_older_exporter_is_given_a_fused_graph_for_each_device(two_graphs, tmp_path, capsys) -> None:
    bundle = two_graphs("fp16")
    old = shutil.copytree(bundle, tmp_path / "old")
    found = manifest.read(old)
    for entry in (found["graph"], found["graphs"][0]):
        (old / entry["fused_file"]).unlink()
        del found["files"][entry["fused_file"]]
        entry["files"].remove(entry["fused_file"])
        entry |= {"fused_file": None, "not_fused": "it is for CUDA, and the fused operator runs on the processor"}
    manifest.write(old, found)
    assert dm.Model.load(old, device="cpu").graph == "portable"
    assert main(["fuse", str(old)]) == 0
    capsys.readouterr()
    now, want = manifest.read(old), manifest.read(bundle)
    for key in ("fingerprint", "graph", "graphs", "files"):
        assert now[key] == want[key]
    assert main(["fuse", str(old)]) == 0, "a second time"
    assert manifest.read(old)["files"] == want["files"]


def test_a_graph_in_16_bits_for_both_devices_has_the_fused_one_of_its_own(case: Path, tmp_path, capsys) -> None:
    """The CPU's operator computes in float32 alone, and CUDA's does not run on the CPU."""
    both = export(case, tmp_path / "both", "fp16", Precision("fp16", device="cuda"))
    cpu, cuda = manifest.graphs(manifest.read(both))
    assert (cpu["file"], cpu["fused_file"], cuda["fused_file"]) == (cuda["file"], None, "model.cuda.fused.onnx")
    assert "16 bits" in cpu["not_fused"]
    assert main(["fuse", str(both)]) == 0
    assert "no fused graph for cpu: the backbone computes in 16 bits" in capsys.readouterr().err
    assert [graph["fused_file"] for graph in manifest.graphs(manifest.read(both))] == [None, "model.cuda.fused.onnx"]

    alone = export(case, tmp_path / "alone", Precision("fp16", device="cuda"))
    assert manifest.read(alone)["graph"]["fused_file"] == "model.fused.onnx"
    model = dm.Model.load(alone, device="cpu")
    assert model.graph == "portable"
    assert model.unfused == "the bundle's graph was exported for cuda and serves cpu as well, where it has no fused one"
    with pytest.raises(dm.BundleError, match=r"exported for cuda.*leave graph out"):
        dm.Model.load(alone, device="cpu", graph="fused")
    assert talk(alone)[1].any()


@pytest.mark.parametrize("fault", ["weights", "memory", "mixed"])
def test_a_fused_node_of_the_wrong_types_is_found(two_graphs, tmp_path: Path, fault: str) -> None:
    model = ir.load(two_graphs("fp16") / "model.cuda.fused.onnx")
    node = next(node for node in model.graph if node.domain == "deltamem")
    at, kind = {"weights": (3, "FLOAT16"), "memory": (2, "FLOAT16"), "mixed": (6, "FLOAT")}[fault]
    value = ir.Value(name="spoilt", shape=node.inputs[at].shape, type=ir.TensorType(ir.DataType[kind]))
    model.graph.inputs.append(value)
    node.replace_input_with(at, value)
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="expected one type" if fault == "mixed" else f"input {at} is FLOAT16"):
        check_island(tmp_path / "model.onnx")


# ---------------------------------------------------------------------- weights on disk


def sizes(bundle: Path) -> dict[str, int]:
    return {name: entry["bytes"] for name, entry in manifest.read(bundle)["files"].items() if name.endswith(".data")}


def test_equal_weights_are_on_disk_once(two_graphs, case: Path, tmp_path: Path) -> None:
    assert set(sizes(two_graphs("fp32"))) == {"model.onnx.data"}, "the same float32 weights"
    half = export(case, tmp_path / "half", "fp16", Precision("fp16", device="cuda"))
    assert set(sizes(half)) == {"model.onnx.data"}
    first, cuda = manifest.graphs(manifest.read(half))
    assert first["file"] == cuda["file"]

    blocks = sizes(export(case, tmp_path / "blocks", "int4", Precision("int4", device="cuda")))
    alone = sizes(export(case, tmp_path / "alone", Precision("int4", device="cuda")))["model.onnx.data"]
    assert blocks["model.cuda.onnx.data"] < 0.6 * alone, "blocks and adapter are shared, embeddings and scales are not"
    other = sizes(two_graphs("fp16"))
    assert other["model.cuda.onnx.data"] < other["model.onnx.data"] / 2, "16 bits for 32, and no second adapter"


# ---------------------------------------------------------------------- a look without running


@pytest.mark.parametrize("fault", ["memory", "inside", "there and back", "no cast"])
def test_an_island_that_is_not_float32_is_found(two_graphs, tmp_path: Path, fault: str) -> None:
    bundle = two_graphs("fp16")
    model = ir.load(bundle / "model.cuda.onnx")
    graph = model.graph
    nodes = {node.name: node for node in graph}
    half = ir.DataType.FLOAT16
    make = Nodes(graph, "/deltamem/layers.1")
    target = nodes["/deltamem/layers.1/networks/MatMul"]
    if fault == "memory":
        next(v for v in graph.inputs if v.name == "past_memory").type = ir.TensorType(half)
    elif fault == "inside":
        target.replace_input_with(0, nodes["/deltamem/layers.1/hidden"].inputs[0])
    elif fault == "there and back":
        softened = make("Cast", target.inputs[0], name="narrow", to=half.value)
        target.replace_input_with(0, make("Cast", softened, name="wide", to=ir.DataType.FLOAT.value))
    else:
        added = nodes["/deltamem/layers.1/delta_o"]
        cast = added.inputs[1].producer()
        added.replace_input_with(1, cast.inputs[0])
        graph.remove(cast)
    graph.sort()
    ir.save(model, tmp_path / "model.cuda.onnx")
    words = {"memory": "past_memory is", "there and back": "a cast inside", "no cast": "edge is missing"}
    with pytest.raises(ExportError, match=words.get(fault, "inside the memory's island")):
        check_island(tmp_path / "model.cuda.onnx")


def test_a_graph_that_the_cpu_cannot_run_says_that_it_was_not_compared(
    case: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A stand-in for a kernel that the CPU has not: onnxruntime's own error in the comparison."""

    def none(*_: object) -> None:
        raise bundling.NoKernel("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel for QMoE")

    monkeypatch.setattr(bundling, "check_graph", none)
    bundle = export(case, tmp_path / "bundle", Precision("fp16", device="cuda"))
    found = manifest.read(bundle)
    assert found["check"] is None
    assert "no kernel for QMoE" in found["graph"]["not_checked"]
    assert main(["inspect", str(bundle)]) == 0
    assert "no: the CPU cannot run it" in capsys.readouterr().out
    assert talk(bundle)[1].any(), "today's runtime reads the manifest"
    with pytest.raises(ExportError, match=r"the CPU cannot run the built graph.*no kernel for QMoE"):
        export(case, tmp_path / "other", "fp32")


# ---------------------------------------------------------------------- the decoder


@pytest.mark.parametrize(
    "family", ["qwen3", "mistral", "gemma2", "gemma3", "phi3 longrope", "hunyuan", "lfm2", "gpt_oss"]
)
def test_attention_in_standard_operators_is_what_transformers_computes(
    make_backbone, family: str, tmp_path: Path
) -> None:
    """Windows, caps, sinks, partial and long RoPE, keys shared by heads; a prompt and then its cache."""
    backbone = Backbone.load(make_backbone(family))
    built = build(backbone, tmp_path / "built", Precision())
    spell_out(built, built)
    assert not [node for node in ir.load(built).graph if node.op_type == "GroupQueryAttention"]
    for method in ("whole", "layers"):
        assert check(backbone, built, Precision(), method).max_abs_diff <= 2e-5


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((family, form) for family in ("llama", "gemma3", "granite", "lfm2") for form in ("fp16", "int4")),
        # Their multipliers, clips and norms of 1 + w are bfloat16 in the graph, or float32 where the builder keeps them so.
        *(
            (family, "bf16")
            for family in ("gemma", "gemma2", "gemma3", "granite", "granitemoehybrid", "nemotron", "olmo")
        ),
    ],
)
def test_other_families_are_right_in_16_bits(make_backbone, family: str, form: str, tmp_path: Path) -> None:
    backbone, precision = Backbone.load(make_backbone(family)), Precision(form, device="cuda")
    built = build(backbone, tmp_path / "built", precision)
    for method in ("whole", "layers"):
        assert check(backbone, built, precision, method).max_abs_diff <= (2e-5 if form == "bf16" else 2e-2)


def test_a_memory_on_every_projection_is_right_in_standard_operators(golden_case, two_graphs) -> None:
    """Corrections of k and v enter in front of the cache, those of packed projections in their parts."""
    name = "phi3_tsw_qkvo"
    report = verify(
        two_graphs("fp32", name), golden_case(name) / "backbone", golden_case(name) / "adapter", device="cuda"
    )
    assert report.good, str(report)
    assert report.logits is not None
    if not has_cuda():
        assert report.logits.max <= 1e-4


# ---------------------------------------------------------------------- what a person asks for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu", "--precision", "bf16"], "CPU cannot compute bf16"),
        (["--device", "cuda", "--precision", "fp16", "--kv", "int8"], "8 bits is for the CPU"),
        (["--device", "cuda", "--device", "cuda"], "one for each device"),
        (["--device", "cpu", "--device", "cuda", *["--precision", "fp16"] * 3], "once for each device in their order"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(case: Path, tmp_path: Path, capsys, arguments, words) -> None:
    source = ["--backbone", str(case / "backbone"), "--adapter", str(case / "adapter")]
    assert main(["bundle", *source, "--out", str(tmp_path / "b"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [["--name", "x"], ["--force"]])
def test_into_leaves_the_rest_of_the_bundle_alone(case: Path, tmp_path: Path, capsys, option) -> None:
    source = ["--backbone", str(case / "backbone"), "--adapter", str(case / "adapter")]
    assert main(["bundle", *source, "--into", str(tmp_path), *option]) == 2
    assert f"{option[0]} is for a new bundle" in capsys.readouterr().err


def test_a_setting_says_its_precision() -> None:
    for precision in (
        Precision("fp32"),
        Precision("fp16", kv="int8"),
        Precision("int4", 16, 1, symmetric=False, embeddings=True),
        Precision("int8", 128, 2, algorithm="k_quant"),
        Precision("int4", device="cuda"),
    ):
        assert Precision.parse(precision.setting, precision.device) == precision
    assert Precision("int4").setting == Precision("int4", device="cuda").setting, "one fingerprint on both"
    with pytest.raises(ExportError, match="says no precision"):
        Precision.parse("int4/32")


def test_two_devices_at_once_by_the_command_line(case: Path, tmp_path: Path) -> None:
    source = ["--backbone", str(case / "backbone"), "--adapter", str(case / "adapter")]
    bundle = tmp_path / "b"
    assert main(["bundle", *source, "--out", str(bundle), "--device", "cuda", "--device", "cpu"]) == 0
    found = manifest.read(bundle)
    assert [(g["device"], g["precision"]) for g in manifest.graphs(found)] == [("cpu", "fp32"), ("cuda", "fp16")]
