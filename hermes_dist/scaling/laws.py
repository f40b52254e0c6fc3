"""Scaling laws: L(N, D) = E + A / N^α + B / D^β, with honest intervals, or the reason why there are none.

Variable projection: for given exponents the law is linear in E, A, B ≥ 0, so only (α, β) are searched (arXiv 2603.22339); errors
are relative to the loss and weighted by Huber's rule (iteratively reweighted), so that a run that went wrong does not bend
the law. Intervals: bootstrap over runs. Held out: the largest runs are left out, predicted, and the error is stated.

L must have a floor and a ceiling that make sense: fit a loss, or 1 − Dice, never Dice itself, which cannot exceed one.
N = parameters, D = training samples (cropped patches) seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]

HUBER = 0.01
"""Relative residual beyond which a run counts less: 1 % of the loss."""
EXPONENTS = np.linspace(0.05, 2.0, 27)
MIN_RUNS, MIN_VALUES = 7, 3
"""Five parameters need more than five runs, and each exponent at least three different values."""


@dataclass(frozen=True)
class Run:
    """One finished run."""

    parameters: float
    samples: float
    loss: float


@dataclass(frozen=True)
class Law:
    """E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Floats | float, samples: Floats | float) -> Floats:
        """Predicted loss."""
        return np.asarray(self.E + self.A / np.power(parameters, self.alpha) + self.B / np.power(samples, self.beta))

    def optimum(self, compute_flops: float, flops_per_parameter_sample: float) -> tuple[float, float]:
        """(N, D) of the lowest loss for a compute budget C = κ·N·D, κ = FLOPs per parameter and sample."""
        product = compute_flops / flops_per_parameter_sample
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * product ** (self.beta / (self.alpha + self.beta))
        return parameters, product / parameters


