"""How a backbone's weights, arithmetic and KV cache are stored and run: the settings, their ranges, and the one string
that goes into the fingerprint. The memory stays in float32 whatever is chosen here. It knows nothing of graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltamem_export.errors import ExportError

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
DEVICES = ("cpu", "cuda")
QUANTISED = ("int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ALGORITHMS = ("default", "rtn", "k_quant")
KV_CACHES = ("float", "int8")


@dataclass(frozen=True)
class Precision:
    """How the backbone's weights, arithmetic and KV cache are stored and run.

    Attributes:
        name: fp32, fp16, bf16 (CUDA only: ONNX Runtime has no CPU kernels for it), or int8 and int4: weights of
            8 or 4 bits in blocks, float32 activations on a CPU.
        block_size: int8, int4: weights that share one scale, 16 to 256.
        accuracy_level: int8, int4: 1 keeps activations in float32; 4, the builder's own choice for CPUs, rounds
            them to int8, which is faster and makes results depend slightly on how a stream is split.
        symmetric: int8, int4: False stores a zero point with each scale.
        algorithm: int8, int4: how scales are chosen: `default` (ONNX Runtime's own), `rtn`, or `k_quant`, which
            searches for the scale with the least error and always stores zero points.
        embeddings: int4: quantise the token embeddings too, which are float32 otherwise.
        kv: `float` keeps the KV cache in the activations' type; `int8` stores it in 8 bits with one scale a
            channel, calibrated at export.
        device: what the graph is for, `cpu` or `cuda`; not given: `cuda` with bf16, else `cpu`. It is no part of the setting:
            the same weights mean the same memories on both.

    Raises:
        ExportError: a value that is not one of these, or an option that does nothing at this precision.
    """

    name: str = "fp32"
    block_size: int = 32
    accuracy_level: int = 4
    symmetric: bool = True
    algorithm: str = "default"
    embeddings: bool = False
    kv: str = "float"
    device: str = ""

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise ExportError(f"precision is {self.name!r}, expected {', '.join(PRECISIONS)}")
        if self.block_size not in BLOCK_SIZES:
            raise ExportError(
                f"int4 block size is {self.block_size}, expected {', '.join(map(str, BLOCK_SIZES[:-1]))} or 256"
            )
        if self.accuracy_level not in (1, 2, 3, 4):
            raise ExportError(f"int4 accuracy level is {self.accuracy_level}, expected 1 to 4")
        if self.algorithm not in ALGORITHMS:
            raise ExportError(f"int4 algorithm is {self.algorithm!r}, expected {', '.join(ALGORITHMS)}")
        if self.kv not in KV_CACHES:
            raise ExportError(f"the KV cache is {self.kv!r}, expected {' or '.join(KV_CACHES)}")
        if not self.quantised and (not self.symmetric or self.algorithm != "default"):
            raise ExportError(f"precision {self.name} has no blocks: zero points and algorithms are for int4 and int8")
        if self.embeddings and self.name != "int4":
            raise ExportError(f"precision {self.name} keeps its embeddings as they are: only int4 can quantise them")
        if not self.device:
            object.__setattr__(self, "device", "cuda" if self.name == "bf16" else "cpu")
        if self.device not in DEVICES:
            raise ExportError(f"the device is {self.device!r}, expected {' or '.join(DEVICES)}")
        if self.name == "bf16" and self.device == "cpu":
            raise ExportError(
                "ONNX Runtime's CPU cannot compute bf16; choose fp32, fp16 or int4 for it, or --device cuda"
            )
        if self.kv == "int8" and self.device == "cuda" and self.name != "bf16":
            raise ExportError("a KV cache in 8 bits is for the CPU; on CUDA it is in 16 bits: leave --kv at float")
        if self.kv == "int8" and self.name == "bf16":
            raise ExportError("an int8 KV cache is calibrated on the CPU, which cannot run bf16; choose fp16 with it")

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in blocks of 4 or 8 bits."""
        return self.name in QUANTISED

    @property
    def arithmetic(self) -> str:
        """What activations and the KV cache are in: fp32, fp16 or bf16."""
        if not self.quantised:
            return self.name
        return "fp16" if self.device == "cuda" else "fp32"

    @classmethod
    def parse(cls, setting: str, device: str = "") -> Precision:
        """The precision that has this setting.

        Raises:
            ExportError: none has.
        """
        name, *options = setting.split("/")
        numbers = [int(option) for option in options if option.isdigit()]
        precision = cls(
            name,
            *numbers,
            symmetric="asymmetric" not in options,
            algorithm=next((a for a in ALGORITHMS[1:] if a in options), "default"),
            embeddings="embeddings" in options,
            kv="int8" if "kv-int8" in options else "float",
            device=device,
        )
        if precision.setting != setting:
            raise ExportError(f"precision_setting is {setting!r}, which says no precision; export the bundle again")
        return precision

    @property
    def setting(self) -> str:
        """One string for all that changes results: it goes into the fingerprint."""
        parts = [self.name]
        if self.quantised:
            parts += [str(self.block_size), str(self.accuracy_level)]
            parts += [] if self.symmetric else ["asymmetric"]
            parts += [] if self.algorithm == "default" else [self.algorithm]
            parts += ["embeddings"] if self.embeddings else []
        if self.kv != "float":
            parts.append(f"kv-{self.kv}")
        return "/".join(parts)

    def weight_bytes(self, outputs: int, inputs: int) -> int:
        """What a linear layer's weight takes on disk, its scales, zero points and the padding of its last blocks with it."""
        if not self.quantised:
            return outputs * inputs * (4 if self.name == "fp32" else 2)
        bits, blocks = 4 if self.name == "int4" else 8, -(-inputs // self.block_size)
        zero_points = -(-blocks * bits // 8) if not self.symmetric or self.algorithm == "k_quant" else 0
        scale = 4 if self.arithmetic == "fp32" else 2
        return outputs * (blocks * (self.block_size * bits // 8 + scale) + zero_points)

    def embedding_bytes(self, tokens: int, width: int) -> int:
        """What the token embeddings take on disk."""
        if not self.embeddings:
            return tokens * width * (4 if self.arithmetic == "fp32" else 2)
        blocks = -(-width // self.block_size)
        return tokens * (width // 2 + blocks * 4 + (0 if self.symmetric else -(-blocks // 2)))
