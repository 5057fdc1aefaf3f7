"""The command line `deltamem-export`. It parses, calls, and turns what a person did wrong into one line and exit code 2; everything it
does is a function elsewhere. Heavy modules are imported by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltamem_export.errors import ExportError

DIFFERS = 1
USER_ERROR = 2
INTERRUPTED = 130
_STREAM = "conversations in UTF-8, a user's message a line, an empty line between two of them (docs/health.md)"
_ADAPTER = "a folder with delta_mem_config.json and its tensors"
_OUT = "the bundle's directory, made whole or not at all"
CHECKS: dict[str, bool | str] = {"auto": True, "whole": "whole", "layers": "layers", "none": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 where `verify` finds a difference, 2 for an error that the person can mend,
    130 when interrupted; of `eval`, 1 where a control fails."""
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
        epilog="examples: deltamem-export bundle --backbone Qwen3-4B-Instruct-2507 --adapter delta-mem --precision int4 --out my-bundle; "
        "a graph for CUDA in the same bundle: ... --device cuda --precision fp16 --into my-bundle",
    )
    bundle.add_argument("--backbone", required=True, metavar="DIR", help="a Hugging Face model folder")
    bundle.add_argument("--adapter", required=True, metavar="DIR", help=_ADAPTER)
    place = bundle.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", metavar="DIR", help=_OUT)
    place.add_argument(
        "--into",
        metavar="BUNDLE",
        help="add the graph to this bundle, made from the same backbone and adapter: one fingerprint, the same memories",
    )
    bundle.add_argument(
        "--device",
        action="append",
        choices=("cpu", "cuda"),
        help="what the graph is for; may be given twice, for a bundle with both (default cpu; bf16: cuda)",
    )
    bundle.add_argument(
        "--precision",
        action="append",
        choices=("fp32", "fp16", "bf16", "int8", "int4"),
        help="of the backbone; the memory is float32; once, or once for each --device in their order. On CUDA fp16, bf16, or int4 and "
        "int8 with fp16 arithmetic; fp32 there is exact and slow; bf16 runs on CUDA only (default: fp32 for the CPU, fp16 for CUDA)",
    )
    _add_sealing(bundle)
    bundle.add_argument(
        "--int4-block-size",
        type=int,
        default=32,
        metavar="N",
        help="int4, int8: weights that share a scale: 16 to 256 (default 32)",
    )
    bundle.add_argument(
        "--int4-accuracy-level",
        type=int,
        default=4,
        metavar="N",
        help="4 rounds activations to int8 and is fastest on CPUs; 1 keeps them in float32, and splits of a stream agree (default 4)",
    )
    bundle.add_argument("--int4-asymmetric", action="store_true", help="store a zero point with each scale")
    bundle.add_argument(
        "--int4-algorithm",
        choices=("default", "rtn", "k_quant"),
        default="default",
        help="how scales are chosen; k_quant searches for the least error and takes much longer (default: default)",
    )
    bundle.add_argument("--int4-embeddings", action="store_true", help="quantise the token embeddings too")
    bundle.add_argument(
        "--kv",
        choices=("float", "int8"),
        default="float",
        help="the KV cache: as the activations are, or in 8 bits with calibrated scales (default float)",
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
    _add_adapter_and_out(graft)
    graft.add_argument(
        "--mapping", metavar="FILE", help="JSON that names layers' values, inputs and outputs (docs/export.md)"
    )
    graft.add_argument(
        "--precision", choices=("fp32", "fp16"), default="fp32", help="what the ONNX is in (default fp32)"
    )
    _add_sealing(graft)
    graft.set_defaults(run=_graft)

    calibrate = commands.add_parser(
        "calibrate",
        help="learn what healthy memories of a bundle look like",
        description="Plays conversations through an exported bundle by the runtime and writes what its memories look like then into the "
        "manifest, for Session.health() and on_drift. The fingerprint and all memories stay valid. An older bundle gets the measured "
        "graph that strength= and the gates' figures need. The bundle is replaced whole or not at all.",
        epilog="example: deltamem-export calibrate my-bundle --stream conversations.txt",
    )
    calibrate.add_argument("bundle", metavar="BUNDLE", help="the bundle's directory")
    calibrate.add_argument("--stream", required=True, metavar="FILE", help=_STREAM)
    calibrate.set_defaults(run=_calibrate)

    fuse = commands.add_parser(
        "fuse",
        help="give a bundle of an older exporter its fused graph",
        description="Adds the fused graph to a bundle, or makes it anew: the same weights and the same memories, one node of the runtime's "
        "own for each memory layer. It needs neither the backbone nor the adapter.",
        epilog="example: deltamem-export fuse my-bundle",
    )
    fuse.add_argument("bundle", metavar="BUNDLE", help="the bundle's directory")
    fuse.set_defaults(run=_fuse)

    inspect = commands.add_parser("inspect", help="show what a bundle or an adapter is")
    inspect.add_argument("path", metavar="PATH", help="a bundle's or an adapter's directory")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify",
        help="compare a bundle with the checkpoint it was made from",
        description="Runs the PyTorch reference on your backbone and adapter, and the bundle, side by side on your text: turns, chunks, "
        "single tokens, reading alone. Prints the differences of every layer, where the two part first, and a verdict. Exit code 0: "
        "good, 1: the bundle differs, 2: it could not be compared.",
        epilog="example: deltamem-export verify my-bundle --backbone Qwen3-4B-Instruct-2507 --adapter delta-mem --text notes.txt",
    )
    verify.add_argument("bundle", metavar="BUNDLE", help="the bundle's directory")
    verify.add_argument(
        "--backbone", required=True, metavar="DIR", help="the Hugging Face folder that it was made from"
    )
    verify.add_argument("--adapter", required=True, metavar="DIR", help="the adapter's folder")
    verify.add_argument(
        "--text", metavar="FILE", help="text to compare on, in UTF-8 (default: pseudo-random token ids)"
    )
    verify.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="compare N tokens (default: all of the text, or 160, or more for a small window)",
    )
    verify.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="whose graph of the bundle; the one for CUDA is run by CUDA where onnxruntime-gpu is installed (default: the bundle's first)",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.add_argument("--threads", type=int, metavar="N", help="threads for both sides (default: all cores)")
    verify.set_defaults(run=_verify)

    convert = commands.add_parser(
        "convert",
        help="rewrite an adapter: official to safetensors, or back",
        description="Writes an adapter in its other form. Tensors keep their bits and dtypes, the settings file its bytes.",
        epilog="example: deltamem-export convert delta-mem delta-mem-safetensors",
    )
    convert.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="a folder with delta_mem_config.json and delta_mem_adapter.pt or adapter.safetensors",
    )
    convert.add_argument("out", metavar="OUT", help="the folder to write to")
    convert.add_argument(
        "--to", choices=("official", "safetensors"), help="the form to write (default: the one that ADAPTER is not in)"
    )
    convert.set_defaults(run=_convert)

    train = commands.add_parser(
        "train",
        help="train a memory on your decoder and data, or a small model by a recipe",
        description="Trains a memory on a Hugging Face decoder, which stays frozen, from your conversations; or makes a small model "
        "with a memory from nothing.",
        epilog="example: deltamem-export train --backbone SmolLM2-360M-Instruct --data conversations.jsonl --out my-adapter",
    )
    if training:
        from deltamem_export.training import cli as training_cli

        training_cli.add_arguments(train)
        train.set_defaults(run=training_cli.run)

    from deltamem_export.evaluation import cli as evaluation_cli

    evaluation = commands.add_parser(
        "eval",
        help="measure whether a bundle's memory helps",
        description="Runs a bundle on facts told, changed, asked for after talk, merged, and on recorded conversations, against no "
        "memory, the history in the prompt and BM25. Writes report.json and a page. Exit code 1: a control failed.",
        epilog="example: deltamem-export eval --bundle my-bundle --tasks recall,overwrite --against none,bm25 --report report",
    )
    evaluation_cli.add_arguments(evaluation)
    evaluation.set_defaults(run=evaluation_cli.run)
    return parser


