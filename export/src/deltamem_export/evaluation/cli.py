"""`deltamem-export eval`: arguments and nothing else; the work is in `run.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

WITH_CONTROLS = ("recall", "distance", "overwrite", "relations", "merge", "drift")
TASKS = ("controls", *WITH_CONTROLS, "harm", "conversation")
AGAINST = ("none", "context", "bm25")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltamem-export eval`."""
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the bundle (default: the embedded one)")
    parser.add_argument(
        "--report", type=Path, required=True, metavar="DIR", help="where report.json and index.html are written"
    )
    parser.add_argument(
        "--tasks",
        type=_names(TASKS),
        default=None,
        metavar="A,B",
        help=f"of {', '.join(TASKS)} (default: all, conversation only with --data); the controls "
        "always come with tasks over facts",
    )
    parser.add_argument(
        "--against",
        type=_names(AGAINST),
        default=AGAINST,
        metavar="A,B",
        help="opponents: none, context, bm25 (default: all); with context, memory and context together are asked too",
    )
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="recorded conversations with questions: LoCoMo's JSON, or JSON Lines (docs/evaluation.md); may be given again",
    )
    parser.add_argument(
        "--talk",
        type=Path,
        metavar="FILE",
        help="what goes by between telling and asking: text, or a conversation (default: --data, or the bundle's stream.txt)",
    )
    parser.add_argument(
        "--training",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="data that the bundle was trained on; what the evaluation calls unseen must not stand there; may be given again",
    )
    parser.add_argument(
        "--language",
        choices=("auto", "tiny", "plain"),
        default="auto",
        help="what is told: the tiny recipes' own English, or plain English with made-up names (default: by the bundle's card)",
    )
    parser.add_argument("--cases", type=_positive, metavar="N", help="questions a row (default 1000)")
    parser.add_argument(
        "--reader-cases",
        type=_positive,
        metavar="N",
        help="of opponents that read the whole history at every question (default 200)",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of everything, to see that it runs")
    parser.add_argument("--drift-tokens", type=_positive, metavar="N", help="how long drift streams (default 1000000)")
    parser.add_argument("--drift-streams", type=_positive, metavar="N", help="how many people drift (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="draws people, facts, talk and questions (default 0)")
    parser.add_argument(
        "--budget", type=int, metavar="N", help="tokens of a prompt (default: the model's context less the reply)"
    )
    parser.add_argument(
        "--turns-retrieved",
        type=_positive,
        default=3,
        metavar="N",
        help="turns that BM25 puts into the prompt (default 3)",
    )
    parser.add_argument("--max-new-tokens", type=_positive, default=32, metavar="N", help="of a reply (default 32)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="(default: all cores)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what a report of the same bundle in --report holds; tasks with the same settings are not run again",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluates; 1 when a control failed."""
    try:
        from deltamem_export.evaluation.run import evaluate
    except ModuleNotFoundError as error:
        from deltamem_export.errors import ExportError

        raise ExportError(
            f"eval needs {error.name}, which is not installed: pip install 'deltamem-export[eval]'"
        ) from error
    return evaluate(args)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _names(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        for name in given:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return given

    return names
