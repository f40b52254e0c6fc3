"""How a row of metrics.jsonl becomes metrics: one place that knows the row's keys.

A row may hold anything; the keys below also reach Prometheus and TensorBoard. All are optional apart from `step`.

    step, lr, grad_norm, skipped, step_s, data_wait_s           numbers (skipped: 0 or 1)
    data_stall_s   the longest data_wait_s of all ranks, the same number on each
    loss, loss_bce, loss_dice, loss_modality                    losses of the global batch
    samples, patches, voxels, flops, mfu                        what *this rank* did in this step
    parts_s        {"forward": s, "backward": s, "optimizer": s, "communication": s, "checkpoint": s}
    wait_parts_s   {"storage": s, "decode": s, "augment": s, "transfer": s, "queue": s}
    busy_s         time this rank needed itself (without it: data wait + forward)
    dataset_loss   {dataset: {"bce": x, "dice": x, …}}          means over the global batch's pairs
    task_loss      {"dataset/class": {"bce": x, "dice": x}}
    dataset_samples {dataset: n}                                samples of this rank
    task_pairs     {"dataset/class": n}                         trained (sample, task) pairs of this rank
    task_foreground {"dataset/class": n}                        those whose crop held a voxel of the class
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from hermes_dist.telemetry.prometheus import Meters

GAUGES = {
    "step": "hermes_step",
    "lr": "hermes_learning_rate",
    "grad_norm": "hermes_last_gradient_norm",
    "mfu": "hermes_mfu_ratio",
}
LOSSES = {"loss": "total", "loss_bce": "bce", "loss_dice": "dice", "loss_modality": "modality"}
COUNTERS = {
    "samples": "hermes_samples_total",
    "patches": "hermes_patches_total",
    "voxels": "hermes_voxels_total",
    "flops": "hermes_flops_total",
    "data_stall_s": "hermes_data_stall_seconds_total",
}
PAIRS = {"task_pairs": "hermes_pairs_total", "task_foreground": "hermes_foreground_pairs_total"}
COUNTS = {"dataset_samples": "hermes_dataset_samples_total", **PAIRS}
LOSSES_OF = {"dataset_loss": "hermes_dataset_loss", "task_loss": "hermes_task_loss"}
SCORES = {
    "dice": ("hermes_dice_ratio", 1.0),
    "nsd": ("hermes_nsd_ratio", 1.0),
    "hd95_mm": ("hermes_hd95_meters", 1e-3),
}


def data_stall_s(row: Mapping[str, Any]) -> float:
    """Seconds that the step waited for samples; in rows from before that was measured, rank 0's own wait."""
    return float(row.get("data_stall_s", row.get("data_wait_s", 0.0)))


def record(row: Mapping[str, Any], meters: Meters) -> None:
    """Put one step's row into the meters, apart from what `DatasetTally` keeps for the next scrape."""
    for key, name in GAUGES.items():
        if _finite(row.get(key)):
            meters.series(name, {}).set(row[key])
    for key, term in LOSSES.items():
        if _finite(row.get(key)):
            meters.series("hermes_loss", {"term": term}).set(row[key])
    for key, name in COUNTERS.items():
        if key in row:
            meters.series(name, {}).inc(row[key])
    meters.series("hermes_steps_total", {}).inc()
    meters.series("hermes_skipped_steps_total", {}).inc(int(row.get("skipped") or 0))
    meters.series("hermes_last_step_timestamp_seconds", {}).set(time.time())
    if _finite(row.get("grad_norm")):
        meters.series("hermes_gradient_norm", {}).observe(row["grad_norm"])
    _record_times(row, meters)


def record_evaluation(split: str, report: Mapping[str, Any], meters: Meters) -> None:
    """Put the scores of an evaluation into the meters; a score that is null or NaN (class without reference) is left out."""
    mean = report.get("mean", {}).get("dice")
    if _finite(mean):
        meters.series("hermes_mean_dice_ratio", {"split": split}).set(mean)
    for entry in report.get("per_class", []):
        labels = {"split": split, "dataset": str(entry["dataset"]), "task": str(entry["task"])}
        for key, (name, unit) in SCORES.items():
            if _finite(entry.get(key)):
                meters.series(name, labels).set(unit * entry[key])


def _record_times(row: Mapping[str, Any], meters: Meters) -> None:
    if "step_s" in row:
        meters.series("hermes_step_duration_seconds", {}).observe(row["step_s"])
    parts: dict[str, float] = dict(row.get("parts_s") or {})
    if "data_wait_s" in row:
        parts["data_wait"] = row["data_wait_s"]
    for part, seconds in parts.items():
        meters.series("hermes_step_part_seconds", {"part": part}).observe(seconds)
    causes: dict[str, float] = row.get("wait_parts_s") or ({"unattributed": row["data_wait_s"]} if "data_wait_s" in row else {})
    for cause, seconds in causes.items():
        meters.series("hermes_data_wait_seconds_total", {"cause": cause}).inc(max(0.0, seconds))
    busy_s = row.get("busy_s", parts.get("data_wait", 0.0) + parts.get("forward", 0.0))
    meters.series("hermes_busy_seconds_total", {}).inc(max(0.0, busy_s))


class DatasetTally:
    """What steps say of datasets and classes: hundreds of series, so that they are put into the meters when somebody scrapes."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {key: Counter() for key in COUNTS}
        self._losses: dict[str, dict[str, Mapping[str, float]]] = {key: {} for key in LOSSES_OF}
        meters.before_scrape(self.flush)

    def add(self, row: Mapping[str, Any]) -> None:
        """One step's row: counts are added up; of losses the last one stays."""
        with self._lock:
            for key, counts in self._counts.items():
                counts.update(row.get(key) or {})
            for key, losses in self._losses.items():
                losses.update(row.get(key) or {})

    def flush(self) -> None:
        """Bring the meters up to date."""
        with self._lock:
            for key, counts in self._counts.items():
                for name, count in counts.items():
                    self._meters.series(COUNTS[key], _labels(key, name)).inc(count)
                counts.clear()
            for key, losses in self._losses.items():
                for name, terms in losses.items():
                    for term, value in terms.items():
                        if _finite(value):
                            self._meters.series(LOSSES_OF[key], {**_labels(key, name), "term": term}).set(value)
                losses.clear()


def _labels(key: str, name: str) -> dict[str, str]:
    if key.startswith("dataset_"):
        return {"dataset": name}
    dataset, _, task = name.partition("/")
    return {"dataset": dataset, "task": task}


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All finite numbers of a row as (`path/of/keys`, value), for TensorBoard."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)
