from __future__ import annotations

import math
from itertools import pairwise

import pytest

from hermes_dist.config import OptimizerConfig
from hermes_dist.train.schedule import learning_rate


def test_published_schedule_at_epoch_starts():
    """Values of the released Hermes-R at e = 0..5 and after, with one step an epoch (200 epochs, 5 of warm-up)."""
    config = OptimizerConfig(lr=2e-3, schedule="polynomial", warmup_fraction=5 / 200)
    found = [learning_rate(e, 200, config) for e in (0, 1, 2, 3, 4)]
    assert found == pytest.approx([9.1e-8, 6.7e-7, 5.0e-6, 3.7e-5, 2.7e-4], rel=0.02)
    assert learning_rate(100, 200, config) == pytest.approx(2e-3 * 0.5**0.9)


def test_exponential_falls_from_the_peak_to_the_final_ratio_by_a_constant_factor():
    config = OptimizerConfig(lr=1.0, schedule="exponential", warmup_fraction=0.1, final_lr_ratio=0.01)
    values = [learning_rate(s, 100, config) for s in range(10, 100)]
    assert values[0] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.01)
    ratios = [b / a for a, b in pairwise(values)]
    assert max(ratios) - min(ratios) < 1e-9


@pytest.mark.parametrize("schedule", ["exponential", "polynomial", "constant"])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 50])
def test_every_step_has_a_positive_finite_rate(schedule, max_steps):
    config = OptimizerConfig(lr=1e-3, schedule=schedule)
    for step in range(max_steps):
        assert 0 < learning_rate(step, max_steps, config) <= 1e-3
        assert math.isfinite(learning_rate(step, max_steps, config))
