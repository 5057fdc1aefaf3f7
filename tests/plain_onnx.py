"""A decoder as ONNX in the way of PyTorch's own exporter: standard operators, fresh caches, the inputs and outputs that Optimum gives a
decoder. What `deltamem-export graft --onnx` is for, made here for its tests."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache


class Plain(nn.Module):
    """A causal language model over tensors alone: the cache as a flat list, the mask made by hand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache()
        for i in range(0, len(past), 2):
            cache.update(past[i], past[i + 1], i // 2)
        before, new = past[0].shape[2], input_ids.shape[1]
        causal = torch.arange(before + new)[None] <= torch.arange(new)[:, None] + before
        allowed = causal[None, None] & (attention_mask[:, None, None] != 0)
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        out = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return out.logits, *(tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values))


def write_plain_onnx(model: nn.Module, path: Path) -> Path:
    """Writes an eager decoder to `path`."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    caches = [f"{i}.{part}" for i in range(c.num_hidden_layers) for part in ("key", "value")]
    past = [torch.zeros(1, c.num_key_value_heads, 5, head_dim) for _ in caches]
    ones = torch.ones(1, 9, dtype=torch.long)
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in caches)]
    outputs = ["logits", *(f"present.{name}" for name in caches)]
    axes = {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "position_ids", "logits")}
    axes |= {"attention_mask": {0: "batch", 1: "total"}}
    axes |= {name: {0: "batch", 2: "past"} for name in inputs[3:]} | {
        name: {0: "batch", 2: "total"} for name in outputs[1:]
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every constant
        torch.onnx.export(
            Plain(model).eval(),
            (ones[:, :4], ones, torch.arange(5, 9)[None], *past),
            path,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,
        )
    return path
