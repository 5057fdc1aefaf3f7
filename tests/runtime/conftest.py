"""What the runtime's tests share: a loaded model without a tokenizer (the parity case) and one with (the embedded default)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import deltamem_rt as dm


@pytest.fixture(scope="session")
def ids_model(parity_bundle) -> dm.Model:
    """The Qwen3 parity case: 256 tokens, random weights, no tokenizer."""
    return dm.Model.load(parity_bundle("qwen3_tsw_qo"), device="cpu")


@pytest.fixture(scope="session")
def text_model() -> dm.Model:
    """The embedded default: trained, with a tokenizer and a chat template."""
    return dm.Model.load(dm.default_bundle(), device="cpu")


@pytest.fixture
def session(ids_model: dm.Model) -> Iterator[dm.Session]:
    with ids_model.session() as session:
        yield session


@pytest.fixture
def chat(text_model: dm.Model) -> Iterator[dm.Session]:
    with text_model.session() as session:
        yield session
