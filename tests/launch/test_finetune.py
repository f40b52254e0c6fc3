"""`launch/finetune.py`: the configuration of the new run, and both modes through the real trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hermes_dist.errors import ConfigError
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.store import create_store
from hermes_dist.tasks import TaskTable
from hermes_dist.train import predict
from hermes_dist.train.finetune import finetune_config
from hermes_dist.train.run_directory import write_json
from hermes_dist.train.transfer import check_preprocessing
from hermes_dist.volume.geometry import Grid
from hermes_dist.volume.preprocess import Preprocessing, place
from tests.train.tiny_run import label_of, make_run

ROOT = Path(__file__).resolve().parents[2]
NEW = TaskTable.build([("pancreas", "CT", "abdomen", [("pancreas", [1]), ("cyst", [2])], None)])


def new_store(folder: Path) -> Path:
    """Two training cases of a dataset that the run does not know, of a modality that it knows."""
    writer = create_store(str(folder), "zarr", tasks=NEW, preprocessing=Preprocessing())
    for number in (0, 2):
        label = np.where(label_of(number) == 9, 0, label_of(number)).astype(np.uint8)
        placement = place(Grid(np.diag([1.5, 1.5, 1.5, 1.0]), label.shape), None, Preprocessing(crop_body=False))
        text = json.dumps(placement.to_json())
        record = CaseRecord("pancreas", f"p{number}", "CT", "train", (1.5, 1.5, 1.5), text, f"h{number}")
        image = label.astype(np.float32) + np.random.default_rng(number).normal(0, 0.1, label.shape).astype(np.float32)
        writer.write_case(record, image, label)
    writer.finish()
    return folder


def test_the_new_configuration(tmp_path):
    run = make_run(tmp_path, data={"patch_vox_zyx": [32, 32, 32], "mixture": {"weights": {"organs": 1}}})
    config = finetune_config(run, "transfer", stores=["s3://b/new"], name="next", overrides=["optimizer.lr=1e-4"])
    assert config.run_dir == tmp_path / "next"
    assert (config.data.stores, config.data.mixture.weights, config.optimizer.lr) == (("s3://b/new",), None, 1e-4)
    assert (config.train.initial_weights, config.train.trainable) == (str(run), "all")
    assert config.model == predict.load_run(run).config.model
    for asked, step in (("newest", "newest"), ("best", "best"), ("20", 20)):
        chosen = finetune_config(run, "transfer", stores=["x"], name="next", checkpoint=asked)
        assert chosen.train.initial_checkpoint == step
    frozen = finetune_config(run, "incremental", stores=["x"], name="next")
    assert (frozen.train.trainable, frozen.optimizer.weight_decay, frozen.loss.modality_weight) == ("new_tasks", 0, 0)


def test_the_new_run_lies_beside_the_old_one_wherever_that_was_moved(tmp_path, monkeypatch):
    moved = make_run(tmp_path / "here").rename(tmp_path / "base")
    assert finetune_config(moved, "transfer", stores=["x"], name="next").run_dir == tmp_path / "next"
    monkeypatch.chdir(moved)
    assert finetune_config(Path(), "transfer", stores=["x"], name="next").run_dir == tmp_path / "next"
    elsewhere = finetune_config(moved, "transfer", stores=["x"], name="next", overrides=["run.output_dir=other"])
    assert elsewhere.run_dir == Path("other/next")


def test_bad_use(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match="choose another --name"):
        finetune_config(run, "transfer", stores=["x"], name="run")
    with pytest.raises(ConfigError, match="unknown key 'train.max_step'. Did you mean"):
        finetune_config(run, "transfer", stores=["x"], name="n", overrides=["train.max_step=3"])
    with pytest.raises(ConfigError, match="config.json"):
        finetune_config(tmp_path / "nowhere", "transfer", stores=["x"], name="n")
    other = Preprocessing(spacing_mm_zyx=(2.0, 2.0, 2.0)).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"spacing_mm_zyx = \[2.0, 2.0, 2.0\] \(trained with"):
        check_preprocessing(run, other)
    check_preprocessing(run, Preprocessing(image_dtype="float16").model_dump(mode="json"))  # how it is stored says nothing
    (run / "preprocessing.json").write_text("{")
    with pytest.raises(ConfigError, match="preprocessing.json cannot be read"):
        check_preprocessing(run, other)


def test_all_weights_after_only_new_ones(tmp_path):
    """The zeros of incremental learning are not handed on: without decay LAMB has no trust ratios."""
    run = make_run(tmp_path)
    before = predict.load_run(run).config
    write_json(run / "config.json", finetune_config(run, "incremental", stores=["x"], name="new").model_dump(mode="json"))
    after = finetune_config(run, "transfer", stores=["x"], name="next")
    assert after.optimizer.weight_decay == before.optimizer.weight_decay > 0
    assert after.loss.modality_weight == before.loss.modality_weight


def launch(run: Path, store: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "launch/finetune.py", "--from", str(run), "--store", str(store), "--name", name, *more]
    line += ["train.max_steps=3", "train.global_batch=2", "stream.backend=inline", "monitor.prometheus_port=-1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=280, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_incremental_keeps_old_outputs_bit_for_bit(tmp_path, optimizer):
    """Trained through the engine (ZeRO-1, EMA); read back from its checkpoint; asked about an old and a new dataset."""
    run, store = make_run(tmp_path), new_store(tmp_path / "new")
    done = launch(run, store, "plus", "--mode", "incremental", f"optimizer.name={optimizer}", "optimizer.lr=0.05")
    assert done.returncode == 0, done.stderr
    before, after = (predict.load_run(tmp_path / name, torch.device("cpu")) for name in ("run", "plus"))
    assert [d.name for d in after.tasks.datasets] == ["organs", "brains", "pancreas"]
    image = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    for dataset in before.tasks.datasets:
        ask = [
            predict.model_fn(r.model, r.config, r.tasks, r.tasks.dataset(dataset.name), modality=dataset.modality)(image)
            for r in (before, after)
        ]
        assert torch.equal(ask[0], ask[1])
    old, new = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(new[k][: len(v)], v) for k, v in old.items())
    rows = [json.loads(line) for line in (tmp_path / "plus" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_transfer_moves_all_weights_and_answers_the_new_tasks(tmp_path):
    run, store = make_run(tmp_path), new_store(tmp_path / "new")
    done = launch(run, store, "moved", "optimizer.lr=0.01")
    assert done.returncode == 0, done.stderr
    assert f"initial weights: {run}, weights.safetensors (newest): " in done.stderr
    assert "at their initial values: tasks 2 (pancreas/pancreas, pancreas/cyst), modalities 0, tensors" in done.stderr
    moved = predict.load_run(tmp_path / "moved", torch.device("cpu"))
    assert [d.name for d in moved.tasks.datasets] == ["pancreas"]
    old = predict.load_run(run, torch.device("cpu")).model.state_dict()
    new = moved.model.state_dict()
    assert not torch.equal(new["head.fc1.weight"], old["head.fc1.weight"])
    assert (tmp_path / "moved" / "metrics.jsonl").read_text().count("\n") == 3