def _add_adapter_and_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help=_ADAPTER)
    parser.add_argument("--out", required=True, metavar="DIR", help=_OUT)


def _add_sealing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="the bundle's name (default: the directory's)")
    parser.add_argument("--force", action="store_true", help="replace the bundle that is at --out")
    parser.add_argument("--calibrate", metavar="FILE", help=f"learn what healthy memories look like from {_STREAM}")
    _add_check(parser)


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
    from deltamem_export.bundle import add_graph, export_bundle, set_threads

    if args.threads is not None:
        set_threads(args.threads)
    precisions = _precisions(args)
    if args.into is not None:
        for option in ("name", "force", "calibrate"):
            if getattr(args, option):
                raise ExportError(
                    f"--{option} is for a new bundle; --into leaves all of a bundle as it is and adds a graph"
                )
        add_graph(args.into, args.backbone, args.adapter, precisions, check=CHECKS[args.check])
        return
    export_bundle(
        args.backbone,
        args.adapter,
        args.out,
        precisions,
        name=args.name,
        force=args.force,
        check=CHECKS[args.check],
        calibration=_stream(args),
    )


def _precisions(args: argparse.Namespace) -> list[Any]:
    """A precision for each device that was asked for. Options for blocks go to those that have blocks, as long as one has."""
    from deltamem_export.precision import QUANTISED, Precision

    devices = args.device or [""]
    names = args.precision or ["fp16" if device == "cuda" else "fp32" for device in devices]
    if len(names) not in (1, len(devices)):
        raise ExportError(
            f"{len(names)} times --precision for {len(devices)} times --device; give it once, or once for each device in their order"
        )
    names = names * (len(devices) // len(names))
    blocks: dict[str, Any] = {
        "symmetric": not args.int4_asymmetric,
        "algorithm": args.int4_algorithm,
        "embeddings": args.int4_embeddings,
    }
    some = any(name in QUANTISED for name in names)
    return [
        Precision(
            name,
            args.int4_block_size,
            args.int4_accuracy_level,
            **(blocks if name in QUANTISED or not some else {}),
            kv="float" if device == "cuda" and "cpu" in devices else args.kv,
            device=device,
        )
        for name, device in zip(names, devices, strict=True)
    ]


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
        calibration=_stream(args),
    )


