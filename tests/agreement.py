"""One comparison for all parity tests. A failure tells the largest and the mean difference, and where."""

from __future__ import annotations

import numpy as np


def assert_close(what: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """|found − expected| ≤ tolerance everywhere, in the same shape; a NaN is never close."""
    assert found.shape == expected.shape, f"{what}: found shape {found.shape}, expected {expected.shape}"
    if found.size == 0:
        return
    difference = np.abs(found.astype(np.float64) - expected)
    where = np.unravel_index(np.nan_to_num(difference, nan=np.inf).argmax(), difference.shape)
    assert difference.max() <= tolerance, (
        f"{what}: max {difference.max():.3e}, mean {difference.mean():.3e}, tolerance {tolerance:.0e}; the largest at "
        f"{tuple(int(i) for i in where)}: found {found[where]:.7g}, expected {expected[where]:.7g}"
    )
