"""The rule of δ-mem in readable PyTorch, and `attach`, which hangs it on an unmodified Hugging Face decoder
by hooks. It serves as the reference that the ONNX graph (`island.py`) and the Rust core (`deltamem-core`) are
held against, and as the module that is trained. It knows nothing of files, tokenizers, or losses.

Shapes: B sequences, T tokens, L layers with a memory, H state heads, r the rank, R = H·r, G gates per head
(r, or 1), D hidden.

    q = l2(tanh(Wq h))   k = l2(tanh(Wk h))   v = Wv h          l2(x) = x / max(|x|, 1e-6), per head
    q = Wq h             k = Wk h                               without normalize_qk
    β = σ(Wβ h + bβ)     λ = 1 − β (coupled)  or  σ(Wλ h + bλ)
    read = S q                                                  before the write
    S    ← diag(keep) S − diag(erase) (S k) kᵀ + diag(write) v kᵀ
    standard        keep λ, erase β, write β
    lambda_outside  keep λ, erase λβ, write β
    no_lambda       keep 1, erase β, write β
    Δp = (alpha/r) · scale · W_Δp read                          for p of q, k, v, o

Where writes are means over spans (messages, sentences), q and the reads are of the tokens, k, v and the gates of the
mean h of each span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltamem_export.adapter import DELTA_HEADS, Adapter, AdapterConfig, AttentionShape, expected_shapes
from deltamem_export.decoder import attention_shapes, attentions, projections

L2_EPSILON = 1e-6

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def scan(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, a token at a time. A faster one with the same signature may take its place
    (`attach(..., scan=...)`).

    Args:
        q, k, v: [B, T, H, r].
        keep, erase, write: [B, T, H, r] for gates per row of S, [B, T, H, 1] for one gate per head.
        state: S before the first token, [B, H, r, r]; S[i, j]: i = value row, j = key column.

    Returns:
        reads [B, T, H, r], each before its token's write, and the state after the last token [B, H, r, r].
    """
    reads = []
    for t in range(q.shape[1]):
        reads.append(torch.einsum("bhij,bhj->bhi", state, q[:, t]))  # (B, H, r)
        recalled = torch.einsum("bhij,bhj->bhi", state, k[:, t])  # (B, H, r) of the undecayed S
        update = write[:, t] * v[:, t] - erase[:, t] * recalled  # (B, H, r)
        state = keep[:, t, :, :, None] * state + update[..., None] * k[:, t, :, None, :]  # (B, H, r, r)
    return torch.stack(reads, dim=1) if reads else torch.zeros_like(q), state


@dataclass(frozen=True)
class Proposal:
    """What the edit and gate networks make of a layer's input, before any memory is touched."""

    q: Tensor  # (B, T, H, r)
    k: Tensor  # (B, T, H, r)
    v: Tensor  # (B, T, H, r)
    keep: Tensor  # (B, T, H, G)
    erase: Tensor  # (B, T, H, G)
    write: Tensor  # (B, T, H, G)
    beta_logit: Tensor  # (B, T, H, G), β = σ of it


