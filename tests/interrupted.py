"""Presses Ctrl-C in the middle of a call."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable


def interrupted(call: Callable[[], object], wait: float) -> bool:
    """Runs `call` and presses Ctrl-C after `wait` seconds; whether that was caught while it ran."""
    started = threading.Event()

    def press() -> None:
        started.wait()
        time.sleep(wait)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    caught = False
    try:
        started.set()
        call()
    except KeyboardInterrupt:
        caught = True
    finally:
        # Whatever the call ended with, the key press is not left to somebody else.
        try:
            thread.join()
        except KeyboardInterrupt:
            thread.join()
    return caught
