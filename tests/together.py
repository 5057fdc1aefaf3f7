"""Several calls at the same time, each in a thread of its own; and sessions that step together even where a step takes no time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    import deltamem_rt as dm


def together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each job returns, or the exception that it raised; all of them begin at the same time."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = jobs[index]()
        except BaseException as error:  # a failed assertion must not end its thread in silence
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a session waits for ever"
    return results


def beside_prompts(model: dm.Model, prompt: np.ndarray, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The same while other sessions read prompts: steps queue behind their chunks, and so leave together."""
    left, all_done, reads = [len(jobs)], threading.Event(), threading.Event()

    def counted(job: Callable[[], Any]) -> Any:
        reads.wait(60)
        try:
            return job()
        finally:
            left[0] -= 1
            if left[0] == 0:
                all_done.set()

    prompt = prompt[: model.context_length]

    def prompts() -> None:
        try:
            while not all_done.is_set():
                with model.session() as session:
                    session.feed(prompt, write=False)
                # Jobs of a few milliseconds would else be over before a prompt is read at all.
                reads.set()
        finally:
            reads.set()

    # Beside a single reader a machine with one free processor wakes each of the others just when nobody runs.
    *results, one, two, three = together([*(lambda j=job: counted(j) for job in jobs), prompts, prompts, prompts])
    assert (one, two, three) == (None, None, None)
    return results


def shared(before: dm.ModelStats, after: dm.ModelStats) -> float:
    """Sessions in a step, on average."""
    return (after.step_tokens - before.step_tokens) / max(1, after.steps - before.steps)


def until_shared(model: dm.Model, play: Callable[[], Any], least: float = 1.1, times: int = 6) -> Any:
    """What `play` gives, played again until its steps had more sessions than `least` on average: how many threads a busy machine wakes in
    time is its own affair, that steps are shared is not.
    """
    for _ in range(times):
        before = model.stats
        found = play()
        sessions = shared(before, model.stats)
        if sessions > least:
            return found
    raise AssertionError(f"{sessions:.2f} sessions in a step, expected over {least}, in {times} tries")
