"""Figures with intervals. A share of cases by Wilson, or any ratio of sums by the bootstrap over whole episodes, since the questions of
one episode share a state and are not independent. It knows nothing of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2_000


@dataclass(frozen=True)
class Figure:
    """A value of n cases with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: float, n: int) -> Figure:
        """A share of n independent cases: Wilson's interval."""
        if n == 0:
            return cls(float("nan"), 0.0, 1.0, 0)
        z, share = 1.959964, right / n
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return cls(round(share, 4), round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4), n)

    @classmethod
    def resampled(cls, sums: ArrayLike, counts: ArrayLike, seed: int = 0) -> Figure:
        """The mean of the cases of E episodes, resampled by episode.

        Args:
            sums: float [E], what each episode's cases add up to.
            counts: int [E], how many cases each episode has.
            seed: of the resampling.

        The interval of a share is never narrower than Wilson's for as many independent cases: where few episodes agree by luck, resampling
        them would claim too much.
        """
        top, bottom = np.asarray(sums, float), np.asarray(counts, float)
        n = int(bottom.sum())
        if n == 0 or top.sum() in (0, n):
            return cls.of(float(top.sum()), n)
        value, low, high = _ratio(top, bottom, seed)
        if not 0 < value < 1:
            return cls(value, low, high, n)
        independent = cls.of(float(top.sum()), n)
        return cls(value, min(low, independent.low), max(high, independent.high), n)

    @classmethod
    def paired(cls, ours: ArrayLike, theirs: ArrayLike, n: int, seed: int = 0) -> Figure:
        """The ratio of two sums over the same E episodes, float [E] each, resampled together. n: the cases on either side.

        NaN with an interval from 0 to infinity where `theirs` adds up to nothing.
        """
        top, bottom = np.asarray(ours, float), np.asarray(theirs, float)
        if bottom.sum() == 0:
            return cls(float("nan"), 0.0, float("inf"), n)
        return cls(*_ratio(top, bottom, seed), n)


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    drawn = np.random.default_rng(seed).integers(0, len(top), (RESAMPLES, len(top)))
    below = bottom[drawn].sum(1)
    ratios = top[drawn].sum(1)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return round(float(top.sum() / bottom.sum()), 4), round(float(low), 4), round(float(high), 4)


def perplexity_ratio(ours: ArrayLike, theirs: ArrayLike, tokens: ArrayLike, seed: int = 0) -> Figure:
    """exp of the mean difference of two negative log-likelihoods a token: below 1 where ours predicts better.

    Args:
        ours, theirs: float [E], summed over each episode's tokens.
        tokens: int [E].
    """
    difference, counts = np.asarray(ours, float) - np.asarray(theirs, float), np.asarray(tokens, float)
    value, low, high = (round(math.exp(x), 4) for x in _ratio(difference, counts, seed))
    return Figure(value, low, high, int(counts.sum()))
