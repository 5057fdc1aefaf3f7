"""A whole run, from a folder and a file to an adapter:

OUT/delta_mem_config.json, adapter.safetensors    the adapter that was best on held-out conversations
OUT/card.json                                     data, settings, steps, figures, versions
OUT/metrics.csv                                   a line a step, held-out figures where they were measured
OUT/checkpoint                                    while it runs; a run that was broken off goes on there
"""

from __future__ import annotations

import csv
import io
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltamem_export.adapter import SAFETENSORS_FILE, Adapter
from deltamem_export.backbone import Backbone
from deltamem_export.bundle import adapter_digest
from deltamem_export.finetuning.conversations import read_data
from deltamem_export.finetuning.processes import Processes
from deltamem_export.finetuning.recipe import FinetuningRecipe
from deltamem_export.finetuning.trainer import HeldOut, Trainer

CARD_FILE, METRICS_FILE, CHECKPOINT_FILE = "card.json", "metrics.csv", "checkpoint"
LINES = 20
"""Steps between two lines where the output is no terminal."""

Say = Callable[[str], None]


def finetune(
    backbone: Path,
    data: Path,
    out: Path,
    recipe: FinetuningRecipe,
    seed: int = 0,
    device: str = "cpu",
    name: str = "default",
    say: Say | None = None,
) -> dict[str, Any]:
    """Trains an adapter and writes it with its card. A run that is done already is not run again.

    Args:
        backbone: a Hugging Face folder.
        data: conversations in JSON Lines.
        out: the adapter's folder, made if need be.
        name: of the recipe, for the card.

    Returns:
        the card.

    Raises:
        FileNotFoundError: a folder or file that must be there is not.
        ExportError: data, backbone, settings or checkpoint that do not fit; says what to do.
    """
    processes = Processes(device)
    say = say if say is not None else (lambda line: print(line, file=sys.stderr, flush=True))
    if not processes.first:
        say = _silent
    read = read_data(data)
    train, held_out = read.split(recipe.held_out)
    loaded = Backbone.load(backbone, any_family=True)
    weights = loaded.weights_digest
    versions = {p: version(p) for p in ("deltamem-export", "torch", "transformers", "tokenizers")} | {
        "python": platform.python_version()
    }
    identity = blake3(json.dumps([recipe.to_dict(), read.digest, weights, seed, versions]).encode()).hexdigest()
    if (out / CARD_FILE).is_file() and (out / SAFETENSORS_FILE).is_file():
        card: dict[str, Any] = json.loads((out / CARD_FILE).read_text(encoding="utf-8"))
        if card.get("identity") == identity:
            say(f"{out}: this run is done already")
            return card
    trainer = Trainer(loaded, recipe, train, held_out, seed, processes)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / CHECKPOINT_FILE
    if checkpoint.is_file():
        trainer.load(checkpoint, identity)
        say(f"going on at step {trainer.done} of {trainer.total}")
    say(
        f"{len(trainer.train)} conversations to train on ({trainer.left_out} are too long), {len(trainer.measured)} of {len(held_out)} "
        "held-out ones to measure on; "
        f"{sum(p.numel() for p in trainer.parameters):,} parameters on {len(trainer.handle.layer_indices)} layers; {trainer.total} steps "
        f"on {processes.device.type}" + (f" x {processes.count}" if processes.count > 1 else "")
    )
    seconds = _train(trainer, out, identity, processes, say)
    trainer.handle.layers.load_state_dict(trainer.best_weights)
    adapter = trainer.handle.adapter()
    assert trainer.best is not None
    card = {
        "name": name,
        "identity": identity,
        "backbone": {"architecture": loaded.geometry.architecture, "weights": weights, "dtype": recipe.dtype},
        "adapter": adapter_digest(adapter),
        "data": {
            "file": data.name,
            "blake3": read.digest,
            **read.counts(),
            "trained_on": len(trainer.train),
            "held_out": len(held_out),
            "measured_on": len(trainer.measured),
            "too_long": trainer.left_out,
        },
        "recipe": recipe.to_dict(),
        "seed": seed,
        "steps": trainer.total,
        "processes": processes.count,
        "device": processes.device.type,
        "seconds": round(seconds, 1),
        "made": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "figures": {
            "untrained": asdict(trainer.untrained) if trainer.untrained else None,
            "best": asdict(trainer.best),
        },
    }
    if processes.first:
        _publish(adapter, card, out)
        checkpoint.unlink(missing_ok=True)
    processes.wait()
    say(f"held-out recall {_show(trainer.untrained)} untrained, {_show(trainer.best)} at its best; wrote {out}")
    return card


