"""What changed between commits, what a merge cost, whose writes a read consists of: figures with a table for terminals and notebooks.

The mathematics is in Rust (`deltamem-core`, `edits`); here stands how it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ._records import Commit, stamp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Blame", "Change", "Diff", "Direction", "HeadDiff", "MergeResult", "Redaction", "Share"]

_OF_DIFF = ("layer", "head", "|before|", "|after|", "|change|", "cos", "cos of change", "rank", "largest directions")
_OF_BLAME = ("share", "commit", "branch", "time", "message")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table in plain text: the last column to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == len(head) - 1 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _html(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table for a notebook. Every text in it is escaped: messages are anybody's."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<p>{escape(title)}</p><table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _short(text: str, most: int = 60) -> str:
    first = text.partition("\n")[0]
    return first if len(first) <= most else first[: most - 3] + "..."


def _words(commit: Commit | None) -> str:
    if commit is None:
        return "not committed"
    return _short(commit.message or (str(dict(commit.meta)) if commit.meta else ""))


@dataclass(frozen=True, slots=True)
class Change:
    """Sizes and angles of a change of S. Norms are Frobenius norms.

    ``cosine`` is that of S before and S after (1 when both are zero, 0 when one is); ``cosine_of_change`` that of the change with S before:
    −1 for a mere decay, about 0 for new keys. ``effective_rank`` is exp(−Σ p ln p) with p = σ² / Σ σ² over the change's singular
    values: 1 for one direction.
    """

    norm_before: float
    norm_after: float
    norm_change: float
    cosine: float
    cosine_of_change: float
    effective_rank: float

    def _cells(self) -> list[str]:
        return [
            f"{self.norm_before:.3f}",
            f"{self.norm_after:.3f}",
            f"{self.norm_change:.3f}",
            f"{self.cosine:.3f}",
            f"{self.cosine_of_change:.3f}",
            f"{self.effective_rank:.1f}",
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """One direction of a change: for a query along ``key`` the read moved by ``size`` along ``value``. Both float64 [r], of length 1."""

    size: float
    value: NDArray[np.float64]
    key: NDArray[np.float64]

    def __repr__(self) -> str:
        return f"Direction(size={self.size:.4g})"


@dataclass(frozen=True, slots=True, eq=False)
class HeadDiff:
    """What changed in one layer (counted among those with a memory) and state head; ``directions``: those that moved most."""

    layer: int
    head: int
    change: Change
    directions: tuple[Direction, ...]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Diff:
    """What changed from ``a`` (None: the empty memory) to ``b`` (None: what is not committed).

    ``total`` is over all heads; its effective rank counts directions over all of them. ``heads``: those of layer 0, then of layer 1, ...
    """

    a: Commit | None
    b: Commit | None
    total: Change
    heads: tuple[HeadDiff, ...]

    @property
    def title(self) -> str:
        """What is compared with what."""
        before = self.a.short if self.a else "empty"
        return f"{before} -> {self.b.short if self.b else 'not committed'}"

    def _rows(self) -> list[list[str]]:
        rows = [
            [str(h.layer), str(h.head), *h.change._cells(), " ".join(f"{d.size:.3g}" for d in h.directions)]
            for h in self.heads
        ]
        return [*rows, ["all", "", *self.total._cells(), ""]]

    def __repr__(self) -> str:
        return f"{self.title}\n{_table(_OF_DIFF, self._rows())}"

    def _repr_html_(self) -> str:
        return _html(self.title, _OF_DIFF, self._rows())

    def plot(self, axes: Any = None) -> Any:
        """Draw the size of the change by layer and head, as a heat map.

        Parameters
        ----------
        axes : matplotlib.axes.Axes, optional
            Where to draw; by default a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            matplotlib is not installed.
        """
        pyplot = _pyplot("Diff.plot()")
        if axes is None:
            _, axes = pyplot.subplots()
        layers = 1 + max(h.layer for h in self.heads)
        heads = 1 + max(h.head for h in self.heads)
        sizes = [[0.0] * heads for _ in range(layers)]
        for h in self.heads:
            sizes[h.layer][h.head] = h.change.norm_change
        image = axes.imshow(sizes, aspect="auto", vmin=0)
        axes.set(xlabel="head", ylabel="layer", title=self.title, xticks=range(heads), yticks=range(layers))
        axes.figure.colorbar(image, ax=axes, label="|change|")
        return axes


def _pyplot(what: str) -> Any:
    try:
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib, which is not installed: pip install matplotlib") from error


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge came to.

    ``case`` is ``"up-to-date"`` (their side held nothing new), ``"fast-forward"`` (ours had nothing of its own) or ``"three-way"``;
    ``commit`` is the branch's head afterwards, ``bases`` the common ancestors that were found. The figures lie in [0, 1], and are 0 where
    nothing had to be added: ``overlap`` of the keys that both sides wrote (0: none, 1: the same ones in the same proportions), and what
    each side's own facts lose, e / √(e² + s²) with s what they read and e what the other side adds: 0 as before, 0.71 when the
    disturbance is as large as the read.
    """

    case: Literal["up-to-date", "fast-forward", "three-way"]
    commit: Commit | None
    bases: tuple[str, ...]
    overlap: float
    loss_ours: float
    loss_theirs: float

    def __repr__(self) -> str:
        head = self.commit.short if self.commit else "no commit"
        figures = f", overlap={self.overlap:.3f}, loss_ours={self.loss_ours:.3f}, loss_theirs={self.loss_theirs:.3f}"
        return f"MergeResult({self.case}, {head}{figures if self.case == 'three-way' else ''})"


