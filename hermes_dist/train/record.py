"""What a finished step tells: the row of `metrics.jsonl`, which telemetry turns into gauges and counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hermes_dist.config import Config
from hermes_dist.parallel.engine import StepStats
from hermes_dist.stream.batch import StepBatch
from hermes_dist.tasks import TaskTable

TERMS = ("bce", "dice")


@dataclass
class LossSums:
    """Sums over (sample, class) pairs, accumulated over micro-batches.

    `per_class` is (4, N) float64: BCE, overlap, their weighted sum with the auxiliary head, and the number of pairs, for the N
    classes of all datasets in order (a task shared by two datasets has two rows, so that each dataset is seen by itself).
    `modality` is (1,). Both travel in one small all-reduce a step. `foreground` (N,) float64 counts the pairs whose crop holds a
    voxel of the class; it stays this rank's own, as all counters of a rank do.
    """

    offsets: Tensor
    per_class: Tensor
    modality: Tensor
    foreground: Tensor

    @staticmethod
    def zeros(tasks: TaskTable, device: torch.device) -> LossSums:
        """Empty sums on `device`; `offsets` (D,) int64 is the first row of each dataset, on the host."""
        sizes = [len(d.classes) for d in tasks.datasets]
        return LossSums(
            torch.tensor(np.cumsum([0, *sizes[:-1]]), dtype=torch.int64),
            torch.zeros(4, sum(sizes), dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
            torch.zeros(sum(sizes), dtype=torch.float64, device=device),
        )

    def add(self, dataset_ids: Tensor, pair_mask: Tensor, losses: Tensor, foreground: Tensor) -> None:
        """Add the (3, B, T) losses of the valid pairs, and the (B, T) bool that tell which of them hold a voxel of their class.

        Column t of a sample is class t of its dataset.

        `dataset_ids` (B,) and `pair_mask` (B, T) lie on the host: which values go where is decided there, so that the device,
        where the losses are, is not waited for.
        """
        rows = (self.offsets[dataset_ids][:, None] + torch.arange(pair_mask.shape[1]))[pair_mask]
        chosen = pair_mask.flatten().nonzero()[:, 0]
        rows, chosen = (t.to(losses.device, non_blocking=True) for t in (rows, chosen))
        values = losses.flatten(1).index_select(1, chosen).double()
        self.per_class.index_add_(1, rows, torch.cat([values, torch.ones_like(values[:1])]))
        self.foreground.index_add_(0, rows, foreground.flatten().index_select(0, chosen).double())

    def packed(self) -> Tensor:
        """All sums that ranks add up in one vector of 4N + 1 values."""
        return torch.cat([self.per_class.flatten(), self.modality])

    def unpack(self, vector: Tensor) -> LossSums:
        """Sums from a vector as made by `packed`; `foreground` is this one's."""
        return LossSums(self.offsets, vector[:-1].reshape(4, -1), vector[-1:], self.foreground)


@dataclass(frozen=True)
class StepRecord:
    """One step, as seen by this rank: global sums of the losses, and this rank's own times and counts."""

    batch: StepBatch
    stats: StepStats
    sums: LossSums
    lr: float
    order_hash: str
    global_samples: int
    position: int
    """Of the next step's first sample in the plan."""
    step_s: float
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def row(self, config: Config, tasks: TaskTable) -> dict[str, Any]:
        """The line of metrics.jsonl. Losses are means over the pairs of the global batch; times in seconds."""
        bce, dice, pairs, count = self.sums.per_class.cpu()
        n = max(self.batch.pair_count, 1)
        modality = float(self.sums.modality) / max(self.batch.modality_count, 1)
        patches = sum(b.image.shape[0] for b in self.batch.micro_batches)
        return {
            "step": self.batch.step,
            "position": self.position,
            "loss": float(pairs.sum()) / n + (config.loss.modality_weight or 0.0) * modality,
            "loss_bce": float(bce.sum()) / n,
            "loss_dice": float(dice.sum()) / n,
            "loss_modality": modality,
            "lr": self.lr,
            "grad_norm": self.stats.grad_norm,
            "skipped": int(self.stats.skipped),
            "step_s": self.step_s,
            "data_wait_s": self.batch.data_wait_s,
            "data_stall_s": self.batch.data_stall_s,
            "samples_per_s": self.global_samples / max(self.step_s, 1e-9),
            "order_hash": self.order_hash,
            "samples": int(self.batch.positions.size),
            "patches": patches,
            "voxels": patches * int(np.prod(config.data.patch_vox_zyx)),
            "parts_s": self.stats.parts_s,
            "wait_parts_s": self.batch.wait_parts_s,
            **self._per_dataset(tasks, bce, dice, count),
            **self.extra,
        }

    def _per_dataset(self, tasks: TaskTable, bce: Tensor, dice: Tensor, count: Tensor) -> dict[str, Any]:
        datasets: dict[str, dict[str, float]] = {}
        classes: dict[str, dict[str, float]] = {}
        for dataset, first in zip(tasks.datasets, self.sums.offsets.tolist(), strict=True):
            rows = slice(first, first + len(dataset.classes))
            seen = float(count[rows].sum())
            if not seen:
                continue
            datasets[dataset.name] = {t: float(v[rows].sum()) / seen for t, v in zip(TERMS, (bce, dice), strict=True)}
            for i, name in enumerate(dataset.class_names, start=first):
                classes[f"{dataset.name}/{name}"] = {"bce": float(bce[i] / count[i]), "dice": float(dice[i] / count[i])}
        return {
            "dataset_loss": datasets,
            "task_loss": classes,
            "dataset_samples": self._local_samples(tasks),
            "task_pairs": self._local_pairs(tasks),
            "task_foreground": self._local_foreground(tasks),
        }

    def _local_samples(self, tasks: TaskTable) -> dict[str, int]:
        counts = [0] * len(tasks.datasets)
        for batch in self.batch.micro_batches:
            for dataset in batch.dataset_ids[batch.pair_mask.any(1)].tolist():
                counts[dataset] += 1
        return {d.name: n for d, n in zip(tasks.datasets, counts, strict=True) if n}

    def _local_pairs(self, tasks: TaskTable) -> dict[str, int]:
        samples = self._local_samples(tasks)
        return {f"{d.name}/{c}": samples[d.name] for d in tasks.datasets if d.name in samples for c in d.class_names}

    def _local_foreground(self, tasks: TaskTable) -> dict[str, int]:
        names = [f"{d.name}/{c}" for d in tasks.datasets for c in d.class_names]
        return {name: int(n) for name, n in zip(names, self.sums.foreground.tolist(), strict=True) if n}
