"""The command line `deltamem-export`. It parses, calls, and turns what a person did wrong into one line and exit code 2; everything it
does is a function elsewhere. Heavy modules are imported by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from deltamem_export.errors import ExportError

USER_ERROR = 2
INTERRUPTED = 130
CHECKS: dict[str, bool | str] = {"auto": True, "whole": "whole", "layers": "layers", "none": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for an error that the person can mend, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(training="train" in given[:1])
    args = parser.parse_args(given)
    # A terminated export cleans up behind itself, as an interrupted one does.
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("deltamem-export: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    except (ExportError, OSError) as error:
        print(f"deltamem-export: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser(training: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deltamem-export",
        description="Turns a frozen model and a trained δ-mem adapter into a bundle for deltamem_rt.",
    )
    parser.add_argument("--version", action="version", version=version("deltamem-export"))
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    bundle = commands.add_parser(
        "bundle",
        help="export a bundle",
        description="Builds the backbone as ONNX, compares it with transformers, grafts the memory on, and writes a bundle.",
        epilog="example: deltamem-export bundle --backbone Qwen3-4B-Instruct-2507 --adapter delta-mem --precision int4 --out my-bundle",
    )
    bundle.add_argument("--backbone", required=True, metavar="DIR", help="a Hugging Face model folder")
    bundle.add_argument(
        "--adapter", required=True, metavar="DIR", help="a folder with delta_mem_config.json and its tensors"
    )
    bundle.add_argument("--out", required=True, metavar="DIR", help="the bundle's directory, made whole or not at all")
    bundle.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int4"),
        default="fp32",
        help="of the backbone; the memory is float32 (default fp32)",
    )
    bundle.add_argument("--name", help="the bundle's name (default: the directory's)")
    bundle.add_argument("--force", action="store_true", help="replace the bundle that is at --out")
    _add_check(bundle)
    bundle.add_argument(
        "--int4-block-size",
        type=int,
        default=32,
        metavar="N",
        help="weights that share a scale: 16 to 256 (default 32)",
    )
    bundle.add_argument(
        "--int4-accuracy-level",
        type=int,
        default=4,
        metavar="N",
        help="4 rounds activations to int8 and is fastest on CPUs; 1 keeps them in float32, and splits of a stream agree (default 4)",
    )
    bundle.add_argument("--threads", type=int, metavar="N", help="threads for the comparison (default: all cores)")
    bundle.set_defaults(run=_bundle)

    graft = commands.add_parser(
        "graft",
        help="export a bundle from a decoder ONNX of your own",
        description="Grafts the memory onto a decoder ONNX that you bring, for a backbone that `bundle` does not build. Projections are "
        "found by the backbone's weights; what is not found is named in a mapping. The same checks as in `bundle`.",
        epilog="example: deltamem-export graft --onnx olmo2/model.onnx --backbone OLMo-2 --adapter delta-mem --out my-bundle",
    )
    graft.add_argument(
        "--onnx",
        required=True,
        metavar="FILE",
        help="the decoder, with a KV cache, in float32 or float16, opset 18 or later",
    )
    graft.add_argument(
        "--backbone", required=True, metavar="DIR", help="the Hugging Face folder that it was exported from"
    )
    graft.add_argument(
        "--adapter", required=True, metavar="DIR", help="a folder with delta_mem_config.json and its tensors"
    )
    graft.add_argument("--out", required=True, metavar="DIR", help="the bundle's directory, made whole or not at all")
    graft.add_argument(
        "--mapping", metavar="FILE", help="JSON that names layers' values, inputs and outputs (docs/export.md)"
    )
    graft.add_argument(
        "--precision", choices=("fp32", "fp16"), default="fp32", help="what the ONNX is in (default fp32)"
    )
    graft.add_argument("--name", help="the bundle's name (default: the directory's)")
    graft.add_argument("--force", action="store_true", help="replace the bundle that is at --out")
    _add_check(graft)
    graft.set_defaults(run=_graft)

    inspect = commands.add_parser("inspect", help="show what a bundle or an adapter is")
    inspect.add_argument("path", metavar="PATH", help="a bundle's or an adapter's directory")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="rewrite an official adapter as safetensors")
    convert.add_argument(
        "adapter", metavar="ADAPTER", help="a folder with delta_mem_config.json and delta_mem_adapter.pt"
    )
    convert.add_argument(
        "out", metavar="OUT", help="the folder to write delta_mem_config.json and adapter.safetensors to"
    )
    convert.set_defaults(run=_convert)

    train = commands.add_parser("train", help="train a small memory by a recipe")
    if training:
        from deltamem_export.training import cli as training_cli

        training_cli.add_arguments(train)
        train.set_defaults(run=training_cli.run)
    return parser


def _add_check(command: argparse.ArgumentParser) -> None:
    chosen = command.add_mutually_exclusive_group()
    chosen.add_argument(
        "--check",
        choices=tuple(CHECKS),
        default="auto",
        help="how the graph is compared with transformers: whole models, or one layer at a time for models too large to be run "
        "twice here (default: whole if both fit into memory)",
    )
    chosen.add_argument(
        "--no-check",
        dest="check",
        action="store_const",
        const="none",
        help="the same as --check none; the bundle says so",
    )


def _bundle(args: argparse.Namespace) -> None:
    from deltamem_export.bundle import export_bundle, set_threads
    from deltamem_export.precision import Precision

    if args.threads is not None:
        set_threads(args.threads)
    export_bundle(
        args.backbone,
        args.adapter,
        args.out,
        Precision(args.precision, args.int4_block_size, args.int4_accuracy_level),
        name=args.name,
        force=args.force,
        check=CHECKS[args.check],
    )


def _graft(args: argparse.Namespace) -> None:
    from deltamem_export.bundle import export_bundle
    from deltamem_export.mapping import GraphMapping

    export_bundle(
        args.backbone,
        args.adapter,
        args.out,
        args.precision,
        name=args.name,
        force=args.force,
        check=CHECKS[args.check],
        onnx=args.onnx,
        mapping=GraphMapping.load(args.mapping) if args.mapping else None,
    )


def _inspect(args: argparse.Namespace) -> None:
    from deltamem_export.inspect import describe

    print(describe(args.path))


def _convert(args: argparse.Namespace) -> None:
    from deltamem_export.adapter import Adapter

    adapter = Adapter.load(args.adapter)
    adapter.save(args.out)
    print(f"wrote {len(list(adapter.tensors()))} tensors to {args.out}")


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
