"""The average of each piece is the piece of the average."""

from __future__ import annotations

import torch

from hermes_dist.parallel.ema import Ema
from tests.parallel.test_lamb import flat_partition, make_params


def test_equals_the_plain_average() -> None:
    flat, partition = flat_partition(make_params())
    ema = Ema(partition, 0.9)
    want = flat.detach().clone()
    for update in range(30):
        flat.data += torch.randn(flat.shape, generator=torch.Generator().manual_seed(update))
        ema.update()
        decay = min(1 - 1 / (update + 1), 0.9)
        want = decay * want + (1 - decay) * flat.detach()
    # Weights of order sqrt(30) here: 30 float32 roundings of that size.
    torch.testing.assert_close(ema.averages[0], want, rtol=1e-6, atol=1e-6 * float(flat.detach().abs().max()))


def test_the_first_update_takes_the_weights_over() -> None:
    flat, partition = flat_partition(make_params())
    ema = Ema(partition, 0.99)
    flat.data.mul_(3.0)
    ema.update()
    assert torch.equal(ema.averages[0], flat.detach())


def test_reset() -> None:
    flat, partition = flat_partition(make_params())
    ema = Ema(partition, 0.99)
    ema.update()
    flat.data.zero_()
    ema.reset()
    assert ema.updates == 0
    assert not ema.averages[0].any()
