"""How a backbone's weights and arithmetic are stored and run. The memory stays in float32 whatever is chosen here."""

from __future__ import annotations

from dataclasses import dataclass

from deltamem_export.errors import ExportError

PRECISIONS = ("fp32", "fp16", "int4")


@dataclass(frozen=True)
class Precision:
    """How the backbone's weights and arithmetic are stored and run. The memory stays in float32 whatever is
    chosen here.

    Attributes:
        name: fp32, fp16 or int4 (weights of 4 bits, float32 activations on a CPU).
        block_size: int4: weights that share one scale, 16 to 256.
        accuracy_level: int4: 1 keeps activations in float32; 4, the builder's own choice for CPUs, rounds
        them to int8, which is
            faster and makes results depend slightly on how a stream is split.
    """

    name: str = "fp32"
    block_size: int = 32
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise ExportError(f"precision is {self.name!r}, expected {', '.join(PRECISIONS)}")
        if self.block_size not in (16, 32, 64, 128, 256):
            raise ExportError(f"int4 block size is {self.block_size}, expected 16, 32, 64, 128 or 256")
        if self.accuracy_level not in (1, 2, 3, 4):
            raise ExportError(f"int4 accuracy level is {self.accuracy_level}, expected 1 to 4")

    @property
    def setting(self) -> str:
        """One string for all that changes results: it goes into the fingerprint."""
        return self.name if self.name != "int4" else f"int4/{self.block_size}/{self.accuracy_level}"
