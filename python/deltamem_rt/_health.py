"""What a memory looks like and whether it is healthy: figures with a table for terminals and notebooks.

The figures are computed in Rust (`deltamem-core`, `health`); here stands how they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from ._changes import _html, _table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Health"]

_OF_HEADS = {
    "norm": "|S|",
    "spectral_norm": "spectral",
    "effective_rank": "rank",
    "concentration": "|S|/√rank",
    "change": "turn moved",
    "path": "16 turns",
    "collapse": "collapse",
    "churn": "churn",
    "scatter": "scatter",
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Health:
    """What a session's memory looks like at one moment (docs/health.md). L layers with a memory, H heads, D corrected projections.

    Attributes
    ----------
    norm, spectral_norm : ndarray of float32 [L, H]
        The Frobenius norm of each state, and its largest singular value: how long a read by a query of length 1 can be.
    effective_rank : ndarray of float32 [L, H]
        exp(−Σ p ln p) with p = σ² / Σ σ² over the singular values σ: 1 for one direction, r for r equal ones, 0 for no state.
    concentration : ndarray of float32 [L, H]
        norm / √(effective rank), the size of a direction that is in use. Facts under keys of their own leave it, contradictions raise it.
    change : ndarray of float32 [L, H], or None
        How far (Frobenius) the last turn moved the state; inside a turn, how far it did so far. Watched sessions (``on_drift``) only.
    path : ndarray of float32 [L, H], or None
        How far the last 16 turns did, added up turn by turn. Watched sessions only.
    collapse : ndarray of float32 [L, H], or None
        The effective rank before the last turn over the one after it, times the part of today's energy that was there before (at most 1):
        large where the turn wiped the memory. Watched sessions only.
    churn : ndarray of float32 [L, H], or None
        How much of what the last 25 to 33 turns did came to nothing: their changes' lengths added up, minus the length of all they changed
        together, in the nuclear norm. Facts of their own are no churn, contradictions and noise are. Watched sessions only.
    scatter : ndarray of float32 [L, H], or None
        In how many directions at once the last 16 turns wrote: the nuclear norms of their changes minus the Frobenius norms, added up. A
        turn that writes one fact adds nothing. Watched sessions only.
    distance : ndarray of float32 [L, H], or None
        How far the state is from the last healthy one: a watched session's last healthy turn, otherwise the commit it stands on.
    healthy_commit, healthy_turns : str or None, int or None
        The commit that the session stood on with that state, and how many turns had ended then.
    delta_ratio : ndarray of float32 [L, D], or None
        |correction| / |what it corrects| over the last tokens, for each of ``delta_heads``.
    beta_mean, beta_saturated : ndarray of float32 [L], or None
        The mean of β over the last tokens, and the share of its values below 0.02 or above 0.98.
    lambda_mean, lambda_saturated : ndarray of float32 [L], or None
        The same for λ, where it is not 1 − β.
    measured_tokens : int
        How many tokens that were; 0 where nothing was measured.
    delta_heads, layers : tuple of str, tuple of int
        The corrected projections, and which layers of the model the L are.
    tokens_seen, turns : int
        Tokens read and turns ended since the memory was empty.
    bounds : mapping of str to ndarray of float32, or None
        What the bundle's calibration found healthy memories to stay under, by the names above. None: the bundle was not calibrated, and the
        verdict asks only whether the numbers are finite and small enough to be read.
    frozen : bool
        Whether writes are off because the memory drifted.
    reasons : tuple of str
        What speaks against the memory, in words.
    """

    norm: NDArray[np.float32]
    spectral_norm: NDArray[np.float32]
    effective_rank: NDArray[np.float32]
    concentration: NDArray[np.float32]
    change: NDArray[np.float32] | None
    path: NDArray[np.float32] | None
    collapse: NDArray[np.float32] | None
    churn: NDArray[np.float32] | None
    scatter: NDArray[np.float32] | None
    distance: NDArray[np.float32] | None
    delta_ratio: NDArray[np.float32] | None
    beta_mean: NDArray[np.float32] | None
    beta_saturated: NDArray[np.float32] | None
    lambda_mean: NDArray[np.float32] | None
    lambda_saturated: NDArray[np.float32] | None
    delta_heads: tuple[str, ...]
    layers: tuple[int, ...]
    measured_tokens: int
    tokens_seen: int
    turns: int
    healthy_commit: str | None
    healthy_turns: int | None
    bounds: Mapping[str, NDArray[np.float32]] | None
    frozen: bool
    reasons: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing speaks against the memory. In a bundle without ``bounds`` that says little."""
        return not self.reasons

    @property
    def verdict(self) -> str:
        """The verdict in one line."""
        said = f"{self.tokens_seen} tokens, {self.turns} turns: "
        if self.reasons:
            said += "not healthy"
        elif self.bounds is None:
            said += "no verdict, the bundle was not calibrated (its numbers can be used)"
        else:
            said += "healthy"
        return said + (", frozen" if self.frozen else "")

    def _head(self) -> list[str]:
        head = ["layer", "head"]
        for name, title in _OF_HEADS.items():
            if getattr(self, name) is not None:
                head += [title, "bound"] if self.bounds is not None else [title]
        if self.distance is not None:
            head.append("from healthy")
        head += [f"Δ{name}" for name in self.delta_heads] if self.delta_ratio is not None else []
        for name, title in (("beta_mean", "β"), ("lambda_mean", "λ")):
            if getattr(self, name) is not None:
                head += [title, f"{title} saturated"]
        return [*head, ""]

    def _rows(self) -> list[list[str]]:
        rows = []
        for at, layer in enumerate(self.layers):
            for head in range(self.norm.shape[1]):
                row = [str(layer), str(head)]
                for name in _OF_HEADS:
                    values = getattr(self, name)
                    if values is not None:
                        row.append(f"{values[at, head]:.3g}")
                        if self.bounds is not None:
                            row.append(f"{self.bounds[name][at, head]:.3g}" if name in self.bounds else "-")
                if self.distance is not None:
                    row.append(f"{self.distance[at, head]:.3g}")
                if self.delta_ratio is not None:
                    row += [f"{ratio:.3f}" for ratio in self.delta_ratio[at]]
                for mean, saturated in (
                    (self.beta_mean, self.beta_saturated),
                    (self.lambda_mean, self.lambda_saturated),
                ):
                    if mean is not None and saturated is not None:
                        row += [f"{mean[at]:.3f}", f"{saturated[at]:.3f}"]
                rows.append([*row, ""])
        return rows

    def __repr__(self) -> str:
        return "\n".join(
            [self.verdict, *(f"  {reason}" for reason in self.reasons), _table(self._head(), self._rows())]
        )

    def _repr_html_(self) -> str:
        listed = "".join(f"<li>{escape(reason)}</li>" for reason in self.reasons)
        return _html(self.verdict, self._head(), self._rows()) + (f"<ul>{listed}</ul>" if listed else "")
