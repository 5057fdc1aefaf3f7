"""The recipe `tiny-assistant`: from nothing to a backbone, a memory on it, and the measured card, in one folder.

    OUT/backbone/    Hugging Face folder: config.json, model.safetensors, tokenizer files
    OUT/adapter/     delta_mem_config.json, adapter.safetensors
    OUT/extra/       demo.json, stream.txt, for the bundle
    OUT/*.csv        metrics of both trainings, a line per step
    OUT/card.json    data, steps, device, minutes, measured figures
    OUT/bundle/      what the runtime loads (made by `deltamem_export.bundle`)

A stage that has left its result is not run again, so an interrupted run goes on at the stage it was in; inside the memory's training it goes on at
the last checkpoint. It knows the order of things; the stages themselves live beside it.
"""

from __future__ import annotations

import csv
import ctypes
import json
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from deltamem_export.training import english, evaluate
from deltamem_export.training.backbone import BackboneRecipe, build_backbone, timer, train_backbone
from deltamem_export.training.demo import demo_facts, stream_text
from deltamem_export.training.language import RELATIONS, Speaker, all_phrasings
from deltamem_export.training.memory import MemoryRecipe, MemoryTrainer, train_memory
from deltamem_export.training.tokenizer import Codec, save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """A backbone, a memory, and how much to measure at the end."""

    name: str
    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    memory: MemoryRecipe = field(default_factory=MemoryRecipe)
    corpus_turns: int = 12_000
    episodes: int = 63
    cases: tuple[str, ...] = ()
    """Names of the evaluation's rows; empty: all."""
    bundle: bool = True


RECIPES: dict[str, Recipe] = {
    "tiny-assistant": Recipe("tiny-assistant"),
    # Seconds, for tests: too small to remember anything.
    "smoke": Recipe(
        "smoke",
        BackboneRecipe(
            vocabulary=1200,
            hidden=32,
            layers=2,
            heads=2,
            kv_heads=1,
            head_dim=16,
            intermediate=64,
            steps=20,
            rows=4,
            warm_up=4,
            sharpen_steps=4,
            sharpen_layers=(1,),
        ),
        MemoryRecipe(rank=16, layers=(1,), steps=6, tokens=1024, warm_up=2, fit=2),
        corpus_turns=400,
        episodes=2,
        cases=("8 facts",),
        bundle=False,
    ),
}


