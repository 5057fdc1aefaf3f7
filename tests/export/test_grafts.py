"""Whole bundles against the reference on the same backbone: families, where corrections enter, which layers, and every rule."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import deltamem_rt as dm
import emulated
from agreement import assert_close
from deltamem_export.adapter import Adapter
from deltamem_export.bundle import export_bundle
from deltamem_export.reference import attach, span_weights
from grafted import Grafted

LOGITS, STATES = 1e-4, 1e-5
QUIET = {"say": lambda _: None}
EVERY = ("q", "k", "v", "o")

# family, its settings, the adapter's settings
VARIANTS = {
    "qwen3, every head, biases": ("qwen3", {"attention_bias": True}, {"delta_heads": EVERY}),
    "llama, packed q k v, every head": ("llama", {}, {"delta_heads": EVERY}),
    "llama, packed with biases, k and o": ("llama", {"attention_bias": True}, {"delta_heads": ("k", "o")}),
    "llama, q alone": ("llama", {}, {"delta_heads": ("q",)}),
    "smollm3, o alone, two layers": ("smollm3", {}, {"delta_heads": ("o",), "target_layers": (0, 2)}),
    "one layer, the last": ("qwen3", {}, {"target_layers": (2,)}),
    "no lambda, a gate per head": (
        "llama",
        {},
        {"state_update_mode": "no_lambda", "rankwise_gates": False, "rank": 16},
    ),
    "no lambda, a gate per row": ("qwen3", {}, {"state_update_mode": "no_lambda"}),
    "three heads, a gate per head": ("qwen3", {}, {"num_state_heads": 3, "rankwise_gates": False}),
    "three heads, a gate per row": ("llama", {}, {"num_state_heads": 3}),
    "own lambda": ("llama", {}, {"couple_lambda": False}),
    "own lambda, two heads, a gate per head": (
        "qwen3",
        {},
        {"couple_lambda": False, "num_state_heads": 2, "rankwise_gates": False},
    ),
    "lambda outside": ("qwen3", {}, {"state_update_mode": "lambda_outside"}),
    "norm on delta o": ("qwen3", {}, {"delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 1e-5}),
    "trained scale per layer": ("llama", {}, {"trainable_delta_scale": True}),
    "trained scale per head": (
        "llama",
        {},
        {"trainable_delta_scale": True, "delta_scale_granularity": "head", "delta_heads": EVERY},
    ),
    "free keys": ("qwen3", {}, {"normalize_qk": False, "rank": 2}),
    "rank 1": ("llama", {}, {"rank": 1}),
    "rank 64": ("llama", {}, {"rank": 64, "alpha": 8.0}),
}


def soften(adapter: Adapter) -> Adapter:
    """Keys that are not unit vectors must be short, or the memory explodes and no two programs can agree on it."""
    layers = {
        i: {name: t * 0.05 if name == "memory_k_proj" else t for name, t in tensors.items()}
        for i, tensors in adapter.layers.items()
    }
    return Adapter(adapter.config, layers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bundle_computes_what_the_reference_computes(
    variant, make_backbone, make_adapter, emulator, tmp_path
) -> None:
    family, more, settings = VARIANTS[variant]
    backbone = make_backbone(family, **more)
    adapter = make_adapter(backbone, **settings)
    if not adapter.config.normalize_qk:
        adapter = soften(adapter)
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", check=False, **QUIET)

    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    handle = attach(model, adapter)
    handle.reset(2)
    grafted = Grafted(bundle, batch=2, measured=True)
    ids = np.random.default_rng(0).integers(3, 64, (2, 40))
    cache = None
    moved = 0.0
    # Two prompts, a decoded token on their caches, and a turn of their own with writes off.
    for part, write in ((slice(0, 17), True), (slice(17, 18), True), (slice(18, 40), False)):
        if not write:
            cache = None
            grafted.end_turn()
        handle.writes = write
        with torch.no_grad():
            out = model(torch.from_numpy(ids[:, part]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert_close("logits", grafted.feed(ids[:, part], write=write), out.logits.numpy(), LOGITS)
        assert_close("states", grafted.memory, handle.state.numpy(), STATES * max(1.0, float(handle.state.abs().max())))
        moved = max(moved, float(grafted.energy[..., 0].max()))
    assert moved > 1e-3, "no correction did anything, so nothing was compared"

    # The engine, with each sequence in a session of its own.
    card = emulated.for_a_card(bundle, tmp_path / "card")
    places = ((bundle, "cpu", "fused"), (bundle, "cpu", "portable"), (card, emulated.ON_DEVICE, "fused"))
    for (path, device, graph), (row, wanted) in product(places, enumerate(grafted.memory)):
        with dm.Model.load(path, device=device, graph=graph).session() as session:
            session.feed(ids[row, :17])
            session.feed(ids[row, 17:18])
            session.end_turn()
            logits = session.feed(ids[row, 18:], write=False, logits=True)
            assert_close(f"the engine's logits, {graph} on {device}", logits, out.logits[row].numpy(), LOGITS)
            limit = STATES * max(1.0, float(np.abs(wanted).max()))
            assert_close(f"the engine's states, {graph} on {device}", session.memory, wanted, limit)


SPAN_RULES = {
    "messages": ("qwen3", {"memory_write_granularity": "message_mean"}),
    "sentences, three heads": ("llama", {"num_state_heads": 3}),
    "sentences, two heads, a gate per head": ("smollm3", {"num_state_heads": 2, "rankwise_gates": False}),
    "sentences, own lambda, every head": ("llama", {"couple_lambda": False, "delta_heads": EVERY}),
    "sentences, lambda outside, one layer": ("qwen3", {"state_update_mode": "lambda_outside", "target_layers": (1,)}),
    "sentences, no lambda": ("qwen3", {"state_update_mode": "no_lambda"}),
}


@pytest.mark.parametrize("rule", SPAN_RULES)
def test_a_span_bundle_computes_what_the_reference_computes(rule, make_backbone, make_adapter, tmp_path) -> None:
    """A padded batch in one call; then one sequence alone: in chunks that cut its spans, a decoded token, token writes on purpose, and
    a turn with writes off."""
    family, settings = SPAN_RULES[rule]
    backbone = make_backbone(family)
    adapter = make_adapter(backbone, **{"memory_write_granularity": "sentence_mean", **settings})
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", check=False, **QUIET)
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    handle = attach(model, adapter)
    handle.reset(2)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(3, 64, (2, 40)))
    real = np.ones((2, 40), np.int64)
    real[1, 33:] = 0
    spans = torch.from_numpy(np.where(real, np.arange(40) // 6, -1))
    spans[:, :3] = spans[0, 20] = -1
    weights = span_weights(spans).numpy()

    def reference(ids: torch.Tensor, spans: torch.Tensor | str | None, write: bool = True) -> np.ndarray:
        handle.spans, handle.writes = spans, write
        with torch.no_grad():
            return model(ids, use_cache=False).logits.numpy()

    def agrees(what: str, grafted: Grafted, logits: np.ndarray, wanted: np.ndarray) -> None:
        assert_close(f"{what}: logits", logits, wanted, LOGITS)
        want = handle.state.numpy()
        assert_close(f"{what}: states", grafted.memory, want, STATES * max(1.0, float(np.abs(want).max())))

    both = Grafted(bundle, batch=2)
    wanted = reference(ids, spans)
    mask = weights.any(axis=-1).astype(np.float32)
    logits = both.feed(ids.numpy(), spans=weights, span_mask=mask, attention_mask=real)
    agrees("a batch", both, logits[real == 1], wanted[real == 1])  # what the padding itself says is nobody's

    one = Grafted(bundle, measured=True)
    one.memory = before = both.memory[:1]
    handle.state = handle.state[:1]
    found, gathered = [], None
    for start, end in pairwise((0, 9, 10, 27, 40)):
        complete = np.full((1, weights.shape[1]), float(end == 40), np.float32)
        part = slice(start, end)
        found.append(
            one.feed(ids[:1, part].numpy(), spans=weights[:1, :, part], span_mask=complete, past_spans=gathered)
        )
        gathered = one.spans
        assert end == 40 or np.array_equal(one.memory, before), "a span was written before it was complete"
    agrees("chunks", one, np.concatenate(found, axis=1), reference(ids[:1], spans[:1]))
    one.end_turn()

    agrees("a token", one, one.feed(ids[:1, 7:8].numpy()), reference(ids[:1, 7:8], torch.zeros(1, 1, dtype=torch.long)))
    one.end_turn()
    agrees("token writes", one, one.feed(ids[:1, :12].numpy()), reference(ids[:1, :12], "token"))
    one.end_turn()
    before = one.memory
    agrees("writes off", one, one.feed(ids[:1, 5:20].numpy(), write=False), reference(ids[:1, 5:20], None, write=False))
    assert np.array_equal(one.memory, before)
    assert one.energy[..., 0].max() > 1e-3, "no correction did anything, so nothing was compared"


def test_energies_are_the_squares_of_corrections_and_projections(make_backbone, make_adapter, tmp_path) -> None:
    backbone = make_backbone("llama", attention_bias=True)
    adapter = make_adapter(backbone, delta_heads=EVERY, target_layers=(0, 2))
    grafted = Grafted(export_bundle(backbone, adapter, tmp_path / "bundle", check=False, **QUIET), measured=True)
    ids = np.arange(3, 30)
    grafted.feed(ids)

    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    found: dict[tuple[int, str], torch.Tensor] = {}
    for i in (0, 2):
        for p in EVERY:
            module = model.get_submodule(f"model.layers.{i}.self_attn.{p}_proj")
            module.register_forward_hook(lambda _m, _a, out, key=(i, p): found.update({key: out.detach()}))
    handle = attach(model, adapter)  # its hooks run after these, so these see the projections alone
    reads: list[torch.Tensor] = []
    scan = handle.scan
    handle.scan = lambda *tensors: (lambda out: (reads.append(out[0]), out)[1])(scan(*tensors))
    with torch.no_grad():
        model(torch.from_numpy(ids[None]))
        deltas = [handle.layers[str(i)].corrections(r) for i, r in zip((0, 2), reads, strict=True)]
    for number, i in enumerate((0, 2)):
        for at, p in enumerate(EVERY):
            want = torch.stack([deltas[number][p].square().sum(-1), found[i, p].square().sum(-1)], dim=-1)[0].numpy()
            assert_close(f"layer {i}, {p}", grafted.energy[0, :, number, at], want, 1e-4 * max(1.0, want.max()))


@pytest.fixture
def batched(parity_bundle: Callable[..., Path]) -> tuple[Grafted, Grafted]:
    bundle = parity_bundle("qwen3_tsw_qo")
    return Grafted(bundle, batch=3), Grafted(bundle)


def test_a_padded_batch_is_each_sequence_alone(batched) -> None:
    """Prompts of different lengths, padded behind, then a token a step: the attention looks only at how many tokens a row of the
    mask counts, and writes the next one behind them, over the padding."""
    many, one = batched
    rng = np.random.default_rng(1)
    lengths = (19, 7, 12)
    prompts = [rng.integers(3, 256, n) for n in lengths]
    steps = rng.integers(3, 256, (3, 4))
    padded = np.zeros((3, max(lengths)), np.int64)
    real = np.zeros((3, max(lengths)), np.int64)
    for b, prompt in enumerate(prompts):
        padded[b, : len(prompt)], real[b, : len(prompt)] = prompt, 1
    last = np.array([b * max(lengths) + n - 1 for b, n in enumerate(lengths)])
    logits = [many.feed(padded, attention_mask=real, write_mask=real, rows=last)]
    states = [many.memory]
    for step in range(4):
        logits.append(many.feed(steps[:, step : step + 1])[:, 0])
        states.append(many.memory)
    for b, prompt in enumerate(prompts):
        one.reset()
        for step in range(5):
            alone = one.feed(prompt if step == 0 else steps[b, step - 1 : step])[-1]
            assert_close(f"sequence {b}, step {step}: logits", logits[step][b], alone, LOGITS)
            assert_close(f"sequence {b}, step {step}: states", states[step][b], one.memory[0], STATES)


def test_padding_neither_writes_nor_moves_the_state(batched) -> None:
    many, _ = batched
    many.memory = np.random.default_rng(2).standard_normal(many.memory_shape).astype(np.float32)
    before = many.memory.copy()
    many.feed(np.full((3, 5), 7), write_mask=np.zeros((3, 5)))
    assert np.array_equal(many.memory, before)


def test_logits_rows_pick_rows_of_the_flattened_batch(batched) -> None:
    many, _ = batched
    ids = np.random.default_rng(3).integers(3, 256, (3, 6))
    every = many.feed(ids).reshape(18, -1)
    many.reset()
    rows = np.array([17, 0, 6, 6])
    assert_close("rows", many.feed(ids, rows=rows), every[rows], 1e-5)


def test_one_kv_buffer_serves_as_past_and_present(parity_bundle) -> None:
    """`graph.shared_kv`: a buffer of capacity C bound twice; the attention mask alone says how many tokens there are."""
    import onnxruntime as ort

    one = Grafted(parity_bundle("qwen3_tsw_qo"))
    assert one.manifest["graph"]["shared_kv"]
    ids = np.random.default_rng(4).integers(3, 256, 30)
    want = np.concatenate([one.feed(part) for part in np.split(ids, [12, 13])])
    capacity = 64
    buffers = {
        name: ort.OrtValue.ortvalue_from_numpy(np.zeros((*one.kv_shape[:2], capacity, one.kv_shape[3]), np.float32))
        for name in one.past
    }
    memory = np.zeros(one.memory_shape, np.float32)
    logits = []
    for start, end in ((0, 12), (12, 13), (13, 30)):
        binding = one.session.io_binding()
        binding.bind_cpu_input("input_ids", ids[None, start:end].astype(np.int32))
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_cpu_input("write_mask", np.ones((1, end - start), np.float32))
        binding.bind_cpu_input("logits_rows", np.arange(end - start))
        binding.bind_cpu_input("past_memory", memory)
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        for name in ("logits", "present_memory"):
            binding.bind_output(name)
        one.session.run_with_iobinding(binding)
        found = binding.copy_outputs_to_cpu()
        by_shape = {value.ndim: value for value in found if value.ndim in (2, 5)}
        logits.append(by_shape[2])
        memory = by_shape[5]
    assert_close("logits", np.concatenate(logits), want, LOGITS)
    assert_close("states", memory, one.memory, STATES)


@pytest.mark.parametrize("granularity", ["token", "sentence_mean"])
def test_queries_are_what_the_reference_reads_with(granularity, make_backbone, make_adapter, tmp_path) -> None:
    backbone = make_backbone("llama")
    adapter = make_adapter(
        backbone, num_state_heads=2, target_layers=(0, 2), memory_write_granularity=granularity, delta_heads=("q", "o")
    )
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", check=False, **QUIET)
    grafted = Grafted(bundle, measured=True)
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    handle = attach(model, adapter)
    handle.record, handle.spans = True, "token"
    told, asked = np.arange(3, 30), np.arange(30, 50)
    with torch.no_grad():
        for ids in (told, asked):
            model(torch.from_numpy(ids[None]))
            grafted.feed(ids)
            grafted.end_turn()
    want = np.stack([handle.recorded[i].q[0].numpy() for i in (0, 2)], axis=1)  # [T, L, H, r]
    assert_close("queries", grafted.queries[0], want, 1e-5)
