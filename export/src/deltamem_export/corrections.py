"""What onnxruntime-genai's builder gets wrong, put right. Its class for a family is subclassed so that it takes from
the loaded transformers model what it otherwise guesses from the configuration: the epsilon and kind of every norm, the
tables of RoPE, the scale, soft cap and window of every attention, the scale of the embeddings. It knows families
(`families.py`) and the builder's methods; it knows nothing of memories.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from deltamem_export.families import Family, context_length, has_rope, windows

# OLMo's LayerNorm has no weights and its epsilon is written in its code.
_OLMO_EPSILON = 1e-5


def prepare_config(config: PretrainedConfig, family: Family) -> None:
    """Changes a configuration in memory so that the builder reads from it what transformers does."""
    c: Any = config
    c.max_position_embeddings = context_length(config)
    if family.architecture not in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        c.hidden_activation = None  # the others know hidden_act alone, and the builder would prefer this one
    if family.architecture == "Gemma3ForCausalLM":
        c.rope_local_base_freq = 0.0  # asked for, and used for tables that are not used
    if not family.hybrid and family.architecture != "SmolLM3ForCausalLM":
        c.layer_types = ["full_attention" if w is None else "sliding_attention" for w in windows(config, family)]
    if not isinstance(getattr(c, "sliding_window", None), int):
        c.sliding_window = -1


def corrected(model_class: type[Any], family: Family) -> type[Any]:
    """The builder's class of this family with its mistakes put right."""
    bases: tuple[type[Any], ...] = (_Corrected, model_class)
    special = _SPECIAL.get(family.architecture)
    if special is not None:
        bases = (special, *bases)
    return type(f"Corrected{model_class.__name__}", bases, {"family": family})


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The builder hangs modules and tensors of its own onto the model while it reads it; afterwards the model is again
    what it was."""
    kept = [
        (module, dict(module.__dict__), dict(module._modules), dict(module._parameters), dict(module._buffers))
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, fields, modules, parameters, buffers in kept:
            module.__dict__.clear()
            module.__dict__.update(fields)
            for own, was in ((module._modules, modules), (module._parameters, parameters), (module._buffers, buffers)):
                own.clear()
                own.update(was)  # type: ignore[arg-type]


class _Corrected:
    """What every family shares. Mixed in before the builder's class, whose attributes it uses."""

    family: Family
    weights: Any
    attention_attrs: dict[str, Any]
    layernorm_attrs: dict[str, Any]
    rope_attrs: dict[str, Any]
    embed_attrs: dict[str, Any]
    window_size: int
    head_size: int
    io_dtype: Any
    context_length: int

    def __init__(self, config: PretrainedConfig, *args: Any) -> None:
        self._windows = windows(config, self.family)
        self._rope = has_rope(config, self.family)
        self._layer_id = 0
        super().__init__(config, *args)  # type: ignore[call-arg]
        self.__dict__.pop("is_local", None)  # GPT-OSS: set by the number of the layer, whatever layer_types says
        # Several tables of RoPE: by type of layer, where the family has one for each.
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = list(getattr(config, "layer_types", None) or [])
        nested = any(isinstance(kind, dict) for kind in rope.values())
        self._rope_kinds: list[str | None] = kinds if nested else [None] * len(self._rope)

    # ------------------------------------------------------------------ RoPE

    def make_rope_init(self, config: PretrainedConfig) -> None:
        """Nothing of the configuration: the tables come from transformers."""

    def make_rotary_embedding_multi_cache(self, **_: Any) -> None:
        """See `make_rope_init`."""

    def make_rotary_embedding_caches(self, **_: Any) -> tuple[str, str]:
        kind = self._rope_kinds[self._layer_id]
        names = ("cos_cache", "sin_cache") if kind is None else (f"cos_cache_{kind}", f"sin_cache_{kind}")
        made: set[str] = self.rope_attrs.setdefault("tables", set())
        if names[0] not in made:
            made.add(names[0])
            for name, table in zip(names, self._tables(kind), strict=True):
                self.make_initializer(table, name, to=self.io_dtype)  # type: ignore[attr-defined]
        return names

    def _tables(self, kind: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [context, half of the rotary part], float32, as the model's own module makes them."""
        body = self.weights.model
        rotary = body.rotary_emb if hasattr(body, "rotary_emb") else body.pos_emb
        ids = torch.arange(self.context_length)[None]
        at = torch.zeros(1, 1, 1)
        cos, sin = rotary(at, ids) if kind is None else rotary(at, ids, kind)
        half = self._rotary_size() // 2
        return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()

    def _rotary_size(self) -> int:
        factor = float(self.rope_attrs["partial_rotary_factor"])
        return int(self.head_size * factor)

    # ------------------------------------------------------------------ attention

    def is_local(self, layer_id: int) -> bool:
        return self._windows[layer_id] is not None

    def make_attention(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        self._layer_id = layer_id
        self.window_size = self._windows[layer_id] or -1
        attrs = self.attention_attrs
        attrs["scale"] = float(attention.scaling)
        attrs["softcap"] = float(getattr(attention, "attn_logit_softcapping", None) or 0.0)
        kept = attrs["rope"], attrs["use_rope_in_attn"]
        if not self._rope[layer_id]:
            attrs["rope"] = attrs["use_rope_in_attn"] = False
        try:
            super().make_attention(layer_id, attention, root_input, **kwargs)  # type: ignore[misc]
        finally:
            attrs["rope"], attrs["use_rope_in_attn"] = kept

    def make_attention_unpacked_regular(
        self, layer_id: int, attention: Any, qkv_linear: nn.Linear, root_input: str, **_: Any
    ) -> None:
        del layer_id, root_input
        widths = [self.q_size, self.kv_size, self.kv_size]  # type: ignore[attr-defined]
        attention.q_proj, attention.k_proj, attention.v_proj = _split(qkv_linear, widths)

    # ------------------------------------------------------------------ norms

    def make_layernorm(self, layer_id: int, layernorm: nn.Module, skip: bool, simple: bool, location: str) -> None:
        del simple
        _widen(layernorm)
        kept = self.layernorm_attrs["epsilon"]
        self.layernorm_attrs["epsilon"] = _epsilon(layernorm)
        try:
            super().make_layernorm(layer_id, layernorm, skip, not _subtracts_mean(layernorm), location)  # type: ignore[misc]
        finally:
            self.layernorm_attrs["epsilon"] = kept

    def make_attention_qk_norm(self, layer_id: int, attention: Any) -> None:
        kept = self.layernorm_attrs["epsilon"]
        if self.attention_attrs["q_norm"]:
            q_norm, k_norm = _qk_norms(attention)
            _widen(q_norm)
            _widen(k_norm)
            self.layernorm_attrs["epsilon"] = self.attention_attrs["qk_norm_epsilon"] = _epsilon(q_norm)
        try:
            super().make_attention_qk_norm(layer_id, attention)  # type: ignore[misc]
        finally:
            self.layernorm_attrs["epsilon"] = kept

    # ------------------------------------------------------------------ embeddings, MLP, head

    def make_embedding(self, embedding: torch.Tensor) -> None:
        scale = getattr(self.weights.get_input_embeddings(), "embed_scale", None)
        if scale is not None:
            self.embed_attrs["scale"] = float(scale)
        super().make_embedding(embedding)  # type: ignore[misc]

    def make_mlp_unpacked_regular(self, layer_id: int, mlp: Any, gate_up_linear: nn.Linear, root_input: str) -> None:
        del layer_id, root_input
        half = gate_up_linear.weight.shape[0] // 2
        mlp.gate_proj, mlp.up_proj = _split(gate_up_linear, [half, half])

    def has_lm_head(self, module: nn.Module) -> bool:
        return module is self.weights.get_output_embeddings()


class _Olmo:
    """`clip_qkv`: between the projections and all else."""

    attention_attrs: dict[str, Any]
    io_dtype: Any

    def __init__(self, config: Any, *args: Any) -> None:
        self._clip: float | None = config.clip_qkv
        super().__init__(config, *args)  # type: ignore[call-arg]

    def make_attention_qk_subgraph(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        made: Any = self
        attrs = self.attention_attrs
        if self._clip is not None:
            limits = [f"/model/constants/{made.to_str_dtype(self.io_dtype)}/{n}" for n in (-self._clip, self._clip)]
            packed = attrs["use_packed_matmul"]
            for path in ("q_path",) if packed else ("q_path", "k_path", "v_path"):
                name = f"/model/layers.{layer_id}/attn/{'qkv' if packed else path[0]}_clip/Clip"
                shape = made.values[attrs[path]].shape
                made.make_clip(name, [attrs[path], *limits], dtype=self.io_dtype, shape=shape)
                attrs[path] = f"{name}/output_0"
        super().make_attention_qk_subgraph(layer_id, attention, root_input, **kwargs)  # type: ignore[misc]


class _Nemotron:
    """An MLP of two products, with their biases."""

    mlp_attrs: dict[str, Any]

    def make_mlp_proj(self, layer_id: int, mlp: Any, root_input: str) -> None:
        made: Any = self

        def product(name: str, value: str) -> str:
            linear = getattr(mlp, name)
            base = f"/model/layers.{layer_id}/mlp/{name}"
            output = f"{made.make_matmul(linear, f'{base}/MatMul', value)}/output_0"
            if linear.bias is None:
                return output
            made.make_add_bias(linear.bias, f"{base}/Add", root_input=output)
            return f"{base}/Add/output_0"

        up = product("up_proj", root_input)
        activated = made.make_activation(layer_id, root_input=up)
        self.mlp_attrs["output_0"] = product("down_proj", f"{activated}/output_0")


class _GptOss:
    """The factor and the limit inside the experts' activation; a router that is never quantised."""

    moe_attrs: dict[str, Any]

    def make_moe(self, layer_id: int, moe: Any, root_input: str) -> None:
        self.moe_attrs["activation_alpha"] = float(moe.experts.alpha)
        self.moe_attrs["swiglu_limit"] = float(moe.experts.limit)
        moe.router.exclude_from_quantization = True  # 4 bits would choose other experts
        super().make_moe(layer_id, moe, root_input)  # type: ignore[misc]


class _Lfm2:
    """Biases of the products before and behind a convolution."""

    def make_matmul(self, matmul: Any, basename: str, root_input: str, **kwargs: Any) -> str:
        made: Any = self
        name = str(super().make_matmul(matmul, basename, root_input, **kwargs))  # type: ignore[misc]
        if "/conv/" not in basename or matmul.bias is None:
            return name
        add = basename.replace("/MatMul", "/Add")
        made.make_add_bias(matmul.bias, add, root_input=f"{name}/output_0")
        return add


_SPECIAL: dict[str, type[Any]] = {
    "OlmoForCausalLM": _Olmo,
    "NemotronForCausalLM": _Nemotron,
    "Lfm2ForCausalLM": _Lfm2,
    "Lfm2MoeForCausalLM": _Lfm2,
    "GptOssForCausalLM": _GptOss,
}


def _epsilon(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if value is not None:
            return float(value)
    if type(norm).__name__ == "OlmoLayerNorm":
        return _OLMO_EPSILON
    raise NotImplementedError(f"{type(norm).__name__} has no epsilon that is known here")


def _subtracts_mean(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) or type(norm).__name__ == "OlmoLayerNorm"


def _widen(norm: nn.Module) -> None:
    """Some families add 1 to a norm's weights, which 16 bits would round."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dtype != torch.float32:
        norm.weight = nn.Parameter(weight.detach().float(), requires_grad=False)


def _qk_norms(attention: Any) -> tuple[nn.Module, nn.Module]:
    """HunYuan calls them otherwise."""
    if getattr(attention, "query_layernorm", None) is not None:
        return attention.query_layernorm, attention.key_layernorm
    return attention.q_norm, attention.k_norm


def _split(linear: nn.Linear, widths: list[int]) -> list[nn.Linear]:
    """Views of a packed projection's rows, without a copy."""
    parts = []
    start = 0
    for width in widths:
        part = nn.Linear(linear.in_features, width, bias=False, device="meta")
        rows = slice(start, start + width)
        part.weight = nn.Parameter(linear.weight[rows], requires_grad=False)
        if linear.bias is not None:
            part.bias = nn.Parameter(linear.bias[rows], requires_grad=False)
        parts.append(part)
        start += width
    return parts
