"""Making nodes, constants and inputs in an ONNX graph, each under a name that tells where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class Nodes:
    """Appends nodes to a graph under one prefix; `graph.sort()` puts them in order at the end."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix

    def __call__(self, op: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:
        return self.many(op, *inputs, outputs=1, name=name, domain=domain, **attributes)[0]

    def many(
        self, op: str, *inputs: ir.Value | None, outputs: int, name: str, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        full = f"{self.prefix}/{name}"
        made = [ir.Value(name=full if outputs == 1 else f"{full}/{n}") for n in range(outputs)]
        node = ir.node(op, inputs, attributes=attributes, domain=domain, outputs=made, name=full)
        self.graph.append(node)
        return made

    def split(self, value: ir.Value, widths: Sequence[int], *, name: str, axis: int = -1) -> list[ir.Value]:
        """The parts of the given widths along `axis`; the value itself where there is one part."""
        if len(widths) == 1:
            return [value]
        return self.many("Split", value, self.ints(widths), outputs=len(widths), name=name, axis=axis)

    def concat(self, values: Sequence[ir.Value], *, name: str, axis: int = -1) -> ir.Value:
        """The values side by side along `axis`; the value itself where there is one."""
        return values[0] if len(values) == 1 else self("Concat", *values, name=name, axis=axis)

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """A shared int64 constant, one for each distinct list."""
        return self._shared(np.array(numbers, np.int64), "i_" + "_".join(map(str, numbers)))

    def scalar(self, number: float) -> ir.Value:
        return self._shared(np.array(number, np.float32), f"f_{number!r}")

    def floats(self, array: npt.NDArray[np.float32], name: str) -> ir.Value:
        """A weight of this prefix."""
        full = f"{self.prefix}/{name}".lstrip("/").replace("/", ".")
        return self._register(np.ascontiguousarray(array, dtype=np.float32), full)

    def _shared(self, array: npt.NDArray[Any], label: str) -> ir.Value:
        name = f"deltamem.constants.{label}"
        return self.graph.initializers.get(name) or self._register(array, name)

    def _register(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def name_of(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def int_attribute(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())
