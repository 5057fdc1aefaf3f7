"""A start for the memory in closed form: keys and queries that tell the relations apart, values that name what is about to be said,
corrections that say it, and a gate that opens at acknowledgements.

The frozen backbone reads a few thousand generated turns once. Where a value is about to be said, its attention inputs tell the relation
(the backbone was trained so); ridge regression from them to one direction per relation gives the key and query projections, and to a
high or low logit the gate. In an acknowledgement the inputs there also tell the value; regression to its embedding, cut to the memory's
rank, gives the value projection, and the way back gives the correction of the output. Everything is then trained on; this only spares the many steps in which keys are found by chance.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_export.reference import MemoryHandle
from deltamem_export.training.backbone import KIND
from deltamem_export.training.batches import Context, pack
from deltamem_export.training.language import RELATION_INDEX, RELATIONS, Speaker
from deltamem_export.training.tokenizer import DECISIVE, Codec


def _directions(count: int, rank: int) -> tuple[Tensor, Tensor]:
    """A direction for each of `count` relations, [count, rank], and one for every other token, which no relation is near: what is read
    there stays empty, so talk is left alone."""
    nowhere = torch.full((rank,), rank**-0.5)
    axes = torch.eye(rank)[:count] if rank >= count else nn.functional.normalize(torch.randn(count, rank), dim=-1)
    return nn.functional.normalize(axes - (axes @ nowhere).unsqueeze(-1) * nowhere, dim=-1), nowhere


@torch.no_grad()
def fit_addresses(
    model: PreTrainedModel,
    handle: MemoryHandle,
    speaker: Speaker,
    codec: Codec,
    each: int = 24,
    width: int = 128,
    ridge: float = 1.0,
    open_logit: float = 2.0,
    shut_logit: float = -6.0,
    strength: float = 80.0,
) -> None:
    """Sets the projections of every memory layer (one state head) in place."""
    inputs, relations, kinds, tags, targets = _observe(model, handle, speaker, codec, each, width)
    rank = handle.config.read_width
    about = (tags == DECISIVE) & (relations >= 0)
    writes = about & (kinds <= KIND["change"])
    directions, nowhere = _directions(len(RELATIONS), rank)
    place = torch.where(about.unsqueeze(-1), directions[relations.clamp_min(0)], nowhere)
    balance = torch.where(about, (~about).sum() / about.sum(), 1.0).sqrt().unsqueeze(-1)
    embedding = model.get_output_embeddings().weight.cpu()  # [vocabulary, hidden]
    said = embedding[targets[writes]]
    middle = embedding[targets[writes].unique()].mean(dim=0)
    axes = torch.linalg.svd(embedding[targets[writes].unique()] - middle, full_matrices=False).Vh[
        :rank
    ]  # [≤ rank, hidden]
    scale = said.norm(dim=-1).mean()
    name = torch.zeros(len(targets), len(axes))
    name[writes] = (said - middle) / scale @ axes.T
    heavy = torch.where(writes, (~writes).sum() / writes.sum().clamp_min(1), 1.0).sqrt().unsqueeze(-1)
    for i, x in inputs.items():
        layer = handle.layers[str(i)]
        layer.memory_k_proj.copy_(_ridge(x[about], directions[relations[about]], ridge))
        layer.memory_q_proj.copy_(_ridge(x * balance, place * balance, ridge))
        named = _ridge(x * heavy, name * heavy, ridge)
        layer.memory_v_proj.zero_()
        layer.memory_v_proj[: len(axes)].copy_(strength**0.5 * named)
        if "o" in handle.config.delta_heads:
            layer.delta_o_proj.zero_()
            layer.delta_o_proj[:, : len(axes)].copy_(strength**0.5 * axes.T)
        target = torch.where(writes, open_logit, shut_logit).unsqueeze(-1)
        weight = torch.where(writes, (~writes).sum() / writes.sum().clamp_min(1) / 4, 1.0).sqrt().unsqueeze(-1)
        one = torch.ones(x.shape[0], 1)
        gate = _ridge(torch.cat((x, one), dim=-1) * weight, target * weight, ridge)
        layer.beta_proj.copy_(gate[:, :-1].expand_as(layer.beta_proj))
        layer.beta_bias.copy_(gate[:, -1].expand_as(layer.beta_bias))


def _observe(
    model: PreTrainedModel, handle: MemoryHandle, speaker: Speaker, codec: Codec, each: int, width: int
) -> tuple[dict[int, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Attention inputs of the memory's layers, [N, hidden], with the relation, kind and tag of what each token predicts, and that itself."""
    rng: random.Random = speaker.rng
    contexts = []
    for relation in RELATIONS:
        for n in range(each):
            value = speaker.draw_value(relation)
            turn = (
                speaker.tell(relation, value, change=rng.random() < 0.3)
                if n % 2
                else speaker.ask(relation, value if n % 4 else None)
            )
            contexts.append(Context.of_turn(codec.turn(turn), KIND[turn.kind], RELATION_INDEX[relation.name]))
    for _ in range(len(contexts) // 3):
        contexts.append(Context.of_turn(codec.turn(speaker.talk()), KIND["talk"]))
    rows = pack(contexts, width, codec.pad)
    seen: dict[int, list[Tensor]] = {i: [] for i in handle.layer_indices}
    device = next(model.parameters()).device
    for start in range(0, rows.ids.shape[0], 64):
        part = rows.each(lambda t, s=start: t[s : s + 64]).to(str(device))
        out = model.model(
            input_ids=part.ids,
            attention_mask=part.attention_mask(),
            position_ids=part.positions,
            use_cache=False,
            output_hidden_states=True,
        )
        for i in seen:
            h = model.model.layers[i].input_layernorm(out.hidden_states[i])
            seen[i].append(h[part.segments >= 0].cpu())
    real = rows.segments >= 0
    return (
        {i: torch.cat(parts) for i, parts in seen.items()},
        rows.relations[real],
        rows.kinds[real],
        rows.tags[real],
        rows.targets[real],
    )


def _ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """W [out, in] that minimises |x Wᵀ − y|² + ridge |W|²."""
    x, y = x.double(), y.double()
    return torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y).T.float()
