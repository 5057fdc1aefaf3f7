"""One evaluation from its arguments to its report: loads the bundle, chooses language and talk, refuses leaks, runs the tasks, and writes
the report after each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import deltamem_rt as dm
from deltamem_export.errors import ExportError
from deltamem_export.evaluation import dialogue, drift, report, tasks
from deltamem_export.evaluation.cli import TASKS, WITH_CONTROLS
from deltamem_export.evaluation.contest import Contest
from deltamem_export.evaluation.conversations import Dialogue, read_dialogues, read_talk
from deltamem_export.evaluation.languages import Language, PlainEnglish, TinyEnglish
from deltamem_export.evaluation.leaks import refuse_leaks, refuse_recorded
from deltamem_export.evaluation.sheet import Sheet
from deltamem_export.evaluation.work import Size, Work
from deltamem_export.training.cli import RECIPE_NAMES

CONTROL_FAILED = 1
INTERRUPTED = 130


def evaluate(args: argparse.Namespace) -> int:
    """Runs what the arguments ask for. Returns 0, 1 when a control failed, 130 when interrupted.

    Raises ExportError for a bundle that cannot be evaluated, files that cannot be read, and a leak.
    """
    try:
        return _evaluate(args)
    except dm.DeltaMemError as error:
        raise ExportError(str(error)) from error


def _evaluate(args: argparse.Namespace) -> int:
    dialogues = [d for path in args.data for d in read_dialogues(path)]
    chosen = args.tasks or tuple(name for name in TASKS if name != "conversation" or dialogues)
    if set(chosen) & set(WITH_CONTROLS):
        chosen = tuple(dict.fromkeys(("controls", *chosen)))
    if "conversation" in chosen and not dialogues:
        raise ExportError("the task conversation needs recorded conversations: give --data FILE")
    model = dm.Model.load(args.bundle or dm.default_bundle(), threads=args.threads)
    card = _card(model.path)
    language = choose_language(args.language, card, args.seed, model.path)
    refuse_recorded(card, args.data)
    read = refuse_leaks(language, dialogues, args.training)
    contest = Contest(model, args.against, args.budget, args.turns_retrieved, args.max_new_tokens)
    talk, source = _talk(args, model.path)
    work = Work(contest, language, _size(args), args.seed, talk, source)
    done = _begun(model, contest, language, card, args, read)
    settings = {**asdict(work.size), "seed": args.seed, "against": list(args.against), "talk": source}
    settings |= {
        "budget": contest.budget,
        "turns_retrieved": contest.retrieved,
        "max_new_tokens": contest.max_new_tokens,
    }
    if dialogues:
        settings["data"] = [path.name for path in args.data]
    settings = json.loads(json.dumps(settings))  # as it comes back from a file
    try:
        for name in chosen:
            if args.resume and done["tasks"].get(name, {}).get("settings") == settings:
                print(f"{name}: taken from {args.report}", file=sys.stderr)
                continue
            done["tasks"][name] = _run(name, work, dialogues) | {"settings": settings}
            done["tasks"] = {task: done["tasks"][task] for task in TASKS if task in done["tasks"]}
            report.write(done, args.report)
    except KeyboardInterrupt:
        print(f"deltamem-export: interrupted; finished tasks stand in {args.report}, --resume goes on", file=sys.stderr)
        return INTERRUPTED
    report.write(done, args.report)
    failures = [line for task in done["tasks"].values() for line in task["failures"]]
    for line in failures:
        print(f"deltamem-export: {line}", file=sys.stderr)
    print(f"wrote {args.report / report.JSON_FILE} and {args.report / report.PAGE}")
    return CONTROL_FAILED if failures else 0


def _run(name: str, work: Work, dialogues: list[Dialogue]) -> dict[str, Any]:
    work.say = lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)
    run: dict[str, Callable[[], Sheet]] = {
        "controls": lambda: tasks.controls(work),
        "recall": lambda: tasks.recall(work),
        "distance": lambda: tasks.distance(work),
        "overwrite": lambda: tasks.overwrite(work),
        "relations": lambda: tasks.relations(work),
        "merge": lambda: tasks.merge(work),
        "drift": lambda: drift.drift(work),
        "harm": lambda: dialogue.harm(work),
        "conversation": lambda: dialogue.conversation(work, dialogues),
    }
    began = time.perf_counter()
    sheet = run[name]()
    return {
        "rows": sheet.rows(),
        "notes": sheet.notes,
        "failures": sheet.failures,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _begun(
    model: dm.Model, contest: Contest, language: Language, card: dict[str, Any], args: argparse.Namespace, read: int
) -> dict[str, Any]:
    """The report without tasks, or with those that `--resume` keeps."""
    kept: dict[str, Any] = {}
    if args.resume and (found := report.read(args.report)) is not None:
        if found["bundle"]["fingerprint"] != model.fingerprint:
            raise ExportError(
                f"{args.report}: holds a report of the bundle {found['bundle']['name']} ({found['bundle']['fingerprint'][:12]}), not of "
                f"this one ({model.fingerprint[:12]}); give another --report"
            )
        kept = found["tasks"]
    if args.training:
        training = f"{read:,} texts of {', '.join(path.name for path in args.training)} hold nothing that is called unseen here"
    elif card.get("recipe") in RECIPE_NAMES:
        training = (
            f"not shown; by the card: recipe {card['recipe']}, which never draws the held-out pairs and phrasings"
        )
    else:
        training = "not shown (--training): nothing is known of what the bundle has seen"
    return {
        "format": report.FORMAT,
        "bundle": {
            "name": str(model.manifest.get("name") or model.path.name),
            "fingerprint": model.fingerprint,
            "digest": model.manifest["digest"],
            "memory_bytes": model.geometry.bytes,
            "context_length": model.context_length,
        },
        "language": language.name,
        "training": training,
        "limits": {
            "budget": contest.budget,
            "max_new_tokens": contest.max_new_tokens,
            "turns_retrieved": contest.retrieved,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads or 'default'} threads",
        "versions": {name: version(name) for name in ("deltamem-export", "deltamem-rt", "onnxruntime", "bm25s")}
        | {"numpy": np.__version__, "python": platform.python_version()},
        "made": date.today().isoformat(),
        "tasks": kept,
    }


def _card(bundle: Path) -> dict[str, Any]:
    path = bundle / "card.json"
    if not path.is_file():
        return {}
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path}: is not JSON ({error})") from error
    return card


def choose_language(name: str, card: dict[str, Any], seed: int, bundle: Path) -> Language:
    """The language of `--language`, "auto" by the bundle's card. Raises ExportError for tiny where the card names none of its recipes."""
    ours = card.get("recipe") in RECIPE_NAMES
    if name == "tiny" and not ours:
        raise ExportError(
            f"{bundle}: its card names no recipe of the tiny language ({', '.join(RECIPE_NAMES)}), so it was not trained on it and its "
            "held-out parts mean nothing here; leave out --language tiny"
        )
    return TinyEnglish() if name == "tiny" or (name == "auto" and ours) else PlainEnglish(seed)


def _talk(args: argparse.Namespace, bundle: Path) -> tuple[list[str], str]:
    for path in (args.talk, *args.data, bundle / "stream.txt"):
        if path is not None and (path == args.talk or path.is_file()):
            return read_talk(path), path.name
    return [], "generated"


def _size(args: argparse.Namespace) -> Size:
    size = Size.quick() if args.quick else Size()
    given = {
        "cases": args.cases,
        "reader_cases": args.reader_cases,
        "drift_tokens": args.drift_tokens,
        "drift_streams": args.drift_streams,
    }
    return replace(size, **{name: value for name, value in given.items() if value is not None})
