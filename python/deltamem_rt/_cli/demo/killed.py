"""A process that commits is killed, and the store is opened again: what it acknowledged must be there.

Run as a module, this file is that process: it opens a memory, reads turns of talk and commits each, and prints the id of every commit that
returned, until it is killed. The parent reads the same turns as many times as there are commits and compares the memories byte by byte.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from deltamem_rt._native import Model, Session, Snapshot, Store
from deltamem_rt.errors import DeltaMemError

from .aside import ask
from .talk import play

PATIENCE_S = 300
"""How long the process may take to its first commit."""

AT_WORK_S = (0.2, 0.6)
"""It is killed at a random moment of this stretch after its first commit."""


@dataclass(frozen=True)
class Death:
    """A process that was killed at work: the commits that it acknowledged, in order."""

    pid: int
    acknowledged: tuple[str, ...]
    at_work_s: float


@dataclass(frozen=True)
class Reopened:
    """What the store held afterwards.

    `lost`: acknowledged and not there. `found`: commits that are there. The kill may have cut off the word of the last one; `invented` are
    those beyond it that were not acknowledged. `same_bytes`: this process, reading the same turns, holds the memory that the store
    holds, bit for bit, and so again after `tokens` more; and all other memories are what they were.
    """

    lost: int
    found: int
    invented: int
    damages: int
    opening_s: float
    same_bytes: bool
    tokens: int
    question: str
    reply: str

    @property
    def sound(self) -> bool:
        """Whether all that was promised holds."""
        return not (self.lost or self.invented or self.damages) and self.same_bytes


def work_and_die(model: Model, place: Path, name: str, turns: list[list[int]], threads: int | None) -> Death:
    """Lets a new process commit to the memory `name` of the store at `place`, and kills it.

    Nobody else may hold the store meanwhile. Raises DeltaMemError when the process ends by itself or makes no commit.
    """
    job = {
        "bundle": str(model.path),
        "device": model.device,
        "threads": threads,
        "store": str(place),
        "name": name,
        "turns": turns,
    }
    with tempfile.TemporaryDirectory(prefix="deltamem-") as name_of_folder:
        folder = Path(name_of_folder)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        complaints = folder / "stderr.txt"
        with complaints.open("w", encoding="utf-8") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(folder / "job.json")],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        out = cast("TextIO", child.stdout)
        patience = threading.Timer(PATIENCE_S, child.kill)
        patience.start()
        try:
            told = out.readline()  # nothing: the process has ended
            began = time.perf_counter()
            if told:
                time.sleep(random.uniform(*AT_WORK_S))  # the one thing that no seed repeats
            ended = not told or child.poll() is not None
            at_work_s = time.perf_counter() - began
        finally:
            patience.cancel()
            child.kill()
        with child:
            told += out.read()
        if ended:
            last = (complaints.read_text(encoding="utf-8").strip().splitlines() or ["nothing on stderr"])[-1]
            raise DeltaMemError(
                f"the process that was to be killed at work ended by itself, or made no commit within {PATIENCE_S} s: "
                f"code {child.returncode}, {last}"
            )
    # A line that the kill cut off was not read as one by anybody.
    lines = [line for line in told.splitlines(keepends=True) if line.endswith("\n")]
    return Death(child.pid, tuple(line.strip() for line in lines), at_work_s)


def reopen(
    model: Model,
    store: Store,
    opening_s: float,
    states: dict[str, Snapshot],
    name: str,
    death: Death,
    turns: list[list[int]],
    question: str,
) -> Reopened:
    """Looks for all that the killed process acknowledged, and goes on from its last commit.

    `states` are memories as that process found them, `name`, where it was at work, among them. Here that one reads what the process read,
    a turn for each commit there is; then both go on over `turns`, and `question` is asked of the reopened one.
    """
    before = states[name]
    damages = len(store.verify().damages)
    # Every turn made a commit, so the turns since then are the commits since then.
    found = store.snapshot(name).turns - before.turns
    ids = {commit.id for commit in store.log(name, n=found)}
    with (
        model.session() as here,
        model.session(name, store=store, autocommit=True) as there,
        model.session() as aside,
    ):
        here.restore(before)
        play(here, itertools.islice(itertools.cycle(turns), found))
        same = _equal(here, there) and all(
            store.snapshot(other).to_bytes() == state.to_bytes() for other, state in states.items() if other != name
        )
        for session in (here, there):
            play(session, turns)
        return Reopened(
            lost=len(set(death.acknowledged) - ids),
            found=len(ids),
            invented=max(0, len(ids - set(death.acknowledged)) - 1),
            damages=damages,
            opening_s=opening_s,
            same_bytes=same and _equal(here, there),
            tokens=sum(map(len, turns)),
            question=question,
            reply=ask(aside, there.snapshot(), question),
        )


def killed_as_json(death: Death, again: Reopened) -> dict[str, Any]:
    """What came of the kill, as it stands in the JSON output."""
    return {
        "killed_acknowledged": len(death.acknowledged),
        "killed_found": again.found,
        "killed_lost": again.lost,
        "killed_invented": again.invented,
        "killed_at_work_s": round(death.at_work_s, 3),
        "reopened_ms": round(again.opening_s * 1e3, 3),
        "verify_damages": again.damages,
        "restored_bit_for_bit": again.same_bytes,
    }


def _equal(one: Session, other: Session) -> bool:
    return one.snapshot().to_bytes() == other.snapshot().to_bytes()


def main(file: Path) -> None:
    """The process that is killed: it has no other end."""
    job = json.loads(file.read_text(encoding="utf-8"))
    model = Model.load(job["bundle"], device=job["device"], threads=job["threads"])
    with Store(job["store"]) as store, model.session(job["name"], store=store, autocommit=True) as session:
        for turn in itertools.cycle(job["turns"]):
            play(session, [turn])
            print(session.show().id, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