@dataclass(frozen=True)
class LawFit:
    """A law, the 95 % bootstrap interval of each value, the spread of its residuals, and how it predicts runs that it did not "
    "see."""

    law: Law
    low: Law
    high: Law
    relative_error: float
    held_out_error: float | None
    held_out_runs: int
    samples: tuple[Law, ...]

    def interval(self, parameters: float, samples: float) -> tuple[float, float]:
        """95 % interval of the predicted loss."""
        values = [float(law.loss(parameters, samples)) for law in self.samples]
        return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What forbids extrapolation, in words; empty if nothing does."""
        found: list[str] = []
        for name in ("alpha", "beta"):
            low, high = getattr(self.low, name), getattr(self.high, name)
            if low <= 1.05 * EXPONENTS[0] or high >= 0.95 * EXPONENTS[-1]:
                found.append(f"{name} is not determined: its interval [{low:.2f}, {high:.2f}] reaches the edge of the search")
            elif high - low > getattr(self.law, name):
                found.append(f"{name} is uncertain: interval [{low:.2f}, {high:.2f}] is wider than its value")
        if self.low.A == 0 or self.low.B == 0:
            found.append("one of the two terms may be zero: the runs do not show that both model size and data matter")
        return tuple(found)


@dataclass(frozen=True)
class NotEnoughPoints:
    """Why there is no law."""

    reason: str


def fit_law(runs: Sequence[Run], *, bootstrap: int = 200, seed: int = 0, hold_out: bool = True) -> LawFit | NotEnoughPoints:
    """Fit the law.

    Args:
        runs: finished runs; those with a loss that is not finite or positive are left out (diverged).
        bootstrap: resamples for the intervals.
        seed: of the resampling.
        hold_out: also fit without the runs of the largest compute (a fifth) and predict them.
    """
    good = [r for r in runs if math.isfinite(r.loss) and r.loss > 0]
    if reason := _missing(good):
        return NotEnoughPoints(reason)
    data = np.array([(r.parameters, r.samples, r.loss) for r in good], float)
    law = _fit(data, None)
    laws = _bootstrap(data, law, bootstrap, np.random.default_rng(seed))
    columns = np.array([(w.E, w.A, w.B, w.alpha, w.beta) for w in laws])
    low, high = (Law(*map(float, np.quantile(columns, q, axis=0))) for q in (0.025, 0.975))
    residuals = law.loss(data[:, 0], data[:, 1]) / data[:, 2] - 1
    held_out, count = _held_out(good) if hold_out else (None, 0)
    return LawFit(law, low, high, float(np.sqrt(np.mean(residuals**2))), held_out, count, tuple(laws))


def _missing(runs: Sequence[Run]) -> str:
    if len(runs) < MIN_RUNS:
        return f"not enough points: {len(runs)} finished runs, the law has five parameters and needs at least {MIN_RUNS}"
    for name, values in (("model sizes", {r.parameters for r in runs}), ("data budgets", {r.samples for r in runs})):
        if len(values) < MIN_VALUES:
            return f"not enough points: {len(values)} different {name}; an exponent needs at least {MIN_VALUES}"
    return ""


def _bootstrap(data: Floats, law: Law, count: int, rng: np.random.Generator) -> list[Law]:
    laws: list[Law] = []
    while len(laws) < count:
        rows = data[rng.integers(0, len(data), len(data))]
        # A resample that lost the variety of sizes says nothing about exponents; draw another.
        if min(len(np.unique(rows[:, 0])), len(np.unique(rows[:, 1]))) >= MIN_VALUES:
            laws.append(_fit(rows, (law.alpha, law.beta)))
    return laws


def _held_out(runs: Sequence[Run]) -> tuple[float | None, int]:
    ordered = sorted(runs, key=lambda r: r.parameters * r.samples)
    count = max(1, len(runs) // 5)
    kept, left = ordered[:-count], ordered[-count:]
    if _missing(kept):
        return None, 0
    law = _fit(np.array([(r.parameters, r.samples, r.loss) for r in kept], float), None)
    errors = [float(law.loss(r.parameters, r.samples)) / r.loss - 1 for r in left]
    return float(np.sqrt(np.mean(np.square(errors)))), count


def _fit(data: Floats, start: tuple[float, float] | None) -> Law:
    # Scaled by the geometric means, all three columns of the linear problem are of order one.
    scale_n, scale_d = (float(np.exp(np.mean(np.log(data[:, i])))) for i in (0, 1))
    n, d, loss = data[:, 0] / scale_n, data[:, 1] / scale_d, data[:, 2]
    starts = [start] if start else _grid_minima(n, d, loss)
    best = min((_search(n, d, loss, point) for point in starts), key=lambda found: found[0])
    alpha, beta = best[1]
    E, a, b = _project(n, d, loss, alpha, beta)[1]
    return Law(float(E), float(a * scale_n**alpha), float(b * scale_d**beta), alpha, beta)


def _grid_minima(n: Floats, d: Floats, loss: Floats) -> list[tuple[float, float]]:
    grid = [(_project(n, d, loss, a, b, rounds=2)[0], (float(a), float(b))) for a in EXPONENTS[::2] for b in EXPONENTS[::2]]
    return [point for _, point in sorted(grid)[:3]]


def _search(n: Floats, d: Floats, loss: Floats, start: tuple[float, float]) -> tuple[float, tuple[float, float]]:
    low, high = math.log(EXPONENTS[0]), math.log(EXPONENTS[-1])

    def objective(point: Floats) -> float:
        alpha, beta = np.exp(np.clip(point, low, high))
        return _project(n, d, loss, float(alpha), float(beta))[0]

    found = minimize(objective, np.log(start), method="Nelder-Mead", options={"xatol": 3e-4, "fatol": 1e-12, "maxfev": 300})
    alpha, beta = np.exp(np.clip(found.x, low, high))
    return float(found.fun), (float(alpha), float(beta))


def _project(n: Floats, d: Floats, loss: Floats, alpha: float, beta: float, *, rounds: int = 8) -> tuple[float, Floats]:
    """Best E, A, B ≥ 0 for given exponents under Huber's loss of relative residuals: (mean loss, values)."""
    columns = np.stack([np.ones_like(n), n**-alpha, d**-beta], axis=1) / loss[:, None]
    weights = np.ones_like(loss)
    values = np.zeros(3)
    for _ in range(rounds):
        values = _non_negative(columns, weights)
        size = np.abs(columns @ values - 1)
        updated = np.minimum(1, HUBER / np.maximum(size, 1e-15))
        if np.abs(updated - weights).max() < 1e-4:
            break
        weights = updated
    size = np.abs(columns @ values - 1)
    huber = np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2))
    return float(huber.mean()), values


_SUBSETS = [list(s) for k in (3, 2, 1) for s in combinations(range(3), k)]


def _non_negative(columns: Floats, weights: Floats) -> Floats:
    """Weighted least squares of `columns` x = 1 with x ≥ 0: the best feasible solution of the seven subsets of columns."""
    gram = columns.T @ (weights[:, None] * columns)
    target = columns.T @ weights
    best, values = math.inf, np.zeros(3)
    for subset in _SUBSETS:
        part = gram[np.ix_(subset, subset)]
        try:
            x = np.linalg.solve(part, target[subset])
        except np.linalg.LinAlgError:  # two columns are proportional here: a smaller subset does as well
            continue
        if (x < 0).any():
            continue
        cost = float(x @ part @ x - 2 * x @ target[subset])
        if cost < best - 1e-15:
            best, values = cost, np.zeros(3)
            values[subset] = x
        if len(subset) == 3:
            break  # feasible without a bound: nothing is better
    return values
