"""Task and modality ids of a batch: checked once, with the padding made explicit.

Ids may stay on the host while the image is on an accelerator: then the checks, and the choice of an attention kernel without a
mask, cost no device synchronisation. Ids on the device are read back once per forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hermes_dist.errors import ModelError


class Columns(NamedTuple):
    """Checked ids on the image's device."""

    task_ids: Int[Tensor, "B T"]
    """-1 marks a padding column."""
    modality_ids: Int[Tensor, " B"]
    real: Bool[Tensor, "B T"] | None
    """False in padding columns; None if there is none, so that attention needs no mask."""


def check_columns(
    task_ids: Int[Tensor, "B T"],
    modality_ids: Int[Tensor, " B"],
    *,
    n_tasks: int,
    modality_range: tuple[int, int] | None,
    device: torch.device,
) -> Columns:
    """Check both id tensors on the host and move them to `device`.

    Args:
        task_ids: global task ids, -1 = padding column.
        modality_ids: rows of the modality prior table.
        n_tasks: rows of the task prior table.
        modality_range: first and last valid modality id, or None where the model does not look at modalities.
        device: where the image is.

    Raises:
        ModelError: an id outside its table, or no column at all; names the first offending sample.
    """
    if task_ids.shape[1] == 0:
        raise ModelError("task_ids has no column: ask for at least one task")
    host_tasks, host_modalities = task_ids.tolist(), modality_ids.tolist()
    for sample, (row, modality) in enumerate(zip(host_tasks, host_modalities, strict=True)):
        wrong = [i for i in row if not -1 <= i < n_tasks]
        if wrong:
            raise ModelError(
                f"task_ids[{sample}] = {row}: {wrong[0]} is not a task of this model; expected 0 to {n_tasks - 1}, "
                "or -1 for padding"
            )
        if modality_range is not None and not modality_range[0] <= modality <= modality_range[1]:
            low, high = modality_range
            raise ModelError(f"modality_ids[{sample}] = {modality} is not a modality of this model; expected {low} to {high}")
    moved = task_ids.to(device, non_blocking=True)
    padded = any(i < 0 for row in host_tasks for i in row)
    return Columns(moved, modality_ids.to(device, non_blocking=True), moved >= 0 if padded else None)
