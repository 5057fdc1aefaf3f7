"""Training data: conversations in JSON Lines, each with its sessions and with questions about them, checked line by line.

{"sessions": [[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], ...],
 "questions": [{"question": "...", "answer": "...", "evidence": [0]}]}

`evidence` lists the sessions (from 0) that the answer stands in. An empty list says that no session tells it: the answer then says so.
Without `evidence` the answer may stand anywhere. It knows nothing of tokens or models.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltamem_export.errors import ExportError

ROLES = ("system", "user", "assistant")
SHOWN = 20
"""Errors of a file that are told at once."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Question:
    """What is asked, what is to be said, and the sessions that tell it: None where that is not known, () where none does."""

    question: str
    answer: str
    evidence: tuple[int, ...] | None

    @property
    def told(self) -> bool:
        return self.evidence != ()


@dataclass(frozen=True)
class Conversation:
    """One user: sessions in their order, and questions about them. `line` is where it stands, `digest` the BLAKE3 of the line's values."""

    line: int
    digest: str
    sessions: tuple[tuple[Message, ...], ...]
    questions: tuple[Question, ...]

    @property
    def evidence_known(self) -> bool:
        """Whether every question says where its answer stands."""
        return all(q.evidence is not None for q in self.questions)


@dataclass(frozen=True)
class Data:
    """The conversations of a file, each once. `digest`: BLAKE3 of the file's bytes, 64 hex digits."""

    path: Path
    digest: str
    conversations: tuple[Conversation, ...]
    repeated: int

    def counts(self) -> dict[str, int]:
        """What there is, by name."""
        questions = [q for c in self.conversations for q in c.questions]
        return {
            "conversations": len(self.conversations),
            "repeated": self.repeated,
            "sessions": sum(len(c.sessions) for c in self.conversations),
            "messages": sum(len(s) for c in self.conversations for s in c.sessions),
            "questions": len(questions),
            "with_evidence": sum(bool(q.evidence) for q in questions),
            "never_told": sum(not q.told for q in questions),
            "evidence_not_said": sum(q.evidence is None for q in questions),
        }

    def split(self, share: float) -> tuple[list[Conversation], list[Conversation]]:
        """Training and held-out conversations, each in the file's order: of all, ordered by their digests, the last `share` is held out.

        Raises:
            ExportError: fewer than two conversations.
        """
        count = max(1, math.ceil(share * len(self.conversations)))
        if len(self.conversations) - count < 1:
            raise ExportError(
                f"{self.path}: holds {len(self.conversations)} different conversation(s), of which {count} would be held out and none left "
                "to train on; add conversations or lower --held-out"
            )
        held = {c.digest for c in sorted(self.conversations, key=lambda c: c.digest)[-count:]}
        return (
            [c for c in self.conversations if c.digest not in held],
            [c for c in self.conversations if c.digest in held],
        )


def read_data(path: Path) -> Data:
    """Reads and checks a file.

    Raises:
        FileNotFoundError: no such file.
        ExportError: lists what is wrong, each with its line, its field and what to do.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(
            f"{path}: is not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    found: dict[str, Conversation] = {}
    wrong: list[str] = []
    repeated = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            conversation = _conversation(line, number)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
            continue
        repeated += conversation.digest in found
        found.setdefault(conversation.digest, conversation)
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more lines" if len(wrong) > SHOWN else ""
        raise ExportError(f"{path}: {'; '.join(wrong[:SHOWN])}{more}")
    if not found:
        raise ExportError(
            f"{path}: holds no conversation; expected a JSON object a line with sessions and questions (docs/training.md)"
        )
    return Data(path, blake3(raw).hexdigest(), tuple(found.values()), repeated)


def nearest(name: str, known: Collection[str]) -> str:
    """', did you mean ...?' where a known name is near, else what names there are."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _conversation(line: str, number: int) -> Conversation:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}); a conversation is one JSON object on one line") from None
    if not isinstance(entry, dict):
        raise ValueError(f"is a {_kind(entry)}, expected an object with sessions and questions")
    _keys(entry, "", ("sessions", "questions"), ("name", "kind"))
    sessions = tuple(
        tuple(_message(m, f"sessions[{i}][{j}]") for j, m in enumerate(_list(session, f"sessions[{i}]", "messages")))
        for i, session in enumerate(_list(entry["sessions"], "sessions", "sessions, each a list of messages"))
    )
    questions = tuple(
        _question(q, f"questions[{i}]", len(sessions))
        for i, q in enumerate(_list(entry["questions"], "questions", "questions about the sessions"))
    )
    content = json.dumps([entry["sessions"], entry["questions"]], sort_keys=True, ensure_ascii=False)
    return Conversation(number, blake3(content.encode("utf-8", "surrogatepass")).hexdigest(), sessions, questions)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is a {_kind(entry)}, expected an object with role and content")
    _keys(entry, where, ("role", "content"), ("name",))
    if entry["role"] not in ROLES:
        raise ValueError(
            f"{where}.role is {entry['role']!r}, expected {' or '.join(ROLES)}; map other speakers to these"
        )
    return Message(entry["role"], _text(entry["content"], f"{where}.content"))


def _question(entry: Any, where: str, sessions: int) -> Question:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is a {_kind(entry)}, expected an object with question and answer")
    _keys(entry, where, ("question",), ("answer", "answers", "evidence", "kind"))
    if ("answer" in entry) == ("answers" in entry):
        raise ValueError(f"{where} has {'both' if 'answer' in entry else 'neither'} of answer and answers; give one")
    if "answers" in entry:
        # The evaluation's form: any of them counts there; the first is what is learnt.
        answers = _list(entry["answers"], f"{where}.answers", "answers, of which the first is learnt")
        answer = _text(answers[0], f"{where}.answers[0]")
    else:
        answer = _text(entry["answer"], f"{where}.answer")
    evidence: tuple[int, ...] | None = None
    if entry.get("evidence") is not None:
        given = entry["evidence"]
        if not isinstance(given, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
            raise ValueError(f"{where}.evidence is {given!r}, expected a list of session numbers, the first is 0")
        outside = [i for i in given if not 0 <= i < sessions]
        if outside:
            raise ValueError(
                f"{where}.evidence names session {outside[0]}, expected 0 to {sessions - 1}; the first session is 0"
            )
        evidence = tuple(sorted(set(given)))
    return Question(_text(entry["question"], f"{where}.question"), answer, evidence)


def _keys(entry: Mapping[str, Any], where: str, needed: Sequence[str], allowed: Sequence[str]) -> None:
    at = f"{where}." if where else ""
    for name in needed:
        if name not in entry:
            raise ValueError(f"{at}{name} is missing; add it")
    for name in entry:
        if name not in needed and name not in allowed:
            raise ValueError(f"{at}{name} is not known{nearest(name, (*needed, *allowed))}")


def _list(value: Any, where: str, of: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        found = "empty" if isinstance(value, list) else f"a {_kind(value)}"
        raise ValueError(f"{where} is {found}, expected a list of {of}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "empty" if isinstance(value, str) else f"a {_kind(value)}"
        raise ValueError(f"{where} is {found}, expected text")
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def describe(data: Data) -> Iterator[str]:
    """What `--check-data` prints of sound data."""
    yield from (f"{name.replace('_', ' '):18} {count}" for name, count in data.counts().items())
    yield f"{'blake3':18} {data.digest}"
