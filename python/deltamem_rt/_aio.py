"""Asynchronous iteration over a reply: each piece is made in a worker thread, so the event loop goes on meanwhile.

A cancelled task waits for the token in the making, at most; nothing runs on after that, because all work is pulled.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._native import Generation


async def next_piece(generation: Generation) -> str:
    """Return the next piece of text; raise ``StopAsyncIteration`` behind the last one."""
    piece = await asyncio.to_thread(next, generation, None)
    if piece is None:
        raise StopAsyncIteration
    return piece
