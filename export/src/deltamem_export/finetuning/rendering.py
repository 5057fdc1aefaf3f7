"""Messages to tokens, as the runtime reads them: the tokenizer's chat template, a reply behind the generation prompt, no end token at the
end of a turn, and the spans that message and sentence writes cover (a twin of rust/deltamem-engine/src/text/spans.rs). It knows nothing of
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from deltamem_export.backbone import Backbone
from deltamem_export.errors import ExportError, first_line
from deltamem_export.finetuning.conversations import Conversation, Message, Question
from deltamem_export.finetuning.recipe import FinetuningRecipe


@dataclass(frozen=True)
class Context:
    """Tokens that attend to each other, and for each the number of the span that it is written with (-1: none)."""

    ids: tuple[int, ...]
    spans: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A question as it is read: `context` ends with the answer, whose first token is at `start`; `end` follows the answer."""

    context: Context
    start: int
    end: int

    @property
    def targets(self) -> tuple[int, ...]:
        """What is to be predicted from position start − 1 on: the answer, then the end."""
        return (*self.context.ids[self.start :], self.end)


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens. `turns[i]` are the contexts of session i; `alone[j]` is question j without anything before it."""

    conversation: Conversation
    turns: tuple[tuple[Context, ...], ...]
    last_turns: tuple[tuple[Message, ...], ...]
    alone: tuple[Asked, ...]

    def tokens(self, session: int) -> int:
        return sum(len(c.ids) for c in self.turns[session])


class Renderer:
    """A backbone's tokenizer and chat template."""

    def __init__(self, backbone: Backbone, recipe: FinetuningRecipe):
        """Raises ExportError where there is no tokenizer, no chat template or no end token."""
        self.recipe, self.directory = recipe, backbone.directory
        self.tokenizer = _load(backbone.directory)
        ends = backbone.tokens.eos or (() if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,))
        if not ends:
            raise ExportError(
                f"{self.directory}: no token ends a text; set eos_token_id in config.json or generation_config.json"
            )
        self.ends: tuple[int, ...] = tuple(ends)
        self.pad = next((p for p in (backbone.tokens.pad, self.tokenizer.pad_token_id) if p is not None), self.ends[0])
        if len(self.tokenizer) > backbone.geometry.vocab_size:
            raise ExportError(
                f"{self.directory}: the tokenizer has {len(self.tokenizer)} tokens, the model {backbone.geometry.vocab_size}; "
                "they are not of one model"
            )

    def conversation(self, conversation: Conversation) -> Encoded:
        """All of a conversation. Raises ExportError, with the line, for what the template refuses."""
        try:
            turns = [_turns(session, self.recipe.context) for session in conversation.sessions]
            return Encoded(
                conversation,
                tuple(tuple(p for turn in session for p in self._pieces(self.turn(turn))) for session in turns),
                tuple(tuple(session[-1]) for session in turns),
                tuple(self._alone(i, q) for i, q in enumerate(conversation.questions)),
            )
        except ExportError as error:
            raise ExportError(f"line {conversation.line}: {error}") from error

    def turn(self, messages: Sequence[Message]) -> Context:
        """A turn as it is written: its reply stands behind the generation prompt, and its end token is not read."""
        *before, last = messages
        if last.role != "assistant":
            text = self._template(messages, prompt=False)
            return self._context(text, messages, text, "")
        if before:
            prompt = self._template(before, prompt=True)
            return self._context(prompt, before, self._template(before, prompt=False), last.content.strip())
        whole = self._template(messages, prompt=False)
        content = last.content.strip()
        at = whole.find(content)
        if at < 0:
            raise ExportError(
                f"the chat template changes the message {content[:40]!r}; it cannot be read alone, use --context turn"
            )
        alone = self._context(whole[:at], (), "", content)
        if self.recipe.write == "message":  # all that the message adds
            alone = Context(alone.ids, (0,) * len(alone.ids))
        return alone

    def asked(self, question: Question, before: Sequence[Message] = ()) -> Asked:
        """A question and its answer behind the turn `before`."""
        messages = _joined([*before, Message("user", question.question)])
        context = self._context(
            self._template(messages, prompt=True),
            messages,
            self._template(messages, prompt=False),
            question.answer.strip(),
        )
        length = len(self._ids(question.answer.strip())[0])
        return Asked(context, len(context.ids) - length, self._end(messages, question.answer.strip()))

    def taught(self, encoded: Encoded, question: int, sessions: Sequence[int]) -> Asked:
        """The question behind the whole conversation, cut to the teacher's context: sessions without evidence go first, the oldest first,
        then the oldest messages."""
        asked = encoded.conversation.questions[question]
        evidence = set(asked.evidence or ())
        kept = [(i, list(encoded.conversation.sessions[i])) for i in sessions]
        order = sorted(range(len(kept)), key=lambda at: (kept[at][0] in evidence, kept[at][0]))
        while True:
            result = self.asked(asked, [m for _, session in kept for m in session])
            if len(result.context.ids) <= self.recipe.teacher_tokens or not order:
                return result
            at = order[0]
            # A session with evidence loses its oldest half, the others go whole.
            session = kept[at][1]
            left = session[(len(session) + 1) // 2 :] if kept[at][0] in evidence else []
            kept[at] = (kept[at][0], left)
            if not left:
                order.pop(0)

    # ------------------------------------------------------------------ inside

    def _alone(self, number: int, question: Question) -> Asked:
        asked = self.asked(question)
        if len(asked.context.ids) > self.recipe.read_tokens:
            raise ExportError(
                f"questions[{number}] with its answer is {len(asked.context.ids)} tokens, expected at most {self.recipe.read_tokens}; "
                "shorten it or raise --read-tokens"
            )
        return asked

    def _context(self, prompt: str, messages: Sequence[Message], without_prompt: str, reply: str) -> Context:
        ids, starts = self._ids(prompt)
        more, reply_starts = self._ids(reply)
        spans = [-1] * len(ids)
        number = 0
        if self.recipe.write != "token":
            ranges = self._ranges(messages, prompt, without_prompt)
            spans, number = _assign(starts, ranges), len(ranges)
        replied = [number] * len(more)
        if self.recipe.write == "sentence":
            replied = [number + s if s >= 0 else -1 for s in _assign(reply_starts, pieces(reply, 0))]
        return Context((*ids, *more), (*spans, *replied))

    def _ranges(self, messages: Sequence[Message], prompt: str, without_prompt: str) -> list[tuple[int, int]]:
        """Where the spans of messages stand in what is rendered."""
        found: list[tuple[int, int]] = []
        start = 0
        for count, message in enumerate(messages, 1):
            text = without_prompt if count == len(messages) else self._template(messages[:count], prompt=False)
            if not prompt.startswith(text):
                raise ExportError(
                    f"the chat template renders the first {count} of {len(messages)} messages otherwise than in the whole, so messages "
                    "have no places of their own; use --write token"
                )
            end = len(text)
            if message.role != "system":
                if self.recipe.write == "message":
                    found.append((start, end))
                else:
                    content = message.content if message.content in text[start:] else message.content.strip()
                    at = text.find(content, start)
                    if at < 0:
                        raise ExportError(
                            "the chat template changes a message's content, so its sentences have no places; use --write message"
                        )
                    found += pieces(content, at)
            start = end
        return found

    def _pieces(self, context: Context) -> list[Context]:
        size = self.recipe.context_tokens
        return [
            Context(context.ids[i : i + size], context.spans[i : i + size]) for i in range(0, len(context.ids), size)
        ]

    def _end(self, messages: Sequence[Message], answer: str) -> int:
        """The token that the template puts behind a reply, if it ends a text."""
        whole = self._template([*messages, Message("assistant", answer)], prompt=False)
        behind = self._ids(whole[whole.rfind(answer) + len(answer) :])[0]
        return next((i for i in behind if i in self.ends), self.ends[0])

    def _template(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                [m.as_dict() for m in messages], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # whatever a template raises of its own
            roles = ", ".join(m.role for m in messages)
            raise ExportError(
                f"{self.directory}: the chat template does not render messages of {roles} ({first_line(error)}); a backbone without a "
                "template needs chat_template.jinja beside its tokenizer, and one that wants a user first needs --context turn"
            ) from error
        return rendered

    def _ids(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and where each starts in the text."""
        if not text:
            return [], []
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]


def sentences(text: str) -> list[int]:
    """Where the sentences of a text begin: at two or more newlines, and at white space behind one of . ! ? ; : and the closing quotes or
    brackets behind that. The white space begins the next sentence."""
    starts = [0] if text else []
    cut: int | None = None
    ended = words = False
    for at, c in enumerate(text):
        if c.isspace():
            if (ended or text[at : at + 2] == "\n\n") and cut is None:
                cut = at
            ended = False
            continue
        if cut is not None:
            if words:
                starts.append(cut)
            cut = None
        words = True
        ended = c in ".!?;:" or (ended and c in CLOSING)
    return starts


CLOSING = "\"')]}\u201d\u2019\xbb\u203a\u300d\u300f\uff09"


def pieces(text: str, at: int) -> list[tuple[int, int]]:
    """The sentences of a text that begins at `at` of a larger one."""
    return [(at + a, at + b) for a, b in pairwise([*sentences(text), len(text)])]


def _assign(starts: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[int]:
    """The number of the range that each token starts in; -1: none."""
    return [next((n for n, (a, b) in enumerate(ranges) if a <= start < b), -1) for start in starts]


def _turns(session: Sequence[Message], context: str) -> list[list[Message]]:
    """A turn is all up to the next message of a user (or system) behind a reply; with context "message" each message is one."""
    turns: list[list[Message]] = []
    for message in session:
        opens = not turns or (message.role != "assistant" and turns[-1][-1].role == "assistant")
        # Two messages of one role in a row are two turns, which templates can render.
        opens = opens or (turns[-1][-1].role == message.role)
        if context == "message":
            opens = not turns or turns[-1][-1].role != "system"
        if opens:
            turns.append([message])
        else:
            turns[-1].append(message)
    return turns


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role as one message, which templates can render."""
    joined: list[Message] = []
    for m in messages:
        if joined and joined[-1].role == m.role:
            joined[-1] = Message(m.role, f"{joined[-1].content}\n{m.content}")
        else:
            joined.append(m)
    return joined


def _load(directory: Path) -> Any:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises what it likes
        raise ExportError(
            f"{directory}: no tokenizer can be read ({first_line(error)}); put tokenizer.json there"
        ) from error
    if not tokenizer.is_fast:
        raise ExportError(
            f"{directory}: has a slow tokenizer only; save it with a tokenizer.json, which the runtime needs too"
        )
    return tokenizer
