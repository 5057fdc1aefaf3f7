"""A process that holds one bundle and nothing else, and says as JSON what memory it has resident, MiB: `bench_footprint.py` starts it.

python benches/weighing.py BUNDLE TOKENS SESSIONS
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

import deltamem_rt as dm
from opening import load

MIB = 1024 * 1024


def resident() -> tuple[float, float]:
    """VmRSS and RssAnon of this process, MiB."""
    status = Path("/proc/self/status").read_text()
    sizes = [re.search(rf"{name}:\s+(\d+)", status) for name in ("VmRSS", "RssAnon")]
    rss, anonymous = (int(size[1]) / 1024 if size else float("nan") for size in sizes)
    return rss, anonymous


def main() -> None:
    bundle, tokens, sessions = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model = load(bundle, max_batch=16)
    rng = np.random.default_rng(0)
    vocabulary = model.manifest["backbone"]["vocab_size"]

    def read(session: dm.Session, length: int) -> None:
        session.feed(rng.integers(3, vocabulary, length, dtype=np.int32))

    session, length = model.session(), 1_000 if tokens else 128
    for _ in range(5):
        read(session, length)
        session.end_turn()
    found: dict[str, object] = {"after turns": resident()}
    for _ in range(tokens // length):
        read(session, length)
        session.end_turn()
    found["after many"] = resident()
    more = [model.session() for _ in range(sessions)]
    before = resident()[1]
    for each in more:
        read(each, 16)
        each.end_turn()
    found["between turns"] = (resident()[1] - before) / sessions
    for each in more:
        read(each, 16)
    found["in a turn"] = (resident()[1] - before) / sessions
    found["cache"], found["state"] = more[0].cache_bytes / MIB, model.geometry.bytes / MIB
    found["logits"] = vocabulary * 4 / MIB
    print(json.dumps(found))


if __name__ == "__main__":
    main()
