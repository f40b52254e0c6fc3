"""Convolution of single small maps: ours over torch's own, wall seconds on an idle machine, by voxels, channels and threads.

pytest tests/bench/test_model_convolution.py -m bench -s
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional

from hermes_dist.models.convolution import Conv3d, avoids_onednn, channels_last

SIDES = (8, 16, 32)
CHANNELS = (8, 16, 32, 64, 128, 256)
REPEATS = 5


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of the convolution."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def best_s(call: Callable[[], object]) -> float:
    """The fastest of REPEATS, after a warm-up."""
    call()
    times: list[float] = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_single_small_maps(threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"\n{threads} thread(s), 3x3x3:", "| voxels | channels | forward | forward and backward |", "|---|---|---|---|"]
    ratios: dict[tuple[int, int], tuple[float, float]] = {}
    for side in SIDES:
        for channels in CHANNELS:
            x = channels_last(torch.randn(1, channels, side, side, side)).requires_grad_()
            if not avoids_onednn(x):
                continue
            module, g = Conv3d(channels, channels, 3), channels_last(torch.randn_like(x))

            def torch_own(x: torch.Tensor = x, module: Conv3d = module) -> torch.Tensor:
                return functional.conv3d(x, module.weight, padding=1)

            forward = best_s(lambda: module(x)) / best_s(torch_own)  # noqa: B023
            both = best_s(lambda: module(x).backward(g)) / best_s(lambda: torch_own().backward(g))  # noqa: B023
            ratios[side, channels] = forward, both
            lines.append(f"| {side}³ | {channels} | {forward:.2f} | {both:.2f} |")
    with capsys.disabled():
        print("\n".join(lines))
    assert all(forward < 0.6 and both < 0.6 for (side, _), (forward, both) in ratios.items() if side >= 16)
