"""Writes the lock files: every distribution that the names of a `.in` file reach in this environment, at its exact version.

Run by `make lock` in the environment that was tested (`.venv`). A distribution that only Linux has (the CUDA libraries of PyTorch's
wheel) gets a marker, so that the same file installs on macOS and Windows.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
LINUX_ONLY = ("nvidia-", "cuda-", "triton")


def closure(names: list[str]) -> dict[str, str]:
    """Canonical name -> version of everything that `names` need, extras included where they were asked for."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(name), "") for name in names]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            found[name] = distribution(name).version
        except PackageNotFoundError:
            sys.exit(f"lock.py: {name} is not installed here; install it into this environment first")
        for wanted in ["", *sorted(requirement.extras)]:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(text), wanted) for text in distribution(name).requires or []]
    return found


def main() -> None:
    for source in sorted(HERE.glob("*.in")):
        lines = [line.partition("#")[0].strip() for line in source.read_text().splitlines()]
        pins = closure([line for line in lines if line])
        target = source.with_suffix(".txt")
        body = [f"# Written by `make lock` from {source.name}. Do not edit."]
        for name, version in sorted(pins.items()):
            marker = ' ; sys_platform == "linux"' if name.startswith(LINUX_ONLY) else ""
            body.append(f"{name}=={version}{marker}")
        target.write_text("\n".join(body) + "\n")
        print(f"{target.name}: {len(pins)} pins")


if __name__ == "__main__":
    main()
