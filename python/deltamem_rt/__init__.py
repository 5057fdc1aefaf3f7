"""δ-mem in production: a small online memory for a frozen language model.

    >>> import deltamem_rt as dm
    >>> model = dm.Model.load(dm.default_bundle())                       # doctest: +SKIP
    >>> with model.session() as session:                                 # doctest: +SKIP
    ...     session.chat("My dog is called Bruno.").read()
    ...     print(session.chat("What is my dog called?").read())

A :class:`Model` is a bundle made by ``deltamem-export``; a :class:`Session` is one user's memory over it; a :class:`Snapshot` is that
memory as a few KB of bytes; a :class:`Store` keeps memories with their history. This package needs NumPy and ONNX Runtime
(``pip install "deltamem-rt[cpu]"``) and nothing else.
"""

from __future__ import annotations

from ._changes import Blame, Change, Diff, Direction, HeadDiff, MergeResult, Redaction, Share
from ._default import default_bundle
from ._health import Health
from ._native import (
    Generation,
    GenerationStats,
    Geometry,
    MemoryTensor,
    Model,
    ModelStats,
    Prefix,
    Session,
    Snapshot,
    Store,
    __version__,
    scan,
)
from ._records import Commit, Damage, GcReport, MemoryInfo, Move, RepairReport, StoreStats, VerifyReport
from .errors import (
    BundleError,
    ConflictError,
    ContextLengthError,
    DamagedError,
    DeltaMemError,
    DeviceError,
    DriftWarning,
    ExistsError,
    FingerprintError,
    MergeWarning,
    NotFiniteError,
    NotFoundError,
    OnnxRuntimeError,
    OnnxRuntimeNotFoundError,
    QuotaError,
    ReadOnlyError,
    RefError,
    ServerError,
    SessionError,
    SnapshotError,
    StoreError,
    StoreFormatError,
    StoreFullError,
    StoreIOError,
    StoreKeyError,
    StoreLockedError,
    TextError,
    UnavailableError,
)

__all__ = [
    "Blame",
    "BundleError",
    "Change",
    "Commit",
    "ConflictError",
    "ContextLengthError",
    "Damage",
    "DamagedError",
    "DeltaMemError",
    "DeviceError",
    "Diff",
    "Direction",
    "DriftWarning",
    "ExistsError",
    "FingerprintError",
    "GcReport",
    "Generation",
    "GenerationStats",
    "Geometry",
    "HeadDiff",
    "Health",
    "MemoryInfo",
    "MemoryTensor",
    "MergeResult",
    "MergeWarning",
    "Model",
    "ModelStats",
    "Move",
    "NotFiniteError",
    "NotFoundError",
    "OnnxRuntimeError",
    "OnnxRuntimeNotFoundError",
    "Prefix",
    "QuotaError",
    "ReadOnlyError",
    "Redaction",
    "RefError",
    "RepairReport",
    "ServerError",
    "Session",
    "SessionError",
    "Share",
    "Snapshot",
    "SnapshotError",
    "Store",
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "StoreIOError",
    "StoreKeyError",
    "StoreLockedError",
    "StoreStats",
    "TextError",
    "UnavailableError",
    "VerifyReport",
    "__version__",
    "default_bundle",
    "scan",
]
