"""Binary cross entropy and overlap loss per (sample, task) pair (facts 3.1); the caller reduces them over the valid pairs.

Both terms come from one pass over the logits and keep nothing but them for the backward pass: the gradients of all sums are
elementwise in p = sigmoid(logit), so p is redone.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

OverlapKind = Literal["dice", "tversky"]
SMOOTH = 1e-6


class _PairSums(Function):
    """Per pair: mean BCE over the valid voxels, sum(p y), sum(p), over the valid voxels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        flat_valid = None if valid is None else valid.flatten(1)
        counts = _valid_counts(logits, flat_valid)
        bces, tps, ps = [], [], []
        for t in range(logits.shape[1]):
            x, y = logits[:, t].flatten(1).float(), targets[:, t].flatten(1).float()
            bce = functional.binary_cross_entropy_with_logits(x, y, reduction="none")
            p = x.sigmoid()
            if flat_valid is not None:
                bce, p = bce * flat_valid, p * flat_valid
            bces.append(bce.sum(1) / counts)
            tps.append((p * y).sum(1))
            ps.append(p.sum(1))
        ctx.save_for_backward(logits, targets, valid, counts)
        return torch.stack(bces, 1), torch.stack(tps, 1), torch.stack(ps, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_bce: Tensor, g_tp: Tensor, g_p: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, valid, counts = ctx.saved_tensors
        grad = torch.empty_like(logits)
        flat_valid = None if valid is None else valid.flatten(1)
        for t in range(logits.shape[1]):
            p, y = logits[:, t].flatten(1).float().sigmoid(), targets[:, t].flatten(1).float()
            slope = p * (1 - p) * torch.addcmul(g_p[:, t, None], y, g_tp[:, t, None])
            g = (p - y).mul_((g_bce[:, t] / counts)[:, None]).add_(slope)
            if flat_valid is not None:
                g = g * flat_valid
            grad[:, t] = g.view_as(grad[:, t])
        return grad, None, None


def pair_losses(
    logits: Float[Tensor, "B T Z Y X"],
    targets: Float[Tensor, "B T Z Y X"] | Bool[Tensor, "B T Z Y X"],
    valid_voxels: Bool[Tensor, "B Z Y X"] | None = None,
    overlap: OverlapKind = "dice",
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Losses of every pair in float32, not reduced.

    BCE is the mean over the valid voxels. `dice`: 1 - 2 TP / (sum p + sum y), smoothed by 1e-6 in both, so that an empty label
    pushes p to zero. `tversky`: as published, the score is TP / (TP + α FP + β FN + 1e-6) with
    α = clamp(FP / (FP + FN + 1e-6), 0.2, 0.8), not detached, β = 1 - α; an empty label gives loss 1 and gradient 0.

    Args:
        logits: one map per pair.
        targets: its label, 0 or 1.
        valid_voxels: voxels that count (None = all); a sample without any has losses without gradient.
        overlap: which overlap term.
    """
    sums: tuple[Tensor, Tensor, Tensor] = _PairSums.apply(logits, targets, valid_voxels)
    bce, tp, sum_p = sums
    counted = targets if valid_voxels is None else targets * valid_voxels[:, None]
    sum_y = counted.flatten(2).sum(2, dtype=torch.float32)
    if overlap == "dice":
        return bce, 1 - (2 * tp + SMOOTH) / (sum_p + sum_y + SMOOTH)
    fp, fn = sum_p - tp, sum_y - tp
    alpha = (fp / (fp + fn + SMOOTH)).clamp(0.2, 0.8)
    return bce, 1 - tp / (tp + alpha * fp + (1 - alpha) * fn + SMOOTH)


def _valid_counts(logits: Tensor, flat_valid: Tensor | None) -> Tensor:
    voxels = logits[0, 0].numel()
    if flat_valid is None:
        return torch.full((logits.shape[0],), float(voxels), device=logits.device)
    return flat_valid.sum(1, dtype=torch.float32).clamp(min=1)
