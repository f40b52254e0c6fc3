"""Score against model size, one curve a method and training budget (the paper's Figure 3 B: universal against traditional)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Kind = tuple[str, int, str]
"""Method, samples per run, setting: runs of one curve share all three."""


@dataclass(frozen=True)
class CurvePoint:
    """Mean over seeds of one size; `half_width` is that of the 95 % interval (Student's t), None for a single run."""

    parameters: float
    mean: float
    half_width: float | None
    runs: int


def size_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[CurvePoint]]:
    """Result rows of runs → the curve of each method over the sizes of the backbone, by label.

    Runs of other data budgets (samples per run) or of another setting (`row["setting"]`: what else the sweep varies) never
    share a curve; the label names the budget and the setting where a method has several.

    A universal run is scored on all of its datasets; a traditional one may have been trained on one of them. The score of a
    method, size and seed is the mean over the datasets that any run of the sweep was scored on, each counting once; where one is
    missing there is no score.

    Args:
        rows: with `method`, `backbone_parameters`, `seed`, `samples`, `setting` and
            `dice_by_dataset` (dataset → Dice, of the datasets trained on).
    """
    found: dict[tuple[Kind, float, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.get("backbone_parameters") and row.get("dice_by_dataset"):
            kind = (str(row["method"]), int(row.get("samples") or 0), str(row.get("setting") or ""))
            key = (kind, float(row["backbone_parameters"]), int(row["seed"]))
            found[key] |= {
                name: dice for name, dice in row["dice_by_dataset"].items() if dice is not None and math.isfinite(dice)
            }
    datasets = {name for scores in found.values() for name in scores}
    values: dict[Kind, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (kind, parameters, _), scores in found.items():
        if set(scores) == datasets:
            values[kind][parameters].append(float(np.mean(list(scores.values()))))
    return {
        _label(kind, values): [_point(parameters, scores) for parameters, scores in sorted(sizes.items())]
        for kind, sizes in sorted(values.items())
    }


def _label(kind: Kind, kinds: Iterable[Kind]) -> str:
    """The method; with its samples and its setting where other curves of the method have others."""
    method, samples, setting = kind
    others = [other for other in kinds if other[0] == method]
    parts = [method]
    if len({other[1] for other in others}) > 1:
        parts.append(f"{samples:,} samples a run")
    if len({other[2] for other in others}) > 1:
        parts.append(setting)
    return ", ".join(parts)


def _point(parameters: float, scores: list[float]) -> CurvePoint:
    n = len(scores)
    if n == 1:
        return CurvePoint(parameters, scores[0], None, 1)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(scores, ddof=1) / math.sqrt(n))
    return CurvePoint(parameters, float(np.mean(scores)), half, n)


def gain(curve: list[CurvePoint]) -> float | None:
    """Score of the largest size minus that of the smallest; None with fewer than two sizes."""
    return curve[-1].mean - curve[0].mean if len(curve) > 1 else None


def gains_of(curves: Mapping[str, list[CurvePoint]]) -> list[tuple[str, float]]:
    """(label, gain) of the curves with two sizes or more."""
    return [(label, value) for label, points in curves.items() if (value := gain(points)) is not None]
