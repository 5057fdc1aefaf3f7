"""The conversation that goes by between telling and asking: read from a file, cut into turns of token ids.

Plain text (a paragraph or line a message), or JSON: a list of strings or of {"role", "content"}, or conversations in the form of the
LoCoMo data set, {"conversation": {"session_1": [{"speaker", "text"}, ...], "session_1_date_time": ...}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deltamem_rt._cli.arguments import UsageError
from deltamem_rt._native import Model, Session

MESSAGES_A_TURN = 4
TURN_LIMIT = 512
"""Tokens that one turn of talk may have; longer ones are cut."""


def read_messages(path: Path) -> list[str]:
    """The messages of a conversation file, in order. Raises UsageError when there are none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from None
    if path.suffix == ".json" or text.lstrip()[:1] in ("[", "{"):
        try:
            messages = list(_from_json(json.loads(text)))
        except ValueError as error:
            if path.suffix == ".json":
                raise UsageError(f"{path} is not JSON: {error}") from None
            messages = _from_text(text)
    else:
        messages = _from_text(text)
    if not messages:
        raise UsageError(
            f"{path} holds no messages; a conversation is plain text, or JSON: a list of strings, of {{role, content}}, or LoCoMo's form"
        )
    return messages


def _from_text(text: str) -> list[str]:
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]


def _from_json(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        if found.strip():
            yield found.strip()
    elif isinstance(found, list):
        for entry in found:
            yield from _from_json(entry)
    elif isinstance(found, dict):
        conversation = found.get("conversation")
        if isinstance(conversation, dict):
            yield from _from_locomo(conversation)
        elif conversation is not None or "messages" in found:
            yield from _from_json(conversation if conversation is not None else found["messages"])
        elif any(re.fullmatch(r"session_\d+", str(key)) for key in found):
            yield from _from_locomo(found)
        else:
            text = found.get("content", found.get("text"))
            speaker = found.get("speaker", found.get("role"))
            if isinstance(text, str) and text.strip():
                yield f"{speaker}: {text.strip()}" if speaker else text.strip()


def _from_locomo(conversation: dict[str, Any]) -> Iterator[str]:
    numbers = sorted(int(key.removeprefix("session_")) for key in conversation if re.fullmatch(r"session_\d+", key))
    for number in numbers:
        date = conversation.get(f"session_{number}_date_time")
        if isinstance(date, str):
            yield f"[{date}]"
        yield from _from_json(conversation[f"session_{number}"])


class Talk:
    """Messages as turns of token ids, round and round without end, from any place."""

    def __init__(self, model: Model, messages: list[str]) -> None:
        self.messages = messages
        self._model = model
        self._limit = max(1, min(TURN_LIMIT, model.context_length // 2))
        self._encoded: dict[int, list[int]] = {}

    def turns(self, tokens: int, start: int = 0) -> list[list[int]]:
        """Turns of talk from message `start` on, `tokens` tokens in all; the last turn is cut to fit."""
        turns: list[list[int]] = []
        at = start
        while tokens > 0:
            turn: list[int] = []
            for _ in range(MESSAGES_A_TURN):
                turn += self._encode(at % len(self.messages))
                at += 1
            turn = turn[:tokens]
            tokens -= len(turn)
            turns += [turn[i : i + self._limit] for i in range(0, len(turn), self._limit)]
        return turns

    def _encode(self, index: int) -> list[int]:
        if index not in self._encoded:
            # A message that encodes to nothing would never use up the tokens wanted.
            self._encoded[index] = self._model.encode(self.messages[index] + "\n") or self._model.encode(" ")
        return self._encoded[index]


def play(session: Session, turns: Iterable[list[int]]) -> None:
    """Feeds turns of token ids, each a turn of its own."""
    for turn in turns:
        session.feed(turn)
        session.end_turn()
