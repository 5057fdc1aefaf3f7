"""The rule of δ-mem in plain NumPy, in whatever precision its inputs have: the fourth telling of it, slow and without a framework, that
the three real ones (reference.py, graft.py, deltamem-core) are tested against. Shapes as in reference.py, without a batch axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def l2(x: Array) -> Array:
    return x / np.maximum(np.sqrt((x * x).sum(axis=-1, keepdims=True)), 1e-6)


def scan(q: Array, k: Array, v: Array, keep: Array, erase: Array, write: Array, state: Array) -> tuple[Array, Array]:
    """q, k, v [T, H, r]; gates [T, H, r] or [T, H, 1]; state [H, r, r] → reads [T, H, r], state [H, r, r]."""
    reads = np.zeros_like(v)
    state = state.copy()
    for t in range(len(q)):
        for h in range(q.shape[1]):
            s = state[h]
            reads[t, h] = s @ q[t, h]
            update = write[t, h] * v[t, h] - erase[t, h] * (s @ k[t, h])
            state[h] = keep[t, h][:, None] * s + np.outer(update, k[t, h])
    return reads, state


def gates(mode: str, beta_logit: Array, lambda_logit: Array | None) -> tuple[Array, Array, Array]:
    """keep, erase, write from the logits of β and, where it has its own, λ."""
    beta = sigmoid(beta_logit)
    keep = sigmoid(-beta_logit) if lambda_logit is None else sigmoid(lambda_logit)
    if mode == "no_lambda":
        keep = np.ones_like(beta)
    return keep, keep * beta if mode == "lambda_outside" else beta, beta


def read_and_write(
    h: Array,
    tensors: Mapping[str, Array],
    state: Array,
    mask: Array,
    *,
    mode: str,
    normalize_qk: bool,
    couple_lambda: bool,
    spans: Array | None = None,
) -> tuple[Array, Array]:
    """A layer from its input to its reads. h [T, D], mask [T] (1: may write), state [H, r, r] → reads [T, H, r], state. spans [T]: the id
    of a token's span, -1 for none: all tokens read `state`, then the mean h of each span is written."""
    settings = {"mode": mode, "normalize_qk": normalize_qk, "couple_lambda": couple_lambda}
    if spans is not None:
        reads, _ = read_and_write(h, tensors, state, np.zeros(len(h)), **settings)
        for span in sorted(set(spans[(spans >= 0) & (mask != 0)].tolist())):
            mean = h[(spans == span) & (mask != 0)].mean(axis=0, keepdims=True)
            _, state = read_and_write(mean, tensors, state, np.ones(1), **settings)
        return reads, state
    heads, rank = state.shape[:2]
    q, k, v = ((h @ tensors[f"memory_{p}_proj"].T).reshape(len(h), heads, rank) for p in "qkv")
    if normalize_qk:
        q, k = l2(np.tanh(q)), l2(np.tanh(k))
    beta = (h @ tensors["beta_proj"].T + tensors["beta_bias"]).reshape(len(h), heads, -1)
    lam = None if couple_lambda else (h @ tensors["lambda_proj"].T + tensors["lambda_bias"]).reshape(beta.shape)
    keep, erase, write = gates(mode, beta, lam)
    may = mask.reshape(-1, 1, 1) != 0
    return scan(q, k, v, np.where(may, keep, 1), np.where(may, erase, 0), np.where(may, write, 0), state)


def corrections(reads: Array, tensors: Mapping[str, Array], heads: str, scale: float) -> dict[str, Array]:
    """reads [T, H, r] → Δ [T, out] per delta head; scale is alpha/r times what is trained on top."""
    flat = reads.reshape(len(reads), -1)
    return {p: flat @ tensors[f"delta_{p}_proj"].T * scale for p in heads}
