"""Reading a Hugging Face decoder: the attention of every layer and the widths of its projections, from its modules and
weights. It knows nothing of files, memories or ONNX.
"""

from __future__ import annotations

from torch import nn

from deltamem_export.adapter import AttentionShape
from deltamem_export.errors import ExportError


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention module of every layer, first to last.

    Raises:
        ExportError: a layer without one.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise ExportError(f"{type(model).__name__} has no model.layers; its attention cannot be found")
    found = [getattr(layer, "self_attn", None) for layer in layers]
    if None in found:
        raise ExportError(
            f"{type(model).__name__}: layer {found.index(None)} has no self_attn; its attention cannot be found"
        )
    return [module for module in found if module is not None]


def attention_shape(attention: nn.Module) -> AttentionShape:
    """The widths of an attention's input and projections, from its weights.

    Raises:
        ExportError: it has neither q_proj, k_proj and v_proj, nor qkv_proj, with o_proj.
    """
    o = getattr(attention, "o_proj", None)
    packed = getattr(attention, "qkv_proj", None)
    separate = [getattr(attention, f"{p}_proj", None) for p in "qkv"]
    if o is None or (packed is None and None in separate):
        raise ExportError(
            f"{type(attention).__name__} has no q_proj, k_proj, v_proj (or qkv_proj) and o_proj; its "
            "projections cannot be hooked"
        )
    if packed is not None:
        q = int(o.in_features)
        kv = (int(packed.out_features) - q) // 2
        return AttentionShape(int(packed.in_features), q, kv, kv, int(o.out_features))
    q_proj, k_proj, v_proj = separate
    assert q_proj is not None
    assert k_proj is not None
    assert v_proj is not None
    return AttentionShape(
        int(q_proj.in_features),
        int(q_proj.out_features),
        int(k_proj.out_features),
        int(v_proj.out_features),
        int(o.out_features),
    )
