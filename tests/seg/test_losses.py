"""Pair losses against the formulas written plainly, with gradients; empty labels; ignored voxels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hermes_dist.seg.losses import OverlapKind, pair_losses

SHAPE = (2, 3, 4, 5, 6)


def plain(logits: Tensor, targets: Tensor, valid: Tensor | None, overlap: str) -> tuple[Tensor, Tensor]:
    """The definitions of facts 3.1, by autograd."""
    y = targets.to(logits.dtype)
    v = torch.ones_like(logits) if valid is None else valid[:, None].to(logits.dtype).expand_as(logits)
    axes = (2, 3, 4)
    bce = (functional.binary_cross_entropy_with_logits(logits, y, reduction="none") * v).sum(axes) / v.sum(axes)
    p = logits.sigmoid() * v
    y = y * v
    tp, fp, fn = (p * y).sum(axes), (p * (1 - y)).sum(axes), ((v - p) * y).sum(axes)
    if overlap == "dice":
        return bce, 1 - (2 * tp + 1e-6) / (p.sum(axes) + y.sum(axes) + 1e-6)
    alpha = (fp / (fp + fn + 1e-6)).clamp(0.2, 0.8)
    return bce, 1 - tp / (tp + alpha * fp + (1 - alpha) * fn + 1e-6)


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE, generator=generator) * 3
    targets = torch.rand(SHAPE, generator=generator) > 0.6
    valid = torch.rand((SHAPE[0], *SHAPE[2:]), generator=generator) > 0.3
    return logits, targets, valid


@pytest.mark.parametrize("overlap", ["dice", "tversky"])
@pytest.mark.parametrize("ignore", [False, True])
def test_values_and_gradients_equal_the_plain_formula(overlap: OverlapKind, ignore: bool) -> None:
    logits, targets, mask = case()
    valid = mask if ignore else None
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = pair_losses(one, targets, valid, overlap), plain(other, targets, valid, overlap)
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(5))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    ((found[0] + 2 * found[1]) * weights).sum().backward()
    ((expected[0] + 2 * expected[1]) * weights).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_integer_float_and_bool_targets_are_the_same() -> None:
    logits, targets, _ = case()
    for a, b in zip(pair_losses(logits, targets), pair_losses(logits, targets.float()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_ignored_voxels_change_nothing() -> None:
    logits, targets, valid = case()
    changed = torch.where(valid[:, None], logits, torch.full_like(logits, 37.0))
    flipped = torch.where(valid[:, None], targets, ~targets)
    for a, b in zip(pair_losses(logits, targets, valid), pair_losses(changed, flipped, valid), strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_label_teaches_absence_by_dice_and_nothing_by_tversky() -> None:
    logits = torch.zeros(1, 1, 4, 4, 4, requires_grad=True)
    empty = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    _, tversky = pair_losses(logits, empty, overlap="tversky")
    (gradient,) = torch.autograd.grad(tversky.sum(), logits)
    assert tversky.item() == 1.0
    assert not gradient.any()
    _, dice = pair_losses(logits, empty, overlap="dice")
    assert dice.item() == pytest.approx(1.0)
    very_sure = torch.full_like(logits, -60.0)
    assert pair_losses(very_sure, empty, overlap="dice")[1].item() == pytest.approx(0.0, abs=1e-4)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([-1e4, 1e4]).view(1, 1, 1, 1, 2).requires_grad_()
    bce, dice = pair_losses(logits, torch.tensor([True, False]).view(1, 1, 1, 1, 2))
    (bce + dice).sum().backward()
    assert bce.item() == pytest.approx(1e4)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_half_precision_logits_have_float32_losses() -> None:
    logits, targets, _ = case()
    low = logits.bfloat16().requires_grad_()
    bce, dice = pair_losses(low, targets)
    (bce + dice).sum().backward()
    assert bce.dtype == dice.dtype == torch.float32
    torch.testing.assert_close(bce.detach(), plain(logits, targets, None, "dice")[0], atol=2e-2, rtol=2e-2)
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
