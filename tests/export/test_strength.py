"""What the measured graph has beside the graph: the strength of the corrections, and the gates, against the reference; and a measured
graph made anew for a bundle of an older exporter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

import deltamem_rt as dm
from agreement import assert_close
from deltamem_export.adapter import Adapter
from deltamem_export.bundle import export_bundle
from deltamem_export.calibration import Stream, calibrate
from deltamem_export.errors import ExportError
from deltamem_export.graft import measure_again
from deltamem_export.reference import attach
from grafted import Grafted
from sealing import resealed

LOGITS, STATES = 1e-4, 1e-5
QUIET = {"say": lambda _: None, "check": False}
EVERY = ("q", "k", "v", "o")
NORMED = {"delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 1e-5}


def scaled(adapter: Adapter, strength: float) -> Adapter:
    """The adapter whose corrections are `strength` times as large: by its alpha, and behind the norm on Δo by the norm's weight."""
    if not adapter.config.delta_o_rmsnorm:
        return Adapter(replace(adapter.config, alpha=adapter.config.alpha * strength), adapter.layers)
    layers = {
        i: {
            name: t * strength if name in ("delta_o_rmsnorm_weight", "delta_q_proj") else t
            for name, t in tensors.items()
        }
        for i, tensors in adapter.layers.items()
    }
    return Adapter(adapter.config, layers)


@pytest.mark.parametrize("strength", [0.25, 1.0, 2.0])
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"delta_heads": EVERY}), ("qwen3", NORMED), ("llama", {"memory_write_granularity": "message_mean"})],
    ids=["packed, every head", "norm on delta o", "spans"],
)
def test_strength_multiplies_what_the_reference_corrects(
    family, settings, strength, make_backbone, make_adapter, tmp_path
) -> None:
    backbone = make_backbone(family)
    adapter = make_adapter(backbone, **settings)
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", **QUIET)
    grafted = Grafted(bundle, measured=True)
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    handle = attach(model, scaled(adapter, strength))
    handle.spans = "token"
    ids = np.random.default_rng(1).integers(3, 64, (2, 30))
    with dm.Model.load(bundle, device="cpu").session(strength=strength) as session:
        assert session.strength == strength
        for turn in ids:
            with torch.no_grad():
                want = model(torch.from_numpy(turn[None])).logits[0].numpy()
            assert_close("logits", grafted.feed(turn, strength=strength), want, LOGITS)
            spans = "token" if adapter.config.writes_spans else None
            assert_close("the engine's logits", session.feed(turn, logits=True, spans=spans), want, LOGITS)
            grafted.end_turn()
            session.end_turn()
        assert_close("states", grafted.memory, handle.state.numpy(), STATES)
        assert_close("the engine's states", session.memory, handle.state[0].numpy(), STATES)
    assert grafted.energy[..., 0].max() > 1e-4, "no correction did anything, so nothing was compared"


def test_strength_0_is_the_backbone_alone_and_each_token_has_its_own(make_backbone, make_adapter, tmp_path) -> None:
    backbone = make_backbone("llama")
    bundle = export_bundle(backbone, make_adapter(backbone, delta_heads=EVERY), tmp_path / "bundle", **QUIET)
    told, asked = np.arange(3, 40), np.arange(40, 60)
    grafted = Grafted(bundle, measured=True)
    grafted.feed(told)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(backbone).eval()(torch.from_numpy(asked[None])).logits[0].numpy()

    def ask(strength: np.ndarray | float) -> np.ndarray:
        grafted.end_turn()
        return grafted.feed(asked, write=False, strength=strength)

    assert_close("without a memory", ask(0.0), alone, LOGITS)
    half = np.where(np.arange(20) < 10, 0.0, 1.0)[None]
    mixed = ask(half)
    np.testing.assert_array_equal(mixed[:10], ask(0.0)[:10])
    assert np.abs(mixed[10:] - alone[10:]).max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"state_update_mode": "no_lambda", "rankwise_gates": False, "num_state_heads": 2},
        {"couple_lambda": False, "num_state_heads": 2},
        {"couple_lambda": False, "state_update_mode": "lambda_outside", "memory_write_granularity": "sentence_mean"},
    ],
    ids=["no lambda", "own lambda", "lambda outside, spans"],
)
def test_gates_are_those_of_the_reference(settings, make_backbone, make_adapter, tmp_path) -> None:
    backbone = make_backbone("llama")
    adapter = make_adapter(backbone, target_layers=(0, 2), **settings)
    grafted = Grafted(export_bundle(backbone, adapter, tmp_path / "bundle", **QUIET), measured=True)
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    handle = attach(model, adapter)
    handle.record, handle.spans = True, "token"
    ids = np.arange(3, 33)
    grafted.feed(ids)
    with torch.no_grad():
        model(torch.from_numpy(ids[None]))
    kinds = []
    for found in (handle.recorded[i] for i in (0, 2)):
        gates = [torch.sigmoid(found.beta_logit)]
        if not adapter.config.couple_lambda:
            gates.append(found.keep)
        kinds.append(torch.stack([gate[0].flatten(1) for gate in gates], dim=1))
    want = torch.stack(kinds, dim=1).numpy()  # [T, L, kinds, G]
    assert_close("gates", grafted.gates[0], want, 1e-5)


