"""The training's loss on scans that were not trained on: what scaling laws are fitted to. It falls smoothly; Dice does not.

Patches are drawn by the same plan as in training, from another split, without augmentation, with a fixed seed: every run over
the same stores is asked the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hermes_dist.config import Config, validate
from hermes_dist.shards.store import ShardStore
from hermes_dist.stream.loader import open_stream
from hermes_dist.tasks import TaskTable
from hermes_dist.train.evaluate import as_trained
from hermes_dist.train.predict import TrainedRun
from hermes_dist.train.record import LossSums
from hermes_dist.train.run_directory import write_json
from hermes_dist.train.step import StepLoss

SEED = 0
BATCH = 4


def held_out_loss(run: TrainedRun, stores: Sequence[ShardStore], split: str, samples: int) -> dict[str, Any]:
    """Mean loss over the (sample, class) pairs of `samples` patches; also its terms. The model's weights stay as they are.

    `unreadable` lists the cases whose patches were replaced by those of others: this is not the loss of an intact store.

    Raises:
        ConfigError: the split has no case.
    """
    config = _config(run.config, split, samples)
    tasks = _with_stored_values(run.tasks, stores)
    sums = LossSums.zeros(run.tasks, run.device)
    modality_count, unreadable = 0, dict[str, str]()
    with torch.no_grad(), open_stream(config, stores, tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        for batch in stream:
            unreadable |= {f"{e['dataset']}/{e['case_id']}": str(e["error"]) for e in batch.events if e["kind"] == "substitution"}
            loss = StepLoss(config.loss, batch, sums, null_column=config.model.priors.padding == "attended")
            modality_count += batch.modality_count
            for micro in batch.micro_batches:
                loss(run.model, micro.to(run.device))
    bce, dice, pairs, count = (float(row.sum()) for row in sums.per_class)
    modality = float(sums.modality) / max(modality_count, 1)
    return {
        "split": split,
        "requested": samples,
        "samples": -(-samples // BATCH) * BATCH,
        "loss": pairs / count + (config.loss.modality_weight or 0.0) * modality,
        "loss_bce": bce / count,
        "loss_dice": dice / count,
        "loss_modality": modality,
        "unreadable": unreadable,
        **run.about,
    }


def _with_stored_values(tasks: TaskTable, stores: Sequence[ShardStore]) -> TaskTable:
    """The model's tasks, with the label values of these stores: they may have been converted with others than the run's."""
    stored = {d.name: d for store in stores for d in store.collection.tasks.datasets}
    found = {d.name: as_trained(stored[d.name], tasks) for d in tasks.datasets if d.name in stored}
    datasets = [
        replace(d, classes=found[d.name].classes, ignore_value=found[d.name].ignore_value) if d.name in found else d
        for d in tasks.datasets
    ]
    return TaskTable(tuple(datasets))


def write_held_out(run: TrainedRun, result: dict[str, Any]) -> Path:
    """`evaluation/<split>_loss.json` of the run directory."""
    path = run.run_dir / "evaluation" / f"{result['split']}_loss.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    return path


def _config(config: Config, split: str, samples: int) -> Config:
    data = config.model_dump()
    data["run"]["seed"] = SEED
    data["data"]["split"] = split
    data["augment"]["enabled"] = False
    data["stream"] |= {"backend": "inline", "prefetch": BATCH}
    data["train"] |= {"global_batch": BATCH, "micro_batch": BATCH, "max_steps": -(-samples // BATCH)}
    return validate(data)
