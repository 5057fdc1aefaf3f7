"""The handle that `attach` gives: hooks come off, states are explicit, shapes are checked, and any scan may take the default's place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config

from deltamem_export.adapter import Adapter, AdapterConfig
from deltamem_export.errors import AdapterError
from deltamem_export.reference import MemoryHandle, attach, scan

IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture
def model(make_backbone) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(make_backbone("qwen3")).eval()


@pytest.fixture
def handle(model: nn.Module, make_backbone, make_adapter) -> MemoryHandle:
    return attach(model, make_adapter(make_backbone("qwen3")))


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_an_untrained_memory_changes_nothing(model) -> None:
    before = run(model)
    handle = attach(model, AdapterConfig(rank=4, alpha=4.0))
    assert torch.equal(run(model), before)
    assert handle.state.abs().sum() > 0, "yet it writes"


def test_detaching_leaves_the_decoder_as_it_was(model, make_backbone, make_adapter) -> None:
    before = run(model)
    handle = attach(model, make_adapter(make_backbone("qwen3")))
    run(model)  # the first call after a reset reads what this call writes
    assert not torch.equal(run(model), before)
    handle.detach_hooks()
    assert torch.equal(run(model), before)


def test_the_state_is_what_a_caller_puts_there(model, handle) -> None:
    handle.reset(2)
    run(model)
    kept = handle.state.clone()
    first = run(model)
    handle.state = kept
    assert torch.equal(run(model), first)


def test_a_state_of_another_shape_or_batch_is_refused(model, handle) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 3, 1, 4, 4\]"):
        handle.state = torch.zeros(2, 3, 4, 4)
    handle.reset(3)
    with pytest.raises(ValueError, match="of 3 sequences, the call of 2"):
        run(model)


def test_a_write_mask_keeps_tokens_from_writing(model, handle) -> None:
    handle.write_mask = torch.zeros(IDS.shape)
    run(model)
    assert handle.state.abs().sum() == 0
    handle.write_mask = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="write_mask"):
        run(model)


def test_another_scan_takes_the_place_of_the_default(model, make_backbone, make_adapter) -> None:
    calls = []

    def counted(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(tensors[0].shape)
        return scan(*tensors)

    attach(model, make_adapter(make_backbone("qwen3")), scan=counted)
    run(model)
    assert calls == [(2, 10, 1, 4)] * 3


def test_only_memories_ask_for_gradients_and_get_them(model, handle) -> None:
    model.requires_grad_(False)
    handle.reset(2)
    model(IDS)
    model(IDS).logits.square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in handle.parameters())


def test_what_was_trained_comes_out_as_an_adapter(model, handle, tmp_path) -> None:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1.0)
    handle.adapter().save(tmp_path / "trained")
    again = attach(model, Adapter.load(tmp_path / "trained"))
    for (name, ours), (_, theirs) in zip(handle.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_packed_projection_is_corrected_by_slices() -> None:
    """Phi-3's qkv_proj: the same as correcting q, k and v each."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    handle = attach(model, AdapterConfig(rank=4, alpha=4.0, delta_heads=("k", "v")))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    seen = {}
    attention = model.model.layers[0].self_attn
    handle.reset(2)
    run(model)
    handle.detach_hooks()
    attention.qkv_proj.register_forward_hook(lambda _m, _a, out: seen.update(before=out))
    again = attach(model, handle.adapter())
    attention.qkv_proj.register_forward_hook(lambda _m, _a, out: seen.update(after=out))
    again.state = handle.state
    run(model)
    moved = (seen["after"] - seen["before"]).abs().amax(dim=(0, 1))
    assert bool((moved[:32] == 0).all())  # q
    assert bool((moved[32:] > 0).all())  # k and v


def test_writes_per_message_want_spans_or_token_writes_on_purpose(model) -> None:
    config = replace(AdapterConfig(rank=4, alpha=4.0), memory_write_granularity="message_mean")
    handle = attach(model, config)
    ids = torch.arange(3, 9)[None]
    with pytest.raises(ValueError, match=r"message_mean.*\"token\""):
        model(ids)
    handle.spans = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"spans has shape \[1, 4\], expected \[1, 6\]"):
        model(ids)
    handle.spans = "token"
    model(ids)
    assert handle.state is not None


@pytest.mark.parametrize("heads", [1, 3])
def test_spans_of_one_token_a_call_are_token_writes(make_backbone, make_adapter, heads: int) -> None:
    backbone = make_backbone("qwen3")
    adapter = make_adapter(backbone, memory_write_granularity="sentence_mean", num_state_heads=heads)
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    handle = attach(model, adapter)
    states = []
    for spans in ("token", torch.zeros(1, 1, dtype=torch.long)):
        handle.reset()
        handle.spans = spans
        with torch.no_grad():
            for token in range(3, 9):
                model(torch.tensor([[token]]))
        states.append(handle.state)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-6)


def test_spans_are_computed_in_float64_too(model) -> None:
    """As `verify` asks for it, to tell whose rounding a small difference is."""
    torch.manual_seed(0)
    handle = attach(model, AdapterConfig(rank=4, alpha=4.0, memory_write_granularity="message_mean"))
    handle.spans = torch.tensor([[0] * 4 + [2] * 6, [-1] * 3 + [1] * 7])
    single = run(model)
    state = handle.state
    model.double()
    handle.double()
    handle.reset(2)
    double = run(model)
    assert handle.state.dtype == double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=0, atol=1e-5)
    torch.testing.assert_close(handle.state.float(), state, rtol=0, atol=1e-6)


def test_an_adapter_of_another_backbone_is_refused(model, parity_data: Path) -> None:
    with pytest.raises(AdapterError, match="memory_q_proj"):
        attach(model, Adapter.load(parity_data / "qwen3_tsw_qo" / "adapter"))
