"""The loss on held-out patches: that of the training step, the same for every model asked, and zero for one that knows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hermes_dist.errors import ConfigError, CorruptShardError
from hermes_dist.models import build_model
from hermes_dist.seg.losses import pair_losses
from hermes_dist.stream.loader import open_stream
from hermes_dist.tasks import TaskTable
from hermes_dist.train import held_out
from hermes_dist.train.held_out import held_out_loss, write_held_out
from hermes_dist.train.predict import TrainedRun
from hermes_dist.volume.preprocess import Preprocessing
from tests.train.tiny_run import TASKS, Oracle, make_config, make_store


def opened(folder: Path, model: nn.Module, **sections: dict) -> TrainedRun:
    config = make_config(folder, data={"patch_vox_zyx": [32, 32, 32]}, **sections)
    config.run_dir.mkdir(exist_ok=True)
    return TrainedRun(
        config.run_dir, config, TASKS, Preprocessing(), model.eval(), torch.device("cpu"), "digest", "step_00000007", "7"
    )


def test_who_knows_the_answer_has_no_loss_and_who_is_off_has_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "BATCH", 1)  # the oracle answers for one dataset at a time
    stores = [make_store(tmp_path / "store")]
    knows, off = (held_out_loss(opened(tmp_path, Oracle(TASKS, shift)), stores, "test", 6) for shift in (0, 3))
    # A class that is absent from a patch keeps Dice's smoothing, whatever the model says.
    assert knows["loss_bce"] < 1e-3
    assert off["loss_bce"] > 0.1
    assert knows["loss"] < off["loss"] - 0.1


def test_it_is_the_loss_of_the_training_step_over_all_pairs(tmp_path: Path) -> None:
    """Computed again sample by sample, so that batches of mixed datasets and their padding do not matter."""
    store = make_store(tmp_path / "store")
    torch.manual_seed(3)
    run = opened(tmp_path, build_model(make_config(tmp_path).model, TASKS), loss={"modality_weight": 0.0})
    result = held_out_loss(run, [store], "test", 5)
    assert result["samples"] == 8, "whole batches"
    config = held_out._config(run.config, "test", 5)
    total, pairs = 0.0, 0
    with torch.no_grad(), open_stream(config, [store], TASKS, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        for batch in (micro for step in stream for micro in step.micro_batches):
            targets, valid = batch.targets(), batch.valid_voxels()
            for i in range(len(batch.image)):
                real = batch.pair_mask[i]
                output = run.model(batch.image[i : i + 1], batch.task_ids[i : i + 1, real], batch.modality_ids[i : i + 1])
                mask = None if valid is None else valid[i : i + 1]
                bce, overlap = pair_losses(output.mask_logits, targets[i : i + 1, real], mask, overlap="dice")
                total, pairs = total + float((bce + overlap).sum()), pairs + int(real.sum())
    assert result["loss"] == pytest.approx(total / pairs, rel=1e-4)
    assert json.loads(write_held_out(run, result).read_text()) == result


def test_a_split_without_cases_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no case"):
        held_out_loss(opened(tmp_path, Oracle(TASKS)), [make_store(tmp_path / "store")], "val", 4)


def test_cases_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store")
    monkeypatch.setattr(held_out, "BATCH", 1)
    run = opened(tmp_path, Oracle(TASKS))
    assert held_out_loss(run, [store], "test", 6)["unreadable"] == {}
    read = store.read_crop

    def broken(row: Any, *args: Any, **more: Any) -> Any:
        if row.case_id == "b0":
            raise CorruptShardError("checksum does not match")
        return read(row, *args, **more)

    monkeypatch.setattr(store, "read_crop", broken)
    assert held_out_loss(run, [store], "test", 6)["unreadable"] == {"brains/b0": "checksum does not match"}


def test_labels_are_read_with_the_values_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was trained on a store with other values for the same classes; its table says nothing about this one."""
    monkeypatch.setattr(held_out, "BATCH", 1)
    other = TaskTable.build(
        [
            ("organs", "CT", "abdomen", [("liver", [63, 126]), ("tumour", [126])], 7),
            ("brains", "T1", "brain", [("stem", [63]), ("liver", [126])], None),
        ]
    )
    run = opened(tmp_path, Oracle(TASKS))
    stores = [make_store(tmp_path / "store")]
    assert held_out_loss(replace(run, tasks=other), stores, "test", 6) == held_out_loss(run, stores, "test", 6)
