"""Asynchronous iteration over a reply: each piece is made in a worker thread, so the event loop goes on meanwhile.

A cancelled task waits for the token in the making, at most; nothing runs on after that, because all work is pulled.
"""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._native import Generation

# asyncio's own pool has a few threads more than the machine has cores, and a reply that waits for a thread misses its step: as many replies
# step together as have one. Threads are started when they are needed, and wait without work.
THREADS = 256


@cache
def workers() -> ThreadPoolExecutor:
    """The process's threads for replies."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="deltamem")


async def next_piece(generation: Generation) -> str:
    """Return the next piece of text; raise ``StopAsyncIteration`` behind the last one."""
    context = contextvars.copy_context()

    def step() -> str | None:
        return next(generation, None)

    piece = await asyncio.get_running_loop().run_in_executor(workers(), lambda: context.run(step))
    if piece is None:
        raise StopAsyncIteration
    return piece
