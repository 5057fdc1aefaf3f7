"""The errors that Python has no word for. One small tree under :class:`DeltaMemError`; where Python has the word, that is raised.

``FileNotFoundError`` a path that is not there · ``ValueError`` an argument out of range (token ids, sampling options, shapes) ·
``TypeError`` an argument of the wrong type · ``KeyboardInterrupt`` Ctrl-C, also inside a long prefill. Every message says what was
found, what was expected and what to do. After any of them the session is as it was before the call.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "ContextLengthError",
    "DeltaMemError",
    "DeviceError",
    "FingerprintError",
    "NotFiniteError",
    "OnnxRuntimeError",
    "OnnxRuntimeNotFoundError",
    "SessionError",
    "SnapshotError",
    "TextError",
]


class DeltaMemError(Exception):
    """The parent of every error that is special to this package."""


class BundleError(DeltaMemError, ValueError):
    """A bundle that is no bundle, is damaged, is of a newer format, or contradicts itself."""


class FingerprintError(DeltaMemError, ValueError):
    """A memory that was written under another model (backbone, adapter, tokenizer or configuration)."""


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