def _calibrate(args: argparse.Namespace) -> None:
    from deltamem_export.calibration import Stream, calibrate

    calibrate(args.bundle, Stream.load(args.stream), lambda line: print(line, file=sys.stderr))
    print(f"calibrated {args.bundle}")


def _fuse(args: argparse.Namespace) -> None:
    from deltamem_export.fused import add_fused

    reasons = add_fused(args.bundle)
    missing = [f"for {device}: {reason}" for device, reason in reasons.items() if reason is not None]
    if len(missing) == len(reasons):
        raise ExportError(f"{args.bundle}: has no fused graph {', '.join(missing)}; it runs the portable one")
    for line in missing:
        print(f"no fused graph {line}", file=sys.stderr)
    print(f"fused {args.bundle}")


def _stream(args: argparse.Namespace) -> Any:
    from deltamem_export.calibration import Stream

    return Stream.load(args.calibrate) if args.calibrate else None


def _inspect(args: argparse.Namespace) -> None:
    from deltamem_export.inspect import describe

    print(describe(args.path))


def _verify(args: argparse.Namespace) -> int:
    from deltamem_export.bundle import set_threads
    from deltamem_export.verify import verify

    if args.threads is not None:
        set_threads(args.threads)
    text = None
    if args.text is not None:
        try:
            text = Path(args.text).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ExportError(f"{args.text}: is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    report = verify(
        args.bundle,
        args.backbone,
        args.adapter,
        text=text,
        tokens=args.tokens,
        device=args.device,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(report.to_json() if args.json else report)
    return 0 if report.good else DIFFERS


def _convert(args: argparse.Namespace) -> None:
    from deltamem_export.adapter import convert

    written, count = convert(args.adapter, args.out, args.to)
    print(f"wrote {count} tensors to {written}")


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
