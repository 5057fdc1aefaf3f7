"""What a store says about memories: commits, branches, moves, reports. Small immutable values, made by the binding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

__all__ = [
    "Commit",
    "Damage",
    "GcReport",
    "MemoryInfo",
    "Move",
    "RepairReport",
    "StoreStats",
    "VerifyReport",
]

_START = datetime(1970, 1, 1, tzinfo=UTC)


def when(ms: int) -> datetime:
    """Return the aware time of so many milliseconds since 1970, UTC; the last time there is for anything beyond it."""
    try:
        return _START + timedelta(milliseconds=ms)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def stamp(time: datetime) -> str:
    """Return a time as tables show it."""
    return f"{time:%Y-%m-%d %H:%M:%S}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Commit:
    """One commit of one memory. Its id is the BLAKE3 of everything in it, so two commits of one id are the same.

    ``parents`` holds no id for a first commit and two for a merge, the branch's own first. ``state`` is the hash of the state's bytes.
    ``parts`` says what the fingerprint is made of: backbone, adapter, tokenizer (None without one), config. ``time`` is in UTC.
    """

    id: str
    parents: tuple[str, ...]
    generation: int
    branch: str
    state: str
    state_bytes: int
    fingerprint: str
    parts: Mapping[str, str | None] | None
    tokens_seen: int
    time: datetime
    message: str
    meta: Mapping[str, Any]

    @property
    def short(self) -> str:
        """The id's first 12 digits."""
        return self.id[:12]

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Commit) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        first = self.message.partition("\n")[0]
        words = repr(first) if first else repr(dict(self.meta)) if self.meta else "no message"
        return f"Commit({self.short}, {self.branch}, {stamp(self.time)}, {self.tokens_seen} tokens, {words})"


@dataclass(frozen=True, slots=True)
class Move:
    """One move of a branch or a tag. ``old`` None: it was made; ``new`` None: it was deleted."""

    number: int
    kind: Literal["branch", "tag"]
    name: str
    old: str | None
    new: str | None
    time: datetime
    why: str

    def __repr__(self) -> str:
        ids = " -> ".join(end[:12] if end else "none" for end in (self.old, self.new))
        return f"Move({self.number}, {self.kind} {self.name}, {ids}, {stamp(self.time)}, {self.why})"


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """What a memory is. ``branches`` and ``tags``: name to the id of its commit; ``head``: the branch that HEAD means.

    ``bytes`` is what commits and states take. ``expires`` None: never.
    """

    name: str
    head: str
    branches: Mapping[str, str]
    tags: Mapping[str, str]
    commits: int
    bytes: int
    max_commits: int | None
    max_bytes: int | None
    when_full: Literal["refuse", "prune"]
    created: datetime
    changed: datetime
    expires: datetime | None


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds. ``bytes``: of commits and states; ``size``: of the file, or of the keys on the server."""

    place: str
    memories: int
    expired: int
    commits: int
    bytes: int
    size: int
    encrypted: bool
    durability: str


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a ``gc`` took away: expired memories, commits and states that nothing names, old moves; and the file's bytes around it."""

    memories: int
    commits: int
    states: int
    moves: int
    bytes_before: int | None
    bytes_after: int | None


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it was written. ``memory`` None: unknown, or no single one."""

    memory: str | None
    place: str
    what: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What an inspection looked at and found. ``unreachable``: commits and states that nothing names; ``gc`` removes them."""

    memories: int
    commits: int
    states: int
    moves: int
    unreachable: int
    damages: tuple[Damage, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair saved, and what was lost, moved back or renamed."""

    memories: int
    commits: int
    losses: tuple[Damage, ...]
