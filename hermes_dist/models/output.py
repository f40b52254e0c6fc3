"""What every model returns, whatever its method."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """One logit map per asked task (a column), independent of the other columns' classes.

    A NamedTuple, so that DeepSpeed's hooks and torch's checkpointing find the tensors in it.
    """

    mask_logits: Tensor
    """(B, T, Z, Y, X): one binary logit map per column of `task_ids`; columns of id -1 hold finite, meaningless numbers."""
    aux_logits: Tensor | None
    """The same from the auxiliary head at 4x (Hermes-M), or None."""
    modality_logits: Tensor | None
    """(B, M) over the modalities of the task table, or None where the model has no modality prior."""
