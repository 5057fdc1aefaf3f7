"""Makes the digests of a changed bundle or snapshot right again, as somebody would who builds a bundle on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from blake3 import blake3


def resealed(bundle: Path) -> None:
    """Writes sizes and digests of the files that the manifest lists, and the manifest's own."""
    path = bundle / "deltamem.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        data = (bundle / name).read_bytes()
        entry.update(bytes=len(data), blake3=blake3(data).hexdigest())
    manifest["digest"] = "0" * 64
    text = json.dumps(manifest, indent=2)
    path.write_text(text.replace("0" * 64, blake3(text.encode()).hexdigest(), 1))


def snapshot_with(data: bytes, memory: np.ndarray) -> bytes:
    """A snapshot's bytes with another memory (the digest: rust/deltamem-core/src/snapshot.rs)."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata, numbers = header["__metadata__"], memory.astype("<f4").tobytes()
    digest = blake3()
    for key in sorted(metadata.keys() - {"digest"}):
        for text in (key.encode(), metadata[key].encode()):
            digest.update(len(text).to_bytes(8, "little") + text)
    for size in memory.shape:
        digest.update(size.to_bytes(8, "little"))
    digest.update(numbers)
    changed = data[8 : 8 + length].replace(metadata["digest"].encode(), digest.hexdigest().encode())
    return data[:8] + changed + numbers