def as_before(bundle: Path) -> None:
    """Makes of a bundle what an older exporter would have made: a measured graph without strength and gates."""
    path = bundle / "model.measured.onnx"
    model = ir.load(path)
    graph = model.graph
    del graph.outputs[next(n for n, v in enumerate(graph.outputs) if v.name == "gates")]
    unscale = [node for node in graph if node.op_type == "Mul" and node.name.startswith("/deltamem/strength/")]
    for node in unscale:
        for use in tuple(node.outputs[0].uses()):
            use.node.replace_input_with(use.idx, node.inputs[0])
    strength = next(v for v in graph.inputs if v.name == "strength")
    squeezed = next(iter(strength.uses())).node
    graph.remove([*unscale, squeezed])
    graph.inputs.remove(strength)
    ir.save(model, path)
    manifest = json.loads((bundle / "deltamem.json").read_text())
    del manifest["graph"]["strength"], manifest["graph"]["gates"]
    (bundle / "deltamem.json").write_text(json.dumps(manifest))
    resealed(bundle)


def test_an_older_bundle_refuses_other_strengths_until_it_is_calibrated_and_keeps_its_memories(
    make_backbone, make_adapter, tmp_path
) -> None:
    backbone = make_backbone("llama")
    adapter = make_adapter(backbone, delta_heads=EVERY)
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", **QUIET)
    new = Grafted(bundle, measured=True)
    as_before(bundle)
    old = dm.Model.load(bundle, device="cpu")
    with pytest.raises(dm.BundleError, match=r"strength is 0\.5, but this bundle's graph has no input"):
        old.session(strength=0.5)
    with old.session(strength=1.0) as session:
        session.feed(np.arange(3, 40))
        session.end_turn()
        kept, health = session.snapshot(), session.health()
        assert health.beta_mean is None
        assert health.delta_ratio is not None

    stream = Stream([[" ".join(map(str, range(3 + n, 30 + n))) for n in range(25)]], "a test's")
    calibrate(bundle, stream)
    model = dm.Model.load(bundle, device="cpu")
    assert model.fingerprint == old.fingerprint
    assert model.manifest["health"]["stream"] == {
        "description": "a test's",
        "conversations": 1,
        "turns": 25,
        "left_out": 0,
        "tokens": 25 * 27,
    }
    with model.session(strength=0.5) as session:
        session.restore(kept)
        want = new.feed(np.arange(3, 40))
        new.end_turn()
        want = new.feed(np.arange(40, 60), write=False, strength=0.5)
        found = session.feed(np.arange(40, 60), write=False, logits=True)
        assert_close("logits", found, want, LOGITS)
        session.end_turn()
        assert session.health().beta_mean.shape == (3,)


def test_a_graph_that_no_graft_made_is_refused(make_backbone, make_adapter, tmp_path) -> None:
    backbone = make_backbone("llama")
    bundle = export_bundle(backbone, make_adapter(backbone), tmp_path / "bundle", **QUIET)
    manifest = json.loads((bundle / "deltamem.json").read_text())
    manifest["graph"]["measured_file"] = "model.onnx"  # which has no energies
    with pytest.raises(ExportError, match="does not say where the correction q is"):
        measure_again(bundle, manifest, tmp_path / "again.onnx")
