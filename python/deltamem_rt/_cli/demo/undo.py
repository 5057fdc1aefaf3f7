"""A false memory and its end: somebody says what is not so, the answer changes, and a rollback takes it back.

The memory must then be that of before, byte by byte, and say what it said before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltamem_rt._changes import Blame
from deltamem_rt._native import Model, Session
from deltamem_rt._records import Commit

from .aside import MAX_NEW_TOKENS, ask
from .cast import Fact, Person, is_right


@dataclass(frozen=True)
class Undone:
    """One false memory. `same_bytes` is the promise; `blame` None: it was not asked."""

    person: int
    fact: Fact
    false: Fact
    before: str
    misled: str
    after: str
    back_to: Commit
    told_false: Commit
    same_bytes: bool
    blame: Blame | None

    @property
    def false_said(self) -> bool:
        """Whether the false value was the answer."""
        return is_right(self.misled, self.false)

    @property
    def same_answer(self) -> bool:
        """Whether the answer after the rollback is that of before, word by word."""
        return self.after == self.before

    @property
    def blamed(self) -> bool:
        """Whether blame named the commit that told the false fact."""
        top = self.blame.top if self.blame else None
        return top is not None and top.commit == self.told_false


def mislead_and_undo(
    model: Model,
    sessions: list[Session],
    people: list[Person],
    false: list[tuple[Fact, ...]],
    progress: Callable[[str], None],
) -> list[Undone]:
    """Tells everybody the `false` facts in place of theirs, one at a time, and rolls each back before the next.

    Blame is asked once for each person, for their first fact: it replays the chain of states, which takes its time.
    """
    undone = []
    with model.session() as aside:
        for person, session, others in zip(people, sessions, false, strict=True):
            for index, (fact, other) in enumerate(zip(person.facts, others, strict=True)):
                progress(f"person {person.number}  {other.told}")
                undone.append(_one(aside, session, person.number, fact, other, blaming=index == 0))
    return undone


def _one(aside: Session, session: Session, person: int, fact: Fact, false: Fact, *, blaming: bool) -> Undone:
    state, head = session.snapshot(), session.show()
    before = ask(aside, state, fact.question)
    session.chat(false.told, max_new_tokens=MAX_NEW_TOKENS).read()
    told_false = session.show()
    misled = ask(aside, session.snapshot(), fact.question)
    blame = session.blame(fact.question, attribution="surviving") if blaming else None
    session.rollback(head.id)
    back = session.snapshot()
    return Undone(
        person=person,
        fact=fact,
        false=false,
        before=before,
        misled=misled,
        after=ask(aside, back, fact.question),
        back_to=head,
        told_false=told_false,
        same_bytes=back.to_bytes() == state.to_bytes(),
        blame=blame,
    )


def undone_as_json(undone: list[Undone]) -> dict[str, Any]:
    """All of it, as it stands in the JSON output."""
    blamed = [one.blamed for one in undone if one.blame]
    return {
        "false_memories": len(undone),
        "false_said": sum(one.false_said for one in undone),
        "same_answer_after_rollback": sum(one.same_answer for one in undone),
        "rolled_back_bit_for_bit": all(one.same_bytes for one in undone),
        "blamed": len(blamed),
        "blamed_right": sum(blamed),
    }
