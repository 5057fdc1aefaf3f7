"""δ-mem in production: a small online memory for a frozen language model.

    >>> import deltamem_rt as dm
    >>> model = dm.Model.load(dm.default_bundle())                       # doctest: +SKIP
    >>> with model.session() as session:                                 # doctest: +SKIP
    ...     session.chat("My dog is called Bruno.").read()
    ...     print(session.chat("What is my dog called?").read())

A :class:`Model` is a bundle made by ``deltamem-export``; a :class:`Session` is one user's memory over it; a :class:`Snapshot` is that
memory as a few KB of bytes. This package needs NumPy and ONNX Runtime (``pip install "deltamem-rt[cpu]"``) and nothing else.
"""

from __future__ import annotations

from ._default import default_bundle
from ._native import Generation, GenerationStats, Geometry, Model, Session, Snapshot, __version__, scan
from .errors import (
    BundleError,
    ContextLengthError,
    DeltaMemError,
    DeviceError,
    FingerprintError,
    NotFiniteError,
    OnnxRuntimeError,
    OnnxRuntimeNotFoundError,
    SessionError,
    SnapshotError,
    TextError,
)

__all__ = [
    "BundleError",
    "ContextLengthError",
    "DeltaMemError",
    "DeviceError",
    "FingerprintError",
    "Generation",
    "GenerationStats",
    "Geometry",
    "Model",
    "NotFiniteError",
    "OnnxRuntimeError",
    "OnnxRuntimeNotFoundError",
    "Session",
    "SessionError",
    "Snapshot",
    "SnapshotError",
    "TextError",
    "__version__",
    "default_bundle",
    "scan",
]
