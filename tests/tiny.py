"""Tiny random decoders of every family, and adapters that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    HunYuanDenseV1Config,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from deltamem_export.adapter import Adapter, AdapterConfig
from deltamem_export.reference import attach

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
# Odd values everywhere, so that a setting that is ignored shows: epsilons of 1e-3 and more, windows of 16, a hidden size whose
# root is irrational. The vocabulary is as wide as no other weight, since the builder takes a product of that width for the head.
ODD = SIZES | {"vocab_size": 72}
EPS = {"rms_norm_eps": 3e-3}
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "qwen3": lambda **more: Qwen3Config(**{**SIZES, "head_dim": 16, **more}),
    "llama": lambda **more: LlamaConfig(**{**SIZES, **more}),
    "smollm3": lambda **more: SmolLM3Config(**{**SIZES, "no_rope_layers": [1, 0, 1], **more}),
    "mistral": lambda **more: MistralConfig(**{**ODD, **EPS, "head_dim": 32, "sliding_window": 16, **more}),
    "qwen2": lambda **more: Qwen2Config(
        **{**ODD, **EPS, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, **more}
    ),
    "phi": lambda **more: PhiConfig(
        **{
            **ODD,
            "hidden_size": 64,
            "num_key_value_heads": 2,
            "layer_norm_eps": 3e-3,
            "partial_rotary_factor": 0.5,
            **more,
        }
    ),
    "phi3": lambda **more: Phi3Config(
        **{**ODD, **EPS, "sliding_window": 16, "original_max_position_embeddings": 256, **more}
    ),
    "phi3 longrope": lambda **more: Phi3Config(
        **{
            **ODD,
            **EPS,
            "hidden_size": 64,
            "original_max_position_embeddings": 96,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0],
                "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
            },
            "tie_word_embeddings": True,
            **more,
        }
    ),
    "gemma": lambda **more: GemmaConfig(**{**ODD, **EPS, "head_dim": 32, **more}),
    "gemma2": lambda **more: Gemma2Config(
        **{
            **ODD,
            **EPS,
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
            **more,
        }
    ),
    "gemma3": lambda **more: Gemma3TextConfig(
        **{
            **ODD,
            **EPS,
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
            **more,
        }
    ),
    "granite": lambda **more: GraniteConfig(
        **{
            **ODD,
            **EPS,
            "embedding_multiplier": 3.3,
            "residual_multiplier": 0.37,
            "attention_multiplier": 0.19,
            "logits_scaling": 1.7,
            **more,
        }
    ),
    "granitemoehybrid": lambda **more: GraniteMoeHybridConfig(
        **{
            **ODD,
            **EPS,
            "embedding_multiplier": 3.3,
            "residual_multiplier": 0.37,
            "attention_multiplier": 0.19,
            "logits_scaling": 1.7,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 48,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "layer_types": ["attention"] * 3,
            **more,
        }
    ),
    "olmo": lambda **more: OlmoConfig(**{**ODD, "clip_qkv": 0.9, **more}),
    "nemotron": lambda **more: NemotronConfig(
        **{
            **ODD,
            "hidden_size": 64,
            "initializer_range": 0.08,
            "norm_eps": 3e-3,
            "partial_rotary_factor": 0.5,
            "mlp_bias": True,
            **more,
        }
    ),
    "ernie4_5": lambda **more: Ernie4_5Config(**{**ODD, **EPS, "head_dim": 32, "use_bias": True, **more}),
    "hunyuan": lambda **more: HunYuanDenseV1Config(
        **{
            **ODD,
            **EPS,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 10000.0, "factor": 1.0},
            **more,
        }
    ),
    "lfm2": lambda **more: Lfm2Config(
        **{
            **ODD,
            "norm_eps": 3e-3,
            "conv_bias": True,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv"],
            **more,
        }
    ),
    "lfm2_moe": lambda **more: Lfm2MoeConfig(
        **{
            **ODD,
            "norm_eps": 3e-3,
            "conv_bias": True,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.3,
            "layer_types": ["conv", "full_attention", "conv"],
            **more,
        }
    ),
    "gpt_oss": lambda **more: GptOssConfig(
        **{
            **ODD,
            **EPS,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            **more,
        }
    ),
}


def save_backbone(directory: Path, family: str, **more: object) -> Path:
    """A folder with a random tiny decoder, biases and norms random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
                if family == "nemotron" and "norm.weight" in name:
                    parameter.sub_(1.0)  # its norms multiply by 1 + w, and transformers starts w at 1
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    model.save_pretrained(directory)
    return directory


def random_adapter(backbone: Path, **settings: object) -> Adapter:
    """An adapter that fits, its corrections and gates not small."""
    config = replace(AdapterConfig(rank=4, alpha=4.0), **settings)
    torch.manual_seed(1)
    handle = attach(AutoModelForCausalLM.from_pretrained(backbone), config)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 1.0))
            if name.endswith("norm_weight"):
                parameter.copy_(torch.rand_like(parameter) * 0.3)
    return handle.adapter()
