"""3D convolution of stride 1 with the fast kernels of the device, also for single small maps on a CPU.

For one sample whose channels x depth x height is at most 20,480, torch leaves oneDNN for an im2col kernel: a rule for 2D images.
On 3D maps that kernel takes up to ten times as long (torch 2.13, tests/bench/test_model_convolution.py); only on the deepest maps
is it the faster one. So oneDNN is asked for by name. Its backward pass has no name: there the two halves of the map become a
batch of two, which torch accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

_aten = torch.ops.aten
_SMALL = 20_480
"""Limit of torch's rule: samples x channels x depth x height."""
_FEW_VOXELS = 512
"""On fewer voxels im2col wins."""


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channel axis innermost in memory."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast wants matrix products of `x`; its own where autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def avoids_onednn(x: Float[Tensor, "B C Z Y X"]) -> bool:
    """Would torch leave oneDNN for this map, although it is the faster one forward?"""
    return (
        x.shape[0] == 1
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[1] * x.shape[2] * x.shape[3] <= _SMALL
        and x[0, 0].numel() >= _FEW_VOXELS
        and torch.backends.mkldnn.is_available()
    )


def conv(a: Float[Tensor, "B I Z Y X"], weight: Float[Tensor, "O I k k k"]) -> Float[Tensor, "B O Z Y X"]:
    """Convolution on the same grid, without bias. Not differentiable by itself for small maps: see `Conv3d`."""
    weight = weight.to(a.dtype)
    if avoids_onednn(a):
        return _aten.mkldnn_convolution(a, weight, None, [weight.shape[-1] // 2] * 3, [1] * 3, [1] * 3, 1)
    return functional.conv3d(a, weight, padding=weight.shape[-1] // 2)


def data_gradient(
    g: Float[Tensor, "B O Z Y X"], like: Float[Tensor, "B I Z Y X"], weight: Float[Tensor, "O I k k k"]
) -> Float[Tensor, "B I Z Y X"]:
    """Gradient of the convolved map; `like` lends its shape only."""
    if avoids_onednn(like) and like.shape[2] % 2 == 0:
        return conv(g, weight.to(g.dtype).flip(2, 3, 4).transpose(0, 1).contiguous())
    ga = _backward(g, like, weight, [weight.shape[-1] // 2] * 3, (True, False))[0]
    assert ga is not None
    return ga


def weight_gradient(
    g: Float[Tensor, "B O Z Y X"], a: Float[Tensor, "B I Z Y X"], weight: Float[Tensor, "O I k k k"]
) -> Float[Tensor, "O I k k k"]:
    """Gradient of the kernel, for the convolved map `a`."""
    if avoids_onednn(a) and a.shape[2] % 2 == 0:
        return _in_two_halves(g, a, weight)
    gw = _backward(g, a, weight, [weight.shape[-1] // 2] * 3, (False, True))[1]
    assert gw is not None
    return gw


def _backward(g: Tensor, a: Tensor, weight: Tensor, pad: list[int], want: tuple[bool, bool]) -> Sequence[Tensor | None]:
    mask = [want[0], want[1], False]
    return _aten.convolution_backward(g, a, weight.to(a.dtype), None, [1] * 3, pad, [1] * 3, False, [0] * 3, 1, mask)


def _in_two_halves(
    g: Float[Tensor, "1 O Z Y X"], a: Float[Tensor, "1 I Z Y X"], weight: Float[Tensor, "O I k k k"]
) -> Float[Tensor, "O I k k k"]:
    """The sum over two halves of the map, as a batch of two: upper and lower planes with the margin that the kernel needs."""
    margin, half = weight.shape[-1] // 2, a.shape[2] // 2
    wide = functional.pad(a, (0, 0, 0, 0, margin, margin))
    halves = torch.cat([wide[:, :, : half + 2 * margin], wide[:, :, half:]])
    halves_g = torch.cat([g[:, :, :half], g[:, :, half:]])
    gw = _backward(channels_last(halves_g), channels_last(halves), weight, [0, margin, margin], (False, True))[1]
    assert gw is not None
    return gw


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return conv(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[:2]
        return data_gradient(g, x, weight) if want_x else None, weight_gradient(g, x, weight) if want_weight else None


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` without bias, of stride 1 on the same grid, that stays fast for single small maps."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)

    def forward(self, input: Float[Tensor, "B I Z Y X"]) -> Float[Tensor, "B O Z Y X"]:
        """Same grid."""
        if avoids_onednn(input) and not torch.is_autocast_enabled("cpu"):
            return _Conv.apply(input, self.weight)
        return super().forward(input)
