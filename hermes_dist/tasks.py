"""The task table: dataset → modality → classes → global task ids.

Partial labels are algebra, and this is the one place where it is done. A class of a dataset is a binary task; a class that
a dataset does not annotate is *unknown* there, never background, so it simply is not among that dataset's tasks. The same
table feeds the loss mask, the sampler, the metrics, monitoring and export, and every token count is computed from it.

By default equal class names in different datasets stay separate tasks (their definitions may conflict); only the groups
named in `shared_tasks` of a collection are merged, as the paper does for AMOS CT and AMOS MR.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hermes_dist.errors import TaskError, nearest

# Modality names that say "magnetic resonance, sequence not stated": they own a token, but no modality loss is taken on them.
UNSTATED_MODALITIES = frozenset({"MR", "MRI", "unknown"})


@dataclass(frozen=True)
class TaskClass:
    """One annotated class of one dataset: its name, its global task id, and the stored label values that belong to it.

    Several values make a region (nnU-Net's `"whole tumour": [1, 2, 3]`), so that overlapping classes share one label map.
    """

    name: str
    task_id: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class DatasetTasks:
    """What one dataset annotates. `ignore_value` marks voxels that nobody annotated (nnU-Net's ignore label)."""

    name: str
    modality: str
    region: str
    classes: tuple[TaskClass, ...]
    ignore_value: int | None = None

    @property
    def task_ids(self) -> tuple[int, ...]:
        """Global task ids in class order."""
        return tuple(c.task_id for c in self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in class order."""
        return tuple(c.name for c in self.classes)


@dataclass(frozen=True)
class TaskTable:
    """All datasets of a collection, in order, with their global task ids."""

    datasets: tuple[DatasetTasks, ...]

    @staticmethod
    def build(
        datasets: Sequence[tuple[str, str, str, Sequence[tuple[str, Sequence[int]]], int | None]],
        shared_tasks: Sequence[Sequence[str]] = (),
    ) -> TaskTable:
        """Assign global task ids in order of appearance.

        Args:
            datasets: (name, modality, region, [(class name, stored label values)], ignore value) per dataset.
            shared_tasks: groups of `dataset/class` names that are one task.

        Raises:
            TaskError: duplicate dataset or class names, or a shared name that does not exist.
        """
        known = [f"{d[0]}/{c[0]}" for d in datasets for c in d[3]]
        for name in {n for n in known if known.count(n) > 1} if len(set(known)) < len(known) else ():
            raise TaskError(f"class {name!r} is declared twice; class names must be unique within a dataset")
        group_of: dict[str, int] = {}
        for index, group in enumerate(shared_tasks):
            for name in group:
                if name not in known:
                    raise TaskError(f"shared_tasks names {name!r}, which no dataset declares.{nearest(name, known)}")
                if name in group_of:
                    raise TaskError(f"shared_tasks names {name!r} in two groups; a class is one task")
                group_of[name] = index
        next_id, id_of_group = 0, dict[int, int]()
        rows: list[DatasetTasks] = []
        for dataset, modality, region, classes, ignore_value in datasets:
            if dataset in {r.name for r in rows}:
                raise TaskError(f"dataset {dataset!r} is declared twice; dataset names must be unique in a collection")
            entries: list[TaskClass] = []
            for class_name, values in classes:
                group = group_of.get(f"{dataset}/{class_name}")
                task_id = next_id if group is None else id_of_group.setdefault(group, next_id)
                next_id += task_id == next_id
                entries.append(TaskClass(class_name, task_id, tuple(int(v) for v in values)))
            rows.append(DatasetTasks(dataset, modality, region, tuple(entries), ignore_value))
        return TaskTable(tuple(rows))

    @staticmethod
    def merge(tables: Sequence[TaskTable]) -> TaskTable:
        """One table over several stores. Tasks that are shared inside a store stay shared; nothing is merged across stores."""
        groups: list[list[str]] = []
        for table in tables:
            names: dict[int, list[str]] = {}
            for dataset in table.datasets:
                for c in dataset.classes:
                    names.setdefault(c.task_id, []).append(f"{dataset.name}/{c.name}")
            groups += [group for group in names.values() if len(group) > 1]
        rows = [
            (d.name, d.modality, d.region, [(c.name, c.values) for c in d.classes], d.ignore_value)
            for table in tables
            for d in table.datasets
        ]
        return TaskTable.build(rows, groups)

    @cached_property
    def n_tasks(self) -> int:
        """Number of global tasks = rows of the task prior table."""
        return 1 + max((i for d in self.datasets for i in d.task_ids), default=-1)

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """Modality names in order of first appearance = slabs of the modality prior table."""
        return tuple(dict.fromkeys(d.modality for d in self.datasets))

    @property
    def max_classes(self) -> int:
        """Largest number of classes of any one dataset."""
        return max(len(d.classes) for d in self.datasets)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {d.name: i for i, d in enumerate(self.datasets)}

    def dataset_index(self, name: str) -> int:
        """Position of a dataset. Raises TaskError naming the nearest known one."""
        if name not in self._index:
            known = list(self._index)
            raise TaskError(f"dataset {name!r} is not in this collection ({', '.join(known)}).{nearest(name, known)}")
        return self._index[name]

    def dataset(self, name: str) -> DatasetTasks:
        """The dataset of that name. Raises TaskError naming the nearest known one."""
        return self.datasets[self.dataset_index(name)]

    def modality_id(self, modality: str) -> int:
        """Row of a modality in the modality prior table. Raises TaskError naming the nearest known one."""
        if modality not in self.modalities:
            raise TaskError(
                f"modality {modality!r} was not trained; known: {', '.join(self.modalities)}.{nearest(modality, self.modalities)}"
            )
        return self.modalities.index(modality)

    def modality_target(self, modality: str) -> int:
        """Target of the modality cross entropy: the modality's id, or -1 (ignored) where the sequence is not stated."""
        return -1 if modality in UNSTATED_MODALITIES else self.modality_id(modality)

    def find_tasks(self, name: str) -> list[tuple[DatasetTasks, TaskClass]]:
        """All classes that a user may mean by `class` or `dataset/class`. Raises TaskError if there is none."""
        pairs = [(d, c) for d in self.datasets for c in d.classes]
        hits = [(d, c) for d, c in pairs if name in (f"{d.name}/{c.name}", c.name)]
        if not hits:
            known = [f"{d.name}/{c.name}" for d, c in pairs]
            close = nearest(name, known + [c.name for _, c in pairs])
            raise TaskError(f"task {name!r} is not known to this model; it knows {len(known)} tasks.{close}")
        return hits

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description; `from_json` is its inverse."""
        return {
            "datasets": [
                {
                    "name": d.name,
                    "modality": d.modality,
                    "region": d.region,
                    "classes": [{"name": c.name, "task_id": c.task_id, "values": list(c.values)} for c in d.classes],
                    "ignore_value": d.ignore_value,
                }
                for d in self.datasets
            ]
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TaskTable:
        """Inverse of `to_json`."""
        return TaskTable(
            tuple(
                DatasetTasks(
                    name=d["name"],
                    modality=d["modality"],
                    region=d["region"],
                    classes=tuple(TaskClass(c["name"], c["task_id"], tuple(c["values"])) for c in d["classes"]),
                    ignore_value=d["ignore_value"],
                )
                for d in data["datasets"]
            )
        )

    @property
    def digest(self) -> str:
        """Hash of the whole table: a checkpoint of another table is recognised by it."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
