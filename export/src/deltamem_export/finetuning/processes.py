"""One process, or several that `accelerate launch` started: who this one is, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Processes:
    """`rank` of `count` processes, and the device of this one."""

    def __init__(self, device: str = "cpu"):
        """Joins the others where the launcher says that there are some; each has a device of its own, or the CPU if `device` is cpu."""
        self.rank, self.count = 0, 1
        self.device = torch.device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=device == "cpu")
            self.rank, self.count = state.process_index, state.num_processes
            self.device = state.device

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this process's."""
        return range(self.rank, count, self.count)

    def add(self, values: Iterable[float]) -> list[float]:
        """Each value summed over all processes."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        if self.count > 1:
            # float32 on the wire for devices without float64; counts stay exact to 2^24.
            tensor = self._sum(tensor.to(torch.float32)).double()
        return [float(v) for v in tensor.tolist()]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every process gets the sum of all gradients; a parameter without one counts as zero."""
        wanted = list(parameters)
        for p in wanted:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.count > 1:
            flat = self._sum(torch.cat([p.grad.flatten() for p in wanted if p.grad is not None]))
            at = 0
            for p in wanted:
                p.grad = flat[at : at + p.numel()].view_as(p).clone()
                at += p.numel()

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            self._sum(torch.zeros(1))

    def _sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        torch.distributed.all_reduce(tensor)
        return tensor
