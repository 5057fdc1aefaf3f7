"""The chunked scan is the sequential rule: the same reads, states and gradients, whatever the length, the mode and the chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltamem_export.reference import scan as sequential_scan
from deltamem_export.scan import chunked_scan

LENGTHS = (1, 11, 100, 203)
MODES = ("standard", "lambda_outside", "no_lambda")


def inputs(
    length: int,
    mode: str,
    rows: bool,
    heads: int = 2,
    rank: int = 8,
    batch: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k = (torch.nn.functional.normalize(normal(batch, length, heads, rank), dim=-1) for _ in range(2))
    v = normal(batch, length, heads, rank)
    beta = normal(batch, length, heads, rank if rows else 1).sigmoid()
    keep = torch.ones_like(beta) if mode == "no_lambda" else 1 - beta
    erase = keep * beta if mode == "lambda_outside" else beta
    mask = (torch.rand(batch, length, generator=generator) < 0.8)[:, :, None, None]  # a fifth may not write
    keep, erase, write = torch.where(mask, keep, 1.0), torch.where(mask, erase, 0.0), torch.where(mask, beta, 0.0)
    return [t.detach().requires_grad_() for t in (q, k, v, keep, erase, write, normal(batch, heads, rank, rank))]


@pytest.mark.parametrize("rows", [False, True], ids=["gate per head", "gate per row"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", LENGTHS)
def test_reads_states_and_gradients_are_those_of_the_rule(length: int, mode: str, rows: bool) -> None:
    ours, theirs = inputs(length, mode, rows), inputs(length, mode, rows)
    reads, state = chunked_scan(*ours, chunk=48)
    want_reads, want_state = sequential_scan(*theirs)
    assert (reads - want_reads).abs().max() < 2e-5
    assert (state - want_state).abs().max() < 1e-5
    weight = torch.randn(reads.shape, generator=torch.Generator().manual_seed(1))
    ((reads * weight).sum() + state.square().sum()).backward()
    ((want_reads * weight).sum() + want_state.square().sum()).backward()
    for got, want in zip(ours, theirs, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert (got.grad - want.grad).norm() <= 2e-5 * want.grad.norm() + 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
def test_the_chunk_size_does_not_matter(chunk: int) -> None:
    values = inputs(130, "standard", rows=False)
    reads, state = chunked_scan(*values, chunk=chunk)
    want_reads, want_state = sequential_scan(*values)
    assert (reads - want_reads).abs().max() < 2e-5
    assert (state - want_state).abs().max() < 1e-5


def test_a_stream_in_two_calls_is_the_stream_in_one() -> None:
    *values, state = inputs(90, "standard", rows=False)
    reads, end = chunked_scan(*values, state)
    first, middle = chunked_scan(*(t[:, :37] for t in values), state)
    second, last = chunked_scan(*(t[:, 37:] for t in values), middle)
    assert (torch.cat((first, second), dim=1) - reads).abs().max() < 1e-5
    assert (last - end).abs().max() < 1e-5


def test_a_gate_that_forgets_everything_stays_finite() -> None:
    q, k, v, keep, erase, write, state = inputs(100, "standard", rows=False)
    keep = torch.zeros_like(keep)
    reads, end = chunked_scan(q, k, v, keep, erase, write, state)
    want_reads, want_end = sequential_scan(q, k, v, keep, erase, write, state)
    assert torch.isfinite(reads).all()
    assert (reads - want_reads).abs().max() < 1e-5
    assert (end - want_end).abs().max() < 1e-5


def test_no_tokens_leave_the_state() -> None:
    *values, state = inputs(1, "standard", rows=False)
    reads, end = chunked_scan(*(t[:, :0] for t in values), state)
    assert reads.shape[1] == 0
    assert torch.equal(end, state)


@pytest.mark.parametrize("rows", [False, True], ids=["gate per head", "gate per row"])
def test_gradients_hold_against_finite_differences(rows: bool) -> None:
    values = inputs(9, "lambda_outside", rows, heads=1, rank=3, batch=1, dtype=torch.float64)
    with torch.no_grad():
        values[3].clamp_(0.1, 0.9)
    assert torch.autograd.gradcheck(lambda *a: chunked_scan(*a, chunk=4), values)
