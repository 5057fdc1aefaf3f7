"""The byte-level BPE tokenizer of the tiny assistant and the encoding of turns.

Any text can be fed: the alphabet is the 256 bytes. A turn is rendered as `<|user|>message<|end|><|assistant|>reply<|end|>`; the chat
template and `Codec.turn` say the same thing once as text and once as ids. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deltamem_export.training.language import ACKNOWLEDGEMENT, BY_NAME, Turn

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL = (PAD, END, USER, ASSISTANT, SYSTEM)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

TEXT, REPLY, DECISIVE = 0, 1, 2
"""What a token is as a target: text the model only reads, a reply's plain token, or one that decides between right and wrong."""


def train_tokenizer(corpus: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens (special tokens first) trained on `corpus`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Hugging Face form: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[USER, ASSISTANT, SYSTEM]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = 2048
    fast.save_pretrained(folder)


@dataclass(frozen=True)
class EncodedTurn:
    """A turn as ids, ending in the end token, which is a target but never fed.

    `tags[i]` says what `ids[i]` is as a target (TEXT, REPLY, DECISIVE); `reply` is the index of the first id of the reply.
    """

    turn: Turn
    ids: tuple[int, ...]
    tags: tuple[int, ...]
    reply: int


class Codec:
    """Encodes turns. Phrases that recur are encoded once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.end, self.user, self.assistant, self.pad = (tokenizer.token_to_id(t) for t in (END, USER, ASSISTANT, PAD))
        self.encode = lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, message: str) -> list[int]:
        """What the chat template renders for one user message and the generation prompt."""
        return [self.user, *self.encode(message), self.end, self.assistant]

    def turn(self, turn: Turn) -> EncodedTurn:
        prompt = self.prompt(turn.user)
        reply: list[int] = []
        tags: list[int] = []

        def add(text: str, tag: int) -> None:
            ids = self.encode(text)
            reply.extend(ids)
            tags.extend([tag] * len(ids))

        if turn.relation:
            prefix = BY_NAME[turn.relation].prefix
            add((ACKNOWLEDGEMENT if turn.kind in ("tell", "change") else "") + prefix, REPLY)
            if turn.kind == "unknown":
                rest = turn.reply[len(prefix) :]
                ids = self.encode(rest)
                reply.extend(ids)
                tags.extend([DECISIVE] + [REPLY] * (len(ids) - 1))
            else:
                add(f" {turn.value}", DECISIVE)
                add(".", REPLY)
        else:
            add(turn.reply, REPLY)
        return EncodedTurn(turn, (*prompt, *reply, self.end), (*([TEXT] * len(prompt)), *tags, REPLY), len(prompt))
