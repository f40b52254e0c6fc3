"""From stores and configuration to a reader: the checks that must fail before the first step rather than during it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hermes_dist.config import Config, Vox3
from hermes_dist.errors import ConfigError, nearest
from hermes_dist.stream.mixture import shares
from hermes_dist.stream.plan import Group, Plan
from hermes_dist.stream.reader import Reader, Store
from hermes_dist.tasks import DatasetTasks, TaskTable

SCANNED_ROWS = 4096
"""Rows per dataset that the checks look at. A class that none of so many cases shows is not judged in larger datasets."""


def build_reader(config: Config, stores: Sequence[Store], tasks: TaskTable) -> tuple[Reader, list[dict[str, Any]]]:
    """The reader of a training run, and notes for the audit file (what is padded, what has no foreground).

    Raises:
        ConfigError: no case in the split, a mixture or class weight for something unknown, a weighted class without foreground.
    """
    groups = build_groups(stores, tasks, config.data.split)
    names = [g.name for g in groups]
    fractions = shares(names, [len(g.cases) for g in groups], config.data.mixture)
    used = [(g, f) for g, f in zip(groups, fractions, strict=True) if f > 0]
    plan = Plan(
        config.run.seed,
        [g for g, _ in used],
        np.asarray([f for _, f in used]),
        block=config.data.mixture.block,
        foreground_probability=config.data.foreground.probability,
    )
    reader = Reader(
        plan,
        stores,
        class_weights=class_weights(tasks, config.data.foreground.class_weights),
        data=config.data,
        augmentation=config.augment,
        faults=config.stream.faults,
        # The last attempt still has time to end before whoever waits for the sample gives up and can only say that it waited.
        retry_limit_s=config.stream.wait_limit_s / 2,
    )
    notes: list[dict[str, Any]] = []
    for group in plan.groups:
        notes += _check_dataset(reader, group, tasks.datasets[group.dataset], config)
    return reader, notes


def build_groups(stores: Sequence[Store], tasks: TaskTable, split: str) -> list[Group]:
    """One group per dataset of the task table that has cases in the split, in the table's order.

    Raises:
        ConfigError: no store has a case of the split.
    """
    cases: dict[str, list[npt.NDArray[np.int64]]] = {}
    first, splits = 0, set[str]()
    for store in stores:
        manifest = store.manifest
        splits.update(manifest.splits)
        for name in manifest.dataset_names:
            rows = manifest.rows(name, split)
            if len(rows):
                cases.setdefault(name, []).append(first + rows)
        first += len(manifest)
    if not cases:
        raise ConfigError(
            f"data.split = {split!r} holds no case; the stores have {', '.join(sorted(splits)) or 'no split at all'}."
            f"{nearest(split, sorted(splits))}"
        )
    return [Group(d.name, i, np.concatenate(cases[d.name])) for i, d in enumerate(tasks.datasets) if d.name in cases]


def class_weights(tasks: TaskTable, weights: dict[str, float]) -> list[npt.NDArray[np.float64]]:
    """Weight of each class of each dataset in the draw of a foreground class (1 where nothing is stated).

    Raises:
        ConfigError: a name that is not `dataset/class`, or a negative weight.
    """
    known = [f"{d.name}/{c}" for d in tasks.datasets for c in d.class_names]
    for name, weight in weights.items():
        if name not in known:
            raise ConfigError(f"data.foreground.class_weights names {name!r}: expected dataset/class.{nearest(name, known)}")
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"data.foreground.class_weights[{name!r}] = {weight}: expected a finite number >= 0")
    return [np.asarray([weights.get(f"{d.name}/{c}", 1.0) for c in d.class_names]) for d in tasks.datasets]


def _check_dataset(reader: Reader, group: Group, dataset: DatasetTasks, config: Config) -> list[dict[str, Any]]:
    patch = reader.patch
    unseen, n_padded, n_seen = set(range(len(dataset.classes))), 0, 0
    complete = len(group.cases) <= SCANNED_ROWS
    for shape, voxels in _scan(reader, group):
        n_seen += 1
        n_padded += _is_smaller(shape, patch)
        unseen -= {k for k in unseen if voxels[k] > 0}
        if not unseen and n_padded < n_seen:
            break
    notes: list[dict[str, Any]] = []
    if n_padded == n_seen:
        notes.append(
            {
                "kind": "note",
                "dataset": dataset.name,
                "message": f"every case is smaller than the patch {patch}: patches are padded",
            }
        )
    if not complete or not unseen:
        return notes
    wanted = config.data.foreground
    for k in sorted(unseen):
        name = f"{dataset.name}/{dataset.classes[k].name}"
        if wanted.class_weights.get(name, 0) > 0:
            raise ConfigError(
                f"data.foreground.class_weights[{name!r}]: no case of split {config.data.split!r} has a voxel of this class; "
                "remove the weight, or check the labels with `hermes-shard check`"
            )
        notes.append(
            {"kind": "note", "dataset": dataset.name, "message": f"class {name} has no voxel in split {config.data.split!r}"}
        )
    if len(unseen) == len(dataset.classes) and wanted.probability > 0:
        raise ConfigError(
            f"dataset {dataset.name!r} has no foreground at all in split {config.data.split!r}: nothing can be learned from it; "
            "leave it out (data.mixture.weights), check its labels, or set data.foreground.probability=0"
        )
    return notes


def _scan(reader: Reader, group: Group) -> Iterator[tuple[Vox3, tuple[int, ...]]]:
    """(shape, voxels per class) of evenly spread cases, at most SCANNED_ROWS."""
    chosen = np.unique(np.linspace(0, len(group.cases) - 1, min(len(group.cases), SCANNED_ROWS)).astype(np.int64))
    for case in group.cases[chosen]:
        store, row = reader.locate(int(case))
        entry = store.manifest.row(row)
        yield entry.shape_vox_zyx, entry.class_voxels


def _is_smaller(shape: Vox3, patch: Vox3) -> bool:
    return any(s < p for s, p in zip(shape, patch, strict=True))
