"""`deltamem-export train`: arguments and nothing else; the work is in `recipe.py`, and in `finetuning/` for a backbone of your own."""

from __future__ import annotations

import argparse
from pathlib import Path

from deltamem_export.errors import ExportError

RECIPE_NAMES = ("tiny-assistant", "smoke")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltamem-export train`."""
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"what to make: {' or '.join(RECIPE_NAMES)}, from nothing (default: {RECIPE_NAMES[0]}); with --backbone: default, "
        "paper-tsw, paper-ssw, paper-msw or FILE.yaml",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the adapter, metrics and card (and the backbone that a recipe makes); an interrupted run goes on there",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed repeats a run on the same machine and library versions (default: 0)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as PyTorch sees fit)")
    parser.add_argument(
        "--stream", type=Path, help="a conversation for the evaluation only: LoCoMo JSON or text (default: our own)"
    )
    from deltamem_export.finetuning import cli as finetuning

    finetuning.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the recipe; the last line says where the result lies."""
    if args.backbone is not None or args.data is not None or args.check_data:
        from deltamem_export.finetuning import cli as finetuning

        return finetuning.run(args)
    name = args.recipe or RECIPE_NAMES[0]
    if name not in RECIPE_NAMES:
        raise ExportError(
            f"--recipe {name} needs --backbone DIR and --data FILE; without them there are {' and '.join(RECIPE_NAMES)}"
        )
    if args.out is None:
        raise ExportError("--out is missing; give the folder for backbone, adapter, metrics and card")

    import torch

    from deltamem_export.training.recipe import RECIPES, run_recipe

    if args.threads:
        torch.set_num_threads(args.threads)
    run_recipe(RECIPES[name], args.out, args.seed, args.device, args.stream)
    print(f"done: {args.out} (try it: deltamem chat {args.out / 'bundle'})")
    return 0
