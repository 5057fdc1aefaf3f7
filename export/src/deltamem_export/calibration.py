"""What healthy memories of a bundle look like: conversations are played through it by the runtime, as a user's would be, and the
figures of `Session.health` behind every turn become quantiles and bounds in the manifest's section `health` (docs/health.md). It knows
the runtime's public API and the manifest; what the figures mean is known in the runtime.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deltamem_export import manifest
from deltamem_export.errors import ExportError
from deltamem_export.graft import measure_again

# The bounds are the largest figures seen, times this.
MARGIN = 1.1
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
OF_THE_STATE = (
    "norm",
    "spectral_norm",
    "effective_rank",
    "concentration",
    "change",
    "path",
    "collapse",
    "churn",
    "scatter",
)
MEASURED = ("delta_ratio", "beta_mean", "beta_saturated", "lambda_mean", "lambda_saturated")
BOUNDED = (*OF_THE_STATE, "delta_ratio", "beta_mean")
# The measured figures are those of the last 256 tokens, so they are asked for now and then, and not before there are so many.
_MEASURED_EVERY = 10
_MEASURED_TOKENS = 256
MIN_TURNS = 20
# A reply that runs into its limit where hardly any does is a model in a loop, and what it wrote is no healthy memory's: such a turn is left
# out, with the turns behind it whose figures still look back on it. Where more replies are cut off than that, it is the model's way.
RARELY = 0.01
_LOOKS_BACK = 33

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stream:
    """Conversations to calibrate on, each a list of messages, and what they are in words.

    A message is a user's: a bundle with a chat template answers it, another one reads it. Where a bundle has no tokenizer, a message is
    token ids with spaces between them.
    """

    conversations: Sequence[Sequence[str]]
    description: str

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stream:
        """Reads a text file in UTF-8: a message a line; an empty line begins a conversation with an empty memory.

        Raises:
            FileNotFoundError: there is no such file.
            ExportError: it is no text, or holds fewer than 20 messages.
        """
        file = Path(path)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ExportError(f"{file}: is not text in UTF-8 ({error.reason} at byte {error.start})") from error
        conversations: list[list[str]] = [[]]
        for line in lines:
            if line.strip():
                conversations[-1].append(line.strip())
            elif conversations[-1]:
                conversations.append([])
        found = cls([c for c in conversations if c], file.name)
        turns = sum(map(len, found.conversations))
        if turns < MIN_TURNS:
            raise ExportError(
                f"{file}: holds {turns} messages, expected at least {MIN_TURNS}, one a line; bounds that are learnt from a few turns call "
                "healthy memories ill"
            )
        return found


def learn(bundle: Path, stream: Stream, say: Say = lambda _: None) -> dict[str, Any]:
    """Plays the stream through a sealed bundle and returns the manifest's section `health`.

    Raises:
        ExportError: the runtime is not installed, or refuses the bundle or a message.
    """
    try:
        import deltamem_rt as runtime
    except ImportError as error:
        raise ExportError(
            'calibrating plays conversations through the runtime, which is not installed: pip install "deltamem-rt[cpu]"'
        ) from error
    turns: list[_Turn] = []
    tokens = 0
    try:
        model = runtime.Model.load(bundle, device="cpu")
        text = model.manifest["text"]
        chats = text is not None and text["chat_template"] is not None
        for number, conversation in enumerate(stream.conversations, 1):
            # Watched, since a watched session knows how far each turn moved the state; what an older calibration says is not asked.
            with model.session(on_drift="warn") as session, warnings.catch_warnings():
                warnings.simplefilter("ignore", runtime.DriftWarning)
                cut_off_at = -_LOOKS_BACK
                for turn, message in enumerate(conversation, 1):
                    cut_off = _say_to(session, message, chats, text is not None)
                    cut_off_at = turn if cut_off else cut_off_at
                    health = session.health(measure=turn % _MEASURED_EVERY == 0)
                    measured = health.measured_tokens == min(_MEASURED_TOKENS, model.context_length)
                    turns.append(_Turn(_figures(health, measured), cut_off, turn < cut_off_at + _LOOKS_BACK))
                tokens += session.tokens_seen
            say(
                f"calibrating: conversation {number} of {len(stream.conversations)}, {len(turns)} turns, {tokens} tokens"
            )
    except (runtime.DeltaMemError, ValueError) as error:
        raise ExportError(f"the calibration stream cannot be played: {error}") from error
    kept = turns
    if sum(turn.cut_off for turn in turns) <= RARELY * len(turns):
        kept = [turn for turn in turns if not turn.looks_back_on_one]
    seen: dict[str, list[npt.NDArray[np.float64]]] = defaultdict(list)
    for turn in kept:
        for name, value in turn.figures.items():
            seen[name].append(value)
    found = {name: np.stack(values) for name, values in seen.items()}
    bounds = {name: (MARGIN * found[name].max(axis=0)).round(6).tolist() for name in BOUNDED if name in found}
    if "beta_mean" in bounds:
        bounds["beta_mean"] = [[bound] for bound in bounds["beta_mean"]]
    return {
        "stream": {
            "description": stream.description,
            "conversations": len(stream.conversations),
            "turns": len(turns),
            "left_out": len(turns) - len(kept),
            "tokens": tokens,
        },
        "margin": MARGIN,
        "quantiles": list(QUANTILES),
        # The quantiles stand last: [L, H, quantiles], [L, D, quantiles], [L, quantiles].
        "figures": {
            name: np.moveaxis(np.quantile(values, QUANTILES, axis=0), 0, -1).round(6).tolist()
            for name, values in found.items()
        },
        "bounds": bounds,
    }


def calibrate(bundle: str | os.PathLike[str], stream: Stream, say: Say = lambda _: None) -> Path:
    """Gives an exported bundle the section `health`, and its measured graph the input `strength` and the output `gates` if an older
    exporter left them out. Its weights, its fingerprint and its memories stay. It is replaced whole or not at all.

    Raises:
        FileNotFoundError: there is no bundle.
        ExportError: it is damaged, or the stream cannot be played.
    """
    from deltamem_export.bundle import remade

    with remade(bundle) as (new, found):
        graph = found["graph"]
        if graph["measured_file"] and not (graph.get("strength") and graph.get("gates")):
            say("grafting the measured graph again")
            file = new / graph["measured_file"]
            file.unlink()
            measure_again(Path(bundle), found, file)
            graph |= {"strength": True, "gates": True}
            found["files"][graph["measured_file"]] = manifest.file_entry(file)
        found["health"] = None
        manifest.write(new, found)
        found["health"] = learn(new, stream, say)
    return Path(os.path.abspath(bundle))


@dataclass(frozen=True)
class _Turn:
    """The figures behind a turn, whether its reply ran into the limit, and whether its figures look back on such a turn or are one's."""

    figures: dict[str, npt.NDArray[np.float64]]
    cut_off: bool
    looks_back_on_one: bool


def _say_to(session: Any, message: str, chats: bool, text: bool) -> bool:
    """One turn. Returns whether there was a reply that did not end by itself."""
    if chats:
        reply = session.chat(message)
        reply.read()
        return bool(reply.stats.finish_reason == "length")
    session.feed(message if text else [int(part) for part in message.split()])
    session.end_turn()
    return False


def _figures(health: Any, measured: bool) -> dict[str, npt.NDArray[np.float64]]:
    values = {name: getattr(health, name) for name in (*OF_THE_STATE, *(MEASURED if measured else ()))}
    return {name: np.asarray(value, np.float64) for name, value in values.items() if value is not None}