def _train(trainer: Trainer, out: Path, identity: str, processes: Processes, say: Say) -> float:
    recipe, start = trainer.recipe, time.monotonic()
    with _Metrics(out / METRICS_FILE if processes.first else None, trainer.done, trainer.total, say) as metrics:
        if trainer.best is None:
            metrics.line({"step": -1}, trainer.measure())
        while trainer.done < trainer.total:
            line = trainer.step()
            measured = trainer.done % recipe.evaluate_every == 0 or trainer.done == trainer.total
            metrics.line(line, trainer.measure() if measured else None)
            if processes.first and (trainer.done % recipe.checkpoint_every == 0 or trainer.done == trainer.total):
                metrics.flush()
                trainer.save(out / CHECKPOINT_FILE, identity)
    return time.monotonic() - start


def _publish(adapter: Adapter, card: Mapping[str, Any], out: Path) -> None:
    """The tensors last: a folder that has them has all."""
    partial = out / ".partial"
    adapter.save(partial)
    (partial / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (out / SAFETENSORS_FILE).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda p: p.name == SAFETENSORS_FILE):
        path.replace(out / path.name)
    partial.rmdir()


class _Metrics:
    """The CSV, and a line for a person: the same line anew in a terminal, one now and then elsewhere."""

    COLUMNS = (
        "seconds",
        "step",
        "loss",
        "answer",
        "unknown",
        "harm",
        "margin",
        "teacher",
        "anchor",
        "sparsity",
        "told",
        "never_told",
        "norm",
        "facts",
        "tokens",
        "held_out_recall",
        "held_out_told",
        "held_out_never_told",
        "held_out_loss",
        "held_out_harm",
    )

    def __init__(self, path: Path | None, done: int, total: int, say: Say):
        self.path, self.done, self.total, self.say = path, done, total, say
        self.live = path is not None and sys.stderr.isatty()

    def __enter__(self) -> _Metrics:
        kept: list[dict[str, str]] = []
        if self.path is not None and self.path.is_file() and self.done:
            # What came behind the checkpoint is done again.
            with self.path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) < self.done]
        self.before = float(kept[-1]["seconds"]) if kept else 0.0
        self.start = time.monotonic()
        self.file: Any = self.path.open("w", newline="", encoding="utf-8") if self.path else io.StringIO()
        self.writer = csv.DictWriter(self.file, self.COLUMNS, restval="")
        self.writer.writeheader()
        self.writer.writerows(kept)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            print(file=sys.stderr)
        self.file.close()

    def flush(self) -> None:
        self.file.flush()

    def line(self, values: Mapping[str, float], held_out: HeldOut | None) -> None:
        seconds = self.before + time.monotonic() - self.start
        row: dict[str, Any] = {"seconds": round(seconds, 1), **{k: _short(v) for k, v in values.items()}}
        if held_out is not None:
            names = {"recall": held_out.recall, "told": held_out.told, "never_told": held_out.unknown}
            row |= {
                f"held_out_{k}": _short(v) for k, v in (names | {"loss": held_out.loss, "harm": held_out.harm}).items()
            }
        self.writer.writerow(row)
        step = int(values["step"]) + 1
        text = f"{seconds:6.0f} s  step {step}/{self.total}"
        if step:
            text += "".join(f"  {k} {values[k]:.3g}" for k in ("loss", "told", "facts", "tokens"))
        if held_out is not None:
            text += f"  held out: recall {held_out.recall:.3f}, loss {held_out.loss:.3f}, harm {held_out.harm:.2g}"
        if self.live:
            print(f"\r\x1b[K{text}", end="\n" if held_out is not None else "", file=sys.stderr, flush=True)
        elif held_out is not None or step % LINES == 0:
            self.say(text)


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _show(figures: HeldOut | None) -> str:
    return "not measured" if figures is None else f"{figures.recall:.3f}"


def _silent(_: str) -> None:
    pass
