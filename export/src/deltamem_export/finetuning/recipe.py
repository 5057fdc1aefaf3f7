"""The settings of a training run: their defaults, the paper's recipes by name, and YAML files. Each setting is an option of the command
line too; what its help says stands here. It knows nothing of data or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from deltamem_export.adapter import DELTA_HEADS, UPDATE_MODES, AdapterConfig
from deltamem_export.errors import ExportError
from deltamem_export.finetuning.conversations import nearest

WRITES = {"token": "token", "message": "message_mean", "sentence": "sentence_mean"}


def _of(default: Any, about: str, choices: tuple[str, ...] = (), least: float = 0, most: float = math.inf) -> Any:
    return field(default=default, metadata={"help": about, "choices": choices, "least": least, "most": most})


def _expect(condition: bool, name: str, found: Any, expected: str) -> None:
    if not condition:
        raise ExportError(f"setting {name} is {found!r}, expected {expected}")


def _range(least: float, most: float) -> str:
    return f"{least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"


@dataclass(frozen=True)
class FinetuningRecipe:
    """Every setting of a run but the backbone, the data and the seed.

    Raises:
        ExportError: a value of the wrong type or out of range; the message names the setting.
    """

    # the memory
    rank: int = _of(32, "of the state of a head: r x r numbers a layer", least=1, most=128)
    heads: int = _of(1, "state heads a layer; several are the paper's MSW", least=1, most=256)
    alpha: float = _of(0.0, "corrections are scaled by alpha/rank; 0 takes the rank")
    layers: tuple[int, ...] = _of((), "layers with a memory, the first is 0; empty: all")
    update_mode: str = _of("no_lambda", "the rule", UPDATE_MODES)
    couple_lambda: bool = _of(True, "λ = 1 − β; false: a gate of its own")
    gates: str = _of("head", "a gate per head, or per row of the state", ("head", "row"))
    write: str = _of("token", "what one write covers", tuple(WRITES))
    delta_heads: tuple[str, ...] = _of(("q", "o"), "projections that are corrected", DELTA_HEADS)
    beta_bias: float = _of(-1.0, "where the bias of β starts", least=-math.inf)
    # what the model sees
    context: str = _of("turn", "what is in context while sessions are written", ("turn", "message"))
    context_tokens: int = _of(512, "a longer turn goes on in a context of its own", least=8)
    state_only: float = _of(
        1.0,
        "share of questions that are read from the state alone; of the others the last turn stays in context",
        most=1,
    )
    read_tokens: int = _of(512, "a question with its answer, and the last turn where it stays", least=8)
    # the losses
    answer_weight: float = _of(1.0, "cross-entropy of answers that were told")
    unknown_weight: float = _of(0.5, "cross-entropy of answers to what was never told (evidence [])")
    harm_weight: float = _of(1.0, "KL to the frozen model on turns that need no memory")
    harm_turns: int = _of(1, "such turns an episode")
    margin_weight: float = _of(0.0, "the true state must beat an empty and another one by `margin`")
    margin: float = _of(0.5, "nats a token of the answer")
    teacher_weight: float = _of(0.0, "KL to the frozen model that sees the whole context, on the answers")
    anchor_weight: float = _of(0.0, "1 − cosine of the last hidden vectors, ours and that teacher's, on the answers")
    teacher_tokens: int = _of(8192, "context of the teacher; sessions without evidence go first", least=8)
    sparsity_weight: float = _of(0.0, "distance of the mean β over what is written from sparsity_target")
    sparsity_target: float = _of(0.05, "see sparsity_weight", most=1)
    # the stream and the curriculum
    bptt_tokens: int = _of(
        2048, "tokens of a stream that gradients go back through; the state goes on detached", least=8
    )
    first_facts: float = _of(2.0, "questions an episode to begin with", least=1)
    most_facts: int = _of(32, "questions an episode in the end", least=1)
    first_tokens: int = _of(512, "written tokens an episode to begin with", least=8)
    written_tokens: int = _of(8192, "written tokens an episode in the end", least=8)
    promote: float = _of(0.8, "share of right answers from which the next episodes are larger", most=1)
    # the optimiser
    steps: int = _of(0, "optimiser steps; 0 takes them from `epochs`")
    epochs: float = _of(1.0, "times that the data are gone through")
    batch: int = _of(4, "conversations at once", least=1)
    accumulate: int = _of(1, "batches a step, shared among the processes", least=1)
    rate: float = _of(1e-3, "of AdamW")
    warm_up: float = _of(0.1, "share of the steps in which the rate rises; a cosine follows", most=1)
    weight_decay: float = _of(0.0, "of AdamW")
    clip: float = _of(1.0, "largest norm of the gradient")
    dtype: str = _of("fp32", "of the frozen backbone; the memory is float32", ("fp32", "bf16"))
    # what is measured and kept
    held_out: float = _of(0.1, "share of the conversations that is never trained on", most=0.9)
    evaluate_every: int = _of(100, "steps between two measurements on held-out conversations", least=1)
    evaluated: int = _of(64, "held-out conversations that are measured on", least=1)
    checkpoint_every: int = _of(100, "steps between two checkpoints", least=1)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = self._settled(f.name, getattr(self, f.name), f.default)
            object.__setattr__(self, f.name, value)
            choices, least, most = f.metadata["choices"], f.metadata["least"], f.metadata["most"]
            if choices:
                for each in value if isinstance(value, tuple) else (value,):
                    _expect(each in choices, f.name, value, " or ".join(choices))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                _expect(math.isfinite(value) and least <= value <= most, f.name, value, _range(least, most))
        self.adapter_config()

    @staticmethod
    def _settled(name: str, value: Any, default: Any) -> Any:
        """The value in its type. Lists become tuples, whole numbers become floats where a float is meant."""
        if isinstance(default, tuple):
            kind = str if name == "delta_heads" else int
            good = isinstance(value, (list, tuple)) and all(type(v) is kind for v in value)
            _expect(good, name, value, "a list of " + ("projections" if kind is str else "layer numbers"))
            return tuple(value)
        if isinstance(default, float) and type(value) is int:
            return float(value)
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        _expect(type(value) is type(default), name, value, names[type(default)])
        return value

    def adapter_config(self) -> AdapterConfig:
        """The adapter that is trained. Raises AdapterError for settings that do not fit each other."""
        return AdapterConfig(
            rank=self.rank,
            alpha=self.alpha or float(self.rank),
            num_state_heads=self.heads,
            couple_lambda=self.couple_lambda,
            state_update_mode=self.update_mode,
            rankwise_gates=self.gates == "row",
            memory_write_granularity=WRITES[self.write],
            target_layers=self.layers,
            delta_heads=self.delta_heads,
        )

    def total_steps(self, conversations: int) -> int:
        """Optimiser steps of a run on so many conversations."""
        return self.steps or max(1, math.ceil(self.epochs * conversations / (self.batch * self.accumulate)))

    def to_dict(self) -> dict[str, Any]:
        """As YAML and JSON have it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


