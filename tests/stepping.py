"""Steps of a bundle in the runtime: what they compute, and which nodes run in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import deltamem_rt as dm


def talk(model: dm.Model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every token and the memory: a prompt, single tokens, a turn that only reads."""
    with model.session() as session:
        logits = [session.feed(ids[:30], logits=True)]
        logits += [session.feed(ids[t : t + 1], logits=True) for t in range(30, 34)]
        session.end_turn()
        logits.append(session.feed(ids[34:], write=False, logits=True))
        return np.concatenate(logits), session.memory.copy()


def profiled(bundle: Path, folder: Path, graph: str) -> Counter[str]:
    """The nodes that ran in the last of three decode steps, by ONNX Runtime's own profile."""
    folder.mkdir()
    code = (
        "import sys, deltamem_rt as dm\n"
        "model = dm.Model.load(sys.argv[1], graph=sys.argv[2])\n"
        "session = model.session()\n"
        "session.feed([5, 6, 7, 8])\n"
        "for token in (9, 10, 11): session.feed([token])\n"
        "session.close(); del session, model"
    )
    environment = os.environ | {"DELTAMEM_PROFILE": str(folder / "profile"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(bundle), graph], check=True, env=environment)
    (file,) = folder.iterdir()
    return last_run(json.loads(file.read_text()))


def last_run(events: list[dict]) -> Counter[str]:
    start = max(event["ts"] for event in events if event["name"] == "model_run")
    return Counter(
        event["args"]["op_name"]
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= start
    )
