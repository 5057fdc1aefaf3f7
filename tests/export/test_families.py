"""Every family: the builder's plain graph against transformers, as the builder makes it and as it is corrected; then the bundle
against the PyTorch reference on the very same weights, in ONNX Runtime and in the engine; then int4. What is measured is held against
docs/families.md, which `DELTAMEM_WRITE_DOCS=1 pytest tests/export/test_families.py` writes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

import deltamem_rt as dm
import emulated
from agreement import assert_close
from deltamem_export.adapter import AdapterConfig
from deltamem_export.backbone import Backbone, digest_tensors
from deltamem_export.builder import build
from deltamem_export.bundle import export_bundle
from deltamem_export.check import open_graph
from deltamem_export.errors import AdapterError, ExportError
from deltamem_export.families import FAMILIES as TABLE
from deltamem_export.families import REFUSED, Family
from deltamem_export.graft import graft
from deltamem_export.precision import Precision
from deltamem_export.reference import attach
from deltamem_export.structure import find_attentions
from grafted import Grafted
from tiny import FAMILIES, random_adapter, save_backbone
from together import beside_prompts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
LOGITS, STATES = 1e-4, 1e-5
TOKENS = 90  # more than five windows of 16
EVERY = ("q", "k", "v", "o")
FP32, INT4 = Precision("fp32"), Precision("int4")


@dataclass(frozen=True)
class Measured:
    """One row of the table. `before` is a number, or why the builder alone fails."""

    family: Family
    before: float | str
    after: float
    logits: float
    states: float
    int4: float


@pytest.fixture(scope="session")
def measured(emulator: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Measured]:
    """`measured("gemma2")`: its row, measured when first asked for."""

    @cache
    def measure(name: str) -> Measured:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        source = save_backbone(folder / "backbone", name)
        before, after = plain_differences(source, folder)
        logits, states = parity(source, folder)
        return Measured(
            TABLE[Backbone.load(source).geometry.architecture],
            before,
            after,
            logits,
            states,
            int4_difference(source, folder),
        )

    return measure


def plain_differences(source: Path, folder: Path) -> tuple[float | str, float]:
    """The plain graph's largest difference from transformers in the logits, over a prompt, a longer one on its cache, and a token:
    as the builder makes it, and corrected."""
    backbone = Backbone.load(source)
    ids = np.random.default_rng(0).integers(0, backbone.geometry.vocab_size, TOKENS)
    with torch.inference_mode():
        want = backbone.model(torch.from_numpy(ids[None]), use_cache=False).logits[0].numpy()

    def difference(correct: bool) -> float:
        graph = build(backbone, folder / f"plain-{correct}", FP32, correct=correct)
        got = open_graph(graph, backbone, FP32).feed(ids, [TOKENS // 3, TOKENS - 1])["logits"]
        return float(np.abs(got - want).max())

    try:
        before: float | str = difference(correct=False)
    except ExportError as error:
        before = re.search(r"failed with (\w+)", str(error))[1]
    return before, difference(correct=True)


def parity(source: Path, folder: Path) -> tuple[float, float]:
    """The bundle's largest differences from the reference in logits and states: turns, chunks, a token, reading alone. The engine is
    held to the same."""
    adapter = random_adapter(source, delta_heads=EVERY)
    bundle = export_bundle(source, adapter, folder / "bundle", say=lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    handle = attach(model, adapter)
    handle.reset(1)
    grafted = Grafted(bundle, measured=True)
    engines = {graph: dm.Model.load(bundle, threads=1, graph=graph) for graph in ("fused", "portable")}
    card = emulated.for_a_card(bundle, folder / "card")
    engines["fused for a card"] = dm.Model.load(card, threads=1, device=emulated.ON_DEVICE, graph="fused")
    sessions = {graph: engine.session() for graph, engine in engines.items()}
    ids = np.random.default_rng(1).integers(3, grafted.manifest["backbone"]["vocab_size"], TOKENS)
    logits, states, moved = 0.0, 0.0, 0.0
    past = None
    for start, end, write, new_turn in (
        (0, 23, True, False),
        (23, 24, True, False),
        (24, 47, True, False),
        (47, 60, True, True),
        (60, 90, False, True),
    ):
        if new_turn:
            past = None
            grafted.end_turn()
            for session in sessions.values():
                session.end_turn()
        part = ids[start:end]
        handle.writes = write
        with torch.no_grad():
            out = model(torch.from_numpy(part[None]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        want, state = out.logits[0].numpy(), handle.state.numpy()
        found = grafted.feed(part, write=write)
        logits = max(logits, float(np.abs(found - want).max()))
        states = max(states, float(np.abs(grafted.memory - state).max()))
        moved = max(moved, float(grafted.energy[..., 0].max()))
        for graph, session in sessions.items():
            assert_close(f"the engine's logits, {graph}", session.feed(part, write=write, logits=True), want, LOGITS)
            assert_close(f"the engine's states, {graph}", session.memory, state[0], STATES)
    assert moved > 1e-3, "no correction did anything, so nothing was compared"
    for engine in engines.values():
        steps_of_many(engine, ids)
    return logits, states


def steps_of_many(model: dm.Model, ids: np.ndarray) -> None:
    """Sessions of different lengths that step at the same time, over a window's end, get what each gets alone."""

    def reads(count: int) -> tuple[np.ndarray, np.ndarray]:
        with model.session() as session:
            session.feed(ids[:count])
            logits = [session.feed([token], logits=True)[0] for token in ids[count : count + 24]]
            return np.stack(logits), session.memory

    lengths = (1, 9, 17, 30)
    alone = [reads(count) for count in lengths]
    carries_more = bool(model.manifest["graph"]["states"])
    assert (model.unbatched is not None) == carries_more, model.unbatched
    for _ in range(40):  # steps of a model as small as this are over before the next thread is there, mostly
        together = beside_prompts(model, np.tile(ids, 2), [lambda n=count: reads(n) for count in lengths])
        for found, expected in zip(together, alone, strict=True):
            assert_close("logits in steps of many", found[0], expected[0], LOGITS)
            assert_close("states in steps of many", found[1], expected[1], STATES)
        if carries_more or model.stats.largest_step > 1:
            return
    pytest.fail(f"no two sessions ever shared a step: {model.stats}")


