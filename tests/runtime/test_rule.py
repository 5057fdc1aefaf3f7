"""The Rust rule against the NumPy oracle over random shapes, ranks, heads, modes, gates and masks.

Its twins in PyTorch and ONNX are held against the same oracle in tests/export; tests/test_twins.py holds all three side by side.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltamem_rt as dm
import oracle


def by_the_oracle(arrays: list[np.ndarray], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rule in float64; a masked token keeps all, erases and writes nothing."""
    q, k, v, keep, erase, write, state = (array.astype(np.float64) for array in arrays)
    moves = mask[:, None, None]
    return oracle.scan(q, k, v, np.where(moves, keep, 1.0), erase * moves, write * moves, state)


@st.composite
def streams(draw):
    tokens, heads, rank = (
        draw(st.integers(0, 40)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 33, 64])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    gates = rank if draw(st.booleans()) else 1
    mode = draw(st.sampled_from(["standard", "lambda_outside", "no_lambda"]))
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)  # noqa: E731
    q, k, v = (rng.standard_normal((tokens, heads, rank)).astype(np.float32) for _ in range(3))
    beta = 1 / (1 + np.exp(-rng.normal(0, 3, (tokens, heads, gates)))).astype(np.float32)
    lam = 1 - beta
    keep, erase, write = {
        "standard": (lam, beta, beta),
        "lambda_outside": (lam, lam * beta, beta),
        "no_lambda": (np.ones_like(beta), beta, beta),
    }[mode]
    mask = rng.random(tokens) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    state = rng.standard_normal((heads, rank, rank)).astype(np.float32)
    return unit(np.tanh(q)), unit(np.tanh(k)), v, keep, erase, write, state, mask


@settings(max_examples=150, deadline=None)
@given(stream=streams())
def test_the_rust_rule_equals_the_oracle(stream) -> None:
    *arrays, mask = stream
    before = arrays[-1].copy()
    reads, state = dm.scan(*arrays, mask=mask)
    expected_reads, expected_state = by_the_oracle(arrays, mask)
    np.testing.assert_allclose(reads, expected_reads, rtol=0, atol=2e-4)
    np.testing.assert_allclose(state, expected_state, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(arrays[-1], before)
    if not mask.any():
        np.testing.assert_array_equal(state, before)


@settings(max_examples=50, deadline=None)
@given(stream=streams(), cut=st.integers(0, 40))
def test_any_split_gives_the_same_bits(stream, cut: int) -> None:
    *arrays, state, mask = stream
    reads, final = dm.scan(*arrays, state, mask=mask)
    first, middle = dm.scan(*(x[:cut] for x in arrays), state, mask=mask[:cut])
    second, last = dm.scan(*(x[cut:] for x in arrays), middle, mask=mask[cut:])
    np.testing.assert_array_equal(np.concatenate([first, second]), reads)
    np.testing.assert_array_equal(last, final)


def test_arrays_that_do_not_fit_are_refused() -> None:
    ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    good = {name: ones(5, 2, 4) for name in ("q", "k", "v", "keep", "erase", "write")} | {"state": ones(2, 4, 4)}
    dm.scan(**good)
    for name, bad in [("k", ones(5, 2, 3)), ("v", ones(4, 2, 4)), ("write", ones(5, 2, 1)), ("state", ones(2, 4, 3))]:
        with pytest.raises(ValueError, match="expected"):
            dm.scan(**(good | {name: bad}))
    with pytest.raises(ValueError, match="expected"):
        dm.scan(**good, mask=np.ones(4, bool))
    with pytest.raises(TypeError):
        dm.scan(**(good | {"q": np.ones((5, 2, 4))}))