class DeltaMemory(nn.Module):
    """The edit and gate networks of one layer. Its parameters carry the adapter's names; it holds no state."""

    memory_q_proj: Tensor  # (R, D)
    memory_k_proj: Tensor  # (R, D)
    memory_v_proj: Tensor  # (R, D)
    beta_proj: Tensor  # (H·G, D)
    beta_bias: Tensor  # (H·G)
    lambda_proj: Tensor  # (H·G, D), only where λ is not coupled to β
    lambda_bias: Tensor  # (H·G)
    delta_o_rmsnorm_weight: Tensor  # (width of o)
    delta_scale_raw: Tensor  # (1) or (4)

    def __init__(
        self, config: AdapterConfig, shape: AttentionShape, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Without `tensors`: projections uniform in ±1/√D, β's bias −1, corrections zero, so that attaching
        changes nothing yet."""
        super().__init__()
        self.config = config
        required, optional = expected_shapes(config, shape)
        for name, size in required.items():
            start = tensors[name].clone() if tensors is not None else _initial(name, size, config)
            self.register_parameter(name, nn.Parameter(start.float()))
        # Corrections that are not in use travel along, so that an adapter leaves as it came; they are not
        # trained.
        for name in optional:
            if tensors is not None and name in tensors:
                self.register_buffer(name, tensors[name].clone().float())

    def propose(self, h: Tensor) -> Proposal:
        """The networks alone. h: the attention's input, [B, T, D]."""
        c = self.config
        per_head = (*h.shape[:2], c.num_state_heads, c.rank)
        per_gate = (*h.shape[:2], c.num_state_heads, c.gates_per_head)
        q = F.linear(h, self.memory_q_proj).view(per_head)  # (B, T, H, r)
        k = F.linear(h, self.memory_k_proj).view(per_head)  # (B, T, H, r)
        v = F.linear(h, self.memory_v_proj).view(per_head)  # (B, T, H, r)
        if c.normalize_qk:
            q, k = _l2(q.tanh()), _l2(k.tanh())
        beta_logit = F.linear(h, self.beta_proj, self.beta_bias).view(per_gate)  # (B, T, H, G)
        beta = beta_logit.sigmoid()
        if c.state_update_mode == "no_lambda":
            keep = torch.ones_like(beta)
        elif c.couple_lambda:
            keep = (-beta_logit).sigmoid()  # 1 − β with its digits kept when β is close to 1
        else:
            keep = F.linear(h, self.lambda_proj, self.lambda_bias).view(per_gate).sigmoid()  # (B, T, H, G)
        erase = keep * beta if c.state_update_mode == "lambda_outside" else beta
        return Proposal(q, k, v, keep, erase, beta, beta_logit)

    def read_and_write(
        self, h: Tensor, state: Tensor, may: Tensor, spans: Tensor | None = None, scan: Scan = scan
    ) -> tuple[Proposal, Tensor, Tensor]:
        """The networks and the memory.

        Args:
            h: the attention's input, [B, T, D].
            state: S before the call, [B, H, r, r].
            may: which tokens may write, bool [B, T].
            spans: None: each token reads, then writes. int64 [B, T], the id of the span that a token belongs to, -1 for
                none: every token reads `state`, then the mean h of each span is written, in the order of the ids.
            scan: the recurrence.

        Returns:
            the Proposal that was written (of T tokens, or of S spans), the reads [B, T, H, r], the state after.
        """
        if spans is None:
            p = self.propose(h)
            return p, *scan(p.q, p.k, p.v, *_masked(p, may), state)
        if spans.shape != h.shape[:2]:
            raise ValueError(f"spans has shape {list(spans.shape)}, expected {list(h.shape[:2])}")
        reads = torch.einsum("bhij,bthj->bthi", state, self.propose(h).q)  # (B, T, H, r)
        weights = span_weights(torch.where(may, spans, -1))  # (B, S, T)
        p = self.propose(weights.to(h.dtype) @ h)
        _, after = scan(p.q, p.k, p.v, *_masked(p, weights.any(dim=-1)), state)
        return p, reads, after

    def corrections(self, reads: Tensor) -> dict[str, Tensor]:
        """Δ of each delta head from the reads [B, T, H, r]: head → [B, T, width of its projection]."""
        c = self.config
        flat = reads.flatten(-2)  # (B, T, R)
        deltas = {}
        for p in c.delta_heads:
            delta = F.linear(flat, self.get_parameter(f"delta_{p}_proj")) * (c.scaling * self.scale(p))
            if p == "o" and c.delta_o_rmsnorm:
                delta = F.rms_norm(delta, delta.shape[-1:], self.delta_o_rmsnorm_weight, c.delta_o_rmsnorm_eps)
            deltas[p] = delta
        return deltas

    def scale(self, head: str) -> Tensor | float:
        """The trained factor on top of alpha/r: σ(raw)·max, or 1."""
        if not self.config.trainable_delta_scale:
            return 1.0
        i = DELTA_HEADS.index(head) if self.config.delta_scale_granularity == "head" else 0
        return self.delta_scale_raw[i].sigmoid() * self.config.delta_scale_max


class MemoryHandle(nn.Module):
    """The memories of one attached decoder: their networks (`layers`), and the state, which is explicit.

    Attributes:
        state: [B, L, H, r, r], float32; None until `reset` or the first call, which starts from zero.
            Assigning sets it. It carries gradients from call to call; `state = state.detach()` cuts them.
        writes: False: the memory reads only.
        write_mask: [B, T] or None; 1: the token may write, 0: it only reads (padding).
        spans: what the next calls write, for an adapter whose writes are means over spans: int64 [B, T], the id of the
            span that a token belongs to, -1 for none. The spans of a call are written in the order of their ids, and all
            its tokens read the state from before the call. "token": each token writes, as without spans.
        record: True: `recorded` keeps each layer's Proposal of the last call, of its tokens or of its spans.
        scan: the recurrence in use.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, layers: Mapping[int, DeltaMemory], scan: Scan) -> None:
        super().__init__()
        self.config = config
        self.layer_indices = tuple(sorted(layers))
        self.layers = nn.ModuleDict({str(i): layers[i] for i in self.layer_indices})
        self.scan: Scan = scan
        self.writes = True
        self.write_mask: Tensor | None = None
        self.spans: Tensor | Literal["token"] | None = None
        self.record = False
        self.recorded: dict[int, Proposal] = {}
        self._states: list[Tensor] | None = None
        self._deltas: dict[int, dict[str, Tensor]] = {}
        self._hooks: list[Any] = []
        for i, attention in enumerate(attentions(model)):
            if i in layers and attention is not None:
                self._hang(i, attention)

    @property
    def state(self) -> Tensor | None:
        return None if self._states is None else torch.stack(self._states, dim=1)

    @state.setter
    def state(self, value: Tensor | None) -> None:
        if value is None:
            self._states = None
            return
        c = self.config
        want = (len(self.layer_indices), c.num_state_heads, c.rank, c.rank)
        if value.ndim != 5 or tuple(value.shape[1:]) != want:
            raise ValueError(f"state has shape {list(value.shape)}, expected [B, {', '.join(map(str, want))}]")
        self._states = list(value.unbind(dim=1))

    def reset(self, batch: int = 1) -> None:
        """Empty memories for `batch` sequences; the first read after it is zero."""
        c = self.config
        parameter = next(self.parameters())
        self.state = parameter.new_zeros(batch, len(self.layer_indices), c.num_state_heads, c.rank, c.rank)
        self.recorded = {}

    def adapter(self) -> Adapter:
        """The networks as they are now, ready to be saved."""
        return Adapter(
            self.config,
            {
                int(i): {name: t.detach().cpu().float().clone() for name, t in layer.state_dict().items()}
                for i, layer in self.layers.items()
            },
        )

    def detach_hooks(self) -> None:
        """Leaves the decoder as it was found."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ------------------------------------------------------------------ hooks

    def _hang(self, i: int, attention: nn.Module) -> None:
        self._hooks.append(attention.register_forward_pre_hook(partial(self._before_attention, i), with_kwargs=True))
        self._hooks.append(attention.register_forward_hook(partial(self._after_attention, i)))
        corrected: dict[nn.Module, dict[str, int | None]] = {}
        for p, projection in projections(attention).items():
            if p in self.config.delta_heads:
                corrected.setdefault(projection.module, {})[p] = projection.start
        for module, starts in corrected.items():
            self._hooks.append(module.register_forward_hook(partial(self._correct, i, starts)))

    def _before_attention(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._deltas[i] = self._step(i, h)

    def _after_attention(self, i: int, *_: Any) -> None:
        del self._deltas[i]

    def _correct(
        self, i: int, starts: Mapping[str, int | None], module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        """Adds the corrections of what this module makes, each at its start (None: all of the output)."""
        for p, start in starts.items():
            delta = self._deltas[i][p].to(output.dtype)
            if start is not None:
                delta = F.pad(delta, (start, output.shape[-1] - start - delta.shape[-1]))
            output = output + delta
        return output

    def _step(self, i: int, h: Tensor) -> dict[str, Tensor]:
        """One layer's whole turn: propose, read and write, correct. h: [B, T, D]."""
        if self._states is None:
            self.reset(h.shape[0])
        assert self._states is not None
        at = self.layer_indices.index(i)
        state = self._states[at]  # (B, H, r, r)
        if state.shape[0] != h.shape[0]:
            raise ValueError(
                f"the state is of {state.shape[0]} sequences, the call of {h.shape[0]}; reset({h.shape[0]}) first"
            )
        layer: DeltaMemory = self.layers[str(i)]  # type: ignore[assignment]
        may = self._may_write(h)  # (B, T)
        if self.config.writes_spans and self.spans is None and bool(may.any()):
            raise ValueError(
                f"writes are {self.config.memory_write_granularity} here, and no spans are given: set `spans` to ids "
                '[B, T], or to "token" to write each token on purpose'
            )
        spans = self.spans if isinstance(self.spans, Tensor) else None
        proposal, reads, self._states[at] = layer.read_and_write(h.to(state.dtype), state, may, spans, self.scan)
        if self.record:
            self.recorded[i] = proposal
        return layer.corrections(reads)

    def _may_write(self, h: Tensor) -> Tensor:
        """[B, T]: which tokens of this call may write."""
        may = torch.full(h.shape[:2], self.writes, device=h.device)
        if self.write_mask is not None:
            if self.write_mask.shape != h.shape[:2]:
                raise ValueError(f"write_mask has shape {list(self.write_mask.shape)}, expected {list(h.shape[:2])}")
            may &= self.write_mask != 0
        return may


def span_weights(spans: Tensor) -> Tensor:
    """What takes the mean over each span: [B, S, T] float32, 1/length of span s for its tokens and 0 for others.

    Args:
        spans: int64 [B, T], the id of the span that a token belongs to, -1 for none.

    Returns:
        The spans of a row in the order of their ids; S is the largest number of spans in a row, and rows of zeros stand
        behind those of a row with fewer.
    """
    rows = [torch.unique(row[row >= 0]) for row in spans]  # ids, ascending
    weights = torch.zeros(len(rows), max(map(len, rows)), spans.shape[1], device=spans.device)  # (B, S, T)
    for row, ids, own in zip(spans, rows, weights, strict=True):
        own[: len(ids)] = (row == ids[:, None]).float()
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1)


def attach(model: nn.Module, adapter: Adapter | AdapterConfig, scan: Scan = scan) -> MemoryHandle:
    """Hangs memories on a Hugging Face decoder. The decoder's code and weights stay as they are;
    `detach_hooks` undoes it.

    Args:
        model: a causal language model whose layers have `self_attn` with q/k/v/o projections, or a packed
            `qkv_proj`.
        adapter: a trained adapter, or settings alone for one that is yet to be trained.
        scan: the recurrence; see `scan` in this module for its contract.

    Returns:
        the handle, on the decoder's device. Its parameters (float32) ask for gradients; the decoder's are
        left as they are.

    Raises:
        AdapterError: the adapter does not fit this decoder.
        ExportError: the decoder has no attention that can be hooked.
    """
    config = adapter.config if isinstance(adapter, Adapter) else adapter
    shapes = attention_shapes(model)
    if isinstance(adapter, Adapter):
        wanted = adapter.check_backbone(shapes)
    else:
        wanted = config.memory_layers(len(shapes), [i for i, shape in enumerate(shapes) if shape is None])
    tensors = adapter.layers if isinstance(adapter, Adapter) else {}
    layers = {i: DeltaMemory(config, shape, tensors.get(i)) for i, shape in enumerate(shapes) if shape and i in wanted}
    handle = MemoryHandle(model, config, layers, scan)
    return handle.to(next(model.parameters()).device)


def _masked(p: Proposal, may: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """keep, erase and write; where `may` [B, T] is false all is kept and nothing is written."""
    may = may[:, :, None, None]
    return torch.where(may, p.keep, 1), torch.where(may, p.erase, 0), torch.where(may, p.write, 0)


def _l2(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-6) over the last axis."""
    unit: Tensor = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(L2_EPSILON)
    return unit


def _initial(name: str, size: tuple[int, ...], config: AdapterConfig) -> Tensor:
    if name == "beta_bias":
        return torch.full(size, -1.0)
    if name == "lambda_bias":
        return torch.full(size, 4.0)
    if name == "delta_o_rmsnorm_weight":
        return torch.ones(size)
    if name == "delta_scale_raw":
        # σ(raw)·max = 1, or half of max where that cannot be
        share = 1.0 / config.delta_scale_max if config.delta_scale_max > 1.0 else 0.5
        return torch.full(size, share).logit()
    if name.startswith("delta_"):
        return torch.zeros(size)
    start: Tensor = (torch.rand(size) * 2 - 1) / size[1] ** 0.5
    return start
