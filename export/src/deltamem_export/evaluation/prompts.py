"""The bundle's chat template over several messages. The engine renders one message at a time, since a turn's context is dropped; an
opponent that puts history into the prompt needs more. What is rendered here is held against the engine's own count of tokens first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

import deltamem_rt as dm
from deltamem_export.errors import ExportError


def message(role: str, content: str) -> dict[str, str]:
    """A message as templates take it."""
    return {"role": role, "content": content}


class Prompts:
    """Renders conversations for one model."""

    def __init__(self, model: dm.Model) -> None:
        """Raises ExportError for a bundle that has no tokenizer or no chat template, or whose template renders otherwise here."""
        text: Mapping[str, Any] = model.manifest.get("text") or {}
        name = text.get("chat_template")
        if not name:
            raise ExportError(
                f"{model.path} has no chat template, and eval asks in chat turns: export it again from a backbone folder with a "
                "tokenizer.json and a chat_template.jinja"
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
        self.model = model
        self._template = environment.from_string((model.path / name).read_text(encoding="utf-8"))
        self._tokens = {f"{name}_token": text.get(f"{name}_token") or "" for name in ("bos", "eos")}
        self._agrees()

    def render(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> str:
        """The conversation as text; `reply`: up to where the assistant's next reply begins."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=reply, **self._tokens)
        except TemplateError as error:
            raise ExportError(
                f"{self.model.path}: the chat template refuses a conversation of {len(messages)} messages ({error}); without "
                "context and bm25 in --against none is needed"
            ) from error

    def ids(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> list[int]:
        """The same as token ids."""
        return self.model.encode(self.render(messages, reply))

    def _agrees(self) -> None:
        probe = "What is my dog called?"
        with self.model.session() as session:
            generation = session.chat(probe, max_new_tokens=1, write=False)
            generation.read()
            engine = generation.stats.prompt_tokens
        here = len(self.ids([message("user", probe)]))
        if engine != here:
            raise ExportError(
                f"{self.model.path}: a question has {engine} tokens by the engine's rendering of the chat template and {here} by "
                "Jinja's, so opponents would read another prompt than the memory; the template uses something that only one of "
                "the two knows: simplify it"
            )


def _refuse(text: str) -> None:
    raise TemplateError(text)
