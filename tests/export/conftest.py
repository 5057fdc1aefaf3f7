"""What the exporter's tests share: quiet libraries on one thread, and small random backbones and adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, SmolLM3Config

from deltamem_export.adapter import Adapter, AdapterConfig
from deltamem_export.reference import attach

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "qwen3": lambda **more: Qwen3Config(**SIZES, head_dim=16, **more),
    "llama": lambda **more: LlamaConfig(**SIZES, **more),
    "smollm3": lambda **more: SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], **more),
}


@pytest.fixture
def make_backbone(tmp_path: Path) -> Callable[..., Path]:
    """`make_backbone("llama", attention_bias=True)`: a folder with a random tiny decoder, biases and norms random too."""

    def make(family: str, **more: object) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](**more))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
        directory = tmp_path / f"backbone-{family}"
        model.save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    """`make_adapter(backbone, rank=4, ...)`: a random adapter that fits, its corrections and gates not small."""

    def make(backbone: Path, **settings: object) -> Adapter:
        config = replace(AdapterConfig(rank=4, alpha=4.0), **settings)
        torch.manual_seed(1)
        handle = attach(AutoModelForCausalLM.from_pretrained(backbone), config)
        with torch.no_grad():
            for name, parameter in handle.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 1.0))
                if name.endswith("norm_weight"):
                    parameter.copy_(torch.rand_like(parameter) * 0.3)
        return handle.adapter()

    return make
