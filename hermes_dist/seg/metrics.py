"""Honest scores: Dice, normalised surface Dice and HD95 of whole scans, and their averages with confidence intervals.

A score of one (case, class) keeps the facts; what an empty reference or a missed structure counts is decided only when
scores are averaged, by a *named* policy that is printed with every table:

    policy     both empty      reference empty, prediction not    reference not empty, prediction empty
    count      Dice 1, 0 mm    Dice 0, worst distance             Dice 0, worst distance
    nnunet     left out        Dice 0, worst distance             Dice 0, worst distance
    skip       left out        left out (false positives free)    Dice 0, worst distance

NSD goes with Dice. The worst distance is the diagonal of the scan, so that missing a structure never improves a mean HD95
(elsewhere it becomes NaN and is left out). The mean Dice under all three policies stands side by side in the JSON.

Deliberately not here: files, models, tasks. See `train/evaluate.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64

from hermes_dist.config import EvaluateConfig
from hermes_dist.seg.surface import Spacing, surface_distances

Policy = Literal["count", "nnunet", "skip"]
METRICS = ("dice", "nsd", "hd95_mm")
BOOTSTRAP_SEED = 20_240_617
POLICY_TEXT: dict[str, str] = {
    "count": "absent class: 1 if the prediction is empty too, else 0; missed structure: 0, HD95 = diagonal of the scan",
    "nnunet": "absent class: left out if the prediction is empty too, else 0; missed structure: 0, HD95 = diagonal of the scan",
    "skip": "absent class: left out, false positives are free (Hermes as published); missed structure: 0, HD95 = scan's diagonal",
}


@dataclass(frozen=True)
class MaskScore:
    """What is known of one class in one case. `nsd` and `hd95_mm` are NaN unless both masks hold voxels."""

    dice: float
    nsd: float
    hd95_mm: float
    reference_vox: int
    prediction_vox: int
    worst_mm: float

    @property
    def missed(self) -> bool:
        """The reference holds the structure and nothing of it was predicted anywhere in the scan."""
        return self.reference_vox > 0 and self.prediction_vox == 0

    @property
    def false_alarm(self) -> bool:
        """The reference does not hold the structure, and some was predicted."""
        return self.reference_vox == 0 and self.prediction_vox > 0

    def value(self, metric: str, policy: Policy) -> float:
        """The metric as the policy counts it; NaN = left out of the average."""
        if self.reference_vox and self.prediction_vox:
            return float(getattr(self, metric))
        if policy != "count" and not self.reference_vox and (policy == "skip" or not self.prediction_vox):
            return float("nan")
        right = not self.reference_vox and not self.prediction_vox
        if metric == "hd95_mm":
            return 0.0 if right else self.worst_mm
        return 1.0 if right else 0.0


@dataclass(frozen=True)
class ClassScore:
    """A `MaskScore` with its names: one line of the `cases` list of an evaluation."""

    dataset: str
    case_id: str
    name: str
    task_id: int
    grid: str
    score: MaskScore

    def to_json(self) -> dict[str, Any]:
        """A flat JSON-able row; NaN becomes null."""
        row = {"dataset": self.dataset, "case_id": self.case_id, "class": self.name, "task_id": self.task_id, "grid": self.grid}
        return row | {key: _number(value) for key, value in asdict(self.score).items()}

    @staticmethod
    def from_json(row: dict[str, Any]) -> ClassScore:
        """Inverse of `to_json`."""
        numbers: dict[str, Any] = {k: float("nan") if row[k] is None else row[k] for k in MaskScore.__dataclass_fields__}
        return ClassScore(row["dataset"], row["case_id"], row["class"], row["task_id"], row["grid"], MaskScore(**numbers))


def score_case(
    prediction: Bool[np.ndarray, "Z Y X"],
    reference: Bool[np.ndarray, "Z Y X"],
    spacing_mm_zyx: Spacing,
    *,
    tolerance_mm: float = 2.0,
    valid: Bool[np.ndarray, "Z Y X"] | None = None,
) -> MaskScore:
    """Score one binary mask against its reference on the same grid.

    Args:
        prediction: predicted voxels.
        reference: annotated voxels.
        spacing_mm_zyx: true voxel spacing of that grid.
        tolerance_mm: boundary voxels at most this far from the other surface count as right (NSD, Nikolov et al. 2018).
        valid: voxels that somebody annotated; the others are background in both masks.

    HD95 is the larger of the two directed 95th percentiles, as in MONAI and DeepMind's code.
    """
    if valid is not None:
        prediction, reference = prediction & valid, reference & valid
    predicted, expected = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    worst_mm = float(np.linalg.norm(np.asarray(prediction.shape) * np.asarray(spacing_mm_zyx)))
    if not predicted or not expected:
        dice = float("nan") if predicted == expected else 0.0
        return MaskScore(dice, float("nan"), float("nan"), expected, predicted, worst_mm)
    overlap = int(np.count_nonzero(prediction & reference))
    forth, back = surface_distances(prediction, reference, spacing_mm_zyx)
    close = np.count_nonzero(forth <= tolerance_mm) + np.count_nonzero(back <= tolerance_mm)
    hd95_mm = float(max(np.percentile(forth, 95), np.percentile(back, 95)))
    nsd = float(close / (len(forth) + len(back)))
    return MaskScore(2 * overlap / (predicted + expected), nsd, hd95_mm, expected, predicted, worst_mm)


def aggregate(scores: Sequence[ClassScore], config: EvaluateConfig) -> dict[str, Any]:
    """Averages per class, per dataset and over all classes, with bootstrap 95 % intervals over cases.

    A class's mean runs over its cases; a dataset's mean over its classes; the overall mean over all (dataset, class) entries,
    each with the same weight. The bootstrap draws the cases of each dataset with replacement, the same draw for all its classes.

    Returns:
        `mean`, `per_dataset`, `per_class` and `policy`, JSON-able; a mean of nothing is null.
    """
    policy: Policy = config.empty_reference
    tables = [_Table(name, [s for s in scores if s.dataset == name]) for name in dict.fromkeys(s.dataset for s in scores)]
    random = np.random.default_rng(BOOTSTRAP_SEED)
    draws = {t.dataset: random.integers(0, len(t.cases), (config.bootstrap, len(t.cases))) for t in tables}
    entries: dict[str, list[tuple[str, Float64[np.ndarray, " classes"], Float64[np.ndarray, "draws classes"]]]] = {}
    for metric in METRICS:
        values = [(t.dataset, t.matrix(metric, policy)) for t in tables]
        entries[metric] = [(name, _mean(v), _resampled(v, draws[name])) for name, v in values]
    mean: dict[str, Any] = {}
    per_dataset: list[dict[str, Any]] = [{"dataset": t.dataset, "n": len(t.cases), "n_classes": len(t.classes)} for t in tables]
    per_class = [row for t in tables for row in t.facts(policy)]
    for metric in METRICS:
        means, resampled = [e[1] for e in entries[metric]], [e[2] for e in entries[metric]]
        _put(mean, metric, np.concatenate(means) if means else np.empty(0), np.concatenate(resampled, 1) if means else None)
        for row, centre, samples in zip(per_dataset, means, resampled, strict=True):
            _put(row, metric, centre, samples)
        for row, centre, samples in zip(per_class, _columns(means), _columns(resampled), strict=True):
            _put(row, metric, centre[None], samples[:, None])
    mean |= {"n_classes": len(per_class), "n_cases": sum(len(t.cases) for t in tables)}
    mean |= {"missed": sum(row["missed"] for row in per_class), "false_alarms": sum(row["false_alarms"] for row in per_class)}
    mean["dice_by_policy"] = {p: _average([row["dice_by_policy"][p] for row in per_class]) for p in POLICY_TEXT}
    return {"mean": mean, "per_dataset": per_dataset, "per_class": per_class, "policy": _policy_json(config)}


class _Table:
    """The scores of one dataset as a cases × classes table."""

    def __init__(self, dataset: str, scores: Sequence[ClassScore]) -> None:
        self.dataset = dataset
        self.cases = sorted({s.case_id for s in scores})
        self.classes = list({s.name: s.task_id for s in scores}.items())
        self._scores = {(s.case_id, s.name): s.score for s in scores}

    def matrix(self, metric: str, policy: Policy) -> Float64[np.ndarray, "cases classes"]:
        """The metric as the policy counts it; NaN where a class is left out or was not scored."""
        rows = [[self._scores.get((case, name)) for name, _ in self.classes] for case in self.cases]
        return np.array([[float("nan") if s is None else s.value(metric, policy) for s in row] for row in rows], dtype=np.float64)

    def facts(self, policy: Policy) -> list[dict[str, Any]]:
        """What is counted rather than averaged, one row a class."""
        result: list[dict[str, Any]] = []
        by_policy = {p: _mean(self.matrix("dice", p)) for p in ("count", "nnunet", "skip")}
        for column, (name, task_id) in enumerate(self.classes):
            scores = [s for case in self.cases if (s := self._scores.get((case, name))) is not None]
            found = [s.hd95_mm for s in scores if s.reference_vox and s.prediction_vox]
            result.append(
                {
                    "dataset": self.dataset,
                    "task": name,
                    "task_id": task_id,
                    "n": sum(not np.isnan(s.value("dice", policy)) for s in scores),
                    "n_with_reference": sum(s.reference_vox > 0 for s in scores),
                    "missed": sum(s.missed for s in scores),
                    "false_alarms": sum(s.false_alarm for s in scores),
                    "hd95_found_mm": _average(found),
                    "dice_by_policy": {p: _number(float(v[column])) for p, v in by_policy.items()},
                }
            )
        return result


def _policy_json(config: EvaluateConfig) -> dict[str, Any]:
    return {
        "empty_reference": config.empty_reference,
        "meaning": POLICY_TEXT[config.empty_reference],
        "dice": "2|A∩B| / (|A|+|B|) on whole scans, one binary mask a class",
        "nsd": f"share of boundary voxels within {config.nsd_tolerance_mm:g} mm of the other surface, true spacing",
        "hd95_mm": "larger of the two directed 95th percentiles between boundary voxels, true spacing",
        "nsd_tolerance_mm": config.nsd_tolerance_mm,
        "mean": "cases → class, then all (dataset, class) entries with equal weight",
        "ci": f"95 % percentile bootstrap over cases, {config.bootstrap} draws" if config.bootstrap else "none",
    }


def _mean(values: Float64[np.ndarray, "cases classes"]) -> Float64[np.ndarray, " classes"]:
    """Column means without NaN; NaN where a column has nothing else (numpy would warn)."""
    counted = ~np.isnan(values)
    total, count = np.where(counted, values, 0.0).sum(0), counted.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _resampled(values: Float64[np.ndarray, "cases classes"], draws: np.ndarray) -> Float64[np.ndarray, "draws classes"]:
    """Class means of each draw of cases, from how often each case was drawn (one small matrix product)."""
    weight = np.stack([np.bincount(draw, minlength=len(values)) for draw in draws]) if len(draws) else np.empty((0, len(values)))
    counted = ~np.isnan(values)
    total, count = weight @ np.where(counted, values, 0.0), weight @ counted.astype(np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _columns(tables: list[np.ndarray]) -> list[np.ndarray]:
    return [table[..., column] for table in tables for column in range(table.shape[-1])]


def _put(row: dict[str, Any], metric: str, centre: np.ndarray, samples: np.ndarray | None) -> None:
    """Write the mean over the entries of `centre`, and the interval of the same mean over the draws, into a row."""
    row[metric] = _average(list(centre))
    means = _mean(samples.T) if samples is not None else np.empty(0)
    means = means[~np.isnan(means)]
    row[f"{metric.removesuffix('_mm')}_ci"] = (
        [round(float(v), 6) for v in np.percentile(means, [2.5, 97.5])] if len(means) else None
    )


def _average(values: Sequence[float | None]) -> float | None:
    kept = [v for v in values if v is not None and not np.isnan(v)]
    return _number(float(np.mean(kept))) if kept else None


def _number(value: Any) -> Any:
    """JSON has no NaN: a float that is none becomes null; six decimals are enough for a score."""
    return (None if np.isnan(value) else round(value, 6)) if isinstance(value, float) else value
