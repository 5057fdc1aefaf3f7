"""The options of `deltamem-export train --backbone`: one for each setting of a recipe, and nothing else; the work is in `run.py`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from deltamem_export.errors import ExportError
from deltamem_export.finetuning.conversations import describe, nearest, read_data
from deltamem_export.finetuning.recipe import RECIPES, FinetuningRecipe, changed, read_recipe

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that need a backbone or data."""
    files = parser.add_argument_group("a memory on a decoder of your own (docs/training.md)")
    files.add_argument("--backbone", type=Path, metavar="DIR", help="a Hugging Face model folder; it stays as it is")
    files.add_argument("--data", type=Path, metavar="FILE", help="conversations, a JSON object a line")
    files.add_argument("--check-data", action="store_true", help="check the data, say what there is, and train nothing")
    settings = parser.add_argument_group(
        "settings of that memory, over those of the recipe", "The defaults are those of --recipe default."
    )
    for f in fields(FinetuningRecipe):
        about = f.metadata["help"] + f" (default: {shown(f.default)})".replace("%", "%%")
        given: dict[str, Any] = {"help": about, "default": None, "dest": f"setting_{f.name}"}
        name = f"--{f.name.replace('_', '-')}"
        if isinstance(f.default, bool):
            settings.add_argument(name, action=argparse.BooleanOptionalAction, **given)
        elif isinstance(f.default, tuple):
            each = str if f.name == "delta_heads" else int
            settings.add_argument(name, type=_several(each), metavar="A,B", **given)
        elif f.metadata["choices"]:
            settings.add_argument(name, choices=f.metadata["choices"], **given)
        else:
            settings.add_argument(name, type=type(f.default), metavar="N", **given)


def run(args: argparse.Namespace) -> int:
    """Checks the data, or trains; the last line says what to do with the result."""
    if args.data is None:
        raise ExportError("--data is missing; give conversations in JSON Lines (docs/training.md)")
    if args.check_data:
        return _check_data(args)
    for option in ("backbone", "out"):
        if getattr(args, option) is None:
            raise ExportError(
                f"--{option} is missing; with --data, give --backbone DIR and --out DIR, or --check-data alone"
            )
    if args.stream is not None:
        raise ExportError("--stream is of --recipe tiny-assistant; it has no meaning with --backbone")
    name, recipe = chosen(args)

    import torch

    from deltamem_export.finetuning.run import finetune

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        finetune(args.backbone, args.data, args.out, recipe, args.seed, args.device, name)
    except KeyboardInterrupt:
        print(
            "deltamem-export: interrupted; the same command goes on from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        return INTERRUPTED
    if os.environ.get("RANK", "0") == "0":
        print(
            f"done: {args.out} (next: deltamem-export bundle --backbone {args.backbone} --adapter {args.out} --out BUNDLE)"
        )
    return 0


def chosen(args: argparse.Namespace) -> tuple[str, FinetuningRecipe]:
    """The recipe's name and its settings with those that were given."""
    name = args.recipe or "default"
    if name in RECIPES:
        recipe = RECIPES[name]
    elif name.endswith((".yaml", ".yml")):
        recipe, name = read_recipe(Path(name)), Path(name).name
    else:
        raise ExportError(f"--recipe {name} is not known with --backbone{nearest(name, RECIPES)}, or FILE.yaml")
    given = {f.name: getattr(args, f"setting_{f.name}") for f in fields(FinetuningRecipe)}
    return name, changed(recipe, {k: v for k, v in given.items() if v is not None})


def _check_data(args: argparse.Namespace) -> int:
    data = read_data(args.data)
    for line in describe(data):
        print(line)
    if args.backbone is not None:
        from deltamem_export.backbone import Backbone
        from deltamem_export.finetuning.rendering import Renderer

        renderer = Renderer(Backbone.load(args.backbone, any_family=True), chosen(args)[1])
        lengths = sorted(
            sum(encoded.tokens(i) for i in range(len(encoded.turns)))
            for encoded in map(renderer.conversation, data.conversations)
        )
        middle = lengths[len(lengths) // 2]
        print(f"{'tokens':18} {sum(lengths)}, of a conversation {lengths[0]} to {lengths[-1]}, median {middle}")
    print(f"{args.data}: good")
    return 0


def _several(each: type) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(each(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {each.__name__}; expected e.g. 2,3") from None

    return parse


def shown(value: Any) -> str:
    """A setting's value for people."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "all"
    return f"{value:g}" if isinstance(value, float) else str(value)
