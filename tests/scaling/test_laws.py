"""The law's fit: exact data, noise, outliers, held-out runs, a slow reference solver, and the refusal to guess."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares, nnls

from hermes_dist.scaling.curves import gain, gains_of, size_curves
from hermes_dist.scaling.laws import HUBER, Law, LawFit, NotEnoughPoints, Run, _non_negative, fit_law

SIZES = (1e5, 3e5, 1e6, 3e6, 1e7)
BUDGETS = (500.0, 2_000.0, 8_000.0, 32_000.0)
TRUTH = Law(0.2, 40.0, 12.0, 0.4, 0.5)
CHINCHILLA = Law(1.82, 482.01, 2085.43, 0.3478, 0.3658)
"""Epoch AI's re-fit of the Chinchilla data (arXiv 2404.10102)."""


def runs_of(
    law: Law, noise: float = 0.0, seed: int = 0, sizes: tuple[float, ...] = SIZES, budgets: tuple[float, ...] = BUDGETS
) -> list[Run]:
    rng = np.random.default_rng(seed)
    return [Run(n, d, float(law.loss(n, d)) * math.exp(noise * rng.normal())) for n in sizes for d in budgets]


def fitted(runs: list[Run], **options: int) -> LawFit:
    fit = fit_law(runs, **{"bootstrap": 20, **options})  # type: ignore[arg-type]
    assert isinstance(fit, LawFit)
    return fit


@settings(max_examples=6, deadline=None)
@given(alpha=st.floats(0.15, 1.2), beta=st.floats(0.15, 1.2), floor=st.floats(0.05, 0.5))
def test_exact_data_give_the_exact_law(alpha: float, beta: float, floor: float) -> None:
    truth = Law(floor, 0.5 * 1e6**alpha, 0.5 * 4e3**beta, alpha, beta)
    law = fitted(runs_of(truth), bootstrap=1).law
    assert [law.E, law.alpha, law.beta] == pytest.approx([floor, alpha, beta], rel=0.02, abs=2e-3)


@pytest.mark.parametrize("seed", range(2))
def test_noisy_data_recover_the_exponents_within_the_intervals(seed: int) -> None:
    """95 % intervals: the truth lies inside (with a margin, since two seeds × two exponents will miss one now and then)."""
    fit = fitted(runs_of(TRUTH, 0.01, seed), bootstrap=60)
    for name in ("alpha", "beta"):
        low, high, true = (getattr(w, name) for w in (fit.low, fit.high, TRUTH))
        assert low - 0.05 <= true <= high + 0.05
    assert fit.relative_error < 0.02
    assert fit.held_out_error is not None
    assert fit.held_out_error < 0.1


def test_the_published_chinchilla_refit_is_recovered_from_runs_of_that_law() -> None:
    """The digitised runs are not at hand; runs drawn from the published law, at its sizes and with its noise, are."""
    sizes = tuple(np.geomspace(5e7, 1.6e10, 12))
    budgets = tuple(np.geomspace(2e9, 3e11, 8))
    fit = fitted(runs_of(CHINCHILLA, 0.003, 1, sizes, budgets), bootstrap=60)
    assert fit.low.alpha <= CHINCHILLA.alpha <= fit.high.alpha
    assert fit.low.beta <= CHINCHILLA.beta <= fit.high.beta
    assert pytest.approx(CHINCHILLA.E, abs=0.05) == fit.law.E
    assert not fit.warnings


def test_the_optimum_of_the_refit_is_about_twenty_tokens_per_parameter() -> None:
    parameters, tokens = CHINCHILLA.optimum(5.76e23, 6.0)
    assert 15 < tokens / parameters < 32
    assert 6 * parameters * tokens == pytest.approx(5.76e23)


def test_the_optimum_is_the_minimum_along_constant_compute() -> None:
    parameters, samples = TRUTH.optimum(1e12, 2.0)
    around = [float(TRUTH.loss(parameters * f, samples / f)) for f in (0.8, 0.99, 1.0, 1.01, 1.25)]
    assert min(around) == around[2]


def test_a_run_that_went_wrong_does_not_bend_the_law() -> None:
    runs = runs_of(TRUTH, 0.002)
    runs[7] = Run(runs[7].parameters, runs[7].samples, 3 * runs[7].loss)
    law = fitted(runs).law
    assert [law.alpha, law.beta] == pytest.approx([TRUTH.alpha, TRUTH.beta], rel=0.15)


