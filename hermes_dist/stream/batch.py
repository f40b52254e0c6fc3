"""Batches: samples of several datasets, side by side, as tensors.

Labels stay one integer map per sample until they are on the device; `Batch.targets` expands them there. A sample's classes
fill its first columns; what is left is padding (task id -1, pair mask false). A filler sample has no valid pair at all: it
only keeps the number of forward passes equal on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hermes_dist.config import Vox3
from hermes_dist.stream.reader import Sample
from hermes_dist.tasks import TaskTable
from hermes_dist.volume import augment_device
from hermes_dist.volume.augment import Draw


@dataclass(frozen=True)
class Pending:
    """A sample whose augmentation is left to the training device: source box (Z, Y, X), draw, and the patch's place in it."""

    image: Tensor
    label: Tensor
    numbers: Draw
    patch_start_vox_zyx: Vox3

    def finish(self, device: torch.device, patch_vox_zyx: Vox3) -> tuple[Tensor, Tensor]:
        """Image and label of the patch, on the device."""
        image, label = self.image.to(device), self.label.to(device)
        return augment_device.apply(image, label, self.numbers, self.patch_start_vox_zyx, patch_vox_zyx)


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    B samples, T = most classes of any of them, V = label values. image (B, 1, Z, Y, X) float32; label (B, Z, Y, X) int16 or
    int32; class_values (B, T, V) bool: label value v belongs to column t; task_ids (B, T) int64, -1 = padding; modality_ids,
    modality_targets (-1 = not stated, or filler), dataset_ids, ignore_values (-1 = none): (B,) int64; pair_mask (B, T) bool.
    """

    image: Tensor
    label: Tensor
    class_values: Tensor
    task_ids: Tensor
    modality_ids: Tensor
    modality_targets: Tensor
    dataset_ids: Tensor
    ignore_values: Tensor
    pair_mask: Tensor
    pending: tuple[Pending, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """This batch with image and label on another device.

        Ids and masks stay on the host: whoever decides something by them (checks, sizes, rows to add to) would make the device
        wait otherwise. What the device needs of them is sent along where it is needed. What is `pending` is augmented on the
        device: before that image and label are placeholders.
        """
        if self.pending:
            patch = (int(self.label.shape[1]), int(self.label.shape[2]), int(self.label.shape[3]))
            done = [p.finish(torch.device(device), patch) for p in self.pending]
            image, label = torch.stack([image for image, _ in done])[:, None], torch.stack([label for _, label in done])
        else:
            image, label = (t.to(device, non_blocking=non_blocking) for t in (self.image, self.label))
        return replace(self, image=image, label=label, pending=())

    def targets(self) -> Tensor:
        """(B, T, Z, Y, X) bool: does the voxel belong to the class of column t? False in padding columns."""
        value = torch.arange(self.class_values.shape[2])
        width = max(int(self.class_values.sum(dim=2).max()), 1)
        # The values of each column in ascending order, -1 behind the last: mostly one, so that one comparison does it.
        ordered = torch.where(self.class_values, value, value.numel()).sort(dim=2).values[:, :, :width]
        ordered = torch.where(ordered == value.numel(), -1, ordered)[:, :, :, None, None, None]
        ordered = ordered.to(self.label.dtype).to(self.label.device, non_blocking=True)
        label = self.label[:, None]
        hit = label == ordered[:, :, 0]
        for i in range(1, width):
            hit |= label == ordered[:, :, i]
        return hit

    def valid_voxels(self) -> Tensor | None:
        """(B, Z, Y, X) bool, false where nobody annotated (the dataset's ignore value); None if no sample has one."""
        if not bool((self.ignore_values >= 0).any()):
            return None
        ignored = self.ignore_values.to(self.label.dtype).to(self.label.device, non_blocking=True)
        return self.label != ignored[:, None, None, None]


@dataclass
class StepBatch:
    """What a rank consumes in one global step.

    `pair_count` and `modality_count` are global: valid (sample, task) pairs and stated modalities of the whole step.
    `identities`, `positions` and `cases` (`dataset/case_id`) describe the real local samples in order. `wait_parts_s` sums to
    `data_wait_s`, this rank's; `data_stall_s` is the longest of all ranks', which the step waited for (the trainer fills it in).
    `unreadable` are the cases (by number over all manifests) that this rank found to be bad for the first time.
    """

    step: int
    micro_batches: list[Batch]
    pair_count: int
    modality_count: int
    identities: np.ndarray[Any, np.dtype[np.int64]]
    positions: np.ndarray[Any, np.dtype[np.int64]]
    cases: list[str] = field(default_factory=list[str])
    data_wait_s: float = 0.0
    data_stall_s: float = 0.0
    wait_parts_s: dict[str, float] = field(default_factory=dict[str, float])
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    unreadable: tuple[int, ...] = ()

    def cases_of(self, micro_batch: int) -> list[str]:
        """`dataset/case_id` of the real samples in one micro-batch."""
        real = [int(batch.pair_mask.any(dim=1).sum()) for batch in self.micro_batches[: micro_batch + 1]]
        return self.cases[sum(real[:-1]) : sum(real)]


class Collator:
    """Makes batches of samples of one task table."""

    def __init__(self, tasks: TaskTable, patch_vox_zyx: Vox3) -> None:
        self.tasks = tasks
        self.patch = patch_vox_zyx
        values = [v for d in tasks.datasets for c in d.classes for v in c.values]
        ignored = [d.ignore_value for d in tasks.datasets if d.ignore_value is not None]
        self.n_values = 1 + max([0, *values, *ignored])
        self.label_dtype = np.int16 if self.n_values <= 2**15 else np.int32
        self.pairs = np.asarray([len(d.classes) for d in tasks.datasets], np.int64)
        self.modality_targets = np.asarray([tasks.modality_target(d.modality) for d in tasks.datasets], np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """One batch; without samples one filler (zeros, the first dataset's tasks, no valid pair)."""
        chosen = [s.dataset for s in samples] or [0]
        n, width = len(chosen), int(max(self.pairs[d] for d in chosen))
        # One sample that is left to the device takes its neighbours along: they have nothing left to change.
        pending = tuple(self._pending(s) for s in samples) if any(s.numbers is not None for s in samples) else ()
        make = np.empty if samples and not pending else np.zeros
        image, label = make((n, 1, *self.patch), np.float32), make((n, *self.patch), self.label_dtype)
        class_values = np.zeros((n, width, self.n_values), bool)
        task_ids = np.full((n, width), -1, np.int64)
        for i, sample in enumerate(samples if not pending else ()):
            image[i, 0], label[i] = sample.image, self._declared(sample.label)
        for i, d in enumerate(chosen):
            for t, c in enumerate(self.tasks.datasets[d].classes):
                task_ids[i, t] = c.task_id
                class_values[i, t, list(c.values)] = True
        real = np.full(n, bool(samples))
        datasets = [self.tasks.datasets[d] for d in chosen]
        ignored = [-1 if d.ignore_value is None else d.ignore_value for d in datasets]
        return Batch(
            image=torch.from_numpy(image),
            label=torch.from_numpy(label),
            class_values=torch.from_numpy(class_values),
            task_ids=torch.from_numpy(task_ids),
            modality_ids=torch.tensor([self.tasks.modality_id(d.modality) for d in datasets], dtype=torch.int64),
            modality_targets=torch.from_numpy(np.where(real, self.modality_targets[chosen], -1)),
            dataset_ids=torch.tensor(chosen, dtype=torch.int64),
            ignore_values=torch.tensor(ignored, dtype=torch.int64),
            pair_mask=torch.from_numpy((task_ids >= 0) & real[:, None]),
            pending=pending,
        )

    def _declared(self, label: np.ndarray) -> np.ndarray:
        """Large values that belong to no class (`other_values`) as background: in `label_dtype` they may turn negative."""
        return label if label.dtype.itemsize == 1 else np.where(label < self.n_values, label, 0)

    def _pending(self, sample: Sample) -> Pending:
        image = np.require(sample.image, requirements=["C", "W"])  # arrays of the object store are read-only
        label = torch.from_numpy(self._declared(sample.label).astype(self.label_dtype))
        return Pending(torch.from_numpy(image), label, sample.numbers or Draw(), sample.patch_start)


def local_part(first: int, global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Positions [start, stop) of a rank in the global step that begins at position `first`.

    The rank-th contiguous part; parts differ by at most one.
    """
    return first + rank * global_batch // world_size, first + (rank + 1) * global_batch // world_size


def micro_batch_count(global_batch: int, world_size: int, micro_batch: int) -> int:
    """Forward passes per step: what the largest part needs, and so the same on every rank."""
    return math.ceil(math.ceil(global_batch / world_size) / micro_batch)
