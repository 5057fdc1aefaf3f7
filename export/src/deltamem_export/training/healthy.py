"""Conversations as a healthy memory sees them, for the bundle's calibration (`deltamem_export.calibration`): a person tells the assistant up to
64 things, changes some, asks for some, and talks. Drawn from the training language with seeds of their own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from deltamem_export.calibration import Stream
from deltamem_export.training.language import RELATIONS, Relation, Speaker

FIRST_SEED = 3_000_000
CONVERSATIONS = 30
TURNS = 200


def healthy_stream(conversations: int = CONVERSATIONS, turns: int = TURNS) -> Stream:
    """The stream that the shipped bundle's bounds are learnt from."""
    return Stream(
        [
            conversation(Speaker(random.Random(FIRST_SEED + number)), turns, at_once=number % 3 * 24)
            for number in range(conversations)
        ],
        f"training language, seeds from {FIRST_SEED}: up to {len(RELATIONS)} facts told, one by one or up to 48 in a row, some "
        "changed, questions, small talk",
    )


def conversation(speaker: Speaker, turns: int, at_once: int = 0) -> Sequence[str]:
    """One person's messages. The first `at_once` tell a fact each; then, until all are told, 40 % tell one, 10 % change one, 20 % ask for
    one, the rest talks."""
    untold = speaker.draw_facts(len(RELATIONS))
    told: dict[str, tuple[Relation, str]] = {}
    messages = []
    for turn in range(turns):
        roll = speaker.rng.random() if turn >= at_once else 0.0
        if roll < 0.4 and untold:
            relation, value = untold.pop()
            told[relation.name] = relation, value
            messages.append(speaker.tell(relation, value).user)
        elif roll < 0.7 and told:
            relation, value = speaker.rng.choice(list(told.values()))
            if roll < 0.5:
                value = speaker.draw_value(relation, unlike=value)
                told[relation.name] = relation, value
                messages.append(speaker.tell(relation, value, change=True).user)
            else:
                messages.append(speaker.ask(relation, value).user)
        else:
            messages.append((speaker.long_talk() if roll > 0.94 else speaker.talk()).user)
    return messages


if __name__ == "__main__":
    import sys
    from pathlib import Path

    from deltamem_export.calibration import calibrate

    # Calibrates an exported bundle of this language: python -m deltamem_export.training.healthy BUNDLE
    calibrate(Path(sys.argv[1]), healthy_stream(), print)
