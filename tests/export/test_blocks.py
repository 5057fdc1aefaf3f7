"""The graph with the runtime's own products of weights in blocks: which products it takes in, that it computes what the portable graph
computes, that it is added to an older bundle, and what is said of one that is wrong. The products alone are held bit for bit against
their sums spelled out in rust/deltamem-kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import deltamem_rt as dm
from deltamem_export import manifest
from deltamem_export.bundle import share_files
from deltamem_export.cli import main
from deltamem_export.precision import Precision
from stepping import profiled, talk

BLOCKS_FILE = "model.blocks.onnx"
INT4, INT8 = Precision("int4"), Precision("int8")


def products(path: Path, domain: str) -> list[ir.Node]:
    return [node for node in ir.load(path).graph if node.op_type == "MatMulNBits" and node.domain == domain]


@pytest.mark.parametrize(
    "precision", [INT4, INT8, Precision("int4", 128), Precision("int8", 64)], ids=lambda p: p.setting
)
def test_every_product_in_blocks_is_taken_in_and_computes_what_it_did(parity_bundle, precision) -> None:
    bundle = parity_bundle("qwen3_tsw_qo", precision)
    found = manifest.read(bundle)["graph"]
    assert found["blocks_file"] == BLOCKS_FILE
    assert BLOCKS_FILE in found["files"]
    of_others = products(bundle / "model.onnx", "com.microsoft")
    own = products(bundle / BLOCKS_FILE, "deltamem")
    assert [node.name for node in own] == [node.name for node in of_others]
    assert len(own) > 10
    assert not products(bundle / BLOCKS_FILE, "com.microsoft")
    data = {
        Path(value.const_value.path).name
        for value in ir.load(bundle / BLOCKS_FILE).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert data == {"model.onnx.data"}, "the weights are on disk once"

    assert dm.Model.load(bundle).graph == "blocks"
    ids = np.random.default_rng(0).integers(3, 256, 60)
    (logits, memory), (want, wanted) = (talk(dm.Model.load(bundle, graph=g), ids) for g in ("blocks", "portable"))
    # Both round activations to 8 bits, and one that is off in the last digit may fall to the other side.
    assert np.abs(logits - want).mean() < 5e-3 * np.abs(want).max()
    assert np.abs(logits - want).max() < 5e-2 * np.abs(want).max()
    assert np.abs(memory - wanted).max() < 2e-2 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "precision",
    [Precision("fp32"), Precision("int4", 32, 1), Precision("int4", 16), Precision("int4", symmetric=False)],
    ids=lambda p: p.setting,
)
def test_a_bundle_whose_products_are_others_has_none(parity_bundle, precision) -> None:
    bundle = parity_bundle("qwen3_tsw_qo", precision)
    assert manifest.read(bundle)["graph"]["blocks_file"] is None
    assert not (bundle / BLOCKS_FILE).exists()
    assert dm.Model.load(bundle).graph == "fused"
    with pytest.raises(dm.BundleError, match=r"no graph with products in blocks.*deltamem-export fuse"):
        dm.Model.load(bundle, graph="blocks")


def test_a_decode_step_runs_the_fused_graphs_nodes(parity_bundle, tmp_path) -> None:
    bundle = parity_bundle("qwen3_tsw_qo", INT4)
    blocks, fused = (profiled(bundle, tmp_path / g, g) for g in ("blocks", "fused"))
    assert blocks == fused


def test_an_older_bundle_can_be_given_one(parity_bundle, tmp_path, capsys) -> None:
    bundle = parity_bundle("qwen3_tsw_qo", INT4)
    found = manifest.read(bundle)
    old = tmp_path / "old"
    old.mkdir()
    del found["files"][BLOCKS_FILE], found["graph"]["blocks_file"]
    found["graph"]["files"].remove(BLOCKS_FILE)
    share_files(bundle, old, found)
    manifest.write(old, found)
    model = dm.Model.load(old)
    assert model.graph == "fused"
    assert main(["fuse", str(old)]) == 0
    assert capsys.readouterr().out == f"fused {old}\n"
    assert (old / BLOCKS_FILE).read_bytes() == (bundle / BLOCKS_FILE).read_bytes()
    assert manifest.read(old)["graph"]["files"] == manifest.read(bundle)["graph"]["files"]
    again = dm.Model.load(old)
    assert (again.graph, again.fingerprint) == ("blocks", model.fingerprint)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bits", 2, "bits is 2, expected 4 or 8"),
        ("block_size", 48, "blocks of 48 weights"),
        ("K", 1 << 40, "the weights"),
        ("N", 0, "has none"),
        ("K", -5, "expected 0 or more"),
    ],
)
def test_a_node_that_does_not_fit_its_weights_is_refused(parity_bundle, tmp_path, name, value, said) -> None:
    bundle = parity_bundle("qwen3_tsw_qo", INT4)
    found = manifest.read(bundle)
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    share_files(bundle, spoilt, found)
    model = ir.load(bundle / BLOCKS_FILE)
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    node.attributes[name] = ir.AttrInt64(name, value)
    (spoilt / BLOCKS_FILE).unlink()
    ir.save(model, spoilt / BLOCKS_FILE)
    found["files"][BLOCKS_FILE] = manifest.file_entry(spoilt / BLOCKS_FILE)
    manifest.write(spoilt, found)
    with pytest.raises(dm.DeltaMemError, match=said):
        dm.Model.load(spoilt)
    assert dm.Model.load(spoilt, graph="fused").graph == "fused"


def test_what_is_cut_elsewhere_comes_out_the_same(parity_bundle) -> None:
    """A product's rows do not depend on each other, so that a prompt in pieces differs by the attention's sums alone."""
    model = dm.Model.load(parity_bundle("qwen3_tsw_qo", INT4))
    ids = np.random.default_rng(1).integers(3, 256, 40)
    found = []
    for cut in (40, 7):
        with model.session() as session:
            logits = [session.feed(ids[i : i + cut], logits=True) for i in range(0, 40, cut)]
            found.append(np.concatenate(logits))
    assert np.abs(found[0] - found[1]).max() < 0.1
    assert np.abs(found[0] - found[1]).mean() < 5e-3
