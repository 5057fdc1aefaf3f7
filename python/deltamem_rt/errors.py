"""The errors that Python has no word for. One small tree under :class:`DeltaMemError`; where Python has the word, that is raised.

``FileNotFoundError`` a path that is not there, ``FileExistsError`` one that is · ``ValueError`` an argument out of range (token ids,
sampling options, shapes, names) · ``TypeError`` an argument of the wrong type · ``KeyboardInterrupt`` Ctrl-C, also inside a long prefill.
Every message says what was found, what was expected and what to do. After any of them the session is as it was before the call; where the
commit behind a turn failed, the turn is in the session and the next commit holds it.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "ConflictError",
    "ContextLengthError",
    "DamagedError",
    "DeltaMemError",
    "DeviceError",
    "DriftWarning",
    "ExistsError",
    "FingerprintError",
    "MergeWarning",
    "NotFiniteError",
    "NotFoundError",
    "OnnxRuntimeError",
    "OnnxRuntimeNotFoundError",
    "QuotaError",
    "ReadOnlyError",
    "RefError",
    "ServerError",
    "SessionError",
    "SnapshotError",
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "StoreIOError",
    "StoreKeyError",
    "StoreLockedError",
    "TextError",
    "UnavailableError",
]


class DeltaMemError(Exception):
    """The parent of every error that is special to this package."""


class BundleError(DeltaMemError, ValueError):
    """A bundle that is no bundle, is damaged, is of a newer format, or contradicts itself."""


class FingerprintError(DeltaMemError, ValueError):
    """A memory that was written under another model.

    ``differs``: which of ``"backbone"``, ``"adapter"``, ``"tokenizer"``, ``"config"``, where a commit says what its model was made of.
    """

    differs: tuple[str, ...] = ()


class SnapshotError(DeltaMemError, ValueError):
    """Bytes that are no snapshot, or a damaged one."""


class SessionError(DeltaMemError, RuntimeError):
    """A call that makes no sense in the session's present state: closed, in use by another thread, nothing to go on from."""


class ContextLengthError(DeltaMemError, ValueError):
    """The turn would be longer than the model's context. ``end_turn()`` makes room; the memory stays."""


class TextError(DeltaMemError, ValueError):
    """A tokenizer or a chat template that failed. (A bundle without one is a ``SessionError``.)"""


class DeviceError(DeltaMemError, RuntimeError):
    """A device that this machine or this build does not have."""


class NotFiniteError(DeltaMemError, ArithmeticError):
    """A run that gave NaN or infinite numbers. The memory from before the call was kept."""


class OnnxRuntimeError(DeltaMemError, RuntimeError):
    """ONNX Runtime refused or failed; its own words are in the message."""


class OnnxRuntimeNotFoundError(DeltaMemError, ImportError):
    """No usable ONNX Runtime is installed: ``pip install "deltamem-rt[cpu]"`` or ``pip install "deltamem-rt[cuda]"``."""


class StoreError(DeltaMemError):
    """The parent of what can go wrong in a store."""


class NotFoundError(StoreError, KeyError):
    """No memory, branch, tag or commit of that name."""

    def __str__(self) -> str:
        # KeyError would show its message in quotes.
        return Exception.__str__(self)


class ExistsError(StoreError, ValueError):
    """A memory, branch or tag of that name exists already."""


class RefError(StoreError, ValueError):
    """A text that names no commit, or a commit that cannot be used so."""


class ConflictError(StoreError, RuntimeError):
    """The branch was moved by another worker; nothing was written. ``session.merge()`` brings both together.

    ``expected`` and ``found`` are the ids of the head that was built on and of the head that is there; None: no such branch.
    """

    memory: str = ""
    branch: str = ""
    expected: str | None = None
    found: str | None = None


class QuotaError(StoreError):
    """The memory may keep no more commits, bytes or branches. Nothing was written."""


class StoreKeyError(StoreError, ValueError):
    """The store's key is missing, not needed, or another one."""


class StoreFormatError(StoreError, ValueError):
    """A file or database that is no store, or of a newer version."""


class DamagedError(StoreError, ValueError):
    """Bytes that are not those that were written. ``verify()`` finds what else is, ``repair()`` and ``salvage()`` save the rest."""


class StoreLockedError(StoreError, RuntimeError):
    """Another process has the file open for writing."""


class ReadOnlyError(StoreError, PermissionError):
    """The store was opened for reading only."""


class StoreFullError(StoreError, OSError):
    """No room is left. The change was not acknowledged."""


class StoreIOError(StoreError, OSError):
    """The system failed to read or write. A change that was under way is there whole or not at all."""


class UnavailableError(StoreError, ConnectionError):
    """The store is closed, or its server does not answer in time. A change that was under way is there whole or not at all."""


class ServerError(StoreError, ConnectionError):
    """An address that names no server, a wrong user or password, or a server that cannot keep a store."""


class DriftWarning(UserWarning):
    """A watched memory (``on_drift``) is not healthy any more; the message says why, and what was done."""


class MergeWarning(UserWarning):
    """Both sides of a merge wrote much the same keys: facts of one may read wrong now."""
