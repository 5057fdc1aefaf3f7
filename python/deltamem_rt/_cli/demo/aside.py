"""Asking a memory aside: the question goes to a copy, in a session without a store, so asking leaves no trace in the memory."""

from __future__ import annotations

from deltamem_rt._native import Session, Snapshot

MAX_NEW_TOKENS = 32


def ask(aside: Session, memory: Snapshot, question: str) -> str:
    """What the memory answers. `aside` is any session of the same model; what it held is dropped."""
    aside.restore(memory)
    return aside.chat(question, max_new_tokens=MAX_NEW_TOKENS, write=False).read().strip()
