"""Runs every bench and writes docs/benchmarks.md: the machine, the versions, the date, then what each bench says.

A bench is a file benches/bench_*.py that prints Markdown: a heading, what it measures and against whom, a table with medians, spread and
the ratio to its opponent, measured in the same run. Rust's own benches (rust/*/benches/*.rs) run through `cargo bench`. A bench that
fails is named in the page and makes this command fail, after the others have run.

    python benches/run.py [NAME...] [--dry-run]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
VERSIONS = ("deltamem-rt", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "numpy", "torch", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="benches to run, such as memory_cost (default: all of them)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be written; leave docs/benchmarks.md alone"
    )
    options = parser.parse_args()
    benches = {path.stem.removeprefix("bench_"): path for path in sorted(Path(__file__).parent.glob("bench_*.py"))}
    unknown = set(options.names) - benches.keys()
    if unknown:
        parser.error(f"there is no bench {', '.join(sorted(unknown))}; there are: {', '.join(benches) or 'none'}")

    sections, failed = [machine()], []
    for name in options.names or benches:
        section, code = run(name, [sys.executable, str(benches[name])])
        sections.append(section)
        failed += [name] * (code != 0)
    if not options.names and any(ROOT.glob("rust/*/benches/*.rs")):
        section, code = run("cargo bench", ["cargo", "bench", "--workspace", "--quiet"], verbatim=True)
        sections.append(section)
        failed += ["cargo bench"] * (code != 0)

    page = "\n\n".join(section.strip() for section in sections) + "\n"
    if options.dry_run:
        print(page)
    elif options.names:
        print(page)
        print("only some benches ran, so docs/benchmarks.md was left as it is", file=sys.stderr)
    else:
        PAGE.write_text(page, encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, command: list[str], verbatim: bool = False) -> tuple[str, int]:
    """What a bench printed, as a section, and its exit code. Its own words on stderr are shown as they come."""
    print(f"bench {name} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    text = done.stdout.strip()
    if verbatim:
        text = f"## {name}\n\n```text\n{text}\n```"
    if done.returncode != 0:
        text = f"{text or f'## {name}'}\n\n**This bench failed with exit code {done.returncode}; what stands here is incomplete.**"
    return f"{text}\n\n*{name}: ran {time.monotonic() - began:.0f} s.*", done.returncode


def machine() -> str:
    """The page's head: where and with what the figures were made."""
    rows = [
        ("date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("processor", processor()),
        (
            "cores",
            f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} for this process",
        ),
        ("memory", memory()),
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("commit", commit()),
        ("load before", load()),
    ]
    rows += [(name, installed) for name in VERSIONS if (installed := version_of(name))]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "# Benchmarks\n\nWritten by `make bench`. Every ratio is against an opponent measured in the same run.\n\n"
        f"| | |\n|---|---|\n{table}"
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
    return f"{os.getloadavg()[0]:.2f} (1 minute)" if hasattr(os, "getloadavg") else "unknown"


if __name__ == "__main__":
    sys.exit(main())
