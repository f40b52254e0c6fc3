"""Hermes itself for engine tests, with the interface of `toy`: narrow Hermes-R and Hermes-M, three datasets of 3, 1 and 5 tasks.

Batches come from the collator and the loss from the trainer, so that tasks are mixed per sample, columns are padded and ranks
hold fillers as in training. The stem is frozen; the modality head is a branch that nobody uses (its loss has no weight).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hermes_dist.config import LossConfig, ModelConfig, resolve, validate
from hermes_dist.models import build_model
from hermes_dist.stream.batch import Batch, Collator, StepBatch
from hermes_dist.stream.reader import Sample
from hermes_dist.tasks import TaskTable
from hermes_dist.train.record import LossSums
from hermes_dist.train.step import StepLoss

TASKS = TaskTable.build(
    [
        ("a", "CT", "", [("whole", [1, 2]), ("core", [2]), ("other", [3])], None),
        ("b", "T1", "", [("x", [1])], None),
        ("c", "PET", "", [(f"y{i}", [i + 1]) for i in range(5)], None),
    ]
)
MODELS: dict[str, dict[str, Any]] = {
    "hermes-r": {"base_channels": 8, "blocks": [1, 1, 1, 1]},
    "hermes-m": {"backbone": "medformer", "base_channels": 8},
}
PATCH = (32, 32, 32)
RATES = {"hermes-r": 3e-5, "hermes-m": 1e-6}
"""Learning rates at which rounding stays rounding. An untrained net of this size has norms over 8 voxels and gradient norms of 40
to 90: at 1e-3 one process with the batch in micro-batches differs from itself with the whole batch by 1e-3 after ten steps."""


class HermesKit:
    """Model, samples and loss of one kind of Hermes."""

    def __init__(self, kind: str) -> None:
        self.config: ModelConfig = resolve(validate({"model": MODELS[kind]})).model
        self.loss = LossConfig(overlap="dice", modality_weight=0.0)
        self.collator = Collator(TASKS, PATCH)

    def make_model(self, seed: int = 0) -> nn.Module:
        """The same weights for the same seed."""
        torch.manual_seed(seed)
        model = build_model(self.config, TASKS)
        model.backbone.stem.requires_grad_(False)  # type: ignore[union-attr]
        return model

    def make_samples(self, step: int, count: int) -> list[Sample]:
        """The global batch of a step: datasets in turn, bright boxes on noise."""
        samples: list[Sample] = []
        for index in range(count):
            random = np.random.default_rng([step, index])
            dataset = (step + index) % 3
            label = np.zeros(PATCH, np.uint8)
            for value in range(1, 6):
                z, y, x = (int(random.integers(0, n - 6)) for n in PATCH)
                label[z : z + 6, y : y + 6, x : x + 6] = value
            image = (random.standard_normal(PATCH) * 0.3 + label * 0.5).astype(np.float32)
            samples.append(Sample(index, dataset, index, index, image, label))
        return samples

    def pair_count(self, samples: Sequence[Sample]) -> int:
        """Valid (sample, task) pairs."""
        return sum(len(TASKS.datasets[s.dataset].classes) for s in samples)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        return self.collator.collate(samples)

    def split(self, samples: Sequence[Sample], rank: int, world_size: int, micro_batch: int) -> list[Batch]:
        """The contiguous part of one rank in micro-batches, as many on every rank; empty ones are fillers."""
        per_rank = -(-len(samples) // world_size)
        mine = samples[rank * per_rank : (rank + 1) * per_rank]
        count = -(-per_rank // micro_batch)
        return [self.collator.collate(mine[i * micro_batch : (i + 1) * micro_batch]) for i in range(count)]

    def make_loss(
        self, pair_count: int, record: Callable[[Tensor], Any] = lambda _: None
    ) -> Callable[[nn.Module, Batch], Tensor]:
        """The trainer's loss, normalised by the global pair count."""
        step = StepBatch(0, [], pair_count, 0, np.zeros(0, np.int64), np.zeros(0, np.int64))
        loss_fn = StepLoss(self.loss, step, LossSums.zeros(TASKS, torch.device("cpu")), null_column=False)

        def recorded(module: nn.Module, batch: Batch) -> Tensor:
            loss = loss_fn(module, batch)
            record(loss.detach())
            return loss

        return recorded
