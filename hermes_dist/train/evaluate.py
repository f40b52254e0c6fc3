"""Honest evaluation: whole scans of a split, every annotated class, missed structures counted, results with names and intervals.

Scans come from the shard stores and are never cropped with the ground truth. Where the raw reference is at hand
(`Job.references`), predictions are mapped back and scored on the scan's original grid; else on the stored grid, whose
reference was resampled with the image. Each case says which (`grid`), and so does the policy.

Cases are dealt out by `evaluate_queue`: any number of workers, no collective while they work, so uneven scans or a dead
worker cannot hang the others. The model is a plain whole copy, also under ZeRO-3.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hermes_dist.config import Config
from hermes_dist.errors import HermesError, TaskError, UsageError, nearest
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.runtime import Runtime
from hermes_dist.seg import sliding_window
from hermes_dist.seg.metrics import ClassScore, aggregate, score_case
from hermes_dist.shards.manifest import ManifestRow
from hermes_dist.shards.retry import retried
from hermes_dist.shards.store import ShardStore
from hermes_dist.tasks import DatasetTasks, TaskClass, TaskTable
from hermes_dist.telemetry.telemetry import Telemetry
from hermes_dist.train import predict
from hermes_dist.train.evaluate_queue import WorkQueue
from hermes_dist.train.evaluate_slices import save_slice
from hermes_dist.train.memory_errors import named_memory_errors
from hermes_dist.train.run_directory import write_json
from hermes_dist.volume.geometry import Placement

Reference = Callable[[ManifestRow], npt.NDArray[np.integer[Any]] | None]
"""The raw label map of a case on its original grid (array axes Z Y X), or None where it is not at hand."""
Progress = Callable[[int, int, str], None]
SLICES = "slices"


class EvaluationStopped(Exception):
    """An evaluation during training that ends without a result, since the run is asked to stop. Never reaches a person."""


@dataclass(frozen=True)
class Job:
    """What is evaluated, apart from the model. `weights_digest` names the weights; `references` gives raw label maps.

    `checkpoint` and `chosen` say where the weights came from (see `TrainedRun`): they are stated with the results.
    `references_digest` names the collection of the raw labels: another one has other labels, or lacks other cases.
    """

    run_dir: Path
    config: Config
    stores: Sequence[ShardStore]
    tasks: TaskTable
    split: str
    weights_digest: str
    references: Reference | None = None
    pictures: bool = True
    checkpoint: str = ""
    chosen: str = ""
    references_digest: str = ""

    @property
    def out_dir(self) -> Path:
        """`RUN/evaluation`."""
        return self.run_dir / "evaluation"

    @property
    def path(self) -> Path:
        """`RUN/evaluation/SPLIT.json`."""
        return self.out_dir / f"{self.split}.json"

    @property
    def work_dir(self) -> Path:
        """What is finished so far, pictures too: results of other weights or settings are never among it."""
        return self.out_dir / f".work-{self.split}-{self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """Of everything that determines the results: an evaluation goes on only where one of the same fingerprint stopped."""
        parts = [
            self.weights_digest,
            self.config.evaluate.model_dump(mode="json"),
            predict.window(self.config),
            [store.collection.digest for store in self.stores],
            self.references is not None,
            self.references_digest,
        ]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Case:
    """One scan of the split: where it is, and what its dataset annotates."""

    store: ShardStore
    row: ManifestRow
    dataset: DatasetTasks


def find_cases(job: Job) -> list[Case]:
    """All scans of the split (at most `evaluate.max_cases` a dataset), the largest first.

    Raises:
        UsageError: no store has a case in that split.
        TaskError: a store holds a dataset that the model was not trained on, or with other classes.
    """
    cases: list[Case] = []
    for store in job.stores:
        for stored in store.collection.tasks.datasets:
            indices = store.manifest.rows(stored.name, job.split)[: job.config.evaluate.max_cases]
            if len(indices):
                dataset = as_trained(stored, job.tasks)
                cases += [Case(store, store.manifest.row(int(index)), dataset) for index in indices]
    if not cases:
        known = sorted({s for store in job.stores for s in store.manifest.splits})
        raise UsageError(
            f"split {job.split!r} has no case in {len(job.stores)} store(s); known: {known}.{nearest(job.split, known)}"
        )
    return sorted(cases, key=lambda c: (-int(np.prod(c.row.shape_vox_zyx)) * len(c.dataset.classes), c.row.name))


def as_trained(stored: DatasetTasks, tasks: TaskTable) -> DatasetTasks:
    """A store's dataset with its own label values and the model's task ids, classes in the order in which they were trained.

    Raises:
        TaskError: the model does not know this dataset, or knows other classes of it.
    """
    trained = tasks.dataset(stored.name)
    values = {c.name: c.values for c in stored.classes}
    if set(values) != set(trained.class_names):
        raise TaskError(
            f"dataset {stored.name!r} annotates {', '.join(values)} in the store, but the model was trained on "
            f"{', '.join(trained.class_names)}; name the store that it was trained from"
        )
    return replace(stored, classes=tuple(TaskClass(c.name, c.task_id, values[c.name]) for c in trained.classes))


def evaluate(
    model: nn.Module, job: Job, runtime: Runtime | None = None, *, progress: Progress | None = None
) -> dict[str, Any] | None:
    """Score a split and write `evaluation/<split>.json`; the result on rank 0, None elsewhere.

    Every rank calls it with its own whole copy of the model in evaluation mode. A scan that cannot be read or predicted is
    listed under `failed` with its reason, and the others go on. Once a rank of `runtime` is told to stop, no rank begins
    another scan: the result is None on rank 0 too, and what is finished is kept for the next time.

    Raises:
        UsageError: the split is empty.
    """
    rank = runtime.rank if runtime else 0
    cases = find_cases(job)
    queue = WorkQueue(job.work_dir, len(cases))
    if rank == 0:
        queue.prepare(keep=lambda row: "failed" not in row)
        (job.work_dir / SLICES).mkdir(exist_ok=True)
    if runtime:
        runtime.barrier()
    done = 0

    def compute(index: int) -> dict[str, Any]:
        nonlocal done
        result = _score_or_explain(model, job, cases[index])
        done += 1
        if progress:
            progress(done, len(cases), cases[index].row.name)
        return result

    queue.work(compute, worker=rank, stop=lambda: runtime is not None and runtime.signalled)
    if rank:
        return None
    if runtime and queue.finished < len(cases):
        runtime.say(
            f"asked to stop: {queue.finished} of {len(cases)} scans are evaluated; the same command goes on with the others"
        )
        return None
    result = _summary(job, cases, queue.results())
    shown = job.out_dir / f"{job.split}.{SLICES}"
    if job.pictures:
        shutil.rmtree(shown, ignore_errors=True)  # of earlier weights, perhaps: first, so that a kill leaves none of those
    write_json(job.path, result)
    if job.pictures:
        os.replace(job.work_dir / SLICES, shown)
    queue.remove()
    return result


def evaluate_during_training(
    engine: Engine,
    config: Config,
    stores: Sequence[ShardStore],
    tasks: TaskTable,
    runtime: Runtime,
    telemetry: Telemetry,
    step: int,
) -> float | None:
    """Evaluate `evaluate.split` with the averaged weights; adds a line to `evaluation/history.jsonl` and sets the gauges.

    Returns the mean Dice on rank 0 (None where no class could be scored), None on the other ranks.

    Raises:
        EvaluationStopped: the run was asked to stop, and scans are missing. On all ranks alike.
    """
    started = time.perf_counter()
    weights = engine.averaged_weights()
    with torch.random.fork_rng(devices=[runtime.device] if runtime.device.type == "cuda" else []):
        # Building a model draws numbers: training must go on as if nothing had happened, since a resumed run evaluates nothing.
        model = predict.load_model(config, tasks, weights, runtime.device, source=f"step {step}")
    name = f"step{step}-{predict.digest(weights)}"
    about = (config.run_dir, config, stores, tasks, config.evaluate.split, name)
    job = Job(*about, pictures=False, checkpoint=f"step_{step:08d}", chosen="during training")
    result = evaluate(model, job, runtime)
    # All ranks meet here. Whether scans are missing is known to rank 0, which would have done them otherwise.
    if not runtime.broadcast_int(int(result is not None)):
        runtime.vote_to_stop()
        raise EvaluationStopped
    if result is None:
        return None
    seconds = time.perf_counter() - started
    row = {
        "step": step,
        "split": job.split,
        "seconds": round(seconds, 3),
        "mean": result["mean"],
        "per_dataset": result["per_dataset"],
        "failed": result["failed"],
    }
    with open(job.out_dir / "history.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    _export(telemetry, result, seconds)
    mean = result["mean"]["dice"]
    runtime.say(f"step {step}: mean Dice on {job.split} {'–' if mean is None else format(mean, '.3f')} in {seconds:.0f} s")
    for failure in result["failed"]:
        runtime.say(f"step {step}: not scored: {failure['dataset']}/{failure['case_id']}: {failure['reason']}")
    return mean


def others_before(job: Job) -> str:
    """What `evaluation/<split>.json` holds already, if that is about other weights than these; else nothing."""
    try:
        earlier = json.loads(job.path.read_text())
        same = earlier["weights"] == job.weights_digest
    except (OSError, ValueError, KeyError, TypeError):  # none, or not one of ours
        return ""
    return "" if same else f"{earlier.get('checkpoint') or 'another checkpoint'} (weights {earlier['weights']})"


def class_mask(label: npt.NDArray[np.integer[Any]], task: TaskClass) -> npt.NDArray[np.bool_]:
    """Voxels of a label map that belong to a class (a region has several values)."""
    if len(task.values) == 1:
        return label == task.values[0]
    return np.isin(label, task.values)


def _score_or_explain(model: nn.Module, job: Job, case: Case) -> dict[str, Any]:
    try:
        with named_memory_errors(case.row.name):
            return {"scores": [s.to_json() for s in score_scan(model, job, case)]}
    except HermesError as error:
        return {"failed": {"dataset": case.dataset.name, "case_id": case.row.case_id, "reason": str(error)}}


def score_scan(model: nn.Module, job: Job, case: Case) -> list[ClassScore]:
    """Predict one whole scan and score each of its dataset's classes."""
    config = job.config
    faults = config.stream.faults
    image, stored_label = retried(lambda _: case.store.read_case(case.row), faults.retries, faults.backoff_s)
    asked = predict.model_fn(model, config, job.tasks, case.dataset, modality=case.row.modality)
    parts = sliding_window.slabs(asked, image, window=predict.window(config), **predict.windows(config.evaluate))
    raw_label = job.references(case.row) if job.references else None
    if raw_label is None:
        packed = sliding_window.packed_masks(parts, image.shape[0], predict.THRESHOLD)
        grid, spacing, label = "stored", case.row.spacing_mm_zyx, stored_label

        def stored_mask(column: int) -> npt.NDArray[np.bool_]:
            return sliding_window.unpacked(packed, column)

        prediction = stored_mask
    else:
        levels = sliding_window.quantised(parts, image.shape[0])
        placement = Placement.from_json(json.loads(case.row.placement))
        grid, spacing, label = "original", placement.original.spacing_mm_zyx, raw_label

        def stored_mask(column: int) -> npt.NDArray[np.bool_]:
            return levels[column] >= sliding_window.LEVELS // 2

        def prediction(column: int) -> npt.NDArray[np.bool_]:
            return predict.restored_mask(levels[column], placement)

    ignore = case.dataset.ignore_value
    valid = None if ignore is None else label != ignore
    scores: list[ClassScore] = []
    for column, task in enumerate(case.dataset.classes):
        score = score_case(
            prediction(column), class_mask(label, task), spacing, tolerance_mm=config.evaluate.nsd_tolerance_mm, valid=valid
        )
        scores.append(ClassScore(case.dataset.name, case.row.case_id, task.name, task.task_id, grid, score))
    if job.pictures:  # of the stored grid: its voxels are square
        masks = [(t.name, stored_mask(i), class_mask(stored_label, t)) for i, t in enumerate(case.dataset.classes)]
        with contextlib.suppress(FileNotFoundError):  # worker 0 has everything and removed the folder
            save_slice(job.work_dir / SLICES, case.row.name, image, masks, case.row.spacing_mm_zyx)
    return scores


