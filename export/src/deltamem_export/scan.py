"""The δ-mem recurrence in chunks: the same reads and states as the rule token by token, in a few dense products per chunk.

A twin of the sequential rule in `reference.py`, for training speed; tests/training/test_scan.py holds the two against each other. With
u_t = w_t v_t − e_t S_{t−1} k_t and S_t = λ_t S_{t−1} + u_t k_tᵀ, let γ_t = λ_1 ⋯ λ_t within a chunk and Γ_ts = γ_{t−1}/γ_s for s < t,
else 0 (never above 1, formed as a difference of logarithms, so nothing is divided by a small λ). Then

    [Ũ | W] = (I + diag(e)(Γ ∘ K Kᵀ))⁻¹ [diag(w) V | diag(e γ⁻) K]
    U = Ũ − W S₀ᵀ      Y = diag(γ⁻) Q S₀ᵀ + (Γ ∘ Q Kᵀ) U      S₀ ← γ_C S₀ + Uᵀ diag(γ_C/γ_s) K

It knows nothing about models, gates or layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
LEAST_KEEP = 1e-13
"""A smaller λ is taken for this: nothing of a state is left either way, and logarithms keep their digits."""


def chunked_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    erase: Tensor,
    write: Tensor,
    state: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Reads before each write, and the state after the last token.

    Args:
        q, k, v: [B, T, H, r].
        keep, erase, write: [B, T, H, r] (a gate per row of S) or [B, T, H, 1] (one per head); keep in [0, 1].
        state: [B, H, r, r], S[i, j] with i the value's row and j the key's column.
        chunk: tokens solved at once; any value gives the same result up to rounding.

    Returns:
        reads [B, T, H, r] and the new state [B, H, r, r].
    """
    if max(keep.shape[-1], erase.shape[-1], write.shape[-1]) > 1:
        return _row_scan(q, k, v, keep, erase, write, state, chunk)
    batch, length, heads, rank = q.shape
    if length == 0:
        return q.new_zeros(batch, 0, heads, rank), state
    size = min(chunk, length)
    count = -(-length // size)
    pad = count * size - length

    def chunks(x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, H, d] → [count, B, H, size, d]; padding neither keeps less nor writes."""
        x = F.pad(x, (0, 0, 0, 0, 0, pad), value=fill) if pad else x
        return x.reshape(batch, count, size, heads, x.shape[-1]).permute(1, 0, 3, 2, 4)

    q, k, v = chunks(q), chunks(k), chunks(v)
    keep, erase, write = chunks(keep, 1.0), chunks(erase), chunks(write)
    strict = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    log_keep = keep.clamp_min(LEAST_KEEP).log().squeeze(-1)  # [count, B, H, size]
    gamma_log = log_keep.cumsum(-1)
    before_log = F.pad(gamma_log[..., :-1], (1, 0))  # shifted, not subtracted: neighbours cancel exactly
    ratio = (before_log.unsqueeze(-1) - gamma_log.unsqueeze(-2)).masked_fill(~strict, -torch.inf).exp()  # Γ
    before = before_log.exp().unsqueeze(-1)
    rest = (gamma_log[..., -1:] - gamma_log).exp().unsqueeze(-1)  # γ_C / γ_s
    total = gamma_log[..., -1].exp()[..., None, None]

    system = erase * ratio * (k @ k.mT)  # strictly lower; the solve supplies the unit diagonal
    right = torch.cat((write * v, erase * before * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u_tilde, w_tilde = solved[..., :rank], solved[..., rank:]
    scores = ratio * (q @ k.mT)
    q_before, k_rest = before * q, rest * k

    reads = []
    for i in range(count):
        u = u_tilde[i] - w_tilde[i] @ state.mT
        reads.append(q_before[i] @ state.mT + scores[i] @ u)
        state = total[i] * state + u.mT @ k_rest[i]
    out = torch.stack(reads, dim=1)  # [B, count, H, size, r]
    return out.permute(0, 1, 3, 2, 4).reshape(batch, count * size, heads, rank)[:, :length], state


def _row_scan(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """A gate per row: rows of S do not mix, so each row is a head whose value has one element."""
    batch, length, heads, rank = q.shape

    def rows(x: Tensor) -> Tensor:
        """[B, T, H, r] or [B, T, H, 1] → [B, T, H·r, 1]."""
        return x.expand(batch, length, heads, rank).reshape(batch, length, heads * rank, 1)

    def shared(x: Tensor) -> Tensor:
        """[B, T, H, r] → [B, T, H·r, r], each row of a head with that head's key or query."""
        return x.unsqueeze(3).expand(batch, length, heads, rank, rank).reshape(batch, length, heads * rank, rank)

    reads, new = _value_scan(
        shared(q),
        shared(k),
        rows(v),
        rows(keep),
        rows(erase),
        rows(write),
        state.reshape(batch, heads * rank, 1, rank),
        chunk,
    )
    return reads.reshape(batch, length, heads, rank), new.reshape(batch, heads, rank, rank)


def _value_scan(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """`chunked_scan` for values narrower than keys: v [B, T, H, d], state [B, H, d, r], reads [B, T, H, d]."""
    batch, length, heads, _ = q.shape
    reads = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        qc, kc, vc, lc, ec, wc = (x[:, part].transpose(1, 2) for x in (q, k, v, keep, erase, write))  # [B, H, C, ·]
        size = qc.shape[2]
        strict = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
        log_keep = lc.clamp_min(LEAST_KEEP).log().squeeze(-1)
        gamma_log = log_keep.cumsum(-1)
        before_log = F.pad(gamma_log[..., :-1], (1, 0))  # shifted, not subtracted: neighbours cancel exactly
        ratio = (before_log.unsqueeze(-1) - gamma_log.unsqueeze(-2)).masked_fill(~strict, -torch.inf).exp()
        before = before_log.exp().unsqueeze(-1)
        right = wc * vc - ec * before * (kc @ state.mT)
        u = torch.linalg.solve_triangular(ec * ratio * (kc @ kc.mT), right, upper=False, unitriangular=True)
        reads.append((before * (qc @ state.mT) + (ratio * (qc @ kc.mT)) @ u).transpose(1, 2))
        rest = (gamma_log[..., -1:] - gamma_log).exp().unsqueeze(-1)
        state = gamma_log[..., -1].exp()[..., None, None] * state + u.mT @ (rest * kc)
    if not reads:
        return v.new_zeros(batch, 0, heads, v.shape[-1]), state
    return torch.cat(reads, dim=1), state
