"""Throughput against ranks: a model with few terms, fitted to measured runs, and its extrapolation.

    step_s = t0 · σ + c · σ · samples per rank + a · log2(ranks) + b · megabytes sent per rank + w · samples per rank
             + stage 3 only: t3 · σ + a3 · σ · micro-steps · log2(ranks)

c is compute and per-sample work, t0 the fixed part of a step (optimizer, Python), a latency of collectives, b their inverse
bandwidth (b absorbs what overlaps with computing), w the wait for data. Stage 3 shares out and gathers weights layer by layer:
t3 is what that costs a step of one rank, a3 the latency of the gathers, which every micro-step repeats. σ = ranks / devices where
several ranks share a core or card, else 1. All terms are non-negative; the fit minimises relative errors. The wait for data is
measured apart (`wait_s`), so w is its mean per sample and the other terms are fitted to what is left of the step. Samples per
rank are whole: those of the ranks that have most, for which the others wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from hermes_dist.scaling.communication import step_bytes

TERMS = ("fixed_s", "per_sample_s", "per_doubling_s", "per_megabyte_s", "stage3_fixed_s", "stage3_per_doubling_s")
WAIT = "data_wait_per_sample_s"


@dataclass(frozen=True)
class Measured:
    """One run: what it was, its median step time without data wait, and that wait. `devices`: cores or cards for its ranks."""

    ranks: int
    stage: int
    global_batch: int
    parameters: int
    step_s: float
    wait_s: float = 0.0
    devices: int | None = None
    micro_steps: int = 1
    """Forward passes of a rank in a step: stages 2 and 3 send with each."""
    micro_batch: int | None = None
    """`train.micro_batch`: runs are compared with others of the same one."""

    @property
    def samples_per_s(self) -> float:
        """Of all ranks."""
        return self.global_batch / (self.step_s + self.wait_s)

    @property
    def samples_per_rank(self) -> int:
        """What the ranks that have most compute in a step; the others, and those without a sample, compute filler or wait."""
        return math.ceil(self.global_batch / self.ranks)

    @property
    def sharing(self) -> float:
        """Ranks per device, at least 1."""
        return max(1.0, self.ranks / (self.devices or self.ranks))


@dataclass(frozen=True)
class ThroughputFit:
    """Fitted terms; `relative_error` is the root mean square over the runs, `held_out_error` with the largest world left out."""

    terms: dict[str, float]
    relative_error: float
    held_out_error: float | None

    def step_s(
        self, ranks: int, stage: int, global_batch: int, parameters: int, devices: int | None = None, micro_steps: int = 1
    ) -> float:
        """Predicted step time, with its wait for data; `devices` None = one for each rank."""
        row = _row(Measured(ranks, stage, global_batch, parameters, 1.0, devices=devices, micro_steps=micro_steps))
        computed = float(np.dot(row, [self.terms[name] for name in TERMS]))
        return computed + self.terms.get(WAIT, 0.0) * math.ceil(global_batch / ranks)

    def samples_per_s(
        self, ranks: int, stage: int, global_batch: int, parameters: int, micro_steps: int = 1, *, devices: int | None = None
    ) -> float:
        """Predicted throughput of all ranks; `devices` None = one for each rank."""
        return global_batch / self.step_s(ranks, stage, global_batch, parameters, devices, micro_steps)


@dataclass(frozen=True)
class TooFewRuns:
    """Why there is no fit."""

    reason: str


def _row(run: Measured) -> list[float]:
    sent = step_bytes(run.parameters, run.stage, run.ranks, micro_steps=run.micro_steps) / 1e6
    doublings, gathering = math.log2(run.ranks), run.sharing if run.stage == 3 else 0.0
    shared = [run.sharing, run.sharing * run.samples_per_rank, doublings, sent]
    return [*shared, gathering, gathering * run.micro_steps * doublings]


def fit_throughput(runs: Sequence[Measured]) -> ThroughputFit | TooFewRuns:
    """Fit the terms that the runs have (stage 3's only where it was used), or say what is missing.

    Three world sizes and more runs than terms are needed; a term that no run has is zero.
    """
    worlds = sorted({run.ranks for run in runs})
    if len(worlds) < 3:
        return TooFewRuns(f"runs at {len(worlds)} world sizes {worlds}; three or more are needed to tell latency from bandwidth")
    present = int(np.any([_row(run) for run in runs], axis=0).sum())
    if len(runs) <= present:
        return TooFewRuns(f"{len(runs)} runs for {present} terms; one more than terms is needed")
    terms, error = _solve(runs)
    inner = [run for run in runs if run.ranks < worlds[-1]]
    held_out = None
    if len({run.ranks for run in inner}) >= 2 and len(inner) >= 3:
        guess = ThroughputFit(dict(zip(TERMS, _solve(inner)[0], strict=True)), 0.0, None)
        errors = [
            guess.step_s(r.ranks, r.stage, r.global_batch, r.parameters, r.devices, r.micro_steps) / r.step_s - 1
            for r in runs
            if r.ranks == worlds[-1]
        ]
        held_out = float(np.sqrt(np.mean(np.square(errors))))
    wait = float(np.mean([r.wait_s / r.samples_per_rank for r in runs]))
    return ThroughputFit({**dict(zip(TERMS, terms, strict=True)), WAIT: wait}, error, held_out)


def _solve(runs: Sequence[Measured]) -> tuple[list[float], float]:
    rows = np.array([_row(r) for r in runs])
    times = np.array([r.step_s for r in runs])
    terms, residual = nnls(rows / times[:, None], np.ones(len(runs)))
    return [float(t) for t in terms], float(residual / math.sqrt(len(runs)))


def efficiency(runs: Sequence[Measured]) -> list[tuple[Measured, float | None, float | None]]:
    """Each run's throughput per device over that of one rank of the same stage, model and micro-batch: (run, weak, strong).

    Weak scaling compares with one rank that has as many samples per rank, strong scaling with one that has the same global
    batch; None where there is no such run. Several such runs (seeds) count by their mean. For the same global batch one rank
    needs more passes, so their number may differ.
    """

    def against(run: Measured, batch: int) -> float | None:
        wanted = (1, run.stage, run.parameters, run.micro_batch, batch)
        alone = [r for r in runs if (r.ranks, r.stage, r.parameters, r.micro_batch, r.global_batch) == wanted]
        return _per_device(run) / float(np.mean([_per_device(r) for r in alone])) if alone else None

    return [(run, against(run, run.samples_per_rank), against(run, run.global_batch)) for run in runs]


def _per_device(run: Measured) -> float:
    return run.samples_per_s / min(run.ranks, run.devices or run.ranks)
