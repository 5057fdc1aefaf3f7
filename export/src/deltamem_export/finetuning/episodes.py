"""What an optimiser step is made of: conversations cut to the curriculum's level, in windows that gradients go back through, with the
questions that are read behind each window. It knows tokens and chance, and nothing of models.

The level has two numbers, questions and written tokens. Of a conversation whose questions all say where their answers stand, as many
questions are drawn as the level has, their sessions are kept, and other sessions join, the shortest first, while they fit: so the longest
are dropped first. Where evidence is not said, a conversation is taken whole once it fits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from deltamem_export.finetuning.recipe import FinetuningRecipe
from deltamem_export.finetuning.rendering import Asked, Context, Encoded, Renderer

OWN_WINDOW = 0.5
"""Share of the questions read right behind the window of their evidence, where gradients reach the write; the others come later."""
AT_LEAST, PATIENCE = 4, 0.7
GROWTH = 1.25


@dataclass(frozen=True)
class Read:
    """One question of an episode: what is read, whether it was told, and what the teacher reads (None without a teacher)."""

    asked: Asked
    told: bool
    taught: Asked | None


@dataclass(frozen=True)
class Window:
    """Contexts that are written one after another, then questions that are read, each from the state behind them."""

    contexts: tuple[Context, ...]
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class Episode:
    """One conversation of a step. `harmless`: turns that need no memory, read from its last state."""

    windows: tuple[Window, ...]
    harmless: tuple[Context, ...]

    @property
    def reads(self) -> list[Read]:
        return [r for w in self.windows for r in w.reads]


@dataclass
class Level:
    """Where the curriculum stands. It grows when right answers are frequent, at least `AT_LEAST` steps apart."""

    facts: float
    tokens: float
    since: int = 0
    right: float = 0.0

    def learn(self, recipe: FinetuningRecipe, right: int, asked: int) -> None:
        """Takes in the told questions of a step."""
        if asked == 0:
            return
        share = right / asked
        self.right = share if self.since == 0 else PATIENCE * self.right + (1 - PATIENCE) * share
        self.since += 1
        if self.since >= AT_LEAST and self.right >= recipe.promote:
            self.facts = min(float(recipe.most_facts), 1.15 * self.facts + 0.35)
            self.tokens = min(float(recipe.written_tokens), GROWTH * self.tokens)
            self.since = 0


class Planner:
    """Draws episodes. All chance is in `rng`."""

    def __init__(self, renderer: Renderer, recipe: FinetuningRecipe, pool: Sequence[Encoded]):
        """`pool`: the conversations whose turns may serve as turns that need no memory of another one."""
        self.renderer, self.recipe, self.pool = renderer, recipe, pool

    def least(self, encoded: Encoded) -> int:
        """The fewest written tokens that an episode of this conversation can have."""
        if not encoded.conversation.evidence_known:
            return sum(encoded.tokens(i) for i in range(len(encoded.turns)))
        return min(
            sum(encoded.tokens(i) for i in q.evidence or (_shortest(encoded),)) for q in encoded.conversation.questions
        )

    def plan(
        self, encoded: Encoded, facts: int, tokens: int, rng: random.Random, at_end: bool = False
    ) -> Episode | None:
        """An episode of at most so many questions and written tokens; None if this conversation has none so small.

        Args:
            at_end: all questions are read behind the last window.
        """
        known = encoded.conversation.evidence_known
        questions = self._questions(encoded, facts, rng)
        if known:
            kept: set[int] = set()
            fitting = []
            for number in questions:
                evidence = set(encoded.conversation.questions[number].evidence or ())
                if sum(encoded.tokens(i) for i in kept | evidence) <= tokens:
                    kept |= evidence
                    fitting.append(number)
            questions = fitting
            for i in sorted(range(len(encoded.turns)), key=lambda i: (encoded.tokens(i), i)):
                if i not in kept and sum(encoded.tokens(j) for j in kept) + encoded.tokens(i) <= tokens:
                    kept.add(i)
            sessions = sorted(kept)
        else:
            sessions = list(range(len(encoded.turns)))
            if sum(encoded.tokens(i) for i in sessions) > tokens:
                return None
        if not questions or not sessions:
            return None
        cut, last_of = self._windows(encoded, sessions)
        reads: list[list[Read]] = [[] for _ in cut]
        for number in questions:
            asked = encoded.conversation.questions[number]
            first = 0 if asked.evidence == () else max(last_of[i] for i in asked.evidence or sessions)
            own = asked.evidence != () and rng.random() < OWN_WINDOW
            at = len(cut) - 1 if at_end else first if own else rng.randint(first, len(cut) - 1)
            reads[at].append(
                self._read(encoded, number, sessions, [i for i in sessions if last_of[i] <= at], rng, at_end)
            )
        windows = tuple(Window(tuple(c), tuple(r)) for c, r in zip(cut, reads, strict=True))
        return Episode(windows, self._harmless(encoded, sessions, rng))

    def _questions(self, encoded: Encoded, facts: int, rng: random.Random) -> list[int]:
        """Numbers of at most `facts` questions in any order; of those never told a third of that, and none at the very beginning."""
        all_questions = encoded.conversation.questions
        told = [i for i, q in enumerate(all_questions) if q.told]
        untold = [i for i, q in enumerate(all_questions) if not q.told]
        drawn = rng.sample(told, min(facts, len(told)))
        room = facts if not told else max(1, facts // 3) if facts >= 2 else 0
        drawn += rng.sample(untold, min(room, len(untold)))
        return drawn

    def _windows(self, encoded: Encoded, sessions: Sequence[int]) -> tuple[list[list[Context]], dict[int, int]]:
        """The stream cut where the next context would pass bptt_tokens, and the window that each session ends in."""
        cut: list[list[Context]] = [[]]
        used = 0
        last_of = {}
        for i in sessions:
            for context in encoded.turns[i]:
                if cut[-1] and used + len(context.ids) > self.recipe.bptt_tokens:
                    cut.append([])
                    used = 0
                cut[-1].append(context)
                used += len(context.ids)
            last_of[i] = len(cut) - 1
        return cut, last_of

    def _read(
        self,
        encoded: Encoded,
        number: int,
        sessions: Sequence[int],
        behind: Sequence[int],
        rng: random.Random,
        measured: bool,
    ) -> Read:
        question = encoded.conversation.questions[number]
        asked = encoded.alone[number]
        if not measured and behind and rng.random() >= self.recipe.state_only:
            longer = self.renderer.asked(question, encoded.last_turns[behind[-1]])
            if len(longer.context.ids) <= self.recipe.read_tokens:
                asked = longer
        taught = None
        if not measured and (self.recipe.teacher_weight or self.recipe.anchor_weight):
            taught = self.renderer.taught(encoded, number, sessions)
        return Read(asked, question.told, taught)

    def _harmless(self, encoded: Encoded, sessions: Sequence[int], rng: random.Random) -> tuple[Context, ...]:
        """Turns that need no memory: of sessions that no question names, if that is known, else of other conversations."""
        if not self.recipe.harm_turns or not self.recipe.harm_weight:
            return ()
        named = {i for q in encoded.conversation.questions for i in q.evidence or ()}
        known = encoded.conversation.evidence_known
        own = [c for i in sessions if known and i not in named for c in encoded.turns[i]]
        if not own:
            others = [e for e in self.pool if e is not encoded]
            if not others:
                return ()
            own = [c for session in rng.choice(others).turns for c in session]
        return tuple(rng.choices(own, k=self.recipe.harm_turns))


def _shortest(encoded: Encoded) -> int:
    return min(range(len(encoded.turns)), key=encoded.tokens)
