"""Learning rate as a pure function of the step, so that it needs no state and cannot disagree after a resume."""

from __future__ import annotations

import math

from hermes_dist.config import OptimizerConfig


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of a step, 0 ≤ step < max_steps.

    Warm-up: peak · exp(10 (step/warm − 1)), the published exponential-shaped ramp. After it, the polynomial schedule is
    peak · (1 − step/max_steps)^0.9 counted from step 0 as published; the exponential one (paper) falls from the peak to
    `final_lr_ratio` of it at the last step.
    """
    warm = round(config.warmup_fraction * max_steps)
    if step < warm:
        return config.lr * math.exp(10 * (step / warm - 1))
    if config.schedule == "polynomial":
        return config.lr * (1 - step / max_steps) ** 0.9
    if config.schedule == "exponential":
        return config.lr * config.final_lr_ratio ** ((step - warm) / max(max_steps - 1 - warm, 1))
    return config.lr