def _summary(job: Job, cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = [ClassScore.from_json(s) for row in rows for s in row.get("scores", ())]
    order = {d.name: i for i, d in enumerate(job.tasks.datasets)}
    scores.sort(key=lambda s: (order[s.dataset], s.case_id))
    result = aggregate(scores, job.config.evaluate)
    grids = {grid: len({(s.dataset, s.case_id) for s in scores if s.grid == grid}) for grid in ("original", "stored")}
    result["policy"] |= {
        "threshold": predict.THRESHOLD,
        "window_vox_zyx": list(predict.window(job.config)),
        "overlap": job.config.evaluate.overlap,
        "window_weights": job.config.evaluate.window_weights,
        "cases_by_grid": grids,
        "grid": "original: the scan's own grid and raw reference; stored: the resampled grid and the reference resampled with it",
    }
    failed = [row["failed"] for row in rows if "failed" in row]
    about = {"split": job.split, "weights": job.weights_digest, "checkpoint": job.checkpoint, "chosen": job.chosen}
    about |= {"n_cases": len(cases)}
    return about | result | {"failed": failed, "cases": [s.to_json() for s in scores]}


def _export(telemetry: Telemetry, result: dict[str, Any], seconds: float) -> None:
    telemetry.evaluation(result["split"], result)
    telemetry.observe("hermes_evaluation_duration_seconds", seconds)
