"""The loop: plans a step, adds up its gradients, measures on held-out conversations, and keeps checkpoints from which a killed run goes on
with the same results. It knows nothing of files but its checkpoint.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamem_export.backbone import Backbone
from deltamem_export.errors import ExportError
from deltamem_export.finetuning.conversations import Conversation
from deltamem_export.finetuning.episodes import Episode, Level, Planner
from deltamem_export.finetuning.objective import TERMS, Objective, Scales, Sums
from deltamem_export.finetuning.processes import Processes
from deltamem_export.finetuning.recipe import FinetuningRecipe
from deltamem_export.finetuning.rendering import Encoded, Renderer
from deltamem_export.reference import attach
from deltamem_export.scan import chunked_scan

OPTIONAL = ("harm", "margin", "teacher", "anchor")
"""Terms that are computed only where they have a weight."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class HeldOut:
    """Measured on held-out conversations: recall is the share of all questions whose greedy answer is the whole answer and ends."""

    recall: float
    told: float
    unknown: float
    loss: float
    harm: float
    n_told: int
    n_unknown: int

    def better_than(self, other: HeldOut | None) -> bool:
        return other is None or (self.recall, -self.loss) > (other.recall, -other.loss)


class Trainer:
    """Holds the frozen decoder, the memory on it, and everything that the next step depends on."""

    def __init__(
        self,
        backbone: Backbone,
        recipe: FinetuningRecipe,
        train: Sequence[Conversation],
        held_out: Sequence[Conversation],
        seed: int = 0,
        processes: Processes | None = None,
    ):
        """Encodes all conversations. Raises ExportError for what cannot be rendered, or where no conversation fits the written tokens."""
        self.recipe, self.seed = recipe, seed
        self.processes = processes or Processes()
        self.renderer = Renderer(backbone, recipe)
        encoded = [self.renderer.conversation(c) for c in train]
        self.planner = Planner(self.renderer, recipe, encoded)
        self.train = [e for e in encoded if self.planner.least(e) <= recipe.written_tokens]
        self.left_out = len(encoded) - len(self.train)
        if not self.train:
            raise ExportError(
                f"none of the {len(encoded)} conversations fits {recipe.written_tokens} written tokens (the shortest needs "
                f"{min(map(self.planner.least, encoded))}); raise --written-tokens, or give questions their evidence"
            )
        self.measured = self._fixed([self.renderer.conversation(c) for c in held_out])
        self.total = recipe.total_steps(len(self.train))

        model: Any = backbone.model
        model.to(self.processes.device, DTYPES[recipe.dtype]).eval().requires_grad_(False)
        torch.manual_seed(seed)
        # Starting values are drawn on the CPU, so that they are the same for every device.
        self.handle = attach(model, recipe.adapter_config(), chunked_scan)
        with torch.no_grad():
            for name, parameter in self.handle.named_parameters():
                if name.endswith("beta_bias"):
                    parameter.fill_(recipe.beta_bias)
        self.parameters = list(self.handle.parameters())
        self.objective = Objective(model, self.handle, recipe, self.renderer.pad)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
        )
        self.rng = random.Random(seed)
        least = min(map(self.planner.least, self.train))
        self.level = Level(
            min(recipe.first_facts, float(recipe.most_facts)),
            float(max(min(recipe.first_tokens, recipe.written_tokens), least)),
        )
        self.queue: list[int] = []
        self.done = 0
        self.best: HeldOut | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.untrained: HeldOut | None = None

    # ------------------------------------------------------------------ a step

    def step(self) -> dict[str, float]:
        """One optimiser step. Returns its line of the metrics."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * schedule(self.done, self.total, recipe.warm_up)
        level = self.level
        batches = [self._draw() for _ in range(recipe.accumulate)]
        draws = [self.rng.getrandbits(64) for _ in batches]
        scales, sums = Scales.of(batches), Sums()
        self.optimizer.zero_grad(set_to_none=True)
        for i in self.processes.share(len(batches)):
            self.objective.step(batches[i], scales, random.Random(draws[i]), sums)
        self.processes.add_gradients(self.parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, recipe.clip))
        if not math.isfinite(norm):
            raise ExportError(
                f"step {self.done}: the gradient is not finite; lower --rate, or train in --dtype fp32 where the backbone overflows"
            )
        self.optimizer.step()
        counts = (sums.told, sums.told_right, sums.untold, sums.untold_right)
        told, told_right, untold, untold_right, *values = self.processes.add([*counts, *sums.terms.values()])
        terms = dict(zip(TERMS, values, strict=True))
        loss = sum(getattr(recipe, f"{name}_weight") * value for name, value in terms.items())
        line = {
            "step": self.done,
            "loss": loss,
            **{n: v for n, v in terms.items() if n not in OPTIONAL or getattr(recipe, f"{n}_weight")},
            "told": told_right / max(1, told),
            "never_told": untold_right / max(1, untold),
            "norm": norm,
            "facts": level.facts,
            "tokens": level.tokens,
        }
        level.learn(recipe, int(told_right), int(told))
        self.done += 1
        return line

    def measure(self) -> HeldOut:
        """Held-out figures of the memory as it is; keeps it if it is the best so far."""
        told = right = untold = untold_right = loss = harm = harm_count = 0.0
        for i in self.processes.share(len(self.measured)):
            episode, sums = self.measured[i], Sums()
            with torch.no_grad():
                self.objective.step([episode], Scales.of([[episode]]), random.Random(i), sums, backward=False)
            told, right = told + sums.told, right + sums.told_right
            untold, untold_right = untold + sums.untold, untold_right + sums.untold_right
            loss += sums.terms["answer"] * sums.told + sums.terms["unknown"] * sums.untold
            if episode.harmless:
                harm, harm_count = harm + sums.terms["harm"], harm_count + 1
        told, right, untold, untold_right, loss, harm, harm_count = self.processes.add(
            [told, right, untold, untold_right, loss, harm, harm_count]
        )
        asked = max(1.0, told + untold)
        found = HeldOut(
            (right + untold_right) / asked,
            right / max(1.0, told),
            untold_right / max(1.0, untold),
            loss / asked,
            harm / max(1.0, harm_count),
            int(told),
            int(untold),
        )
        if self.done == 0:
            self.untrained = found
        if found.better_than(self.best):
            self.best = found
            self.best_weights = {n: t.detach().cpu().clone() for n, t in self.handle.layers.state_dict().items()}
        return found

    # ------------------------------------------------------------------ checkpoints

    def save(self, path: Path, identity: str) -> None:
        """Writes whole or not at all. `identity` says what run it is of."""
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "identity": identity,
                "done": self.done,
                "memory": self.handle.layers.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": self.rng.getstate(),
                "queue": self.queue,
                "level": asdict(self.level),
                "best": asdict(self.best) if self.best else None,
                "best_weights": self.best_weights,
                "untrained": asdict(self.untrained) if self.untrained else None,
            },
            partial,
        )
        partial.replace(path)

    def load(self, path: Path, identity: str) -> None:
        """Takes up where `save` left off.

        Raises:
            ExportError: a checkpoint of another run, or a damaged one.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            found = saved["identity"]
        except Exception as error:  # whatever a damaged file makes the unpickler raise
            raise ExportError(f"{path}: cannot be read; remove it to begin anew") from error
        if found != identity:
            raise ExportError(
                f"{path}: is of another run (settings, data, backbone, seed or library versions differ); choose another --out, or "
                "remove it"
            )
        self.handle.layers.load_state_dict(saved["memory"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.setstate(saved["random"])
        self.queue, self.done, self.level = saved["queue"], saved["done"], Level(**saved["level"])
        self.best = HeldOut(**saved["best"]) if saved["best"] else None
        self.untrained = HeldOut(**saved["untrained"]) if saved["untrained"] else None
        self.best_weights = saved["best_weights"]

    # ------------------------------------------------------------------ drawing

    def _draw(self) -> list[Episode]:
        """A batch of different conversations that fit the level; those that do not are passed over until they do."""
        found: list[Episode] = []
        for _ in range(4 * len(self.train) + self.recipe.batch):
            if len(found) == self.recipe.batch:
                break
            if not self.queue:
                self.queue = list(range(len(self.train)))
                self.rng.shuffle(self.queue)
            encoded = self.train[self.queue.pop()]
            episode = self.planner.plan(encoded, int(self.level.facts), int(self.level.tokens), self.rng)
            if episode is not None:
                found.append(episode)
        return found

    def _fixed(self, encoded: Sequence[Encoded]) -> list[Episode]:
        """What is measured on: the largest episodes of held-out conversations, their questions at the end; always the same."""
        found = []
        for number, each in enumerate(encoded[: self.recipe.evaluated]):
            plan = self.planner.plan(
                each, self.recipe.most_facts, self.recipe.written_tokens, random.Random(number), at_end=True
            )
            if plan is not None:
                found.append(plan)
        if not found:
            raise ExportError(
                f"none of the {len(encoded)} held-out conversations fits {self.recipe.written_tokens} written tokens; raise "
                "--written-tokens, or give questions their evidence"
            )
        return found


def schedule(step: int, total: int, warm_up: float) -> float:
    """The share of the full rate: up in a line over `warm_up` of the steps, then down a cosine to 0."""
    rising = math.ceil(warm_up * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
