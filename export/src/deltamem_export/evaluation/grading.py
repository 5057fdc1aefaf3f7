"""Grades answers in free words against the words of a reference: token F1, the answer within the reply, equality. As in SQuAD: case,
punctuation and articles do not count. LoCoMo's own script also reduces words to stems; this does not.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """What counts of a text."""
    return re.sub(r"\b(a|an|the)\b", " ", text.casefold().translate(_PUNCTUATION)).split()


def token_f1(reply: str, answers: Sequence[str]) -> float:
    """The best F1 of the reply's words with any of the answers', 0 to 1."""
    return max(_f1(words(reply), words(answer)) for answer in answers)


def contains(reply: str, answers: Sequence[str]) -> bool:
    """Whether any of the answers stands in the reply as it is."""
    said = f" {' '.join(words(reply))} "
    return any(f" {' '.join(words(answer))} " in said for answer in answers)


def equals(reply: str, answers: Sequence[str]) -> bool:
    """Whether the reply is one of the answers."""
    return any(words(reply) == words(answer) for answer in answers)


def _f1(said: list[str], wanted: list[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else float(said == wanted)
