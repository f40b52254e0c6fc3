"""Throughput against ranks: a model with few terms, fitted to measured runs, and its extrapolation.

    step_s = t0 + c · samples per rank + a · log2(ranks) + b · megabytes sent per rank

c is compute and per-sample work, t0 the fixed part of a step (optimizer, Python), a latency of collectives, b their inverse
bandwidth (b absorbs what overlaps with computing). All terms are non-negative; the fit minimises relative errors. Data wait
is taken out of the measured times, because it belongs to the data path and not to the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from hermes_dist.scaling.communication import step_bytes

TERMS = ("fixed_s", "per_sample_s", "per_doubling_s", "per_megabyte_s")


@dataclass(frozen=True)
class Measured:
    """One run: what it was, and its median step time without data wait."""

    ranks: int
    stage: int
    global_batch: int
    parameters: int
    step_s: float

    @property
    def samples_per_s(self) -> float:
        """Of all ranks."""
        return self.global_batch / self.step_s


@dataclass(frozen=True)
class ThroughputFit:
    """Fitted terms; `relative_error` is the root mean square over the runs, `held_out_error` with the largest world left out."""

    terms: dict[str, float]
    relative_error: float
    held_out_error: float | None

    def step_s(self, ranks: int, stage: int, global_batch: int, parameters: int) -> float:
        """Predicted step time."""
        return float(np.dot(_row(ranks, stage, global_batch, parameters), list(self.terms.values())))

    def samples_per_s(self, ranks: int, stage: int, global_batch: int, parameters: int) -> float:
        """Predicted throughput of all ranks."""
        return global_batch / self.step_s(ranks, stage, global_batch, parameters)


@dataclass(frozen=True)
class TooFewRuns:
    """Why there is no fit."""

    reason: str


def _row(ranks: int, stage: int, global_batch: int, parameters: int) -> list[float]:
    return [1.0, global_batch / ranks, math.log2(ranks), step_bytes(parameters, stage, ranks) / 1e6]


def fit_throughput(runs: Sequence[Measured]) -> ThroughputFit | TooFewRuns:
    """Fit the terms, or say what is missing: three world sizes and more runs than terms."""
    worlds = sorted({run.ranks for run in runs})
    if len(worlds) < 3:
        return TooFewRuns(f"runs at {len(worlds)} world sizes {worlds}; three or more are needed to tell latency from bandwidth")
    if len(runs) <= len(TERMS):
        return TooFewRuns(f"{len(runs)} runs for {len(TERMS)} terms; one more than terms is needed")
    terms, error = _solve(runs)
    inner = [run for run in runs if run.ranks < worlds[-1]]
    held_out = None
    if len({run.ranks for run in inner}) >= 2 and len(inner) >= 3:
        guess = ThroughputFit(dict(zip(TERMS, _solve(inner)[0], strict=True)), 0.0, None)
        errors = [
            guess.step_s(r.ranks, r.stage, r.global_batch, r.parameters) / r.step_s - 1 for r in runs if r.ranks == worlds[-1]
        ]
        held_out = float(np.sqrt(np.mean(np.square(errors))))
    return ThroughputFit(dict(zip(TERMS, terms, strict=True)), error, held_out)


def _solve(runs: Sequence[Measured]) -> tuple[list[float], float]:
    rows = np.array([_row(r.ranks, r.stage, r.global_batch, r.parameters) for r in runs])
    times = np.array([r.step_s for r in runs])
    terms, residual = nnls(rows / times[:, None], np.ones(len(runs)))
    return [float(t) for t in terms], float(residual / math.sqrt(len(runs)))


def efficiency(runs: Sequence[Measured]) -> list[tuple[Measured, float]]:
    """Each run's throughput per rank over that of the smallest world with the same stage and mode of growth.

    Weak scaling compares runs with the same batch per rank, strong scaling those with the same global batch; a run is compared
    with the smallest world that shares either.
    """
    result: list[tuple[Measured, float]] = []
    for run in runs:
        peers = [
            r
            for r in runs
            if r.stage == run.stage
            and (r.global_batch == run.global_batch or r.global_batch * run.ranks == run.global_batch * r.ranks)
        ]
        base = min(peers, key=lambda r: r.ranks)
        result.append((run, (run.samples_per_s / run.ranks) / (base.samples_per_s / base.ranks)))
    return result
