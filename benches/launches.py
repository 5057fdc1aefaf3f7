"""What a graph for CUDA asks of the card in a step, counted in the graph as it was exported: nodes that launch a kernel, at least one each.
For a machine without a card; where there is one, bench_cuda.py has ONNX Runtime's own profile beside it.

    python benches/launches.py [NAME...] [--precision fp16]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

# They change no number: ONNX Runtime gives the same buffer another shape, or asks for a shape on the host.
_NO_KERNEL = frozenset({"Constant", "Reshape", "Squeeze", "Unsqueeze", "Shape", "Identity"})
_MEMORY, _NETWORKS = "DeviceMemoryLayer", 3
# A step of one token of eight sessions at most is one launch where the networks have no more numbers than this, else two.
_SMALL = 98_304


@dataclass(frozen=True)
class Launches:
    """`nodes`: those that launch kernels; `kernels`: how many they launch at least; `memory`: those that are the memory's."""

    nodes: int
    kernels: int
    memory: int
    layers: int

    def told(self) -> str:
        return f"{self.nodes} ({self.kernels} kernels or more)"


def launching(bundle: Path, graph: str) -> Launches:
    """Reads a bundle's graph for CUDA, `portable` or `fused`; its weights are not read."""
    manifest = json.loads((bundle / "deltamem.json").read_text())
    graphs = [manifest["graph"], *manifest.get("graphs", [])]
    entry = next((found for found in graphs if found.get("device") == "cuda"), graphs[0])
    nodes = list(ir.load(bundle / entry["file" if graph == "portable" else "fused_file"]).graph)
    on_host = _on_host(nodes)
    found = [node for node in nodes if node.op_type not in _NO_KERNEL and node not in on_host]
    kernels = sum(_kernels(node) for node in found)
    own = sum(str(node.name).startswith("/deltamem/layers.") for node in found)
    return Launches(len(found), kernels, own, len(manifest["memory"]["layers"]))


def _kernels(node: ir.Node) -> int:
    if node.op_type != _MEMORY:
        return 1
    networks = node.inputs[_NETWORKS]
    sizes = [] if networks is None or networks.shape is None else [int(size) for size in networks.shape]
    return 1 if math.prod(sizes) <= _SMALL else 2


def _on_host(nodes: list[ir.Node]) -> set[ir.Node]:
    """Nodes that only compute with shapes, which ONNX Runtime leaves to the processor."""
    found: set[ir.Node] = set()
    constants = {node for node in nodes if node.op_type == "Constant"}
    for node in nodes:  # in order
        given = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
        if node.op_type == "Shape" or (given and {*given} <= found | constants):
            found.add(node)
    return found


def main() -> None:
    import models

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["qwen3-0.6b"], help=", ".join(models.SHAPES))
    parser.add_argument("--precision", default="fp16", help="fp32, fp16, bf16, int8 or int4 (default: %(default)s)")
    options = parser.parse_args()
    print("| model | precision | graph | nodes with kernels | kernels at least | over the backbone, a layer |")
    print("|---|---|---|---|---|---|")
    for name in options.names:
        made = models.made(name, options.precision, device="cuda")
        bare = launching(made.bare, "portable")
        rows = {"backbone alone": bare, **{graph: launching(made.bundle, graph) for graph in ("portable", "fused")}}
        for graph, found in rows.items():
            more = (found.kernels - bare.kernels) / found.layers
            print(f"| {name} | {made.precision} | {graph} | {found.nodes} | {found.kernels} | {more:.1f} |")


if __name__ == "__main__":
    main()
