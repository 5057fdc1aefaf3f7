"""Conversations from files: LoCoMo's JSON, or JSON Lines with sessions and questions (docs/evaluation.md). It knows nothing of models.

{"name": "...", "kind": "accurate retrieval", "sessions": [[{"role": "user", "content": "..."}, ...], ...],
 "questions": [{"question": "...", "answers": ["..."]}]}
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_export.errors import ExportError
from deltamem_export.training.language import LISTENING

LOCOMO_KINDS = {1: "several sessions", 2: "time", 3: "inference", 4: "one session", 5: "not answerable"}
"""What LoCoMo's five categories of questions ask for."""


@dataclass(frozen=True)
class Question:
    """A question and the answers that count. `wrong`: what must not be said, for a question that the conversation does not answer."""

    text: str
    answers: tuple[str, ...]
    kind: str
    wrong: str = ""


@dataclass(frozen=True)
class Dialogue:
    """Sessions of (user, reply) turns, and questions about all of them."""

    name: str
    sessions: tuple[tuple[tuple[str, str], ...], ...]
    questions: tuple[Question, ...]


def read_dialogues(path: Path) -> list[Dialogue]:
    """Reads a file of either form. Raises ExportError, with the line, for what is neither."""
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip()[:1] == "[":
            dialogues = [_locomo(sample) for sample in json.loads(text)]
        else:
            dialogues = []
            for number, line in enumerate(text.splitlines(), 1):
                where = f"{path}, line {number}"
                if line.strip():
                    dialogues.append(_sessions(json.loads(line), f"{path.stem} {number}"))
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{where}: is no conversation ({type(error).__name__}: {error}); expected LoCoMo's JSON, or a line of JSON with "
            '"sessions" (lists of {"role", "content"}) and "questions" (of {"question", "answers"}) each'
        ) from error
    if not dialogues:
        raise ExportError(f"{path}: holds no conversation; expected LoCoMo's JSON or lines of JSON with sessions")
    return dialogues


def _locomo(sample: dict[str, Any]) -> Dialogue:
    talk = sample["conversation"]
    numbers = sorted(int(k[8:]) for k in talk if re.fullmatch(r"session_\d+", k) and isinstance(talk[k], list))
    sessions = []
    for number in numbers:
        date = talk.get(f"session_{number}_date_time")
        lines = [f"[{date}]"] if isinstance(date, str) else []
        lines += [f"{m['speaker']}: {m['text']}" for m in talk[f"session_{number}"] if m.get("text")]
        sessions.append(tuple((line, LISTENING) for line in lines))
    questions = []
    for entry in sample.get("qa", ()):
        kind = LOCOMO_KINDS.get(entry.get("category"), "other")
        answerable = entry.get("category") != 5
        answer = str(entry.get("answer", "")) if answerable else ""
        wrong = "" if answerable else str(entry.get("adversarial_answer", ""))
        if answer or wrong:
            questions.append(Question(str(entry["question"]), (answer,) if answer else (), kind, wrong))
    return Dialogue(str(sample.get("sample_id", "conversation")), tuple(sessions), tuple(questions))


def _sessions(entry: dict[str, Any], name: str) -> Dialogue:
    sessions = tuple(tuple(_turns(messages)) for messages in entry["sessions"])
    questions = []
    for asked in entry.get("questions", ()):
        answers = asked["answers"] if "answers" in asked else [asked["answer"]]
        if isinstance(answers, str) or not answers:
            raise ValueError(f'"answers" must be a list that is not empty, not {answers!r}')
        kind = str(asked.get("kind", entry.get("kind", "question")))
        questions.append(Question(str(asked["question"]), tuple(map(str, answers)), kind))
    return Dialogue(str(entry.get("name", name)), sessions, tuple(questions))


def _turns(messages: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """User messages with the reply behind each; one without a reply was listened to."""
    user: str | None = None
    for entry in messages:
        role, content = entry["role"], str(entry["content"])
        if role not in ("user", "assistant"):
            raise ValueError(f'role {role!r}; expected "user" or "assistant"')
        if role == "assistant" and user is not None:
            yield user, content
            user = None
        else:
            if user is not None:
                yield user, LISTENING
            user = content
    if user is not None:
        yield user, LISTENING


def read_talk(path: Path) -> list[str]:
    """The messages of a conversation as talk: one to three lines each. LoCoMo's JSON, JSON Lines, or plain text with a line a message."""
    if path.suffix in (".json", ".jsonl"):
        heard = (user for d in read_dialogues(path) for session in d.sessions for user, _ in session)
        lines = [user for user in heard if not re.fullmatch(r"\[.*\]", user)]  # without LoCoMo's dates
    else:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ExportError(f"{path}: holds no talk; expected a line a message, or a conversation in JSON")
    turns, at, rng = [], 0, random.Random(0)
    while at < len(lines):
        count = rng.randint(1, 3)
        turns.append("\n".join(lines[at : at + count]))
        at += count
    return turns
