"""A trained run asked about scans: load it, ask a dataset's tasks, and bring the masks back to the scan's own grid.

A task's answer depends on which tasks are asked with it, since their tokens meet in the prior fusion. So a dataset is always
asked as it was trained: all of its tasks in one pass, of which the wanted columns are kept. A mask therefore does not depend
on what else the user asked for.

Deliberately not here: reading and writing scans (`launch/predict.py`), scores (`evaluate.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hermes_dist.config import Config, EvaluateConfig, load_config
from hermes_dist.errors import CheckpointError, ConfigError, DataError, TaskError, nearest
from hermes_dist.models import build_model
from hermes_dist.parallel.weights import NEWEST, open_weights
from hermes_dist.seg import sliding_window
from hermes_dist.shards.case import MAX_VOXELS
from hermes_dist.tasks import DatasetTasks, TaskClass, TaskTable
from hermes_dist.train.step import ask
from hermes_dist.volume.geometry import SPACING_RANGE_MM, Grid, Placement
from hermes_dist.volume.intensity import count_not_finite
from hermes_dist.volume.preprocess import Prepared, Preprocessing, preprocess_image, require_size, restore_probability

THRESHOLD = 0.5


@dataclass(frozen=True)
class TrainedRun:
    """A run directory, opened for inference: the model is in evaluation mode on `device`."""

    run_dir: Path
    config: Config
    tasks: TaskTable
    preprocessing: Preprocessing
    model: nn.Module
    device: torch.device
    weights_digest: str
    checkpoint: str
    """Name of what the weights were read from: `step_00002000`, `weights.safetensors`."""
    chosen: str
    """What was asked for: `newest`, `best` or a step."""

    @property
    def about(self) -> dict[str, str]:
        """What results state about their weights, JSON-able."""
        return {"weights": self.weights_digest, "checkpoint": self.checkpoint, "chosen": self.chosen}

    def __str__(self) -> str:
        return f"{self.run_dir}: {self.checkpoint} ({self.chosen}), weights {self.weights_digest}"


@dataclass(frozen=True)
class Target:
    """One wanted task: a class of a dataset, and its column among that dataset's tasks."""

    dataset: DatasetTasks
    column: int

    @property
    def task(self) -> TaskClass:
        """The class of that column."""
        return self.dataset.classes[self.column]

    @property
    def name(self) -> str:
        """`dataset/class`."""
        return f"{self.dataset.name}/{self.task.name}"


@dataclass(frozen=True)
class TaskMask:
    """The answer to one target: a boolean mask with the scan's own shape (Z Y X array axes)."""

    target: Target
    mask_zyx: npt.NDArray[np.bool_]


def load_run(
    run_dir: Path, device: torch.device | None = None, overrides: Sequence[str] = (), *, checkpoint: str | int = NEWEST
) -> TrainedRun:
    """Open a run directory (of `launch/train.py` or `launch/import_published.py`) with its averaged weights.

    `overrides` are `section.key=value` changes to its config.json, e.g. `evaluate.overlap=0.75`; `checkpoint` is `newest`,
    `best` or a step.

    Raises:
        ConfigError: the directory or one of its files is missing or unreadable.
        CheckpointError: there are no complete weights, no such checkpoint, or weights that do not fit the run's configuration
            and task table.
    """
    if not run_dir.is_dir():
        beside = [str(p.parent / p.name) for p in run_dir.parent.glob("*")] if run_dir.parent.is_dir() else []
        raise ConfigError(f"run directory {run_dir} does not exist.{nearest(str(run_dir), beside)}")
    config = load_config(run_dir / "config.json", overrides)
    tasks = TaskTable.from_json(_read_json(run_dir / "tasks.json"))
    described = run_dir / "preprocessing.json"  # never guessed: other intensities or spacing give other masks
    try:
        preprocessing = Preprocessing.model_validate(_read_json(described))
    except ValidationError as error:
        raise ConfigError(f"{described}: {error}") from None
    device = device or default_device()
    weights = open_weights(run_dir, checkpoint)
    model = load_model(config, tasks, weights.tensors, device, source=str(run_dir))
    name = digest(weights.tensors)
    return TrainedRun(run_dir, config, tasks, preprocessing, model, device, name, weights.checkpoint, weights.chosen)


