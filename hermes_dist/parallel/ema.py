"""Exponential moving average of the weights, each rank averaging the piece that it owns.

There is no full second copy of the model: the average of a piece lies beside its master, is saved with it, and is gathered only
where somebody asks for whole weights. Rule of the published Hermes: decay = min(1 − 1/(updates+1), decay), so the first update
takes the weights over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hermes_dist.parallel.partition import Partition


class Ema:
    """Averages of a partition's masters, one tensor per buffer (float32, the buffer's layout)."""

    def __init__(self, partition: Partition, decay: float) -> None:
        self._partition, self._decay = partition, decay
        self.updates = 0
        self.averages: tuple[Tensor, ...] = tuple(b.master.clone() for b in partition.buffers)

    @torch.no_grad()
    def update(self) -> None:
        """Take the current masters into the average. Call after each step that changed them."""
        weight = 1 - min(1 - 1 / (self.updates + 1), self._decay)
        for average, buffer in zip(self.averages, self._partition.buffers, strict=True):
            average.lerp_(buffer.master, weight)
        self.updates += 1

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the past: the average becomes the current masters."""
        self.updates = 0
        for average, buffer in zip(self.averages, self._partition.buffers, strict=True):
            average.copy_(buffer.master)
