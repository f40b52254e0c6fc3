"""Score against model size, one curve a method (the paper's Figure 3 B: universal against traditional)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class CurvePoint:
    """Mean over seeds of one size; `half_width` is that of the 95 % interval (Student's t), None for a single run."""

    parameters: float
    mean: float
    half_width: float | None
    runs: int


def size_curves(rows: Iterable[tuple[str, float, float]]) -> dict[str, list[CurvePoint]]:
    """(method, parameters, score) of each run → the curve of each method, by size. Scores that are not finite are left out."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, parameters, score in rows:
        if math.isfinite(score):
            values[method][parameters].append(score)
    return {
        method: [_point(parameters, scores) for parameters, scores in sorted(sizes.items())]
        for method, sizes in sorted(values.items())
    }


def _point(parameters: float, scores: list[float]) -> CurvePoint:
    n = len(scores)
    if n == 1:
        return CurvePoint(parameters, scores[0], None, 1)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(scores, ddof=1) / math.sqrt(n))
    return CurvePoint(parameters, float(np.mean(scores)), half, n)


def gain(curve: list[CurvePoint]) -> float | None:
    """Score of the largest size minus that of the smallest; None with fewer than two sizes."""
    return curve[-1].mean - curve[0].mean if len(curve) > 1 else None