def default_device() -> torch.device:
    """This process's GPU (by LOCAL_RANK under a launcher) if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def load_model(config: Config, tasks: TaskTable, weights: dict[str, Tensor], device: torch.device, *, source: str) -> nn.Module:
    """A plain, whole copy of the model on one device (no ZeRO partitions, no collectives), ready to be asked."""
    model = build_model(config.model, tasks)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first, *more = [line.strip() for line in str(error).splitlines()][1:] or [str(error)]
        others = f" (and {len(more)} more)" if more else ""
        raise CheckpointError(f"{source}: the weights do not fit its config.json and tasks.json: {first[:500]}{others}") from None
    return model.to(device).eval().requires_grad_(False)


def digest(weights: dict[str, Tensor]) -> str:
    """Hash of all weights: results that name it can be traced back."""
    result = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        result.update(name.encode())
        result.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return result.hexdigest()


def window(config: Config) -> tuple[int, int, int]:
    """The sliding window in voxels: `evaluate.window_vox_zyx`, else the training patch."""
    return config.evaluate.window_vox_zyx or config.data.patch_vox_zyx


def model_fn(
    model: nn.Module,
    config: Config,
    tasks: TaskTable,
    dataset: DatasetTasks,
    *,
    modality: str,
    columns: Sequence[int] | None = None,
) -> sliding_window.ModelFn:
    """Ask all tasks of one dataset, as in training, and keep some columns: (B, 1, z, y, x) → (B, columns, z, y, x) logits."""
    device = next(model.parameters()).device
    task_ids = torch.tensor([dataset.task_ids], device=device)
    modality_ids = torch.tensor([tasks.modality_id(modality)], device=device)
    keep = None if columns is None else torch.tensor(list(columns), device=device)
    half = config.train.precision == "bf16" and device.type == "cuda"
    null_column = config.model.priors.padding == "attended"

    def logits(image: Tensor) -> Tensor:
        count = len(image)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = ask(model, image.to(device), task_ids.expand(count, -1), modality_ids.expand(count), null_column=null_column)
        return output.mask_logits if keep is None else output.mask_logits[:, keep]

    return logits


def windows(config: EvaluateConfig) -> dict[str, Any]:
    """The sliding-window settings of the `evaluate` section, as keyword arguments of `sliding_window.slabs`."""
    return {"overlap": config.overlap, "weights": config.window_weights, "batch": config.window_batch}


def resolve_targets(tasks: TaskTable, names: Sequence[str], modality: str) -> list[Target]:
    """The wanted tasks by `class`, `dataset/class` or `all`, in the order asked, without repeats.

    A plain class name means that class in every dataset of the modality: definitions may differ between datasets, so each is
    a task of its own. `dataset/class` may name a dataset of another modality.

    Raises:
        TaskError: an unknown modality or task (names the nearest known one), or a class that only other modalities have.
    """
    tasks.modality_id(modality)
    found: list[Target] = []
    for name in names:
        if name == "all":
            hits = [(d, c) for d in tasks.datasets for c in d.classes if d.modality == modality]
        else:
            hits = tasks.find_tasks(name)
            here = [(d, c) for d, c in hits if d.modality == modality or name == f"{d.name}/{c.name}"]
            if not here:
                others = ", ".join(f"{d.name}/{c.name} ({d.modality})" for d, c in hits)
                raise TaskError(
                    f"task {name!r} was not trained for modality {modality}, only as {others}; ask for that full name"
                )
            hits = here
        found += [Target(d, d.class_names.index(c.name)) for d, c in hits]
    if not found:
        raise TaskError(f"no task to predict: name some with --tasks, e.g. --tasks {tasks.datasets[0].class_names[0]}")
    return list({t.name: t for t in found}.values())


def predict_scan(
    run: TrainedRun, image_zyx: npt.NDArray[Any], grid: Grid, *, modality: str, targets: Sequence[Target]
) -> Iterator[TaskMask]:
    """Masks of one raw scan on its own grid, one at a time (so that 61 tasks never lie in memory as whole float volumes).

    Args:
        run: the opened run.
        image_zyx: the scan as it was read.
        grid: the scan's own grid.
        modality: chooses the intensity rule and the modality prior.
        targets: the wanted tasks; each dataset among them costs one pass over the scan.

    The probability is interpolated linearly to the scan's grid and thresholded there at 0.5, per task (masks may overlap).
    Voxels outside the body crop are background.

    Raises:
        GeometryError: shape and grid disagree, the axes are sheared, or resampling would make too many voxels.
        DataError: voxels are NaN or infinite, the spacing is impossible, or the scan has no contrast (its masks would be empty,
            and nobody would know why).
    """
    image, placement, _ = _prepared(image_zyx, grid, modality, run.preprocessing)
    for dataset in {t.dataset.name: t.dataset for t in targets}.values():
        wanted = [t for t in targets if t.dataset.name == dataset.name]
        asked = model_fn(run.model, run.config, run.tasks, dataset, modality=modality, columns=[t.column for t in wanted])
        parts = sliding_window.slabs(asked, image, window=window(run.config), **windows(run.config.evaluate))
        levels = sliding_window.quantised(parts, image.shape[0])
        for index, target in enumerate(wanted):
            yield TaskMask(target, restored_mask(levels[index], placement))


def _prepared(image_zyx: npt.NDArray[Any], grid: Grid, modality: str, params: Preprocessing) -> Prepared:
    """`preprocess_image`, where a scan that conversion would have rejected is refused here as well."""
    bad = count_not_finite(image_zyx)
    if bad:
        raise DataError(f"{bad:,} of {image_zyx.size:,} voxels are NaN or infinite; replace them by the value of air")
    if min(grid.spacing_mm_zyx) < SPACING_RANGE_MM[0] or max(grid.spacing_mm_zyx) > SPACING_RANGE_MM[1]:
        spacing = " × ".join(f"{s:.4g}" for s in grid.spacing_mm_zyx)
        raise DataError(f"spacing {spacing} mm is impossible; repair the header (metres or inches are usual causes)")
    require_size(image_zyx, grid, modality, params, below_vox=MAX_VOXELS)
    prepared = preprocess_image(image_zyx, grid, modality, params)
    low, high, std = (prepared.stats[key] for key in ("clip_low", "clip_high", "std"))
    seen = f"values from {float(image_zyx.min()):g} to {float(image_zyx.max()):g}"
    if not np.isfinite(std):
        raise DataError(f"{seen} are too far apart for single precision; scale the scan, or remove the voxels that stand out")
    if std == 0:
        raise DataError(
            f"the scan is constant after clipping to [{low:g}, {high:g}] as {modality} ({seen}); "
            "check its modality, and rescale slope and intercept"
        )
    return prepared


def restored_mask(levels: npt.NDArray[np.uint8], placement: Placement) -> npt.NDArray[np.bool_]:
    """Quantised probabilities of one task on the stored grid → mask on the original grid."""
    if levels.max() < sliding_window.LEVELS // 2:  # interpolation cannot rise above the largest value
        return np.zeros(placement.original.shape_vox_zyx, dtype=bool)
    return restore_probability(sliding_window.dequantised(levels), placement) >= THRESHOLD


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: not a run directory of launch/train.py or launch/import_published.py"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not a readable JSON file: {error}") from None
