"""The table of model families: which architectures can become a bundle, which class of onnxruntime-genai's builder
makes them, and what in a configuration changes results (windows, layers without RoPE, context). What cannot be made
right is refused here by name, with the reason, whether a comparison follows or not. docs/families.md is generated from
this table by its test. It knows nothing of weights, graphs or memories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from deltamem_export.errors import ExportError


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: what `architectures` in config.json says.
        model_type: what `model_type` in config.json says.
        builder: the class of onnxruntime-genai's builder that makes it.
        title: for people.
        corrected: what the builder gets wrong of it and is corrected (`corrections.py`), for people.
        other: what else it does differently from Llama, for people.
        windows: "none", "all" (every layer, where `sliding_window` is set) or "types" (the layers that `layer_types`
        calls sliding_attention).
    """

    architecture: str
    model_type: str
    builder: str
    title: str
    corrected: str = ""
    other: str = ""
    windows: str = "none"

    @property
    def hybrid(self) -> bool:
        """Whether some layers have no attention."""
        return self.model_type in ("lfm2", "lfm2_moe")


_EPSILON = "the norms' epsilon was fixed"

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "LlamaForCausalLM",
            "llama",
            "LlamaModel",
            "Llama 1 to 3",
            "RoPE scalings other than llama3 were dropped",
        ),
        Family(
            "MistralForCausalLM",
            "mistral",
            "MistralModel",
            "Mistral",
            "sliding windows were dropped",
            "window on every layer",
            windows="all",
        ),
        Family(
            "Qwen2ForCausalLM",
            "qwen2",
            "QwenModel",
            "Qwen 2, 2.5",
            "",
            "biases on q, k, v; windows from `max_window_layers` on",
            windows="types",
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            "Qwen3Model",
            "Qwen 3 (dense)",
            "",
            "norms of q and k; windows from `max_window_layers` on",
            windows="types",
        ),
        Family(
            "SmolLM3ForCausalLM",
            "smollm3",
            "SmolLM3Model",
            "SmolLM 3",
            "layers without RoPE made the builder fail",
            "layers without RoPE",
            windows="types",
        ),
        Family(
            "PhiForCausalLM",
            "phi",
            "PhiModel",
            "Phi 1, 1.5, 2",
            _EPSILON,
            "LayerNorm; attention and MLP side by side; partial RoPE; biases everywhere",
        ),
        Family(
            "Phi3ForCausalLM",
            "phi3",
            "Phi3MiniModel",
            "Phi 3, 3.5, 4, 4-mini",
            "sliding windows were dropped",
            "q, k, v packed; partial RoPE; LongRoPE up to the original context (the short factors)",
            windows="all",
        ),
        Family(
            "GemmaForCausalLM",
            "gemma",
            "GemmaModel",
            "Gemma 1",
            "the embeddings' scale was rounded to two decimals",
            "scaled embeddings; norms of 1 + w; tied embeddings",
        ),
        Family(
            "Gemma2ForCausalLM",
            "gemma2",
            "Gemma2Model",
            "Gemma 2",
            "the embeddings' scale was rounded to two decimals",
            "windows on every other layer; soft caps; norms behind attention and MLP; tied embeddings",
            windows="types",
        ),
        Family(
            "Gemma3ForCausalLM",
            "gemma3_text",
            "Gemma3Model",
            "Gemma 3 (text)",
            "two RoPEs in one configuration made the builder fail; the embeddings' scale was rounded to two decimals",
            "windows, and a RoPE of their own on those layers; norms of q and k; norms behind attention and MLP",
            windows="types",
        ),
        Family(
            "GraniteForCausalLM",
            "granite",
            "GraniteModel",
            "Granite 3",
            "",
            "multipliers of embeddings, residuals, attention and logits",
        ),
        Family(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            "GraniteMoEHybridModel",
            "Granite 4 (attention layers, dense MLP)",
            "RoPE was added to layers that have none",
            "multipliers as in Granite 3; layers of Mamba and experts are refused",
        ),
        Family(
            "OlmoForCausalLM",
            "olmo",
            "OLMoModel",
            "OLMo 1",
            "RMSNorm stood for LayerNorm; `clip_qkv` was dropped",
            "LayerNorm without weights; clipped q, k, v (corrections enter before the clip)",
        ),
        Family(
            "NemotronForCausalLM",
            "nemotron",
            "NemotronModel",
            "Nemotron 3, 4 (Minitron)",
            f"{_EPSILON}; biases of the MLP were dropped",
            "LayerNorm of 1 + w; partial RoPE; relu²",
        ),
        Family(
            "Ernie4_5ForCausalLM",
            "ernie4_5",
            "ErnieModel",
            "ERNIE 4.5 (dense)",
            "",
            "interleaved RoPE",
        ),
        Family(
            "HunYuanDenseV1ForCausalLM",
            "hunyuan_v1_dense",
            "HunyuanDenseV1Model",
            "HunYuan dense v1",
            "",
            "norms of q and k behind RoPE; `position_ids` is an input",
        ),
        Family(
            "Lfm2ForCausalLM",
            "lfm2",
            "LFM2Model",
            "LFM 2 (dense)",
            "biases of the convolutions' projections were dropped",
            "convolutions between the attention layers, carried as `past.{i}.conv`; memory on the attention layers",
        ),
        Family(
            "Lfm2MoeForCausalLM",
            "lfm2_moe",
            "LFM2MoEModel",
            "LFM 2 (mixture of experts)",
            "biases of the convolutions' projections were dropped",
            "as LFM 2; the experts' weights and the routers stay as the activations are, also in int4",
        ),
        Family(
            "GptOssForCausalLM",
            "gpt_oss",
            "GPTOSSModel",
            "GPT-OSS",
            "windows went by odd and even layers, whatever `layer_types` says",
            "attention sinks; windows; experts and routers as the activations are, also in int4",
            windows="types",
        ),
    )
}

