"""The arguments that several commands share: which bundle, on what device, with how many threads."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from deltamem_rt._default import default_bundle
from deltamem_rt._native import Model

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class UsageError(Exception):
    """What the user asked for cannot be done as it was asked; the message says what to change."""


class Parser(argparse.ArgumentParser):
    """A command's parser: words and options may stand in any order, `deltamem log ada --graph what-if`."""

    _intermixed = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parses, whoever asks: argparse takes words behind options only where it is asked to."""
        if self._intermixed or "--" in (
            args or ()
        ):  # argparse calls back; behind -- there are words only, which it loses track of
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds BUNDLE, --device and --threads; `load_model` reads them."""
    parser.add_argument(
        "bundle",
        nargs="?",
        type=Path,
        metavar="BUNDLE",
        help="a bundle's directory (default: the embedded tiny-assistant)",
    )
    parser.add_argument(
        "--device",
        type=device,
        metavar="DEVICE",
        default="auto",
        help="where to run: auto, cpu, cuda, or cuda:1 for the second card (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="threads for the model (default: the machine's)")


def device(text: str) -> str:
    """The type of --device."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected auto, cpu, cuda or cuda:N")
    return text


def load_model(options: argparse.Namespace) -> Model:
    """Loads the bundle that the arguments name."""
    return Model.load(options.bundle or default_bundle(), device=options.device, threads=options.threads)


def needs_text(model: Model) -> None:
    """Refuses a bundle of token ids only: the command is about words."""
    if model.manifest.get("text") is None:
        raise UsageError(
            f"{model.path} takes token ids only: its backbone had no tokenizer files; export it again with them beside the weights"
        )


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a whole number of at least 1")
    return number


def not_negative(text: str) -> int:
    """An argument's type: a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number
