"""The log of one person: a commit for each turn in which they told something, with what it changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltamem_rt._native import Store
from deltamem_rt._records import Commit

from .cast import Person


@dataclass(frozen=True)
class LogLine:
    """A turn's commit. `change` is the Frobenius norm of what it moved in the memory; `words` are ours, a commit holds none."""

    commit: Commit
    change: float
    words: str


@dataclass(frozen=True)
class Committed:
    """What all telling left in the store, and one person's log, the oldest first. `bytes`: of all commits with their states."""

    commits: int
    bytes: int
    place_bytes: int
    log: tuple[LogLine, ...]

    def as_json(self) -> dict[str, Any]:
        """Its part of the JSON output."""
        return {
            "commits": self.commits,
            "commit_bytes": round(self.bytes / self.commits),
            "store_bytes": self.place_bytes,
        }


def committed(store: Store, names: list[str], person: Person) -> Committed:
    """Looks at the store after everybody has told their facts. The log is that of `person`, the first of `names`."""
    infos = [store.info(name) for name in names]
    newest_first = store.log(names[0], n=len(person.facts))
    log = []
    for commit, fact in zip(reversed(newest_first), person.facts, strict=True):
        before = commit.parents[0] if commit.parents else None
        change = store.diff(names[0], before, commit.id).total.norm_change
        log.append(LogLine(commit, change, fact.told))
    return Committed(
        commits=sum(info.commits for info in infos),
        bytes=sum(info.bytes for info in infos),
        place_bytes=store.stats().size,
        log=tuple(log),
    )
