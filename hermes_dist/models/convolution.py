"""3D convolution of stride 1 with the fast kernels of the device, also for single small maps on a CPU.

For one sample whose channels x depth x height is at most 20,480, torch leaves oneDNN for an im2col kernel: a rule for 2D images.
On 3D maps that kernel takes 1.3 to 14 times as long forward, and up to 6 times with the backward pass (torch 2.13, 8 to 128
channels, 8^3 to 32^3 voxels, 1 and 2 threads); only on the deepest maps is it the faster one. So oneDNN is asked for by name. Its
backward pass has no name: there a sample of zeros makes the batch two, which torch accepts.
"""

from __future__ import annotations

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
_MANY_CHANNELS = 80
"""Where im2col wins: forward on fewer voxels, backward also with more channels (the zeros double its work)."""


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


def conv_backward(
    g: Float[Tensor, "B O Z Y X"], a: Float[Tensor, "B I Z Y X"], weight: Float[Tensor, "O I k k k"], want: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `a` and of the weight, each where wanted."""
    single = avoids_onednn(a) and a.shape[1] <= _MANY_CHANNELS
    if single:
        a, g = (torch.cat([x, torch.zeros_like(x)]) for x in (a, g))
    pad = [weight.shape[-1] // 2] * 3
    ga, gw, _ = _aten.convolution_backward(
        g, a, weight.to(a.dtype), None, [1] * 3, pad, [1] * 3, False, [0] * 3, 1, [want[0], want[1], False]
    )
    return (ga[:1] if single and ga is not None else ga), gw


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return conv(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return conv_backward(g, x, weight, ctx.needs_input_grad[:2])


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` without bias, of stride 1 on the same grid, that stays fast for single small maps."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)

    def forward(self, input: Float[Tensor, "B I Z Y X"]) -> Float[Tensor, "B O Z Y X"]:
        """Same grid."""
        if avoids_onednn(input) and not torch.is_autocast_enabled("cpu"):
            return _Conv.apply(input, self.weight)
        return super().forward(input)