@dataclass(frozen=True, slots=True)
class Redaction:
    """What a redaction came to: the branch's head afterwards, and how many commits were made again.

    ``survived`` is what was left of the commit's change in the branch's state, as a part of it (0: nothing any more). ``unseparated`` is
    what could not be told apart: the expected size of the error in what was taken out, as a part of the change; 0 is exact.
    ``still_in``: branches and tags that still have the commit in their history.
    """

    commit: Commit
    rewritten: int
    survived: float
    unseparated: float
    still_in: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """One commit's part of a read: signed, negative where the commit works against what is read. ``commit`` None: not committed.

    ``layers`` are the share's parts by layer; they add up to it.
    """

    commit: Commit | None
    share: float
    layers: tuple[float, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Blame:
    """A read, split among commits: ``shares``, the newest commit first, and ``rest`` (older commits) add up to 1.

    ``energy`` is |S q|² over tokens, layers and heads, ``layers`` its parts by layer. So many ``tokens`` were asked, those of ``reply``
    among them (None: there was none). ``merges``: merge commits on the way; what a merge's sum rounds off is its own share.
    """

    shares: tuple[Share, ...]
    rest: float
    energy: float
    layers: tuple[float, ...]
    tokens: int
    reply: str | None
    attribution: Literal["difference", "surviving"]
    merges: int

    @property
    def top(self) -> Share | None:
        """The largest share, the newest of equals."""
        return max(self.shares, key=lambda share: share.share, default=None)

    @property
    def title(self) -> str:
        """What was asked."""
        kind = "what each moved" if self.attribution == "difference" else "what is left of each"
        said = "" if self.reply is None else f", reply {_short(self.reply)!r}"
        return f"the read of {self.tokens} tokens by commit ({kind}{said})"

    def _rows(self) -> list[list[str]]:
        rows = [
            [
                f"{share.share:+.3f}",
                share.commit.short if share.commit else "",
                share.commit.branch if share.commit else "",
                stamp(share.commit.time) if share.commit else "",
                _words(share.commit),
            ]
            for share in self.shares
        ]
        if abs(self.rest) > 1e-9:
            rows.append([f"{self.rest:+.3f}", "", "", "", "older commits"])
        return rows

    def __repr__(self) -> str:
        return f"{self.title}\n{_table(_OF_BLAME, self._rows())}"

    def _repr_html_(self) -> str:
        return _html(self.title, _OF_BLAME, self._rows())
