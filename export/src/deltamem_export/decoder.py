"""Reading a Hugging Face decoder: the attention of every layer and the widths of its projections, from its modules and
weights. It knows nothing of files, memories or ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from deltamem_export.adapter import AttentionShape
from deltamem_export.errors import ExportError

# What families call the projection behind the attention.
_O_NAMES = ("o_proj", "out_proj", "dense")


def attentions(model: nn.Module) -> list[nn.Module | None]:
    """The attention module of every layer, first to last; None for a layer that has none (a convolution).

    Raises:
        ExportError: no layer has one.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise ExportError(f"{type(model).__name__} has no model.layers; its attention cannot be found")
    found = [getattr(layer, "self_attn", None) for layer in layers]
    if not any(module is not None for module in found):
        raise ExportError(f"{type(model).__name__}: no layer has self_attn; its attention cannot be found")
    return found


@dataclass(frozen=True)
class Projection:
    """One of q, k, v, o of an attention.

    Attributes:
        module: the linear layer that makes it; q, k and v may share one.
        width: how many of the layer's outputs it is.
        start: the first of them; None where it is all of them.
    """

    module: nn.Module
    width: int
    start: int | None = None

    @property
    def weight(self) -> Tensor:
        """The layer's weight, [out, in], of all that the layer makes."""
        return self.module.get_parameter("weight")


def projections(attention: nn.Module) -> dict[str, Projection]:
    """Where an attention makes q, k, v and o.

    Raises:
        ExportError: it has neither q_proj, k_proj and v_proj, nor qkv_proj, with o_proj.
    """
    names = dict(attention.named_children())
    o = next((names[name] for name in _O_NAMES if name in names), None)
    packed = names.get("qkv_proj")
    separate = [names.get(f"{p}_proj") for p in "qkv"]
    if o is None or (packed is None and None in separate):
        raise ExportError(
            f"{type(attention).__name__} has no q_proj, k_proj, v_proj (or qkv_proj) and {' or '.join(_O_NAMES)}; its "
            "projections cannot be hooked"
        )
    out, inner = o.get_parameter("weight").shape
    found = {"o": Projection(o, out)}
    if packed is not None:
        q = inner
        kv = (len(packed.get_parameter("weight")) - q) // 2
        starts = {"q": (q, 0), "k": (kv, q), "v": (kv, q + kv)}
        return found | {p: Projection(packed, width, start) for p, (width, start) in starts.items()}
    for p, module in zip("qkv", separate, strict=True):
        assert module is not None
        found[p] = Projection(module, len(module.get_parameter("weight")))
    return found


def attention_shape(attention: nn.Module) -> AttentionShape:
    """The widths of an attention's input and projections, from its weights.

    Raises:
        ExportError: as `projections`.
    """
    found = projections(attention)
    return AttentionShape(int(found["q"].weight.shape[1]), *(found[p].width for p in "qkvo"))


def attention_shapes(model: nn.Module) -> list[AttentionShape | None]:
    """`attention_shape` of every layer, first to last; None for a layer without attention."""
    return [attention_shape(module) if module is not None else None for module in attentions(model)]
