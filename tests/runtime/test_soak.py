"""A million tokens through one session: memory use flat, state finite, the last turn as fast as the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deltamem_rt as dm

TURN = 1000


def resident_bytes() -> int:
    """What this process holds in RAM."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads /proc/self/status, which this system does not have")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def test_a_million_tokens_through_one_session(ids_model: dm.Model) -> None:
    rng = np.random.default_rng(0)
    with ids_model.session() as session:
        after_warm_up, largest = 0, 0.0
        for turn in range(1_000_000 // TURN):
            session.feed(rng.integers(3, 256, TURN, dtype=np.int32))
            if turn % 10 == 0:
                list(session.generate(max_new_tokens=2))
            session.end_turn()
            if turn % 100 == 0:
                session.snapshot()
                largest = max(largest, float(np.abs(session.memory).max()))
            if turn == 100:
                after_warm_up = resident_bytes()
        growth = resident_bytes() - after_warm_up
        assert session.tokens_seen >= 1_000_000
        assert np.isfinite(session.memory).all()
        assert largest < 1e3
        assert growth < 4 << 20, f"{growth / 2**20:.1f} MiB more after 900k tokens"
