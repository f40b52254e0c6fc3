"""Starting from other weights: rows of the prior tables are carried over by their `dataset/class` and modality names.

Task ids are positions in one collection's table, so they mean nothing in another; names do.

Incremental learning (`train.trainable = new_tasks`, the paper's section 4.4) keeps everything that came along as it is and
teaches only the new rows of the task and modality tables. The task table then is the old run's, extended by the new datasets,
so that the new run answers old tasks too, with the same bits. Tables are one tensor each: gradients of old rows are set to
zero, and without weight decay no optimizer here moves a row whose gradients were always zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hermes_dist.config import Config, TrainConfig
from hermes_dist.errors import CheckpointError, ConfigError
from hermes_dist.parallel.weights import Weights, find_checkpoints, open_weights
from hermes_dist.tasks import DatasetTasks, TaskTable

Rows = list[tuple[int, int]]
"""(row here, row there)."""


def extend(config: TrainConfig, tasks: TaskTable) -> TaskTable:
    """The run's task table: the stores', or for incremental learning the old run's followed by the stores' new datasets.

    Raises:
        ConfigError: incremental learning without weights, without a new dataset, or with other classes of an old one.
    """
    if config.trainable == "all":
        return tasks
    if config.initial_weights is None:
        raise ConfigError("train.trainable = 'new_tasks' needs train.initial_weights: the run whose weights stay frozen")
    known = read_tasks(Path(config.initial_weights))
    old = {d.name: d for d in known.datasets}
    for dataset in tasks.datasets:
        if dataset.name in old and old[dataset.name].class_names != dataset.class_names:
            raise ConfigError(
                f"dataset {dataset.name!r} has the classes {', '.join(dataset.class_names)}, but {config.initial_weights} learnt "
                f"{', '.join(old[dataset.name].class_names)} under that name; give the new dataset another name"
            )
        if dataset.name in old and _values(old[dataset.name]) != _values(dataset):
            raise ConfigError(
                f"dataset {dataset.name!r} has the label values {_values(dataset)}, but {config.initial_weights} learnt it with "
                f"{_values(old[dataset.name])}; convert it with those, or leave its store out"
            )
    new = TaskTable.merge([TaskTable(tuple(d for d in tasks.datasets if d.name not in old))])
    if not new.datasets:
        raise ConfigError(
            f"train.trainable = 'new_tasks', but data.stores hold only datasets that {config.initial_weights} knows"
        )
    return TaskTable.merge([known, new])


def _values(dataset: DatasetTasks) -> dict[str, list[int]]:
    ignored = [] if dataset.ignore_value is None else [dataset.ignore_value]
    return {**{c.name: list(c.values) for c in dataset.classes}, "ignored": ignored}


def check_source(config: TrainConfig, preprocessing: dict[str, Any]) -> None:
    """Find what is wrong with `train.initial_weights` and `train.initial_checkpoint` before anything is written.

    Raises:
        ConfigError: the stores were converted otherwise (see `check_preprocessing`), or a checkpoint is chosen and no run.
        CheckpointError: the run has no such checkpoint.
    """
    if config.initial_weights is not None:
        check_preprocessing(Path(config.initial_weights), preprocessing)
        find_checkpoints(Path(config.initial_weights), config.initial_checkpoint)
    elif config.initial_checkpoint != "newest":
        raise ConfigError(
            f"train.initial_checkpoint = {config.initial_checkpoint!r}, but train.initial_weights names no run; "
            "name it, or leave both out"
        )


def initialise(model: nn.Module, config: Config, tasks: TaskTable) -> str | None:
    """Load `train.initial_weights` into the model, if any, and freeze what `train.trainable` says.

    Returns a line that says what was loaded, and what keeps its initial values.

    Raises:
        CheckpointError: the weights are of another architecture (names the first tensor and both shapes), or there are none.
        ConfigError: incremental learning with weight decay, which would move frozen rows.
    """
    if config.train.initial_weights is None:
        return None
    source = Path(config.train.initial_weights)
    read, known = open_weights(source, config.train.initial_checkpoint), read_tasks(source)
    weights, row_map = read.tensors, _row_map(known, tasks)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise CheckpointError(f"{source}: has no tensor {name!r}; was it trained with another model section?")
        rows = row_map(name)
        if tensor.shape[rows is not None :] != weights[name].shape[rows is not None :]:
            raise CheckpointError(
                f"{source}: tensor {name!r} has shape {tuple(weights[name].shape)}, this model expects {tuple(tensor.shape)}; "
                "use the model section of that run's config.json"
            )
        _copy(tensor, weights[name], rows)
    if config.train.trainable == "new_tasks":
        if config.optimizer.weight_decay:
            raise ConfigError(
                f"optimizer.weight_decay = {config.optimizer.weight_decay} would change frozen rows; set it to 0 for new_tasks"
            )
        _freeze_known(model, row_map)
    partial = [name for name, tensor in own.items() if (rows := row_map(name)) is not None and len(rows) < len(tensor)]
    return f"initial weights: {source}, {_loaded(read, known, tasks, list(own), partial)}"


def _loaded(read: Weights, known: TaskTable, tasks: TaskTable, own: Sequence[str], partial: Sequence[str]) -> str:
    """What came along and what did not; `partial`: tensors with rows that keep their initial values."""
    here, there = (tuple(f"{d.name}/{c.name}" for d in table.datasets for c in d.classes) for table in (tasks, known))
    initial = {
        "tasks": _only(here, there),
        "modalities": _only(tasks.modalities, known.modalities),
        "tensors with such rows": list(partial),
    }
    left = {
        "tasks": _only(there, here),
        "modalities": _only(known.modalities, tasks.modalities),
        "tensors": _only(tuple(read.tensors), own),
    }
    return f"{read}: {len(own)} tensors loaded; at their initial values: {_counted(initial)}; left behind: {_counted(left)}"


def _only(names: Sequence[str], others: Sequence[str]) -> list[str]:
    return [name for name in names if name not in others]


def _counted(groups: dict[str, list[str]], shown: int = 3) -> str:
    """How many of each, and the first names: `tasks 4 (a/b, a/c, a/d, …), tensors 0`."""
    names = {kind: ", ".join([*found[:shown], "…"] if len(found) > shown else found) for kind, found in groups.items()}
    return ", ".join(f"{kind} {len(found)}" + (f" ({names[kind]})" if found else "") for kind, found in groups.items())


def check_preprocessing(source: Path, preprocessing: dict[str, Any]) -> None:
    """A model must see what it was trained on, however it is stored.

    Args:
        source: a run directory, or a .safetensors file in one.
        preprocessing: of the stores, as JSON.

    Raises:
        ConfigError: names the settings that differ, or the file that cannot be read.
    """
    path = (source if source.is_dir() else source.parent) / "preprocessing.json"
    if not path.is_file():
        return
    try:
        trained = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}); convert or import that run again") from None
    different = [key for key in trained if key != "image_dtype" and trained[key] != preprocessing.get(key)]
    if different:
        settings = ", ".join(f"{key} = {preprocessing.get(key)} (trained with {trained[key]})" for key in different)
        raise ConfigError(f"the stores were converted with other preprocessing than {source}: {settings}; convert them alike")


def read_tasks(source: Path) -> TaskTable:
    """`tasks.json` of a run directory, or beside a .safetensors file. Raises ConfigError where there is none."""
    path = (source if source.is_dir() else source.parent) / "tasks.json"
    try:
        return TaskTable.from_json(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"train.initial_weights: {path} cannot be read ({type(error).__name__}); name a run directory, "
            "or a .safetensors file that lies beside its tasks.json"
        ) from None


CHANNEL_HEADS = ("head.weight", "head.bias", "aux_head.weight", "aux_head.bias")
"""Of a traditional model: one row a task."""


def _row_map(known: TaskTable, tasks: TaskTable) -> Callable[[str], Rows | None]:
    """For a tensor's name: which rows come from where, if its first axis counts tasks or modalities; None for all others."""
    there = {f"{d.name}/{c.name}": c.task_id for d in known.datasets for c in d.classes}
    here = {f"{d.name}/{c.name}": c.task_id for d in tasks.datasets for c in d.classes}
    first = dict[int, int]()  # a task shared here by classes that were separate there takes the first one's row
    for name, row in here.items():
        if name in there:
            first.setdefault(row, there[name])
    task_rows = sorted(first.items())
    modality_rows = [(i, known.modalities.index(m)) for i, m in enumerate(tasks.modalities) if m in known.modalities]

    def rows(name: str) -> Rows | None:
        first, last = name.split(".", 1)[0], name.rsplit(".", 1)[-1]
        if (first == "pools" and last == "task") or name in CHANNEL_HEADS:
            return task_rows
        if (first == "pools" and last == "modality") or name.startswith("modality_head.fc2."):
            return modality_rows
        return None

    return rows


@torch.no_grad()
def _copy(target: Tensor, source: Tensor, rows: Rows | None) -> None:
    if rows is None:
        target.copy_(source)
        return
    for here, there in rows:
        target[here].copy_(source[there])


def _freeze_known(model: nn.Module, row_map: Callable[[str], Rows | None]) -> None:
    """Only new rows of the prior tables (of the channel head, in a traditional model) learn."""
    for name, parameter in model.named_parameters():
        rows = row_map(name)
        learnt = {here for here, _ in rows or ()}
        if rows is None or name.startswith("modality_head.") or len(learnt) == len(parameter):
            parameter.requires_grad_(False)
        elif learnt:
            frozen = torch.zeros(len(parameter), dtype=torch.bool)
            frozen[sorted(learnt)] = True
            parameter.register_hook(_without_rows(frozen.view(-1, *[1] * (parameter.ndim - 1))))


def _without_rows(frozen: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        return torch.where(frozen.to(gradient.device), torch.zeros((), dtype=gradient.dtype, device=gradient.device), gradient)

    return hook
