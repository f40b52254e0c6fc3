"""How often the bootstrap's 95 % intervals hold the true exponents: synthetic runs of a known law with 1 % noise.

pytest tests/bench/test_law_coverage.py -m bench -s
"""

from __future__ import annotations

import pytest

from hermes_dist.scaling.laws import LawFit, fit_law
from tests.scaling.test_laws import TRUTH, runs_of

SEEDS = 20


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_intervals_hold_the_truth_about_as_often_as_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    held, errors = {"alpha": 0, "beta": 0, "E": 0}, []
    for seed in range(SEEDS):
        fit = fit_law(runs_of(TRUTH, 0.01, seed), bootstrap=60, seed=seed)
        assert isinstance(fit, LawFit)
        errors.append(fit.held_out_error or 0.0)
        for name in held:
            held[name] += getattr(fit.low, name) <= getattr(TRUTH, name) <= getattr(fit.high, name)
    shares = ", ".join(f"{name} {count}/{SEEDS}" for name, count in held.items())
    with capsys.disabled():
        print(f"\n95 % intervals over {SEEDS} sets hold the truth: {shares}; largest runs within {max(errors):.1%}")
    assert min(held.values()) >= 0.7 * SEEDS