def corpus(speaker: Speaker, turns: int) -> Iterator[str]:
    """What the tokenizer is trained on. Values come often enough to be one token each."""
    values = sorted({v for r in RELATIONS for v in r.values})
    for _ in range(max(1, turns // 40)):
        yield from (f" {v}" for v in values)
    for _ in range(6):
        yield from all_phrasings()
    for _ in range(turns):
        turn = speaker.talk()
        relation, value = speaker.draw_facts(1)[0]
        yield from (
            turn.user,
            turn.reply,
            speaker.tell(relation, value).user,
            speaker.ask(relation, value).user,
            relation.acknowledgement(value),
        )
    yield from speaker.text


def run_recipe(
    recipe: Recipe,
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    stream: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All stages into `out`. Returns the card."""
    _keep_heap()
    out.mkdir(parents=True, exist_ok=True)
    backbone, adapter, extra = out / "backbone", out / "adapter", out / "extra"
    text = english.passages()
    seeds = [random.Random(10 * seed + i) for i in (1, 2, 3, 4)]
    minutes = _read(out / "minutes.json")
    lap = timer()

    def done(stage: str) -> None:
        minutes[stage] = round(lap() / 60 - sum(minutes.get(s, 0) for s in ran), 2)
        ran.append(stage)
        (out / "minutes.json").write_text(json.dumps(minutes) + "\n", encoding="utf-8")

    ran: list[str] = []
    if not (backbone / "config.json").is_file():
        tokenizer = train_tokenizer(
            corpus(Speaker(seeds[0], text=text), recipe.corpus_turns), recipe.backbone.vocabulary
        )
        codec = Codec(tokenizer)
        model = build_backbone(recipe.backbone, codec.end, codec.pad, seed)
        say(
            f"backbone: {sum(p.numel() for p in model.parameters()):,} parameters, {recipe.backbone.steps} steps on {device}"
        )
        with _Metrics(out / "backbone.csv", say) as metrics:
            train_backbone(model, Speaker(seeds[1], text=text), codec, recipe.backbone, device, metrics.line)
            torch.manual_seed(seed)
            train_backbone(
                model,
                Speaker(seeds[3], text=text, odd=recipe.backbone.sharpen_odd),
                codec,
                recipe.backbone,
                device,
                metrics.line,
                sharpen=True,
            )
        partial = out / "backbone.partial"
        model.to("cpu").save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        partial.rename(backbone)
        done("backbone")
    codec = Codec(Tokenizer.from_file(str(backbone / "tokenizer.json")))
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    if not (adapter / "adapter.safetensors").is_file():
        say(f"memory: {recipe.memory.steps} steps on {device}")
        speaker = Speaker(seeds[2], text=text, odd=recipe.memory.odd)
        trainer = MemoryTrainer(model, speaker, codec, recipe.memory, seed, device)
        with _Metrics(out / "memory.csv", say) as metrics:
            train_memory(trainer, metrics.line, checkpoint=out / "memory.checkpoint")
        partial = out / "adapter.partial"
        shutil.rmtree(partial, ignore_errors=True)
        trainer.handle.adapter().save(partial)
        partial.rename(adapter)
        done("memory")
    extra.mkdir(exist_ok=True)
    (extra / "demo.json").write_text(json.dumps(demo_facts(), indent=1) + "\n", encoding="utf-8")
    (extra / "stream.txt").write_text(stream_text(), encoding="utf-8")
    model, handle, codec = evaluate.load(backbone, adapter, device)
    turns = evaluate.talk_turns(stream or extra / "stream.txt")
    cases = {n: c for n, c in evaluate.standard_cases(bool(turns)).items() if not recipe.cases or n in recipe.cases}
    figures = evaluate.evaluate(
        model, handle, codec, recipe.episodes, 0, turns, cases, lambda n, r: say(evaluate.line(n, r))
    )
    done("evaluation")
    for result in figures.values():
        result.pop("failures")
    harm = {
        str(n): evaluate.harm(model, handle, codec, n, random.Random(0).sample(turns, min(64, len(turns))), 900 + n)
        for n in (8, min(32, len(RELATIONS)))
    }
    card = {
        "recipe": recipe.name,
        "seed": seed,
        "backbone": asdict(recipe.backbone),
        "memory": asdict(recipe.memory),
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "minutes": minutes,
        "made": time.strftime("%Y-%m-%d"),
        "data": f"generated English ({len(RELATIONS)} relations); Python {platform.python_version()} documentation ({len(text)} passages, PSF licence)",
        "real_conversation": stream.name if stream else "stream.txt (ours)",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "figures": figures,
        "harm": harm,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    if recipe.bundle:
        make_bundle(out, recipe.name, say)
    return card


def make_bundle(out: Path, name: str, say: Callable[[str], None] = print) -> Path:
    """The bundle of what lies in `out`: backbone, adapter, the demo's files and the card, and of a recipe that can remember also what its
    healthy memories look like, if the runtime is there to play conversations."""
    from deltamem_export.bundle import export_bundle
    from deltamem_export.training.healthy import healthy_stream

    extra = [p for p in (out / "extra" / "demo.json", out / "extra" / "stream.txt", out / "card.json") if p.is_file()]

    def copy(target: Path) -> list[str]:
        for path in extra:
            shutil.copyfile(path, target / path.name)
        return [path.name for path in extra]

    remembers = name != "smoke"
    if remembers and find_spec("deltamem_rt") is None:
        say("deltamem_rt is not installed, so the bundle is not calibrated; `deltamem-export calibrate` does it later")
        remembers = False
    return export_bundle(
        out / "backbone",
        out / "adapter",
        out / "bundle",
        "fp32",
        name=name,
        force=True,
        extra_files=copy,
        calibration=healthy_stream() if remembers else None,
        say=say,
    )


class _Metrics:
    """A CSV line per step, and a line for a person now and then."""

    def __init__(self, path: Path, say: Callable[[str], None], every: int = 20):
        self.path, self.say, self.every, self.lap, self.count = path, say, every, timer(), 0

    def __enter__(self) -> _Metrics:
        self.file = self.path.open("a", newline="", encoding="utf-8")
        self.writer: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def line(self, progress: Any) -> None:
        values = {k: round(v, 5) for k, v in asdict(progress).items()}
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, ["seconds", *values])
            if self.file.tell() == 0:
                self.writer.writeheader()
        self.writer.writerow({"seconds": round(self.lap(), 1), **values})
        if self.count % self.every == 0:
            self.file.flush()
            self.say(f"{self.lap():6.0f} s  " + "  ".join(f"{k} {v:.3g}" for k, v in values.items()))
        self.count += 1


def _keep_heap() -> None:
    """glibc gives large blocks back to the kernel after each use; a training step then spends most of its time in page faults.

    Seen: 5.7 s a step on two busy cores against 0.85 s with the blocks kept.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):
            return
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 << 20)  # M_TOP_PAD


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name())
    for entry in _cpuinfo():
        if entry.startswith("model name"):
            return entry.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> Sequence[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    loaded: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
