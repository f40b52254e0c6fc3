"""One training step as arithmetic: what the model is asked, the loss with its global normalisation, and what is logged.

The loss is normalised by the *global* number of (sample, task) pairs, which the plan knows in advance, so gradients are
those of one process with the whole batch whatever the world size, the micro-batch and the placement of samples.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hermes_dist.config import LossConfig
from hermes_dist.models.output import ModelOutput
from hermes_dist.seg.losses import pair_losses
from hermes_dist.stream.batch import Batch, StepBatch
from hermes_dist.train.record import LossSums


def ask(module: nn.Module, image: Tensor, task_ids: Tensor, modality_ids: Tensor, *, null_column: bool) -> ModelOutput:
    """Run the model; `null_column` adds the one padding column that the published reading always attends to.

    Shapes: image (B, 1, Z, Y, X), task_ids (B, T) with −1 padding, modality_ids (B,) → mask_logits (B, T, Z, Y, X).
    """
    if not null_column:
        return module(image, task_ids, modality_ids)
    columns = task_ids.shape[1]
    output: ModelOutput = module(image, functional.pad(task_ids, (0, 1), value=-1), modality_ids)
    aux = None if output.aux_logits is None else output.aux_logits[:, :columns]
    return ModelOutput(output.mask_logits[:, :columns], aux, output.modality_logits)


class StepLoss:
    """Loss of the micro-batches of one global step. Calling it returns this rank's share; the shares of all ranks add up."""

    def __init__(self, config: LossConfig, batch: StepBatch, sums: LossSums, *, null_column: bool) -> None:
        self._config, self._batch, self._sums, self._null_column = config, batch, sums, null_column

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """Normalised loss of one micro-batch (a scalar).

        L = Σ_pairs (BCE + overlap) / pairs + λ · Σ_samples CE / samples, pairs and samples counted over the global batch
        (paper, section 3.4; Hermes-M shares the first term between its main and auxiliary heads).
        """
        output = ask(module, batch.image, batch.task_ids, batch.modality_ids, null_column=self._null_column)
        targets, valid = batch.targets(), batch.valid_voxels()
        overlap = self._config.overlap or "dice"
        mask = batch.pair_mask.to(targets.device, non_blocking=True)
        bce, dice = pair_losses(output.mask_logits, targets, valid, overlap=overlap)
        pairs = bce + dice
        if output.aux_logits is not None:
            aux_bce, aux_dice = pair_losses(output.aux_logits, targets, valid, overlap=overlap)
            weight = self._config.auxiliary_weight
            pairs = (1 - weight) * pairs + weight * (aux_bce + aux_dice)
        loss = torch.where(mask, pairs, 0.0).sum() / max(self._batch.pair_count, 1)
        modality = loss.new_zeros(())
        if output.modality_logits is not None and self._config.modality_weight:
            modality = functional.cross_entropy(
                output.modality_logits.float(),
                batch.modality_targets.to(targets.device, non_blocking=True),
                ignore_index=-1,
                reduction="sum",
            )
            loss = loss + self._config.modality_weight * modality / max(self._batch.modality_count, 1)
        present = targets.flatten(2).any(dim=2)
        self._sums.add(batch.dataset_ids, batch.pair_mask, torch.stack([bce, dice, pairs]).detach(), present)
        self._sums.modality += modality.detach().double()
        return loss


def chain_hash(previous: str, positions: np.ndarray, identities: np.ndarray) -> str:
    """Running hash over the samples consumed, in global order.

    Args:
        previous: hex digest after the step before ("" at the start).
        positions: (N,) int64 global positions of the step's samples, any order.
        identities: (N,) int64 digests of (dataset, case, crop) in the same order.

    The value is the same for every world size, since it is taken over all ranks' samples sorted by position.
    """
    order = np.argsort(positions, kind="stable")
    rows = np.stack([positions[order], identities[order]], axis=1).astype("<i8")
    return hashlib.blake2b(bytes.fromhex(previous) + rows.tobytes(), digest_size=16).hexdigest()
