"""The memory and its opponents, asked the same questions under the same limits of one frozen model.

memory          the state alone: the question is all that is read
none            the same question to an empty memory
context         the whole history in the prompt, as far as it fits, the oldest dropped
bm25            the turns of the history that BM25 ranks first, of equal ranks the newest, in the order they came
memory+context  the state, with the history in the prompt as well

Questions never write, so their order does not matter and every opponent is asked in the same situation. It knows nothing of tasks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import bm25s
import numpy as np

import deltamem_rt as dm
from deltamem_export.errors import ExportError
from deltamem_export.evaluation.prompts import Prompts, message

OPPONENTS = ("none", "context", "bm25")
READERS = ("context", "memory+context")
"""Those who read the history at every question: their price grows with it."""

LOGITS = 1 << 22
"""Logits that are held at once: 16 MB of float32."""


@dataclass(frozen=True)
class Past:
    """One turn of a history. `about`: the relation and value that it told, if it told one; `tokens`: its length in a prompt."""

    user: str
    reply: str
    about: tuple[str, str] | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """A reply with what it took. `found`: whether the telling turn was in the prompt, for those who put history there."""

    text: str
    tokens_read: int
    seconds: float
    found: bool | None = None


@dataclass(eq=False)
class Person:
    """Somebody who talks: a session with their memory, and the history that opponents get."""

    session: dm.Session
    history: list[Past] = field(default_factory=list)
    index: bm25s.BM25 | None = None

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.session.closed:
            self.session.close(discard=True)


class Contest:
    """One model, the opponents asked, and the limits that hold for all of them."""

    def __init__(
        self,
        model: dm.Model,
        against: Sequence[str] = OPPONENTS,
        budget: int | None = None,
        retrieved: int = 3,
        max_new_tokens: int = 32,
    ) -> None:
        """budget: tokens that a prompt may have (default: the model's context less the reply); retrieved: turns that BM25 gives.

        Raises ExportError for a budget that the context does not hold.
        """
        room = model.context_length - max_new_tokens
        if budget is not None and not 1 <= budget <= room:
            raise ExportError(
                f"--budget {budget}: expected 1 to {room}, which is the context of {model.context_length} tokens less a reply of "
                f"{max_new_tokens}"
            )
        self.model, self.prompts = model, Prompts(model)
        self.budget, self.retrieved, self.max_new_tokens = budget or room, retrieved, max_new_tokens
        both = ("memory+context",) if "context" in against else ()
        self.opponents: tuple[str, ...] = ("memory", *against, *both)
        self._keeps_history = bool({"context", "bm25"} & set(against))
        self._by_token = (model.manifest["memory"].get("write_granularity") or "token") == "token"
        self._empty = model.session()
        turn = [message("user", "a"), message("assistant", "b")]
        self._turn_frame = max(0, len(self.prompts.ids(turn + turn, False)) - len(self.prompts.ids(turn, False)) - 2)

    def person(self, session: dm.Session | None = None) -> Person:
        """Somebody new, with an empty memory or a session given."""
        return Person(session or self.model.session())

    # what a person says ----------------------------------------------------------------------------------------------------

    def tell(self, person: Person, text: str, about: tuple[str, str] | None = None) -> str:
        """Says something and reads the reply. Opponents' histories hold what the frozen model replies without a memory."""
        reply = person.session.chat(text, max_new_tokens=self.max_new_tokens).read()
        if self._keeps_history:
            plain = self._empty.chat(text, max_new_tokens=self.max_new_tokens, write=False).read()
            self.remember(person, Past(text, plain, about))
        return reply

    def hear(self, person: Person, text: str, listened: str) -> int:
        """Talk that nobody replies to: read and written in turns that fit the context. Returns its tokens. `listened` is the reply in
        opponents' histories."""
        ids = self.prompts.ids([message("user", text)])
        self._feed(person.session, ids, text)
        self.remember(person, Past(text, listened))
        return len(ids)

    def likelihood(self, session: dm.Session, messages: Sequence[dict[str, str]]) -> tuple[float, int]:
        """Reads and writes a turn of a recorded conversation, cut to the context; returns the negative log-likelihood of its tokens behind
        the first, summed, and how many they are. A bundle that writes spans writes each token here."""
        ids = self.prompts.ids(messages, reply=messages[-1]["role"] == "user")[: self.budget]
        vocabulary = int(self.model.manifest["backbone"]["vocab_size"])
        piece = max(1, LOGITS // vocabulary)
        total, last = 0.0, np.empty((0, vocabulary), np.float32)
        for start in range(0, len(ids), piece):
            part = np.asarray(ids[start : start + piece], np.int32)
            logits = session.feed(part, logits=True, spans=None if self._by_token else "token")
            before = np.concatenate((last, logits[:-1]))
            targets = part[len(part) - len(before) :]
            top = before.max(1, keepdims=True)
            total += float(
                (np.log(np.exp(before - top).sum(1)) + top[:, 0] - before[np.arange(len(before)), targets]).sum()
            )
            last = logits[-1:]
        session.end_turn()
        return total, len(ids) - 1

    def _feed(self, session: dm.Session, ids: list[int], text: str) -> None:
        if not self._by_token:
            session.feed(text)  # the runtime cuts text into the spans that the bundle writes
            session.end_turn()
            return
        for start in range(0, len(ids), self.budget):
            session.feed(ids[start : start + self.budget])
            session.end_turn()

    def remember(self, person: Person, past: Past) -> None:
        """Puts a turn into the history that opponents get."""
        if not self._keeps_history:
            return
        tokens = len(self.model.encode(past.user)) + len(self.model.encode(past.reply)) + self._turn_frame
        person.history.append(replace(past, tokens=tokens))
        person.index = None

    # what it is asked --------------------------------------------------------------------------------------------------------

    def ask(self, who: str, person: Person, question: str, about: tuple[str, str] | None = None) -> Answer:
        """The answer of one opponent; `about` is the fact that it takes, for `found`."""
        session = person.session if who.startswith("memory") else self._empty
        began = time.perf_counter()
        found, ids = None, None
        if who not in ("memory", "none"):
            past = self._ranked(person, question) if who == "bm25" else person.history
            past, ids = self._fitted(past, question)
            found = None if about is None else any(p.about == about for p in past)
        if ids is None:
            reply = session.chat(question, max_new_tokens=self.max_new_tokens, write=False)
            text = reply.read()
        else:
            reply = session.generate(ids, max_new_tokens=self.max_new_tokens, write=False, spans="token")
            text = reply.read()
            session.end_turn()
        return Answer(text, reply.stats.prompt_tokens, time.perf_counter() - began, found)

    def kept_bytes(self, who: str, person: Person) -> int:
        """What the opponent keeps of a person between turns: the state, the history as text, the index."""
        state = self.model.geometry.bytes if who.startswith("memory") else 0
        history = index = 0
        if who not in ("memory", "none"):
            history = sum(len(p.user.encode()) + len(p.reply.encode()) for p in person.history)
        if who == "bm25" and person.index is not None:
            words = sum(len(word.encode()) for word in person.index.vocab_dict)
            index = words + sum(part.nbytes for part in person.index.scores.values() if isinstance(part, np.ndarray))
        return state + history + index

    def _ranked(self, person: Person, question: str) -> list[Past]:
        """The turns that BM25 ranks first; those that share no word with the question are none of them."""
        if not person.history:
            return []
        if person.index is None:
            person.index = bm25s.BM25()
            texts = [f"{p.user} {p.reply}" for p in person.history]
            person.index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
        words = bm25s.tokenize([question], show_progress=False, return_ids=False)[0]
        known = [word for word in words if word in person.index.vocab_dict]
        if not known:
            return []
        scores = person.index.get_scores(known)
        best = np.lexsort((np.arange(len(scores)), scores))[-self.retrieved :]  # of equal ranks the newest
        return [person.history[i] for i in sorted(best) if scores[i] > 0]

    def _fitted(self, past: Sequence[Past], question: str) -> tuple[list[Past], list[int] | None]:
        """The latest of these turns that fit the budget together with the question, and the prompt; None without a turn."""
        left = self.budget - len(self.prompts.ids([message("user", question)]))
        kept: list[Past] = []
        for turn in reversed(past):
            left -= turn.tokens
            if left < 0:
                break
            kept.append(turn)
        kept.reverse()
        while kept:
            messages = [m for p in kept for m in (message("user", p.user), message("assistant", p.reply))]
            ids = self.prompts.ids([*messages, message("user", question)])
            if len(ids) <= self.budget:
                return kept, ids
            kept = kept[1:]
        return [], None
