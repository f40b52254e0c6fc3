from __future__ import annotations

import numpy as np
import pytest
import torch

from hermes_dist.config import Config, resolve
from hermes_dist.parallel.engine import StepStats
from hermes_dist.stream.batch import Batch, StepBatch
from hermes_dist.tasks import TaskTable
from hermes_dist.train.record import LossSums, StepRecord

TASKS = TaskTable.build(
    [("a", "CT", "x", [("liver", [1]), ("spleen", [2])], None), ("b", "MR", "x", [("liver", [1])], None)],
    [["a/liver", "b/liver"]],
)


def batch() -> Batch:
    return Batch(
        image=torch.zeros(3, 1, 2, 2, 2),
        label=torch.zeros(3, 2, 2, 2, dtype=torch.int16),
        class_values=torch.zeros(3, 2, 3, dtype=torch.bool),
        task_ids=torch.tensor([[0, 1], [0, -1], [0, 1]]),
        modality_ids=torch.tensor([0, 1, 0]),
        modality_targets=torch.tensor([0, -1, -1]),
        dataset_ids=torch.tensor([0, 1, 0]),
        ignore_values=torch.full((3,), -1),
        pair_mask=torch.tensor([[True, True], [True, False], [False, False]]),
    )


def test_row_holds_global_means_and_keeps_datasets_that_share_a_task_apart():
    b = batch()
    sums = LossSums.zeros(TASKS, torch.device("cpu"))
    losses = torch.tensor([[[1.0, 2.0], [4.0, 9.0], [9.0, 9.0]]]).repeat(3, 1, 1)
    present = torch.tensor([[True, False], [True, True], [True, True]])
    sums.add(b.dataset_ids, b.pair_mask, losses, present)
    sums.modality += 3.0
    step = StepBatch(
        step=4, micro_batches=[b], pair_count=3, modality_count=1, identities=np.zeros(2, np.int64),
        positions=np.array([8, 9]), data_wait_s=0.5, data_stall_s=0.75,
    )  # fmt: skip
    config = resolve(Config())
    record = StepRecord(step, StepStats(0.25, False, {"forward": 1.0}), sums.unpack(sums.packed()), 1e-3, "ab", 2, 408, 2.0)
    row = record.row(config, TASKS)
    assert row["loss_bce"] == pytest.approx(7 / 3)
    assert row["loss"] == pytest.approx(7 / 3 + 0.001 * 3)
    assert row["dataset_loss"] == {"a": {"bce": 1.5, "dice": 1.5}, "b": {"bce": 4.0, "dice": 4.0}}
    assert row["task_loss"]["a/spleen"]["dice"] == 2.0
    assert row["dataset_samples"] == {"a": 1, "b": 1}
    assert row["task_pairs"] == {"a/liver": 1, "a/spleen": 1, "b/liver": 1}
    assert row["task_foreground"] == {"a/liver": 1, "b/liver": 1}, (
        "a pair without a voxel of the class, and a filler, do not count"
    )
    assert (row["samples_per_s"], row["samples"], row["patches"], row["position"]) == (1.0, 2, 3, 408)
    assert (row["data_wait_s"], row["data_stall_s"]) == (0.5, 0.75)
    required = {"step", "position", "loss", "loss_bce", "loss_dice", "loss_modality", "lr", "grad_norm", "skipped", "step_s",
                "data_wait_s", "samples_per_s", "order_hash"}  # fmt: skip
    assert required <= row.keys()
