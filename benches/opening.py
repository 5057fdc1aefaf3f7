"""Opens bundles for the benches with the options that this version of the runtime has. It needs nothing but the runtime, so that a process
that is weighed holds nothing else.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import deltamem_rt as dm


def load(path: Path, *, graph: str | None = None, max_batch: int | None = None, threads: int | None = None) -> dm.Model:
    """The bundle, unchecked, with those of these options that `Model.load` has."""
    wanted = {"graph": graph, "max_batch": max_batch, "threads": threads}
    return dm.Model.load(path, verify=False, **{k: v for k, v in wanted.items() if v is not None and has_option(k)})


def has_option(name: str) -> bool:
    """Whether `Model.load` knows an option."""
    return name in inspect.signature(dm.Model.load).parameters
