"""Runs benches and writes their sections into docs/benchmarks.md: the machine and the versions at its head, then what each bench says with
when it ran, on which commit and under which load. Sections of benches that did not run stay as they are.

A bench is a file benches/bench_*.py that prints Markdown: a heading, what it measures and against whom, a table with medians, spread and
the ratio to its opponent, measured in the same run. Plots go where BENCH_PLOTS says (measuring.save_plot). Rust's own benches
(rust/*/benches/*.rs) run through `cargo bench`. A bench that fails is named in the page and makes this command fail, after the others have
run. What people have to say of a bench's figures, why a goal is missed for one, stands in docs/benchmarks/NAME.md and is put behind them.

The bench `cuda` needs a card, runs only where it is named, and has a page of its own, docs/benchmarks-cuda.md.

    python benches/run.py [NAME...] [--dry-run]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
CUDA_PAGE = ROOT / "docs" / "benchmarks-cuda.md"
PLOTS = ROOT / "docs" / "benchmarks"
VERSIONS = ("deltamem-rt", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "numpy", "torch", "transformers")
ORDER = ("cost", "history", "sessions", "scan", "footprint", "engine", "store", "precision")
"""Of the sections in the page; a bench that is not named comes behind them."""

CARGO = "cargo bench"
CUDA = "cuda"
NO_CARD = 77
"""The exit code of a bench that has nothing to measure here and has said why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="benches to run, such as cost (default: all of them)")
    parser.add_argument("--dry-run", action="store_true", help="print the sections; leave docs/benchmarks.md alone")
    options = parser.parse_args()
    benches = {path.stem.removeprefix("bench_"): path for path in sorted(Path(__file__).parent.glob("bench_*.py"))}
    commands = {name: [sys.executable, str(benches[name])] for name in ordered(benches)}
    if any(ROOT.glob("rust/*/benches/*.rs")):
        commands[CARGO] = ["cargo", "bench", "--workspace", "--quiet"]
    unknown = set(options.names) - commands.keys()
    if unknown:
        parser.error(f"there is no bench {', '.join(sorted(unknown))}; there are: {', '.join(commands)}")

    failed = []
    for name in options.names or [name for name in commands if name != CUDA]:
        with tempfile.TemporaryDirectory() as scratch:
            section, code = run(name, commands[name], Path(scratch) if options.dry_run else PLOTS)
        failed += [name] * (code != 0)
        if code == NO_CARD:
            continue  # nothing was measured, and what stands in the page stays
        if options.dry_run:
            print(section, flush=True)
            continue
        # After each one: what was measured is not lost when a later bench is stopped.
        place = CUDA_PAGE if name == CUDA else PAGE
        old = place.read_text(encoding="utf-8") if place.exists() else ""
        place.write_text(
            page(head(cards() if name == CUDA else []), {**sections(old), name: section}), encoding="utf-8"
        )
        print(f"written: {place.relative_to(ROOT)}, {name}", flush=True)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


# ---------------------------------------------------------------------- the page


def sections(page: str) -> dict[str, str]:
    """What stands between a bench's marks, by its name."""
    found = re.findall(r"<!-- bench: (.+?) -->\n(.*?)\n<!-- end of \1 -->", page, re.DOTALL)
    return {name: text.strip() for name, text in found}


def page(head: str, sections: dict[str, str]) -> str:
    """The whole page."""
    marked = [f"<!-- bench: {name} -->\n{sections[name].strip()}\n<!-- end of {name} -->" for name in ordered(sections)]
    return "\n\n".join([head.strip(), *marked]) + "\n"


def ordered(names: Sequence[str] | dict[str, object]) -> list[str]:
    """The benches in the order of the page."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def run(name: str, command: list[str], plots: Path) -> tuple[str, int]:
    """What a bench printed, as a section, and its exit code. Its own words on stderr are shown as they come."""
    print(f"bench {name} ...", file=sys.stderr, flush=True)
    began, before, day = time.monotonic(), load(), datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    environment = {**os.environ, "BENCH_PLOTS": str(plots)}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    text = done.stdout.strip()
    if name == CARGO:
        text = f"## {name}\n\n```text\n{text}\n```"
    if done.returncode != 0:
        text = f"{text or f'## {name}'}\n\n**This bench failed with exit code {done.returncode}; what stands here is incomplete.**"
    notes = PLOTS / f"{name}.md"
    if notes.exists():
        text = f"{text}\n\n{notes.read_text(encoding='utf-8').strip()}"
    took = time.monotonic() - began
    line = f"*{name}: {day}, commit {commit()}, load {before} before and {load()} after, ran {took:.0f} s.*"
    return f"{text}\n\n{line}", done.returncode


def cards() -> list[tuple[str, str]]:
    """The cards and their driver, as nvidia-smi names them."""
    wanted = "name,driver_version,memory.total,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return [("card", f"nvidia-smi does not say: {error}")]
    return [
        (f"card {n} (name, driver, memory, power)", line.strip()) for n, line in enumerate(done.stdout.splitlines())
    ]


def head(more: Sequence[tuple[str, str]] = ()) -> str:
    """The page's head: with what the figures were made; `more` rows come first."""
    rows = [
        *more,
        ("processor", processor()),
        (
            "cores",
            f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} for this process",
        ),
        ("memory", memory()),
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
    ]
    rows += [(name, installed) for name in VERSIONS if (installed := version_of(name))]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "# Benchmarks\n\nWritten by `make bench`; `python benches/run.py NAME` writes one section again. Every ratio is against an "
        "opponent measured in the same run. The machine is shared: under each section stand its time and the load (of one minute) before "
        f"and after it, its own included.\n\n| | |\n|---|---|\n{table}"
    )


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def load() -> str:
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


if __name__ == "__main__":
    sys.exit(main())
