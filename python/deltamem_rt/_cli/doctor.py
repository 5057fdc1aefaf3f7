"""`deltamem doctor`: what this machine and this installation have, and whether a model can run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

from deltamem_rt import _native
from deltamem_rt._default import default_bundle
from deltamem_rt._onnxruntime import ENVIRONMENT_VARIABLE, find_library, open_cuda_libraries
from deltamem_rt.errors import DeltaMemError

from .arguments import Commands
from .terminal import Terminal, pairs


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, and whether a model can run",
        description="Prints versions, the ONNX Runtime library and its providers, whether a card answers and what device='auto' takes, the "
        "processor's vector extensions and threads. "
        "Exit code 1: no model can run here, and the last line says why.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    report = examine()
    if options.json:
        print(json.dumps(report, indent=2, default=str))
    else:
        _show(report, Terminal())
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything that the command prints, by name; `problem` is None where a model can run."""
    report: dict[str, Any] = {
        "ok": False,
        "problem": None,
        "version": _native.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": _version_of("numpy"),
        "default_bundle": None,
    }
    try:
        library = find_library()
        report |= {
            "ort_distribution": library.distribution,
            "ort_version": library.version,
            "ort_library": str(library.path),
        }
        report["cuda_libraries"] = [str(path) for path in open_cuda_libraries(library.path)]
        report |= _native.doctor(library.path)
        report["auto"] = (
            "cuda:0 for a bundle with a graph for CUDA, else cpu"
            if report["cuda"]
            else "cpu: no card answers, see CUDA above"
        )
        report["ok"] = True
    except DeltaMemError as error:
        report["problem"] = str(error)
        report = _native.doctor() | report
    try:
        bundle = default_bundle()
        report["default_bundle"] = str(bundle)
        graph = json.loads((bundle / "deltamem.json").read_text(encoding="utf-8"))["graph"]
        report["default_graph"] = "portable" if graph.get("fused_file") is None else "fused"
    except FileNotFoundError as error:
        report["default_bundle_problem"] = str(error)
    return report


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(report: dict[str, Any], terminal: Terminal) -> None:
    def known(key: str) -> str:
        value = report.get(key)
        if isinstance(value, list):
            return ", ".join(str(item) for item in value) or "none"
        return "-" if value is None else str(value)

    distribution = report.get("ort_distribution")
    origin = (
        f"from {distribution}"
        if distribution
        else f"named by {ENVIRONMENT_VARIABLE}"
        if os.environ.get(ENVIRONMENT_VARIABLE)
        else ""
    )
    terminal.line(terminal.bold(f"deltamem-rt {known('version')}"))
    rows = [
        ("Python", f"{known('python')}  {sys.executable}"),
        ("platform", known("platform")),
        ("NumPy", known("numpy")),
        ("ONNX Runtime", f"{known('ort_version')} {origin}".rstrip()),
        ("library", known("ort_library")),
        ("build", known("ort_build")),
        ("providers", known("providers")),
        ("CUDA", known("cuda_says")),
        ("memory on a card", known("card_kernels_say")),
        ("device='auto'", known("auto")),
        ("CPU features", known("cpu_features")),
        ("memory kernel", known("kernel")),
        ("4/8-bit products", known("products")),
        ("threads", known("threads")),
        ("default bundle", report.get("default_bundle") or known("default_bundle_problem")),
        ("its graph", known("default_graph")),
    ]
    for line in pairs(rows):
        terminal.line(line)
    if report["ok"]:
        terminal.line(terminal.good("models can run here"))
    else:
        terminal.line(terminal.bad(f"no model can run here: {report['problem']}"))
