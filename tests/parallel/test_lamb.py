"""LAMB against the formula written tensor by tensor in float64; options; pieces of flat buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hermes_dist.parallel.lamb import Lamb, _norms
from hermes_dist.parallel.partition import FlatBuffer, Partition, Segment
from tests.multiproc.toy import reference_lamb

SHAPES = [(1,), (3,), (7, 5), (2, 3, 2, 1, 3), (600, 500)]


def whole_partition(params: dict[str, Tensor]) -> Partition:
    buffers = tuple(FlatBuffer(p, p.detach().view(-1), (Segment(n, 0, 0, p.numel()),)) for n, p in params.items())
    return Partition(buffers, (), {n: p.shape for n, p in params.items()}, tuple(params), True, lambda: None, lambda: None)


def flat_partition(params: dict[str, Tensor]) -> tuple[Tensor, Partition]:
    """All tensors one after another in one buffer, with padding at its end, as ZeRO keeps them."""
    flat = torch.cat([*(p.detach().view(-1) for p in params.values()), torch.zeros(3)]).requires_grad_()
    segments, offset = [], 0
    for name, p in params.items():
        segments.append(Segment(name, 0, offset, p.numel()))
        offset += p.numel()
    buffer = FlatBuffer(flat, flat.detach(), tuple(segments))
    return flat, Partition(
        (buffer,), (), {n: p.shape for n, p in params.items()}, tuple(params), True, lambda: None, lambda: None
    )


def make_params(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(s, generator=generator).requires_grad_() for i, s in enumerate(SHAPES)}


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator) * 10.0 ** (step % 3 - 1) for s in SHAPES]


@pytest.mark.parametrize("decay", [0.05, 1e-5])
def test_equals_the_formula(decay: float) -> None:
    params, want = make_params(), list(make_params().values())
    moments = [(torch.zeros(p.shape, dtype=torch.float64), torch.zeros(p.shape, dtype=torch.float64)) for p in want]
    lamb = Lamb(list(params.values()), lr=0.0, eps=1e-5, weight_decay=decay)
    lamb.bind(whole_partition(params))
    for step in range(5):
        for p, q, g in zip(params.values(), want, gradients(step), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        lamb.param_groups[0]["lr"] = 0.01 * (step + 1)
        lamb.step()
        ratios = reference_lamb(want, moments, step=step + 1, lr=0.01 * (step + 1), eps=1e-5, decay=decay)
        assert lamb.ratios is not None
        # The formula runs in float64; float32 moments cancel in a tensor of one element, whose ratio then keeps four digits.
        np.testing.assert_allclose(lamb.ratios[:1], ratios[:1], rtol=2e-4)
        np.testing.assert_allclose(lamb.ratios[1:], ratios[1:], rtol=1e-5)
    for p, q in zip(params.values(), want, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 300_001])
def test_norms_of_nearly_equal_entries_keep_six_digits(n: int) -> None:
    """What an update looks like in the first steps; equal squares round alike, so that errors add up."""
    update = 0.9999 * (1 + 1e-4 * torch.rand(n, generator=torch.Generator().manual_seed(0)))
    (found,) = _norms([update])
    assert float(found) == pytest.approx(float(update.double().square().sum().sqrt()), rel=1e-6)


def test_flat_buffer_gives_the_same_bits_of_ratios_and_leaves_padding_alone() -> None:
    params = make_params()
    flat, partition = flat_partition(make_params())
    one, other = Lamb(list(params.values()), lr=0.1, weight_decay=0.01), Lamb([flat], lr=0.1, weight_decay=0.01)
    one.bind(whole_partition(params))
    other.bind(partition)
    for step in range(3):
        for p, g in zip(params.values(), gradients(step), strict=True):
            p.grad = g.clone()
        flat.grad = torch.cat([*(g.view(-1) for g in gradients(step)), torch.zeros(3)])
        one.step()
        other.step()
        assert one.ratios is not None
        assert other.ratios is not None
        torch.testing.assert_close(one.ratios, other.ratios, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.cat([p.detach().view(-1) for p in params.values()]), flat.detach()[:-3], rtol=1e-5, atol=1e-7
    )
    assert not flat.detach()[-3:].any()


def test_zero_norm_has_ratio_one() -> None:
    p = torch.zeros(4).requires_grad_()
    lamb = Lamb([p], lr=0.5, weight_decay=0.01)
    lamb.bind(whole_partition({"p": p}))
    p.grad = torch.ones(4)
    lamb.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.5), rtol=1e-4, atol=0)


def test_a_tensor_without_decay_has_no_trust_ratio_as_in_apex() -> None:
    params = {"w": torch.full((4,), 2.0).requires_grad_(), "bias": torch.full((4,), 2.0).requires_grad_()}
    lamb = Lamb(list(params.values()), lr=0.1, eps=1e-8, weight_decay=0.1, decays=lambda name: name != "bias")
    lamb.bind(whole_partition(params))
    for p in params.values():
        p.grad = torch.ones(4)
    lamb.step()
    torch.testing.assert_close(params["bias"].detach(), torch.full((4,), 1.9))
    # u = 1 + 0.1·2, ratio 2/1.2: the step is lr·‖w‖ = 0.2 per element.
    torch.testing.assert_close(params["w"].detach(), torch.full((4,), 1.8))


def test_ratios_can_be_clamped() -> None:
    p = torch.full((4,), 100.0).requires_grad_()
    lamb = Lamb([p], lr=0.1, weight_decay=1e-9, max_ratio=10.0)
    lamb.bind(whole_partition({"p": p}))
    p.grad = torch.ones(4)
    lamb.step()
    assert lamb.ratios is not None
    assert float(lamb.ratios[0]) == 10.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 99))
def test_pieces_on_several_owners_sum_to_whole_norms(sizes: list[int], world_size: int, seed: int) -> None:
    """Squares of pieces, summed over simulated ranks, are those of whole tensors: any sizes, any cut."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(n, generator=generator) for n in sizes]
    flat = torch.cat(values)
    part = -(-flat.numel() // world_size)
    owners = torch.arange(flat.numel()) // part
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    total = torch.zeros(len(sizes), dtype=torch.float64)
    for rank in range(world_size):
        for t in range(len(sizes)):
            piece = flat[(owners == rank) & (tensor_of == t)]
            total[t] += piece.norm().double() ** 2
    torch.testing.assert_close(total, torch.stack([v.double().square().sum() for v in values]), rtol=1e-5, atol=1e-10)