# What the paper says, and what we chose where it does not (docs/training.md): rank, alpha, gates and layers are the released adapter's;
# 8 GPUs x 4 accumulated are 32 episodes a step, shared among however many processes there are.
PAPER = FinetuningRecipe(
    rank=8,
    alpha=16.0,
    update_mode="standard",
    gates="row",
    beta_bias=-1.5,
    context="message",
    state_only=0.2,
    read_tokens=512,
    unknown_weight=1.0,
    harm_weight=0.0,
    harm_turns=0,
    margin_weight=0.1,
    teacher_weight=0.02,
    anchor_weight=0.02,
    sparsity_weight=0.01,
    sparsity_target=0.05,
    bptt_tokens=8192,
    first_facts=32.0,
    first_tokens=8192,
    written_tokens=8192,
    batch=1,
    accumulate=32,
    rate=2e-4,
    dtype="bf16",
)

RECIPES: dict[str, FinetuningRecipe] = {
    "default": FinetuningRecipe(),
    "paper-tsw": PAPER,
    "paper-ssw": replace(PAPER, write="message"),
    "paper-msw": replace(PAPER, heads=4),
}


def read_recipe(path: Path) -> FinetuningRecipe:
    """A YAML file of settings; `base` names the recipe that the others are taken from.

    Raises:
        FileNotFoundError: no such file.
        ExportError: not YAML, an unknown setting (with the nearest known one), a value that cannot be.
    """
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise ExportError(f"{path}: is a {type(loaded).__name__}, expected settings, a line `name: value` each")
    base = loaded.pop("base", "default")
    if base not in RECIPES:
        raise ExportError(f"{path}: base {base} is not known{nearest(str(base), RECIPES)}")
    try:
        return changed(RECIPES[base], loaded)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error


def changed(recipe: FinetuningRecipe, settings: Mapping[Any, Any]) -> FinetuningRecipe:
    """The recipe with other settings. Raises ExportError for an unknown one, with the nearest known one."""
    known = [f.name for f in fields(FinetuningRecipe)]
    for name in settings:
        if name not in known:
            raise ExportError(f"setting {name} is not known{nearest(str(name), known)}")
    return replace(recipe, **settings)
