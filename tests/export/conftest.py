"""What the exporter's tests share: quiet libraries on one thread, and small random backbones and adapters (tests/tiny.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltamem_export.adapter import Adapter
from tiny import FAMILIES, random_adapter, save_backbone

torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `every_family` runs once for each of them."""
    if "every_family" in metafunc.fixturenames:
        metafunc.parametrize("every_family", FAMILIES)


@pytest.fixture
def make_backbone(tmp_path: Path) -> Callable[..., Path]:
    """`make_backbone("llama", attention_bias=True)`: a folder with a random tiny decoder."""
    return lambda family, **more: save_backbone(tmp_path / f"backbone-{family}", family, **more)


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    """`make_adapter(backbone, rank=4, ...)`: a random adapter that fits."""
    return random_adapter
