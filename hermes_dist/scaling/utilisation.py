"""Model FLOPs utilisation of a running training: what the model's arithmetic needs over what the device could do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hermes_dist.config import Config
from hermes_dist.errors import ConfigError
from hermes_dist.scaling.cost_layers import Request
from hermes_dist.scaling.devices import measured_peak, peak_of
from hermes_dist.scaling.model_costs import training_flops
from hermes_dist.tasks import TaskTable


class Utilisation:
    """Adds `flops` and `mfu` to the rows of one rank.

    The FLOPs of a sample depend on how many classes its dataset has. The peak is that of the device's name in the table, or
    measured on a CPU; a card that the table does not know gives `flops` without `mfu`. A model without
    formula gives neither, and so does incremental learning (`train.trainable=new_tasks`): frozen weights have no gradient, which
    the formulas count.
    """

    def __init__(self, config: Config, tasks: TaskTable, device_name: str | None) -> None:
        """`device_name` as the driver says it; None = CPU, whose peak is measured now (0.3 s)."""
        self.peak = measured_peak() if device_name is None else peak_of(device_name, config.train.precision)
        self.flops: dict[str, int] = {}
        if config.train.trainable == "new_tasks":
            return
        for dataset in tasks.datasets:
            request = Request(config.data.patch_vox_zyx, len(dataset.classes), tasks.n_tasks, len(tasks.modalities))
            try:
                self.flops[dataset.name] = training_flops(config.model, request)
            except ConfigError:  # a backbone without formula: no number is better than a wrong one
                return

    def __call__(self, row: Mapping[str, Any]) -> dict[str, float]:
        """`flops` spent by this rank in the row's step (its `dataset_samples`), and `mfu` over `step_s`."""
        if not self.flops:
            return {}
        flops = sum(self.flops[name] * count for name, count in (row.get("dataset_samples") or {}).items())
        if not self.peak or not row.get("step_s"):
            return {"flops": flops}
        return {"flops": flops, "mfu": flops / row["step_s"] / self.peak}
