"""A start for the memory in closed form: keys and queries that tell the relations apart, values that name what was just said, corrections
that say it, and a gate that opens where an acknowledgement has just said a value.

The frozen backbone reads a few thousand generated turns once; its second phase has made readable what is needed (`backbone.py`). Where an
answer's value is about to be said, the attention's inputs tell the relation: regression from them to one direction per relation gives the
query projection. Behind an acknowledged value they tell relation and value: regression to the same directions gives the key projection;
regression to the value's embedding, cut to the memory's rank, gives the value projection, and the way back the correction of the output;
a high or low logit gives the gate. Everything is then trained on; this spares the many steps in which keys are found by chance.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_export.reference import MemoryHandle
from deltamem_export.training.backbone import KIND, acknowledged
from deltamem_export.training.batches import Context, Rows, pack
from deltamem_export.training.language import RELATION_INDEX, RELATIONS, Speaker
from deltamem_export.training.tokenizer import DECISIVE, Codec


def _directions(count: int, rank: int) -> tuple[Tensor, Tensor]:
    """A direction for each of `count` relations, [count, rank], and one for every other token, which no relation is near: what is read
    there stays empty, so talk is left alone. Orthogonal where the rank has the room."""
    if rank > count:
        axes = torch.eye(rank)
        return axes[:count], axes[count]
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
    inputs, rows, writes = _observe(model, handle, speaker, codec, each, width)
    rank = handle.config.read_width
    reads = (rows.tags == DECISIVE) & ((rows.kinds == KIND["ask"]) | (rows.kinds == KIND["unknown"]))
    directions, nowhere = _directions(len(RELATIONS), rank)
    place = torch.where(reads.unsqueeze(-1), directions[rows.relations.clamp_min(0)], nowhere)
    rare = torch.where(reads, (~reads).sum() / reads.sum(), 1.0).sqrt().unsqueeze(-1)
    embedding = model.get_output_embeddings().weight.cpu()  # [vocabulary, hidden]
    said = embedding[rows.ids[writes]]
    names = embedding[rows.ids[writes].unique()]
    middle = names.mean(dim=0)
    axes = torch.linalg.svd(names - middle, full_matrices=False).Vh[:rank]  # [≤ rank, hidden]
    scale = said.norm(dim=-1).mean()
    name = (said - middle) / scale @ axes.T
    told = directions[rows.relations[writes]]
    few = (~writes).sum() / writes.sum().clamp_min(1)
    for i, x in inputs.items():
        layer = handle.layers[str(i)]
        layer.memory_k_proj.copy_(_aim(_ridge(x[writes], told, ridge), x[writes], told, torch.ones(len(told))))
        layer.memory_q_proj.copy_(_aim(_ridge(x * rare, place * rare, ridge), x, place, rare.square().squeeze(-1)))
        layer.memory_v_proj.zero_()
        layer.memory_v_proj[: len(axes)].copy_(strength**0.5 * _ridge(x[writes], name, ridge))
        if "o" in handle.config.delta_heads:
            layer.delta_o_proj.zero_()
            layer.delta_o_proj[:, : len(axes)].copy_(strength**0.5 * axes.T)
        target = torch.where(writes, open_logit, shut_logit).unsqueeze(-1)
        weight = torch.where(writes, few / 4, 1.0).sqrt().unsqueeze(-1)
        one = torch.ones(x.shape[0], 1)
        gate = _ridge(torch.cat((x, one), dim=-1) * weight, target * weight, ridge)
        layer.beta_proj.copy_(gate[:, :-1].expand_as(layer.beta_proj))
        layer.beta_bias.copy_(gate[:, -1].expand_as(layer.beta_bias))


def _observe(
    model: PreTrainedModel, handle: MemoryHandle, speaker: Speaker, codec: Codec, each: int, width: int
) -> tuple[dict[int, Tensor], Rows, Tensor]:
    """Attention inputs of the memory's layers, [N, hidden], for every token what `Rows` says of it, [N], and whether a fact's value was
    just said."""
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
    return {i: torch.cat(parts) for i, parts in seen.items()}, rows.each(lambda t: t[real]), acknowledged(rows)[real]


def _ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """W [out, in] that minimises |x Wᵀ − y|² + ridge |W|²."""
    x, y = x.double(), y.double()
    return torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y).T.float()


def _aim(start: Tensor, x: Tensor, y: Tensor, weight: Tensor, steps: int = 400, batch: int = 2048) -> Tensor:
    """W [out, in], moved on from `start` until l2(tanh(W x)), which is what the memory is addressed with, is near y; x is drawn by weight.

    Ridge regression knows nothing of tanh and norm: it leaves a cosine of .82 where this leaves .96 (docs/log.md).
    """
    with torch.enable_grad():
        matrix = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([matrix], lr=3e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            at = torch.multinomial(weight, min(batch, len(weight)), replacement=True)
            loss = (nn.functional.normalize((x[at] @ matrix.T).tanh(), dim=-1) - y[at]).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return matrix.detach()
