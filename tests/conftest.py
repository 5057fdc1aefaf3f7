"""What all tests share: the goldens' place, bundles exported from them once a session, and a Redis server of their own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The processor plays a card with kernels of its own from here on (tests/emulated.py); images go to a cache of the tests' own."""
    if sys.platform != "linux":
        pytest.skip("the emulator of a card is written for Linux")
    import emulated

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(emulated.VARIABLE, str(emulated.library()))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("kernels")))
        yield emulated.library()


@pytest.fixture(scope="session")
def device_bundle(
    parity_bundle: Callable[..., Path], emulator: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`device_bundle(case)`: that case's bundle in fp32 with graphs for a card that the processor plays."""
    import emulated

    made: dict[str, Path] = {}

    def bundle(case: str) -> Path:
        if case not in made:
            made[case] = emulated.for_a_card(parity_bundle(case), tmp_path_factory.mktemp("device") / case)
        return made[case]

    return bundle


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that lives as long as the tests, on a free port, its files in a temporary directory."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("neither redis-server nor valkey-server is installed: apt-get install redis-server")
    folder = tmp_path_factory.mktemp("redis")
    port = free_port()
    options = f"--bind 127.0.0.1 --port {port} --dir {folder} --save '' --appendonly yes --logfile {folder}/log".split()
    server = subprocess.Popen([program, *(word.strip("'") for word in options)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.fail(f"{program} did not start: {(folder / 'log').read_text()}")
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
