"""How a row of metrics.jsonl becomes metrics: one place that knows the row's keys.

A row may hold anything; the keys below also reach Prometheus and TensorBoard. All are optional apart from `step`.

    step, lr, grad_norm, skipped, step_s, data_wait_s           numbers (skipped: 0 or 1)
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
import time
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
}
PAIRS = {"task_pairs": "hermes_pairs_total", "task_foreground": "hermes_foreground_pairs_total"}
SCORES = {
    "dice": ("hermes_dice_ratio", 1.0),
    "nsd": ("hermes_nsd_ratio", 1.0),
    "hd95_mm": ("hermes_hd95_meters", 1e-3),
}


def record(row: Mapping[str, Any], meters: Meters) -> None:
    """Put one step's row into the meters."""
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
    _record_datasets(row, meters)


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


def _record_datasets(row: Mapping[str, Any], meters: Meters) -> None:
    for dataset, count in (row.get("dataset_samples") or {}).items():
        meters.series("hermes_dataset_samples_total", {"dataset": dataset}).inc(count)
    for dataset, losses in (row.get("dataset_loss") or {}).items():
        for term, value in losses.items():
            if _finite(value):
                meters.series("hermes_dataset_loss", {"dataset": dataset, "term": term}).set(value)
    for name, losses in (row.get("task_loss") or {}).items():
        dataset, _, task = name.partition("/")
        for term, value in losses.items():
            if _finite(value):
                meters.series("hermes_task_loss", {"dataset": dataset, "task": task, "term": term}).set(value)
    for key, metric in PAIRS.items():
        for name, count in (row.get(key) or {}).items():
            dataset, _, task = name.partition("/")
            meters.series(metric, {"dataset": dataset, "task": task}).inc(count)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All finite numbers of a row as (`path/of/keys`, value), for TensorBoard."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)
