"""`verify` on every family: a good bundle is called good, and one matrix that is another one is found, by its layer and its place.
And the comparison at export, layer by layer and whole, names what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Olmo2Config

from deltamem_export.adapter import Adapter
from deltamem_export.backbone import Backbone
from deltamem_export.builder import build
from deltamem_export.bundle import export_bundle
from deltamem_export.check import check
from deltamem_export.decoder import attentions
from deltamem_export.errors import ExportError
from deltamem_export.precision import Precision
from deltamem_export.verify import Report, verify
from plain_onnx import write_plain_onnx

QUIET = {"say": lambda _: None}
Change = Callable[[torch.Tensor], torch.Tensor]


def another(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix of the same size and scale that is not this one."""
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(tensor.shape, generator=generator) * tensor.float().std()).to(tensor.dtype)


def change_backbone(folder: Path, to: Path, name: str, change: Change = another) -> Path:
    """A copy of a backbone with one weight changed."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def change_adapter(adapter: Adapter, layer: int, name: str) -> Adapter:
    tensors = {i: dict(ts) for i, ts in adapter.layers.items()}
    tensors[layer][name] = another(tensors[layer][name])
    return replace(adapter, layers=tensors)


def change_bundle(bundle: Path, to: Path, matches: Callable[[str], bool]) -> Path:
    """A copy of a bundle with one weight changed in its data file, in place."""
    shutil.copytree(bundle, to)
    found = [v for v in ir.load(to / "model.onnx").graph.initializers.values() if matches(str(v.name))]
    assert len(found) == 1, [v.name for v in found]
    tensor = found[0].const_value
    assert isinstance(tensor, ir.ExternalTensor), f"{found[0].name} is not in the data file"
    changed = another(torch.from_numpy(tensor.numpy().copy())).numpy().tobytes()
    with (to / "model.onnx.data").open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(changed)
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Adapter, Path]]:
    """`made(family)`: a backbone, an adapter and the bundle of the two, made once."""
    cache: dict[str, tuple[Path, Adapter, Path]] = {}

    def make(family: str, backbone: Callable[..., Path], adapter: Callable[..., Adapter]) -> tuple[Path, Adapter, Path]:
        if family not in cache:
            folder = Path(shutil.move(backbone(family), tmp_path_factory.mktemp("verify") / "backbone"))
            memory = adapter(folder)
            cache[family] = folder, memory, export_bundle(folder, memory, folder.parent / "bundle", **QUIET)
        return cache[family]

    return make


def named(report: Report, *words: str) -> None:
    assert not report.good
    assert report.first is not None, report
    for word in words:
        assert word in report.first, f"{word!r} is not in: {report.first}"


def last_memory_layer(adapter: Adapter) -> int:
    return max(adapter.layers)


# ---------------------------------------------------------------------- every family


def test_a_good_bundle_is_good_and_one_swapped_matrix_is_named(
    every_family, made, make_backbone, make_adapter, tmp_path
) -> None:
    backbone, adapter, bundle = made(every_family, make_backbone, make_adapter)
    good = verify(bundle, backbone, adapter)
    assert good.good, str(good)
    assert good.logits.max <= 1e-4
    assert len(good.layers) == sum(module is not None for module in attentions(Backbone.load(backbone).model))

    layer = last_memory_layer(adapter)
    weights = load_file(backbone / "model.safetensors")
    own = f"model.layers.{layer}."

    def weight(*ends: str) -> str:
        return next(name for end in ends for name in sorted(weights) if name.startswith(own) and end in name)

    mlp = weight("down_proj", "fc2", "output_linear", ".w2")
    report = verify(bundle, change_backbone(backbone, tmp_path / "mlp", mlp), adapter)
    named(report, f"layer {layer}: behind the attention")
    assert "the backbone's weights" in report.identity[0]

    report = verify(bundle, change_backbone(backbone, tmp_path / "o", weight("o_proj", "out_proj", "dense")), adapter)
    named(report, f"layer {layer}: the attention or o_proj")

    report = verify(bundle, backbone, change_adapter(adapter, layer, "memory_k_proj"))
    named(report, f"layer {layer}: the memory's networks")
    assert "the adapter's tensors" in report.identity[0]


# ---------------------------------------------------------------------- the places of one family


@pytest.fixture
def qwen(made, make_backbone, make_adapter) -> tuple[Path, Adapter, Path]:
    return made("qwen3", make_backbone, make_adapter)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "layer 1: q_proj"),
        ("model.layers.1.self_attn.k_norm.weight", "layer 1: the attention or o_proj"),
        ("model.layers.2.input_layernorm.weight", "layer 2: the norm in front of the attention"),
        (
            "model.layers.0.mlp.up_proj.weight",
            "layer 0: behind the attention (norms or MLP), seen at the input of layer 1",
        ),
        ("model.embed_tokens.weight", "the embedding"),
        ("model.norm.weight", "the last norm"),
        ("lm_head.weight", "the lm_head"),
    ],
)
def test_a_weight_of_the_backbone_is_named(qwen, tmp_path, name, words) -> None:
    backbone, adapter, bundle = qwen
    named(verify(bundle, change_backbone(backbone, tmp_path / "b", name), adapter), words)


@pytest.mark.parametrize("head", ["q", "o"])
def test_a_correction_of_the_adapter_is_named(qwen, head) -> None:
    backbone, adapter, bundle = qwen
    report = verify(bundle, backbone, change_adapter(adapter, 1, f"delta_{head}_proj"))
    named(report, f"layer 1: the memory's correction of {head}")


@pytest.mark.parametrize(
    ("matches", "words"),
    [
        (lambda n: n.startswith("model.layers.1.") and "gate_proj" in n, "layer 1: behind the attention"),
        (lambda n: n.startswith("model.layers.2.") and "o_proj" in n, "layer 2: the attention or o_proj"),
        (lambda n: n.startswith("deltamem.layers.1.") and "networks" in n, "layer 1: the memory's networks"),
    ],
)
def test_a_weight_of_the_bundle_is_named_and_so_is_its_file(qwen, tmp_path, matches, words) -> None:
    backbone, adapter, bundle = qwen
    report = verify(change_bundle(bundle, tmp_path / "b", matches), backbone, adapter)
    named(report, words)
    assert report.identity == (
        "the bundle's model.onnx.data is not the file that was exported: its bytes have changed",
    )


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "bf16"])
def test_other_precisions_are_held_to_the_weights_that_the_graph_holds(qwen, tmp_path, precision) -> None:
    backbone, adapter, _ = qwen
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", precision, **QUIET)
    good = verify(bundle, backbone, adapter)
    assert good.good, str(good)
    report = verify(bundle, change_backbone(backbone, tmp_path / "other", "model.layers.1.mlp.up_proj.weight"), adapter)
    named(report, *(["model.layers.1.mlp.up_proj.weight"] if precision.startswith("int") else ["layer 1: behind"]))


def test_a_small_mistake_is_not_taken_for_rounding(qwen, tmp_path) -> None:
    """Over the tolerance by little, the reference in float64 decides; it does not excuse what is not its own rounding."""
    backbone, adapter, bundle = qwen
    other = change_backbone(backbone, tmp_path / "other", "lm_head.weight", lambda t: t * (1 + 5e-5))
    report = verify(bundle, other, adapter)
    assert 1 < report.logits.max / report.logits.tolerance < 10
    assert any("float64" in note for note in report.notes)
    named(report, "the lm_head")


def test_weights_in_other_values_of_the_same_size_are_another_checkpoint(qwen, tmp_path) -> None:
    """A change that int4 rounds away moves no number, and yet it is not the checkpoint that was exported."""
    backbone, adapter, _ = qwen
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", "int4", **QUIET)
    other = change_backbone(backbone, tmp_path / "other", "model.layers.1.mlp.up_proj.weight", lambda t: t * (1 + 1e-6))
    report = verify(bundle, other, adapter)
    assert report.computes_the_same
    assert not report.good
    assert "not bit for bit" in report.verdict


@pytest.mark.parametrize("granularity", ["message_mean", "sentence_mean"])
def test_writes_of_spans_are_verified_in_spans(make_backbone, make_adapter, tmp_path, granularity) -> None:
    backbone = make_backbone("llama")
    adapter = make_adapter(backbone, memory_write_granularity=granularity)
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", **QUIET)
    good = verify(bundle, backbone, adapter)
    assert good.good, str(good)
    assert "in spans" in str(good)
    named(verify(bundle, backbone, change_adapter(adapter, 1, "memory_v_proj")), "layer 1: the memory's networks")


def test_a_decoder_that_was_brought_is_looked_into_where_the_memory_is(make_adapter, tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    model = AutoModelForCausalLM.from_config(Olmo2Config(**sizes, **heads), attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "backbone")
    backbone, onnx = tmp_path / "backbone", write_plain_onnx(model, tmp_path / "brought.onnx")
    adapter = make_adapter(backbone)
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", onnx=onnx, **QUIET)
    good = verify(bundle, backbone, adapter)
    assert good.good, str(good)
    assert all(layer.attention_input and layer.attention_output and layer.state for layer in good.layers)
    named(verify(bundle, backbone, change_adapter(adapter, 1, "memory_k_proj")), "layer 1: the memory's networks")
    other = change_backbone(backbone, tmp_path / "other", "model.layers.1.mlp.up_proj.weight")
    named(verify(bundle, other, adapter), "layer 1: behind the attention", "layer 2")


def test_an_8_bit_cache_is_recognised_by_its_scales(qwen, tmp_path) -> None:
    backbone, adapter, _ = qwen
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", Precision(kv="int8"), **QUIET)
    good = verify(bundle, backbone, adapter)
    assert good.good, str(good)
    assert good.precision == "fp32/kv-int8"
    named(verify(bundle, backbone, change_adapter(adapter, 1, "memory_v_proj")), "layer 1: the memory's networks")


def test_another_model_altogether_is_said_and_not_run(qwen, make_backbone, make_adapter) -> None:
    _, _, bundle = qwen
    other = make_backbone("qwen3", num_hidden_layers=2)
    report = verify(bundle, other, make_adapter(other))
    assert not report.good
    assert report.logits is None
    assert "another model" in report.verdict
    assert any("num_layers is 2, in the bundle 3" in line for line in report.identity)


def test_a_setting_that_differs_is_named(qwen) -> None:
    backbone, adapter, bundle = qwen
    report = verify(bundle, backbone, replace(adapter, config=replace(adapter.config, alpha=8.0)))
    assert "memory.alpha is 8.0, in the bundle 4.0" in report.identity
    named(report, "layer 0: the memory's correction of")


def test_the_users_text_is_what_is_run(parity_bundle, parity_data) -> None:
    case = parity_data / "llama_tsw_qo"
    text = "My sister lives in Oslo, and I have not been there. " * 4
    report = verify(parity_bundle("llama_tsw_qo"), case / "backbone", case / "adapter", text=text)
    assert report.good, str(report)
    found = json.loads(report.to_json())
    assert found["good"] is True
    assert found["tokens"] == report.tokens > 60
    assert found["tokens"] != 160
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
    assert all(layer[part]["max"] < 1e-4 for layer in found["layers"] for part in ("attention_input", "state"))
    with pytest.raises(ExportError, match="too few"):
        verify(parity_bundle("llama_tsw_qo"), case / "backbone", case / "adapter", text="Oslo")


def test_verify_writes_nothing_into_the_bundle(qwen) -> None:
    backbone, adapter, bundle = qwen
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    verify(bundle, backbone, adapter)
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before


# ---------------------------------------------------------------------- the check at export


def test_layer_by_layer_agrees_on_every_family(every_family, make_backbone, tmp_path) -> None:
    backbone = Backbone.load(make_backbone(every_family))
    found = check(backbone, build(backbone, tmp_path / "built", Precision()), Precision(), "layers")
    assert found.method == "layers"
    assert found.max_abs_diff <= 1e-4


@pytest.fixture
def built(make_backbone, tmp_path) -> tuple[Backbone, Path]:
    backbone = Backbone.load(make_backbone("llama"))
    return backbone, build(backbone, tmp_path / "built", Precision())


@pytest.mark.parametrize("method", ["whole", "layers"])
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        ("model.layers.1.mlp.up_proj", "layer 1"),
        ("model.layers.2.self_attn.q_proj", "layer 2"),
        ("model.embed_tokens", "the embedding"),
        ("lm_head", "the lm_head"),
    ],
)
def test_a_weight_that_differs_is_named_by_both_methods(built, method, weight, words) -> None:
    backbone, graph = built
    with torch.no_grad():
        backbone.model.get_submodule(weight).weight.mul_(1.02)
    with pytest.raises(ExportError, match=words):
        check(backbone, graph, Precision(), method)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_wrong_epsilon_in_one_layer_is_named_layer_by_layer(built, layer) -> None:
    backbone, graph = built
    backbone.model.model.layers[layer].post_attention_layernorm.variance_epsilon = 3e-6
    with pytest.raises(ExportError, match=f"in layer {layer}:"):
        check(backbone, graph, Precision(), "layers")


def test_layer_by_layer_leaves_the_backbone_as_it_was(built) -> None:
    backbone, graph = built
    backbone.model.bfloat16()
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    with pytest.raises(ExportError):  # the graph has the unrounded weights
        check(backbone, graph, Precision(), "layers")
    ids = torch.arange(9)[None]
    for name, tensor in backbone.model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]), name
    assert backbone.model(ids).logits.shape == (1, 9, 64)
    assert not any("forward" in vars(module) for module in backbone.model.modules())


def test_a_model_too_large_for_the_machine_is_compared_layer_by_layer(
    make_backbone, make_adapter, tmp_path, monkeypatch
) -> None:
    from deltamem_export import check as checking
    from deltamem_export.inspect import describe

    backbone = make_backbone("qwen3")
    said: list[str] = []
    monkeypatch.setattr(checking, "free_memory", lambda: 1000)
    bundle = export_bundle(backbone, make_adapter(backbone), tmp_path / "bundle", say=said.append)
    assert any("layers: both models at once take" in line for line in said)
    manifest = json.loads((bundle / "deltamem.json").read_text())
    assert manifest["check"]["method"] == "layers"
    assert "each layer alone within" in describe(bundle)


def test_random_hidden_vectors_are_of_all_sizes() -> None:
    """An epsilon shows in vectors that are as small as it; a cut-off shows in large ones."""
    from deltamem_export.layerwise import _hidden

    sizes = np.sqrt((_hidden(160, 64, Precision()) ** 2).mean(axis=1))
    assert sizes.min() < 2e-3
    assert sizes.max() > 5
