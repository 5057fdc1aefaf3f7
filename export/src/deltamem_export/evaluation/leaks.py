"""Keeps evaluation and training apart: what an evaluation calls unseen must not stand in the training data that it is shown.

Of the tiny language these are the held-out pairs, told or answered in any phrasing, and the held-out phrasings with any value; of the plain
one the made-up names; of a conversation its questions and its longer messages. It knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltamem_export.errors import ExportError
from deltamem_export.evaluation.conversations import Dialogue
from deltamem_export.evaluation.languages import Language

SHOWN = 5
LONG, ASKED = 8, 4
"""Words from which on a message or a question of a conversation is its own."""


def refuse_leaks(language: Language, dialogues: Sequence[Dialogue], training: Sequence[Path]) -> int:
    """Raises ExportError that names what of the evaluation stands in the training files and where. Returns the texts read.

    Every text in a file counts, whatever its key: JSON Lines, JSON, or plain text.
    """
    unseen = {_words(text): what for text, what in (*_of_language(language), *_of_dialogues(dialogues))}
    lengths = sorted({len(words) for words in unseen})
    found: dict[str, str] = {}
    read = 0
    for path in training:
        for place, text in _texts(path):
            read += 1
            words = _words(text)
            for length in lengths:
                for at in range(len(words) - length + 1):
                    what = unseen.get(words[at : at + length])
                    if what is not None:
                        found.setdefault(what, place)
    if found:
        shown = "; ".join(f"{what} ({place})" for what, place in list(found.items())[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        cure = "take them out of the training data and train again"
        if all(what.startswith("the name ") for what in found):
            cure += ", or choose another --seed, which makes up other names"
        raise ExportError(
            f"the training data holds what the evaluation calls unseen: {shown}{more}; figures from it would show nothing: {cure}"
        )
    return read


def refuse_recorded(card: Mapping[str, Any], data: Sequence[Path]) -> None:
    """Raises ExportError where a conversation file is the one that the bundle's card names as its training data, by its BLAKE3."""
    record = card.get("data")
    trained_on = record.get("blake3") if isinstance(record, Mapping) else None
    for path in data:
        if trained_on is not None and blake3(path.read_bytes()).hexdigest() == trained_on:
            raise ExportError(
                f"{path}: is what the bundle was trained on, by its card.json (BLAKE3 {trained_on[:12]}); figures from it would show "
                "nothing: give conversations that it has not seen"
            )


def _of_language(language: Language) -> Iterator[tuple[str, str]]:
    for r in language.relations:
        if not language.held_out:
            yield from ((value, f"the name {value!r}") for value in r.values)
            continue
        for value in r.held_out_values:
            what = f"the pair {r.name} = {value}"
            yield from ((frame.format(value=value), what) for frame in (*r.tell, f"{r.prefix} {{value}}"))
        held = r.tell[r.held_out_tell]
        yield from ((held.format(value=value), f"the phrasing {held!r}") for value in r.values)
        asked = r.ask[r.held_out_ask]
        yield asked, f"the phrasing {asked!r}"


def _of_dialogues(dialogues: Iterable[Dialogue]) -> Iterator[tuple[str, str]]:
    for dialogue in dialogues:
        for question in (q for q in dialogue.questions if len(_words(q.text)) >= ASKED):
            yield question.text, f"the question {question.text!r} of {dialogue.name}"
        for user in (user for session in dialogue.sessions for user, _ in session):
            what = f"the message {user[:60]!r} of {dialogue.name}"
            # As it is, and without the name of who said it.
            yield from ((text, what) for text in {user, user.partition(": ")[2]} if len(_words(text)) >= LONG)


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Every string of a file with where it stands; lines are read one by one. Raises ExportError for a file that is no text."""
    try:
        if path.suffix == ".json":
            yield from ((str(path), text) for text in _strings(json.loads(path.read_text(encoding="utf-8"))))
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = line
                yield from ((f"{path}, line {number}", text) for text in _strings(entry))
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: is not text in UTF-8; --training takes JSON Lines, JSON or plain text") from error
    except ValueError as error:
        raise ExportError(f"{path}: is not JSON ({error})") from error


def _strings(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for value in entry.values():
            yield from _strings(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from _strings(value)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))
