"""What if: each person's memory is forked, two branches of the fork are told different facts, and they are merged.

Every fact is asked for on either branch and after the merge, aside: what one branch knows of the other's facts shows too. The people's
own memories stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltamem_rt._changes import MergeResult
from deltamem_rt._native import Model, Session, Snapshot, Store
from deltamem_rt._records import Commit
from deltamem_rt.errors import MergeWarning

from .aside import MAX_NEW_TOKENS, ask
from .cast import Fact, Person, is_right

OURS, THEIRS = "main", "what-if"
MERGED = "merged"
BEFORE = "before"
"""The facts told before the branches parted."""


@dataclass
class Recall:
    """Answers that were right, of so many."""

    right: int = 0
    asked: int = 0

    @property
    def share(self) -> float | None:
        """The share of right answers; None of nothing."""
        return self.right / self.asked if self.asked else None


@dataclass(frozen=True)
class Branched:
    """Both branches of one person, with what was told on each, the oldest first, and what the merge made of them."""

    base: Commit
    told: dict[str, tuple[tuple[Commit, str], ...]]
    merge: MergeResult


@dataclass(frozen=True)
class WhatIf:
    """What came of it. `recall[memory][facts]`: `memory` is a branch or MERGED, `facts` those of BEFORE or of a branch."""

    people: tuple[Branched, ...]
    recall: dict[str, dict[str, Recall]]
    warned: int

    @property
    def merged(self) -> Recall:
        """Of the facts told on the branches, after the merge."""
        return self._of(MERGED, MERGED)

    @property
    def apart(self) -> Recall:
        """The same facts before it, each on its own branch."""
        return self._of(OURS, THEIRS)

    def as_json(self) -> dict[str, Any]:
        """Its part of the JSON output. Recalls are None where the branches were told nothing."""
        merged, apart, before = self.merged, self.apart, self.recall[MERGED][BEFORE]
        return {
            "branch_facts": merged.asked,
            "recall_on_own_branch": apart.share,
            "recall_after_merge": merged.share,
            "recall_of_earlier_facts_after_merge": before.share,
            "merge_overlap_mean": sum(one.merge.overlap for one in self.people) / len(self.people),
            "merges_warned": self.warned,
        }

    def _of(self, ours: str, theirs: str) -> Recall:
        sides = (self.recall[ours][OURS], self.recall[theirs][THEIRS])
        return Recall(sum(side.right for side in sides), sum(side.asked for side in sides))


def what_if(
    model: Model,
    store: Store,
    names: list[str],
    people: list[Person],
    extra: list[tuple[Fact, ...]],
    progress: Callable[[str], None],
) -> WhatIf:
    """Plays it for all: `extra` are each person's facts for the branches, half for each. Forks are named NAME-what-if."""
    memories, groups = (OURS, THEIRS, MERGED), (BEFORE, OURS, THEIRS)
    recall = {memory: {group: Recall() for group in groups} for memory in memories}
    played = []
    with model.session() as aside, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergeWarning)
        for name, person, facts in zip(names, people, extra, strict=True):
            progress(f"person {person.number}  two branches, {len(facts)} facts, a merge")
            half = len(facts) // 2
            of = {BEFORE: person.facts, OURS: facts[:half], THEIRS: facts[half:]}
            store.fork(name, fork := f"{name}-{THEIRS}")
            with model.session(fork, store=store, autocommit=True) as session:
                branched, states = _branch_and_merge(session, of)
            played.append(branched)
            for memory in memories:
                for group in groups:
                    for fact in of[group]:
                        recall[memory][group].asked += 1
                        recall[memory][group].right += is_right(ask(aside, states[memory], fact.question), fact)
    return WhatIf(tuple(played), recall, sum(issubclass(warning.category, MergeWarning) for warning in caught))


def _branch_and_merge(session: Session, of: dict[str, tuple[Fact, ...]]) -> tuple[Branched, dict[str, Snapshot]]:
    base = session.show()
    told, states = {}, {}
    session.branch(THEIRS)
    for branch in (THEIRS, OURS):
        session.checkout(branch)
        told[branch] = tuple(_tell(session, fact) for fact in of[branch])
        states[branch] = session.snapshot()
    merge = session.merge(THEIRS)
    states[MERGED] = session.snapshot()
    return Branched(base, told, merge), states


def _tell(session: Session, fact: Fact) -> tuple[Commit, str]:
    session.chat(fact.told, max_new_tokens=MAX_NEW_TOKENS).read()
    return session.show(), fact.told
