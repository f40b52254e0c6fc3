"""MFU of a row: FLOPs of its samples over time and peak."""

from __future__ import annotations

import pytest

from hermes_dist.config import Config, resolve, validate
from hermes_dist.scaling.cost_layers import Request
from hermes_dist.scaling.model_costs import training_flops
from hermes_dist.scaling.utilisation import Utilisation
from hermes_dist.tasks import TaskTable

TASKS = TaskTable.build(
    [("a", "CT", "x", [("l", [1]), ("t", [2])], None), ("b", "MR", "x", [(f"c{i}", [i + 1]) for i in range(9)], None)]
)


def config(**model: object) -> Config:
    return resolve(validate({"model": {"base_channels": 8, **model}, "data": {"patch_vox_zyx": [32, 32, 32]}}))


def test_flops_follow_the_classes_of_the_samples() -> None:
    used = Utilisation(config(), TASKS, "NVIDIA H100 80GB HBM3")
    row = used({"step_s": 0.5, "dataset_samples": {"a": 2, "b": 1}})
    one, other = (training_flops(config().model, Request((32, 32, 32), columns, 11, 2)) for columns in (2, 9))
    assert row["flops"] == 2 * one + other
    assert row["mfu"] == pytest.approx(row["flops"] / 0.5 / 495e12)


def test_an_unknown_card_has_no_utilisation_and_a_cpu_is_measured() -> None:
    assert set(Utilisation(config(), TASKS, "Unheard 1")({"step_s": 1.0, "dataset_samples": {"a": 1}})) == {"flops"}
    assert Utilisation(config(), TASKS, None).peak


def test_a_backbone_without_formula_gives_nothing() -> None:
    assert (
        Utilisation(config(backbone="swinunetr", method="traditional"), TASKS, "H100")(
            {"step_s": 1.0, "dataset_samples": {"a": 1}}
        )
        == {}
    )


def test_frozen_weights_have_no_gradient_so_incremental_learning_exports_nothing() -> None:
    frozen = config().model_copy(update={"train": config().train.model_copy(update={"trainable": "new_tasks"})})
    assert Utilisation(frozen, TASKS, "H100")({"step_s": 1.0, "dataset_samples": {"a": 1}}) == {}