def test_variable_projection_agrees_with_a_plain_five_parameter_search() -> None:
    runs = runs_of(TRUTH, 0.01, 5)
    data = np.array([(r.parameters, r.samples, r.loss) for r in runs])

    def residuals(x: np.ndarray) -> np.ndarray:
        E, a, b = np.exp(x[:3])
        return (E + a * (data[:, 0] / 1e6) ** -x[3] + b * (data[:, 1] / 4e3) ** -x[4]) / data[:, 2] - 1

    def huber(z: np.ndarray) -> np.ndarray:
        root = np.sqrt(z)
        return np.stack(
            [np.where(root <= 1, z, 2 * root - 1), np.where(root <= 1, 1, 1 / root), np.where(root <= 1, 0, -0.5 * z**-1.5)]
        )

    found = least_squares(residuals, [np.log(0.2), np.log(0.15), np.log(0.2), 0.4, 0.5], loss=huber, f_scale=HUBER, xtol=1e-12)
    law = fitted(runs).law
    assert [law.E, law.alpha, law.beta] == pytest.approx([np.exp(found.x[0]), found.x[3], found.x[4]], rel=0.02)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_the_inner_solver_agrees_with_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns, weights = rng.random((9, 3)) * rng.choice([-1, 1], 3), rng.random(9)
    root = np.sqrt(weights)
    expected, _ = nnls(root[:, None] * columns, root)
    assert _non_negative(columns, weights) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        (runs_of(TRUTH)[:6], "6 finished runs"),
        (runs_of(TRUTH, sizes=(1e5, 1e6)), "2 different model sizes"),
        (runs_of(TRUTH, budgets=(500.0, 2_000.0)), "2 different data budgets"),
        ([Run(n, d, math.nan) for n in SIZES for d in BUDGETS], "0 finished runs"),
    ],
)
def test_not_enough_points_is_said_instead_of_a_line(runs: list[Run], reason: str) -> None:
    fit = fit_law(runs)
    assert isinstance(fit, NotEnoughPoints)
    assert reason in fit.reason


def test_an_undetermined_exponent_is_named() -> None:
    """Size does not matter in these runs: A ≈ 0, so alpha says nothing, and the fit says so."""
    fit = fitted(runs_of(Law(0.3, 0.0, 12.0, 0.4, 0.5), 0.02))
    assert fit.warnings


def test_curves_of_methods_by_size() -> None:
    """Universal runs know all datasets; a traditional score is put together from runs of one dataset each."""

    def row(method: str, parameters: float, seed: int, **dice: float | None) -> dict[str, Any]:
        return {"method": method, "backbone_parameters": parameters, "seed": seed, "dice_by_dataset": dice}

    rows = [
        row("hermes", 1e6, 0, ct=0.9, mr=0.7),
        row("hermes", 1e6, 1, ct=0.9, mr=0.74),
        row("hermes", 4e6, 0, ct=0.92, mr=0.8),
        row("traditional", 1e6, 0, ct=0.8),
        row("traditional", 1e6, 0, mr=0.78),
        row("traditional", 4e6, 0, ct=0.9),
        row("traditional", 4e6, 0, mr=None),
        {"method": "swinunetr", "backbone_parameters": None, "seed": 0, "dice_by_dataset": {"ct": 1.0}},
    ]
    curves = size_curves(rows)
    assert [p.mean for p in curves["hermes"]] == pytest.approx([0.81, 0.86])
    assert curves["hermes"][0].half_width == pytest.approx(12.706 * 0.01, rel=1e-3)
    assert [(p.parameters, p.mean) for p in curves["traditional"]] == [(1e6, pytest.approx(0.79))], "a dataset is missing at 4e6"
    assert gain(curves["traditional"]) is None
    assert gains_of(curves) == [("hermes", pytest.approx(0.05))]


def test_curves_do_not_mix_budgets_or_settings() -> None:
    def row(parameters: float, samples: int, setting: str, dice: float) -> dict[str, Any]:
        return {
            "method": "hermes",
            "backbone_parameters": parameters,
            "seed": 0,
            "samples": samples,
            "setting": setting,
            "dice_by_dataset": {"ct": dice},
        }

    rows = [row(n, samples, "", dice) for n in (1e6, 4e6) for samples, dice in ((100, 0.5), (1000, 0.7))]
    curves = size_curves(rows)
    assert {name: [p.mean for p in points] for name, points in curves.items()} == {
        "hermes, 100 samples a run": [0.5, 0.5],
        "hermes, 1,000 samples a run": [0.7, 0.7],
    }
    assert set(size_curves([row(1e6, 9, "x=1", 0.5), row(1e6, 9, "x=2", 0.6)])) == {"hermes, x=1", "hermes, x=2"}
    assert set(size_curves([row(1e6, 9, "x=1", 0.5)])) == {"hermes"}
