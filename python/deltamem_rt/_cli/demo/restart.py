"""The restart in the middle of the demo: another Python process loads the model and one person's memory from a file, and goes on.

The parent goes on from the same memory with the same tokens; what both then hold is compared byte by byte. Run as a module, this file
is the other process; its directory holds `before.safetensors` and `turns.json`, and it leaves `after.safetensors` and `reply.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deltamem_rt._native import Model, Session, Snapshot
from deltamem_rt.errors import DeltaMemError

PATIENCE_S = 300


@dataclass(frozen=True)
class Restart:
    """What came of it. `same_bytes` is the promise: memory, position and counts equal bit for bit."""

    same_bytes: bool
    snapshot_bytes: int
    tokens: int
    pid: int
    question: str
    reply: str


def restart(
    model: Model,
    session: Session,
    turns: list[list[int]],
    question: str,
    max_new_tokens: int,
    threads: int | None,
) -> Restart:
    """Hands `session`'s memory to a new process, lets both go on over `turns`, and compares them.

    The new process also answers `question`, from what it loaded. Raises DeltaMemError when it does not come to an end.
    """
    with tempfile.TemporaryDirectory(prefix="deltamem-") as name:
        folder = Path(name)
        before = session.snapshot().to_bytes()
        (folder / "before.safetensors").write_bytes(before)
        job = {
            "bundle": str(model.path),
            "device": model.device,
            "threads": threads,
            "turns": turns,
            "question": question,
            "max_new_tokens": max_new_tokens,
        }
        (folder / "turns.json").write_text(json.dumps(job), encoding="utf-8")
        try:
            child = subprocess.run(
                [sys.executable, "-m", __name__, str(folder)],
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DeltaMemError(f"the restarted process did not end within {PATIENCE_S} s") from None
        if child.returncode != 0:
            last = (child.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise DeltaMemError(f"the restarted process ended with code {child.returncode}: {last}")
        play(session, turns)
        mine = session.snapshot()
        theirs = Snapshot.from_bytes((folder / "after.safetensors").read_bytes())
        said = json.loads((folder / "reply.json").read_text(encoding="utf-8"))
        return Restart(
            same_bytes=mine.to_bytes() == theirs.to_bytes(),
            snapshot_bytes=len(before),
            tokens=sum(map(len, turns)),
            pid=said["pid"],
            question=question,
            reply=said["reply"],
        )


def play(session: Session, turns: list[list[int]]) -> None:
    """Feeds turns of token ids, each a turn of its own."""
    for turn in turns:
        session.feed(turn)
        session.end_turn()


def main(folder: Path) -> None:
    """The other process."""
    job = json.loads((folder / "turns.json").read_text(encoding="utf-8"))
    model = Model.load(job["bundle"], device=job["device"], threads=job["threads"])
    with model.session() as session:
        session.restore(Snapshot.from_bytes((folder / "before.safetensors").read_bytes()))
        play(session, job["turns"])
        (folder / "after.safetensors").write_bytes(session.snapshot().to_bytes())
        reply = session.chat(job["question"], max_new_tokens=job["max_new_tokens"]).read()
    (folder / "reply.json").write_text(json.dumps({"pid": os.getpid(), "reply": reply}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
