"""What all tests share: the goldens' place, and bundles exported from them once a session."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # `import oracle`, `import agreement`: modules of the tests, not tests themselves

# A shell that starts a job in the background has it ignore Ctrl-C, and so would the programs that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def parity_data() -> Path:
    """The goldens: tests/data/parity/README.md."""
    return HERE / "data" / "parity"


@pytest.fixture(scope="session")
def golden_case(parity_data: Path) -> Callable[[str], Path]:
    """`golden_case("gemma2_tsw_qo")`: where a golden is, of the parity goldens or of those of other families."""

    def find(case: str) -> Path:
        return next(folder / case for folder in (parity_data, HERE / "data" / "families") if (folder / case).is_dir())

    return find


@pytest.fixture(scope="session")
def parity_bundle(golden_case: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`parity_bundle(case, precision="fp32")`: the path of that case's bundle, exported when first asked for."""
    made: dict[tuple[str, str], Path] = {}

    def bundle(case: str, precision: str = "fp32") -> Path:
        if (case, precision) not in made:
            import torch

            from deltamem_export.bundle import export_bundle

            torch.set_num_threads(1)
            out = tmp_path_factory.mktemp("bundles") / f"{case}-{precision}"
            source = golden_case(case)
            made[case, precision] = export_bundle(
                source / "backbone", source / "adapter", out, precision, say=lambda _: None
            )
        return made[case, precision]

    return bundle
