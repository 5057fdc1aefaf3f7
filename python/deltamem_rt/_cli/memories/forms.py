"""How what a store says looks to a program: JSON with the API's names, full ids, each time as ISO 8601 in UTC and in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from deltamem_rt._changes import Blame, Change, Diff, MergeResult
from deltamem_rt._records import Commit, Damage, MemoryInfo, Move

_START = datetime(1970, 1, 1, tzinfo=UTC)


def print_json(found: Mapping[str, Any]) -> None:
    """Prints one object. What is not ASCII is escaped: messages are anybody's, and a terminal may read along."""
    print(json.dumps(found, indent=2))


def of_time(key: str, time: datetime | None) -> dict[str, Any]:
    """A time under its key, and in milliseconds since 1970 under KEY_ms."""
    if time is None:
        return {key: None, f"{key}_ms": None}
    return {
        key: f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z",
        f"{key}_ms": (time - _START) // timedelta(milliseconds=1),
    }


def of_commit(commit: Commit) -> dict[str, Any]:
    """A commit."""
    return {
        "id": commit.id,
        "parents": list(commit.parents),
        "generation": commit.generation,
        "branch": commit.branch,
        **of_time("time", commit.time),
        "message": commit.message,
        "meta": dict(commit.meta),
        "tokens_seen": commit.tokens_seen,
        "fingerprint": commit.fingerprint,
        "parts": None if commit.parts is None else dict(commit.parts),
        "state": commit.state,
        "state_bytes": commit.state_bytes,
    }


def of_memory(info: MemoryInfo) -> dict[str, Any]:
    """What a memory is."""
    return {
        **of_refs(info),
        "commits": info.commits,
        "bytes": info.bytes,
        "max_commits": info.max_commits,
        "max_bytes": info.max_bytes,
        "when_full": info.when_full,
        **of_time("created", info.created),
        **of_time("changed", info.changed),
        **of_time("expires", info.expires),
    }


def of_refs(info: MemoryInfo) -> dict[str, Any]:
    """Which memory, and where its branches and tags are."""
    return {"name": info.name, "head": info.head, "branches": dict(info.branches), "tags": dict(info.tags)}


def of_move(move: Move) -> dict[str, Any]:
    """A move of a branch or a tag."""
    return {
        "number": move.number,
        "kind": move.kind,
        "name": move.name,
        "old": move.old,
        "new": move.new,
        **of_time("time", move.time),
        "why": move.why,
    }


def of_change(change: Change) -> dict[str, float]:
    """Sizes and angles of a change."""
    return {
        "norm_before": change.norm_before,
        "norm_after": change.norm_after,
        "norm_change": change.norm_change,
        "cosine": change.cosine,
        "cosine_of_change": change.cosine_of_change,
        "effective_rank": change.effective_rank,
    }


def of_diff(diff: Diff) -> dict[str, Any]:
    """A diff, with the directions that moved most."""
    return {
        "a": diff.a and of_commit(diff.a),
        "b": diff.b and of_commit(diff.b),
        "total": of_change(diff.total),
        "heads": [
            {
                "layer": head.layer,
                "head": head.head,
                **of_change(head.change),
                "directions": [
                    {"size": one.size, "value": one.value.tolist(), "key": one.key.tolist()} for one in head.directions
                ],
            }
            for head in diff.heads
        ],
    }


def of_merge(result: MergeResult) -> dict[str, Any]:
    """What a merge came to."""
    return {
        "case": result.case,
        "commit": result.commit and of_commit(result.commit),
        "bases": list(result.bases),
        "overlap": result.overlap,
        "loss_ours": result.loss_ours,
        "loss_theirs": result.loss_theirs,
    }


def of_blame(blame: Blame) -> dict[str, Any]:
    """A read, split among commits."""
    return {
        "attribution": blame.attribution,
        "reply": blame.reply,
        "tokens": blame.tokens,
        "energy": blame.energy,
        "layers": list(blame.layers),
        "merges": blame.merges,
        "rest": blame.rest,
        "shares": [
            {"share": share.share, "layers": list(share.layers), "commit": share.commit and of_commit(share.commit)}
            for share in blame.shares
        ],
    }


def of_damages(damages: Sequence[Damage]) -> list[dict[str, Any]]:
    """What is not as it was written."""
    return [{"memory": damage.memory, "place": damage.place, "what": damage.what} for damage in damages]
