"""`deltamem-export train`: arguments and nothing else; the work is in `recipe.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

RECIPE_NAMES = ("tiny-assistant", "smoke")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltamem-export train`."""
    parser.add_argument(
        "--recipe", choices=RECIPE_NAMES, default="tiny-assistant", help="what to make (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for backbone, adapter, metrics and card; an interrupted run goes on there",
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


def run(args: argparse.Namespace) -> int:
    """Runs the recipe; the last line says where the result lies."""
    import torch

    from deltamem_export.training.recipe import RECIPES, run_recipe

    if args.threads:
        torch.set_num_threads(args.threads)
    run_recipe(RECIPES[args.recipe], args.out, args.seed, args.device, args.stream)
    print(f"done: {args.out} (try it: deltamem chat {args.out / 'bundle'})")
    return 0