_CODE = "its code comes with the model folder, and no code from a folder is run here"
_NO_BUILDER = "onnxruntime-genai 0.18's builder does not know it"
_VISION = "it is a model of text and images or sound; a bundle holds a decoder of text alone"

# Architectures that are known and cannot become a bundle: → why.
REFUSED: dict[str, str] = {
    "Olmo2ForCausalLM": _NO_BUILDER,
    "Olmo3ForCausalLM": _NO_BUILDER,
    "Qwen3MoeForCausalLM": _NO_BUILDER,
    "Qwen2MoeForCausalLM": _NO_BUILDER,
    "MinistralForCausalLM": _NO_BUILDER,
    "Ministral3ForCausalLM": _NO_BUILDER,
    "MixtralForCausalLM": _NO_BUILDER,
    "CohereForCausalLM": _NO_BUILDER,
    "Cohere2ForCausalLM": _NO_BUILDER,
    "StableLmForCausalLM": _NO_BUILDER,
    "GlmForCausalLM": _NO_BUILDER,
    "Glm4ForCausalLM": _NO_BUILDER,
    "GPTNeoXForCausalLM": _NO_BUILDER,
    "GPT2LMHeadModel": _NO_BUILDER,
    "FalconForCausalLM": _NO_BUILDER,
    "DeepseekV3ForCausalLM": _NO_BUILDER,
    "InternLM2ForCausalLM": _CODE,
    "ChatGLMModel": _CODE,
    "ChatGLMForConditionalGeneration": _CODE,
    "Phi3SmallForCausalLM": _CODE,
    "Phi3VForCausalLM": _CODE,
    "Phi4MMForCausalLM": _CODE,
    "VideoChatFlashQwenForCausalLM": _CODE,
    "PhiMoEForCausalLM": "the builder makes its mixture of experts for CUDA and 4 bits alone",
    "PhimoeForCausalLM": "the builder makes its mixture of experts for CUDA and 4 bits alone",
    "Gemma3ForConditionalGeneration": _VISION,
    "Gemma4ForConditionalGeneration": _VISION,
    "Gemma4UnifiedForConditionalGeneration": _VISION,
    "Mistral3ForConditionalGeneration": _VISION,
    "Lfm2VlForConditionalGeneration": _VISION,
    "Lfm2AudioForConditionalGeneration": _VISION,
    "Qwen2_5_VLForConditionalGeneration": _VISION,
    "Qwen3VLForConditionalGeneration": _VISION,
    "Qwen3_5ForConditionalGeneration": _VISION,
    "Qwen3_5MoeForConditionalGeneration": _VISION,
    "WhisperForConditionalGeneration": "it is an encoder and a decoder; a bundle holds a decoder alone",
}

# Settings that change results and that the builder ignores or makes wrong: refused, also where no comparison follows.
_MULTIPLE = 16


def find_family(architecture: str, model_type: str) -> Family:
    """The family of a configuration's names.

    Raises:
        ExportError: a family that cannot become a bundle, with the reason.
    """
    family = FAMILIES.get(architecture)
    if family is not None and family.model_type == model_type:
        return family
    if architecture in REFUSED:
        raise ExportError(
            f"architecture {architecture} ({model_type}) cannot become a bundle: {REFUSED[architecture]}. "
            f"Supported are {', '.join(sorted(FAMILIES))}"
        )
    raise ExportError(
        f"architecture {architecture} ({model_type}) is not supported; supported are {', '.join(sorted(FAMILIES))}"
    )


