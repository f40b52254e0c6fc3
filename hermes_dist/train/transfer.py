"""Starting from other weights: rows of the prior tables are carried over by their `dataset/class` and modality names.

Task ids are positions in one collection's table, so they mean nothing in another; names do.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from hermes_dist.config import TrainConfig
from hermes_dist.errors import CheckpointError, ConfigError
from hermes_dist.parallel.checkpoint import read_weights
from hermes_dist.tasks import TaskTable


def initialise(model: nn.Module, config: TrainConfig, tasks: TaskTable) -> None:
    """Load `train.initial_weights` into the model, if any; does nothing otherwise.

    Raises:
        CheckpointError: the weights are of another architecture; names the first tensor and both shapes.
        ConfigError: `train.trainable=new_tasks` without weights to start from.
    """
    if config.initial_weights is None:
        if config.trainable != "all":
            raise ConfigError("train.trainable = 'new_tasks' needs train.initial_weights: the run whose weights stay frozen")
        return
    source = Path(config.initial_weights)
    weights = read_weights(source)
    run_dir = source if source.is_dir() else source.parent
    known = TaskTable.from_json(json.loads((run_dir / "tasks.json").read_text()))
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise CheckpointError(f"{source}: has no tensor {name!r}; was it trained with another model section?")
        rows = _row_map(name, known, tasks)
        if rows is not None:
            _copy_rows(tensor, weights[name], rows)
        elif tensor.shape == weights[name].shape:
            tensor.copy_(weights[name])
        elif not name.startswith("modality_head.fc2."):
            raise CheckpointError(
                f"{source}: tensor {name!r} has shape {tuple(weights[name].shape)}, this model expects {tuple(tensor.shape)}; "
                "use the model section of that run's config.json"
            )


def _row_map(name: str, known: TaskTable, tasks: TaskTable) -> list[tuple[int, int]] | None:
    """(row here, row there) for a tensor whose first axis counts tasks or modalities; None for all others."""
    leaf = name.rsplit(".", 1)[-1]
    if name.startswith("pools.") and leaf == "task":
        there = {f"{d.name}/{c.name}": c.task_id for d in known.datasets for c in d.classes}
        here = {f"{d.name}/{c.name}": c.task_id for d in tasks.datasets for c in d.classes}
    elif name.startswith("pools.") and leaf == "modality":
        there = {m: i for i, m in enumerate(known.modalities)}
        here = {m: i for i, m in enumerate(tasks.modalities)}
    else:
        return None
    return [(row, there[key]) for key, row in here.items() if key in there]


@torch.no_grad()
def _copy_rows(target: Tensor, source: Tensor, rows: list[tuple[int, int]]) -> None:
    for here, there in rows:
        target[here].copy_(source[there])
