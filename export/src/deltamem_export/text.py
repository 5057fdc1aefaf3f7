"""What a bundle needs to speak text: the tokenizer file, the chat template and the strings of its special
tokens, found in a backbone's folder. A folder without a tokenizer is fine: its bundle takes token ids only.
It knows nothing of graphs or memories.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from tokenizers import Tokenizer

from deltamem_export.errors import ExportError, first_line

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
# A tokenizer in one of these forms is converted by transformers when tokenizer.json is not there.
_OTHER_FORMS = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


@dataclass(frozen=True)
class Text:
    """The manifest's `text` section."""

    tokenizer: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None


def copy_text(backbone: Path, bundle: Path, vocab_size: int, bos: int | None, eos: tuple[int, ...]) -> Text | None:
    """Copies tokenizer and template into the bundle; None without a tokenizer.

    Raises:
        ExportError: a file that cannot be read, or a tokenizer with more tokens than the backbone has
        embeddings.
    """
    target = bundle / TOKENIZER_FILE
    if (backbone / TOKENIZER_FILE).is_file():
        shutil.copyfile(backbone / TOKENIZER_FILE, target)
    elif any((backbone / name).is_file() for name in _OTHER_FORMS):
        _convert(backbone, target)
    else:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(target))
    except Exception as error:  # the tokenizers package raises Exception itself
        raise ExportError(f"{backbone / TOKENIZER_FILE}: cannot be read ({error})") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ExportError(
            f"{backbone / TOKENIZER_FILE}: has token id {largest}, but the backbone's vocab_size is "
            f"{vocab_size}; they do not belong together"
        )

    settings = _json(backbone / "tokenizer_config.json")
    special = _json(backbone / "special_tokens_map.json") | settings
    template = _template(backbone, settings)
    if template is not None:
        (bundle / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return Text(
        TOKENIZER_FILE,
        TEMPLATE_FILE if template is not None else None,
        _token(special.get("bos_token")) or (tokenizer.id_to_token(bos) if bos is not None else None),
        _token(special.get("eos_token")) or (tokenizer.id_to_token(eos[0]) if eos else None),
    )


def text_digest(bundle: Path, text: Text | None) -> str | None:
    """BLAKE3 over tokenizer, template and special strings; None without a tokenizer."""
    if text is None:
        return None
    hasher = blake3()
    for name in (text.tokenizer, text.chat_template):
        data = (bundle / name).read_bytes() if name else b""
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    hasher.update(json.dumps([text.bos_token, text.eos_token]).encode())
    return str(hasher.hexdigest())


def _convert(backbone: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone, local_files_only=True)
        tokenizer.backend_tokenizer.save(str(target))
    except Exception as error:
        raise ExportError(
            f"{backbone}: has no {TOKENIZER_FILE}, and its tokenizer cannot be converted "
            f"({first_line(error)}); save one with "
            "transformers' save_pretrained first"
        ) from error


def _template(backbone: Path, settings: dict[str, Any]) -> str | None:
    path = backbone / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name; a chat wants the one called default
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path}: not JSON ({error})") from error
    return found if isinstance(found, dict) else {}
