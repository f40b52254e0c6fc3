"""Convolution of single small maps: the numbers of torch's own, in double precision, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hermes_dist.models.convolution import Conv3d, avoids_onednn, conv, data_gradient, weight_gradient


@pytest.mark.parametrize("sides", [(8, 8, 8), (9, 7, 10), (32, 16, 16), (4, 4, 4)])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [(1, 8), (16, 8), (96, 4)])
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_torch_in_double_precision(
    batch: int, channels: tuple[int, int], kernel: int, sides: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels[0], *sides, generator=generator).contiguous(memory_format=torch.channels_last_3d)
    module = Conv3d(*channels, kernel)
    weight = module.weight.detach().double().requires_grad_()
    exact_x = x.double().requires_grad_()
    x.requires_grad_()
    out, exact = module(x), functional.conv3d(exact_x, weight, padding=kernel // 2)
    g = torch.randn(out.shape, generator=generator)
    out.backward(g)
    exact.backward(g.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-3)
    # What is asked for outside autograd is the same.
    torch.testing.assert_close(conv(x.detach(), module.weight.detach()), out.detach(), rtol=1e-5, atol=1e-6)
    gx = data_gradient(g, torch.empty_like(x), module.weight.detach())
    torch.testing.assert_close(gx, x.grad, rtol=1e-4, atol=1e-5)
    gw = weight_gradient(g, x.detach(), module.weight.detach())
    torch.testing.assert_close(gw, module.weight.grad, rtol=1e-4, atol=1e-4)


def test_only_single_small_maps_take_the_detour() -> None:
    assert avoids_onednn(torch.empty(1, 8, 32, 32, 32))
    assert not avoids_onednn(torch.empty(2, 8, 32, 32, 32))
    assert not avoids_onednn(torch.empty(1, 32, 32, 32, 32))
    assert not avoids_onednn(torch.empty(1, 320, 4, 4, 4))
    assert not avoids_onednn(torch.empty(1, 8, 32, 32, 32, dtype=torch.bfloat16))


def test_autocast_decides_the_type() -> None:
    module = Conv3d(8, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(1, 8, 16, 16, 16)).dtype == torch.bfloat16