def int4_difference(source: Path, folder: Path) -> float:
    """A bundle in int4 runs; returned is what its own check measured, on the weights that its blocks stand for."""
    bundle = export_bundle(source, random_adapter(source), folder / "int4", INT4, say=lambda _: None)
    grafted = Grafted(bundle)
    assert np.isfinite(grafted.feed(np.arange(3, 50))).all()
    assert np.isfinite(grafted.feed(np.array([7]))).all()
    return float(grafted.manifest["check"]["max_abs_diff"])


def test_the_corrected_graph_is_the_model(every_family, measured) -> None:
    assert measured(every_family).after <= LOGITS


def test_a_bundle_of_it_computes_what_the_reference_computes(every_family, measured) -> None:
    row = measured(every_family)
    assert row.logits <= LOGITS
    assert row.states <= STATES


def test_a_bundle_of_it_in_int4_runs(every_family, measured) -> None:
    assert measured(every_family).int4 <= LOGITS


def test_every_family_of_the_table_has_a_tiny_model(measured) -> None:
    assert {measured(name).family.architecture for name in FAMILIES} == set(TABLE)


# ---------------------------------------------------------------------- settings that the builder gets wrong or ignores

ROPES = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
SETTINGS = {
    **{
        f"{family}, {kind} RoPE": (family, {"rope_parameters": {**rope, "rope_theta": 500.0}})
        for family in ("llama", "mistral", "qwen3", "smollm3")
        for kind, rope in ROPES.items()
    },
    "phi, linear RoPE": (
        "phi",
        {"rope_parameters": {**ROPES["linear"], "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}),
    "llama, as many kv heads as heads": ("llama", {"num_key_value_heads": 2}),
    "llama, wide heads, tied, gelu": ("llama", {"head_dim": 32, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama, relu": ("llama", {"hidden_act": "relu"}),
    "llama, a window that Llama does not have": ("llama", {"sliding_window": 8}),
    "llama, a vocabulary as wide as its MLP": ("llama", {"vocab_size": 48}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, windows that are off": ("qwen2", {"use_sliding_window": False}),
    "qwen3, windows by type": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3, windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 16}),
    "smollm3, no RoPE at all": ("smollm3", {"no_rope_layers": [0, 0, 0]}),
    "phi3, wide": ("phi3", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "gemma, exact gelu, biases": ("gemma", {"hidden_act": "gelu", "attention_bias": True}),
    "gemma2, no soft caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3, a soft cap": ("gemma3", {"final_logit_softcapping": 3.0}),
    "gemma3, full attention": ("gemma3", {"layer_types": ["full_attention"] * 3}),
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "granitemoehybrid, with RoPE": ("granitemoehybrid", {"position_embedding_type": "rope"}),
    "olmo, no clip, biases": ("olmo", {"clip_qkv": None, "attention_bias": True}),
    "nemotron, biases": ("nemotron", {"attention_bias": True}),
    "ernie4_5, no biases, tied": ("ernie4_5", {"use_bias": False, "tie_word_embeddings": True}),
    "hunyuan, biases": ("hunyuan", {"attention_bias": True}),
    "lfm2, attention first, a longer convolution": (
        "lfm2",
        {"conv_bias": False, "conv_L_cache": 4, "layer_types": ["full_attention", "conv", "full_attention"]},
    ),
    "lfm2, an MLP of a width of its own": ("lfm2", {"block_auto_adjust_ff_dim": True, "block_multiple_of": 16}),
    "lfm2_moe, no bias of experts": ("lfm2_moe", {"use_expert_bias": False}),
    "gpt_oss, another activation": ("gpt_oss", {"swiglu_alpha": 1.0, "swiglu_limit": 1.0}),
    "gpt_oss, one expert, plain RoPE": (
        "gpt_oss",
        {"num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_changes_results_is_in_the_graph(setting, make_backbone, tmp_path) -> None:
    family, more = SETTINGS[setting]
    backbone = Backbone.load(make_backbone(family, **more))
    assert plain_difference(backbone, tmp_path) <= LOGITS


def plain_difference(backbone: Backbone, folder: Path) -> float:
    graph = build(backbone, folder / "plain", FP32)
    backbone.to_float32()
    ids = np.random.default_rng(0).integers(0, backbone.geometry.vocab_size, TOKENS)
    with torch.inference_mode():
        want = backbone.model(torch.from_numpy(ids[None]), use_cache=False).logits[0].numpy()
    return float(np.abs(open_graph(graph, backbone, FP32).feed(ids, [60])["logits"] - want).max())


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3", "nemotron", "phi3", "lfm2"])
def test_files_in_bfloat16_make_an_exact_graph_and_stay_as_they_are(family, make_backbone, tmp_path) -> None:
    """Norms of 1 + w and Gemma's scale, which 16 bits would round; and modules of the builder's own, which it hangs onto the model."""
    source = make_backbone(family)
    AutoModelForCausalLM.from_pretrained(source).to(torch.bfloat16).save_pretrained(source)
    backbone = Backbone.load(source)
    modules = [name for name, _ in backbone.model.named_modules()]
    digest = digest_tensors(backbone.model.state_dict())
    assert plain_difference(backbone, tmp_path) <= LOGITS
    assert [name for name, _ in backbone.model.named_modules()] == modules
    assert backbone.weights_digest == digest


def test_longrope_ends_at_the_original_context(make_backbone) -> None:
    """Beyond it transformers turns the tokens of one call otherwise than those of two."""
    assert Backbone.load(make_backbone("phi3 longrope")).geometry.context_length == 96
    assert Backbone.load(make_backbone("phi3")).geometry.context_length == 256


# ---------------------------------------------------------------------- structure


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "olmo", "hunyuan", "lfm2", "gpt_oss"])
def test_names_inside_the_graph_do_not_matter(family, make_backbone, tmp_path) -> None:
    """Every node and inner value renamed: the same graft, and the same numbers bit for bit."""
    source = make_backbone(family)
    backbone = Backbone.load(source)
    adapter = random_adapter(source, delta_heads=EVERY)
    bundle = export_bundle(source, adapter, tmp_path / "bundle", check=False, say=lambda _: None)
    built = build(backbone, tmp_path / "plain", FP32)
    model = ir.load(built)
    ends = {*model.graph.inputs, *model.graph.outputs}
    for number, node in enumerate(model.graph):
        node.name = f"node {number}"
        for at, value in enumerate(node.outputs):
            if value not in ends:
                value.name = f"value {number} {at}" if value.name else value.name
    for number, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"weight {number}"
    renamed = tmp_path / "renamed.onnx"
    ir.save(model, renamed, external_data="renamed.onnx.data", size_threshold_bytes=1024)
    layers = json.loads((bundle / "deltamem.json").read_text())["memory"]["layers"]
    want = Grafted(bundle).feed(np.arange(3, 40))
    graft(renamed, bundle / "model.onnx", adapter, layers, backbone.geometry.head_dim)
    assert np.array_equal(Grafted(bundle).feed(np.arange(3, 40)), want)


def test_a_layer_without_attention_carries_no_memory(make_backbone, tmp_path) -> None:
    source = make_backbone("lfm2")
    assert sorted(random_adapter(source).layers) == [1]
    with pytest.raises(
        AdapterError, match=r"target_layers is \[0, 1\], expected layers with attention; \[0, 2\] of this"
    ):
        random_adapter(source, target_layers=(0, 1))
    graph = ir.load(build(Backbone.load(source), tmp_path / "plain", FP32)).graph
    with pytest.raises(ExportError, match=r"no GroupQueryAttention on past_key_values\.0\.key"):
        find_attentions(graph, [0])


# ---------------------------------------------------------------------- refused

WRONG = {
    "heads of 24": ("llama", {"head_dim": 24}, "head_dim is 24; ONNX Runtime's attention needs a multiple of 16"),
    "a rotary part of 8": ("phi", {"partial_rotary_factor": 0.25}, "the rotary part of a head is 8"),
    "norms of q and k in Phi": ("phi", {"qk_layernorm": True}, "setting qk_layernorm is True, expected False"),
    "attention to what comes": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is on"),
    "experts in Granite": (
        "granitemoehybrid",
        {"num_local_experts": 2, "num_experts_per_tok": 1},
        "num_local_experts is 2, expected 0: the builder leaves out",
    ),
    "Mamba in Granite": (
        "granitemoehybrid",
        {"layer_types": ["linear_attention", "attention", "attention"]},
        "the builder makes every layer an attention layer",
    ),
    "experts that are not normalised": ("lfm2_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    "an activation without a node": ("llama", {"hidden_act": "quick_gelu"}, "quick_gelu activation function is not"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_setting_that_cannot_be_right_is_refused_without_a_check(wrong, make_backbone, tmp_path) -> None:
    family, more, said = WRONG[wrong]
    source = make_backbone(family, **more)
    adapter = random_adapter(save_backbone(tmp_path / "plain", family))
    with pytest.raises(ExportError, match=re.escape(said)):
        export_bundle(source, adapter, tmp_path / "bundle", check=False, say=lambda _: None)


@pytest.mark.parametrize("architecture", [*REFUSED, "NewForCausalLM"])
def test_a_family_that_cannot_become_a_bundle_says_why(architecture, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "any"}))
    why = REFUSED.get(architecture, "is not supported")
    with pytest.raises(ExportError, match=rf"architecture {architecture} \(any\).*{re.escape(why)}"):
        Backbone.load(tmp_path)


def test_an_adapter_of_all_layers_needs_attention_in_all() -> None:
    assert AdapterConfig(rank=8, alpha=8.0).memory_layers(4, without=[0, 2]) == (1, 3)


# ---------------------------------------------------------------------- the page

FIGURE = re.compile(r"\d\.\de[-+]\d\d")


def page(rows: dict[str, Measured]) -> str:
    """docs/families.md."""
    lines = [
        "| model | architecture | builder's class | plain graph: as built | corrected | with memory: logits | states | int4 | "
        "corrected, and what else is different |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        family = row.family
        title = family.title + (" (LongRoPE)" if name.endswith("longrope") else "")
        before = f"does not build ({row.before})" if isinstance(row.before, str) else _figure(row.before)
        notes = "; ".join(
            note for note in (f"**{family.corrected}**" if family.corrected else "", family.other) if note
        )
        cells = (title, family.architecture, family.builder, before, *map(_figure, (row.after, row.logits)))
        states = f"{row.states:.1e}" if row.states <= STATES else f"**{row.states:.1e}**"
        lines.append(f"| {' | '.join(cells)} | {states} | {_figure(row.int4)} | {notes} |")
    table = "\n".join(lines)
    why: dict[str, list[str]] = {}
    for architecture, reason in REFUSED.items():
        why.setdefault(reason, []).append(architecture)
    refused = "\n".join(f"* {', '.join(names)}: {reason}." for reason, names in why.items())
    return TEXT.format(table=table, refused=refused, count=len(TABLE), tokens=TOKENS)


def _figure(value: float) -> str:
    return f"{value:.1e}" if value <= LOGITS else f"**{value:.1e}**"


TEXT = """\
# Families

Written by `tests/export/test_families.py`, which also holds it against what it measures. {count} architectures, each a tiny random model
with odd settings (an epsilon of 3e-3, windows of 16, random norms and biases), in float32 on a CPU; the figures are largest absolute
differences.

* **Plain graph**: onnxruntime-genai's decoder before a memory is grafted, from transformers on the same weights, over {tokens} tokens in
  three calls. "As built" is what the builder makes alone. What is bold is wrong, and the builder says nothing; the exporter corrects it.
* **With memory**: the bundle from the PyTorch reference, corrections on q, k, v and o: two chunks and a token, a new turn, a turn that only
  reads. The engine is held to the same tolerances, 1e-4 and 1e-5.
* **int4**: the plain graph from transformers with the weights that its 4-bit blocks stand for, activations in float32; the bundle runs.

{table}

Every export compares its own graph with transformers in the same way and refuses one that differs; `--no-check` leaves that out, but not
the corrections, nor the refusals below.

## How corrections enter

Δq, Δk and Δv are added straight after their projection: before a clip, before norms of q and k, before RoPE. Δo is added straight after the
projection behind the attention (`o_proj`, `out_proj`, `dense`): before a norm behind it, before a residual multiplier. Layers without
attention have no memory; `target_layers` that names one is an error. LFM 2 in a batch of the graph's own: rows must have the same length,
since the tail that a convolution carries would hold a shorter row's padding.

## What is refused

Architectures:

{refused}

Settings, also with `--no-check`:

* Heads, or the part of them that RoPE turns, whose width is no multiple of 16: ONNX Runtime's attention fails on them when it runs.
* `use_bidirectional_attention`; in Phi `qk_layernorm`; in Granite 4 experts (`num_local_experts` above 0) and Mamba layers; in LFM 2 with
  experts `norm_topk_prob` off; activations other than silu, relu, relu² and the gelus.
* Files that are already quantised.

A bundle of a model with LongRoPE has the original context, with the short factors. Beyond it transformers turns the tokens of one long call
with other factors than the same tokens in two calls, so that a stream would have no one result. Dynamic RoPE scaling begins behind
`max_position_embeddings`, where a bundle ends.
"""


def test_the_page_says_what_is_measured(measured) -> None:
    found = page({name: measured(name) for name in FAMILIES})
    if os.environ.get("DELTAMEM_WRITE_DOCS"):
        PAGE.write_text(found, encoding="utf-8")
    committed = PAGE.read_text(encoding="utf-8")
    assert FIGURE.sub("#", committed) == FIGURE.sub("#", found), (
        "docs/families.md is not what this test measures; write it with DELTAMEM_WRITE_DOCS=1"
    )