def builder_class(config: PretrainedConfig, family: Family) -> str:
    """The class that the builder itself would take."""
    c: Any = config
    long = family.model_type == "phi3" and c.original_max_position_embeddings != c.max_position_embeddings
    return "Phi3MiniLongRoPEModel" if long else family.builder


def check_settings(config: PretrainedConfig, family: Family) -> None:
    """Refuses settings of a supported family that would give another model.

    Raises:
        ExportError: names the setting, what was found, what was expected.
    """
    c: Any = config
    head, rotary = head_dim(config), rotary_dim(config, family)
    for what, size in (("head_dim", head), ("the rotary part of a head", rotary)):
        if size % _MULTIPLE:
            raise ExportError(
                f"{what} is {size}; ONNX Runtime's attention needs a multiple of {_MULTIPLE}, so this model cannot "
                "be exported"
            )
    if c.num_attention_heads % c.num_key_value_heads:
        raise ExportError(
            f"num_attention_heads is {c.num_attention_heads}, expected a multiple of num_key_value_heads "
            f"{c.num_key_value_heads}"
        )

    def refuse_unless(name: str, expected: object, reason: str) -> None:
        found = getattr(c, name, expected)
        if found != expected:
            raise ExportError(f"setting {name} is {found!r}, expected {expected!r}: {reason}")

    if getattr(c, "use_bidirectional_attention", None):
        raise ExportError(
            "setting use_bidirectional_attention is on; a memory reads and writes from left to right, so attention must too"
        )
    if family.architecture == "PhiForCausalLM":
        refuse_unless("qk_layernorm", False, "the builder leaves out LayerNorms of q and k")
    if family.architecture == "GraniteMoeHybridForCausalLM":
        refuse_unless("num_local_experts", 0, "the builder leaves out the experts")
        kinds = set(c.layer_types)
        if kinds - _ATTENTION_KINDS:
            raise ExportError(
                f"layer_types holds {sorted(kinds - _ATTENTION_KINDS)}: the builder makes every layer an attention layer"
            )
    if family.architecture == "Lfm2MoeForCausalLM":
        refuse_unless("norm_topk_prob", True, "ONNX Runtime's mixture of experts always normalises")
    if family.hybrid and "full_attention" not in c.layer_types:
        raise ExportError("layer_types holds no full_attention; the memory lives on attention layers")


_ATTENTION_KINDS = frozenset({"attention", "full_attention"})


def head_dim(config: PretrainedConfig) -> int:
    c: Any = config
    return int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)


def rotary_dim(config: PretrainedConfig, family: Family) -> int:
    """How many numbers of a head RoPE turns; 0 where no layer has RoPE."""
    if not any(has_rope(config, family)):
        return 0
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [kind for kind in rope.values() if isinstance(kind, dict)]
    parts = {float(kind.get("partial_rotary_factor") or 1.0) for kind in nested or [rope]}
    return min(int(head_dim(config) * part) for part in parts)


def windows(config: PretrainedConfig, family: Family) -> tuple[int | None, ...]:
    """For each layer how many tokens its attention sees, its own included; None: all."""
    c: Any = config
    count = int(c.num_hidden_layers)
    window = getattr(c, "sliding_window", None)
    if family.windows == "none" or not window:
        return (None,) * count
    if family.windows == "all":
        return (int(window),) * count
    return tuple(int(window) if kind == "sliding_attention" else None for kind in c.layer_types)


def has_rope(config: PretrainedConfig, family: Family) -> tuple[bool, ...]:
    """For each layer whether it turns q and k by RoPE."""
    c: Any = config
    count = int(c.num_hidden_layers)
    if family.architecture == "SmolLM3ForCausalLM":
        return tuple(bool(flag) for flag in c.no_rope_layers)
    if family.architecture == "GraniteMoeHybridForCausalLM":
        return (c.position_embedding_type == "rope",) * count
    return (True,) * count


def context_length(config: PretrainedConfig) -> int:
    """How many tokens of one turn the model is the model for. LongRoPE holds up to the original context: beyond it
    transformers turns the tokens of one long call otherwise than the same tokens in two calls, so that a stream would
    have no one result. (Dynamic scaling begins behind `max_position_embeddings`, so it never does here.)"""
    c: Any = config
    length = int(c.max_position_embeddings)
    rope = getattr(c, "rope_parameters", None) or {}
    nested = [kind for kind in rope.values() if isinstance(kind, dict)]
    for kind in nested or [rope]:
        original = kind.get("original_max_position_embeddings")
        if kind.get("rope_type") == "longrope" and original:
            length = min(length, int(original))
    return length
