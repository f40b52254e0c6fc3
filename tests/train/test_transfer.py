"""Carrying weights over by name, and freezing: old outputs keep their bits while new tokens learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hermes_dist.config import Config, TrainConfig, resolve, validate
from hermes_dist.errors import CheckpointError, ConfigError
from hermes_dist.models import build_model
from hermes_dist.parallel.weights import read_weights
from hermes_dist.tasks import TaskTable
from hermes_dist.train import transfer
from hermes_dist.volume.preprocess import Preprocessing
from tests.train.tiny_run import TASKS, add_checkpoints, make_config, make_run

NEW = TaskTable.build([("pancreas", "CT", "abdomen", [("pancreas", [1]), ("cyst", [2])], None)])
OTHER_MODALITY = TaskTable.build([("pelvis", "T2", "pelvis", [("prostate", [1])], None)])


def config_from(run: Path, tmp_path: Path, trainable: str = "all", **sections: dict) -> Config:
    train = {"initial_weights": str(run), "trainable": trainable}
    return make_config(tmp_path, train=train, optimizer={"weight_decay": 0}, **sections)


def old_model(run: Path) -> torch.nn.Module:
    model = build_model(make_config(run.parent).model, TASKS)
    model.load_state_dict(read_weights(run))
    return model.eval()


def test_rows_follow_their_names(tmp_path):
    run = make_run(tmp_path)
    turned = TaskTable.merge(
        [NEW, TaskTable.build([("brains", "T1", "brain", [("liver", [2]), ("stem", [1])], None)]), OTHER_MODALITY]
    )
    config = config_from(run, tmp_path)
    model = build_model(config.model, turned)
    transfer.initialise(model, config, turned)
    old, new = old_model(run).state_dict(), model.state_dict()
    for place in ("enc4", "enc16", "dec4"):
        tasks, modalities = f"pools.{place}.task", f"pools.{place}.modality"
        torch.testing.assert_close(new[tasks][2:4], old[tasks][[3, 2]], rtol=0, atol=0)
        torch.testing.assert_close(new[modalities][:2], old[modalities], rtol=0, atol=0)
        assert not torch.equal(new[tasks][0], old[tasks][0])
    torch.testing.assert_close(new["modality_head.fc2.weight"][:2], old["modality_head.fc2.weight"], rtol=0, atol=0)
    torch.testing.assert_close(new["head.fc1.weight"], old["head.fc1.weight"], rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())


def test_a_task_that_is_shared_only_now_takes_the_first_of_its_rows(tmp_path):
    run = make_run(tmp_path)
    tasks = TaskTable.merge([TASKS, NEW])
    shared = TaskTable.build(
        [(d.name, d.modality, d.region, [(c.name, c.values) for c in d.classes], None) for d in tasks.datasets],
        [["organs/liver", "brains/liver"]],
    )
    config = config_from(run, tmp_path)
    model = build_model(config.model, shared)
    said = transfer.initialise(model, config, shared)
    old, new = old_model(run).state_dict(), model.state_dict()
    assert torch.equal(new["pools.enc4.task"][:3], old["pools.enc4.task"][:3])
    assert said is not None
    assert "tensors with such rows 5 (pools.enc4.task" in said


def test_what_was_loaded_and_what_was_not_is_said(tmp_path):
    run = make_run(tmp_path)
    config = config_from(run, tmp_path)
    organs = TaskTable.build([("organs", "CT", "abdomen", [("liver", [1]), ("tumour", [2])], None)])
    tasks = TaskTable.merge([organs, NEW, OTHER_MODALITY])
    model = build_model(config.model, tasks)
    line = transfer.initialise(model, config, tasks)
    tables = [n for n in model.state_dict() if n.endswith((".task", ".modality")) or n.startswith("modality_head.fc2.")]
    assert line is not None
    assert line.startswith(f"initial weights: {run}, weights.safetensors (newest): {len(model.state_dict())} tensors loaded; at")
    assert (
        "values: tasks 3 (pancreas/pancreas, pancreas/cyst, pelvis/prostate), modalities 1 (T2), tensors with such rows" in line
    )
    assert f"rows {len(tables)} ({', '.join(tables[:3])}, …); left behind: " in line
    assert line.endswith("left behind: tasks 2 (brains/stem, brains/liver), modalities 1 (T1), tensors 0")
    same = transfer.initialise(build_model(config.model, TASKS), config, TASKS)
    assert same is not None
    assert "at their initial values: tasks 0, modalities 0, tensors with such rows 0; left behind: tasks 0, mod" in same


def test_a_checkpoint_of_the_source_can_be_chosen(tmp_path):
    run = make_run(tmp_path)
    add_checkpoints(run, [10, 20], best=10)
    plain = Preprocessing().model_dump(mode="json")
    weights = {}
    for asked, name in (("best", "step_00000010 (best)"), (10, "step_00000010 (10)"), ("newest", "step_00000020 (newest)")):
        config = validate({"train": {"initial_weights": str(run), "initial_checkpoint": asked}}).train
        config = config_from(run, tmp_path).model_copy(update={"train": config})
        transfer.check_source(config.train, plain)
        model = build_model(config.model, TASKS)
        assert f"{run}, {name}: " in str(transfer.initialise(model, config, TASKS))
        weights[asked] = model.state_dict()["head.fc1.weight"]
    assert torch.equal(weights["best"], weights[10])
    assert not torch.equal(weights["best"], weights["newest"])
    with pytest.raises(CheckpointError, match=r"no checkpoint '15'; there are checkpoints of the steps 10 \(best\), 20\."):
        transfer.check_source(TrainConfig(initial_weights=str(run), initial_checkpoint=15), plain)
    with pytest.raises(ConfigError, match=r"train.initial_checkpoint = 'best', but train.initial_weights names no run"):
        transfer.check_source(TrainConfig(initial_checkpoint="best"), plain)


def test_extended_table_keeps_old_ids(tmp_path):
    run = make_run(tmp_path)
    extended = transfer.extend(config_from(run, tmp_path, "new_tasks").train, TaskTable.merge([OTHER_MODALITY, NEW]))
    assert [d.name for d in extended.datasets] == ["organs", "brains", "pelvis", "pancreas"]
    assert [d.task_ids for d in extended.datasets] == [(0, 1), (2, 3), (4,), (5, 6)]
    assert extended.modalities == ("CT", "T1", "T2")
    assert transfer.extend(config_from(run, tmp_path).train, NEW) == NEW


@pytest.mark.parametrize("method", ["hermes", "traditional"])
@pytest.mark.parametrize("new", [NEW, OTHER_MODALITY], ids=["known modality", "new modality"])
@pytest.mark.parametrize("name", ["adamw", "sgd with momentum"])
def test_only_new_rows_learn_and_old_outputs_keep_their_bits(tmp_path, method, new, name):
    run = make_run(tmp_path, model={"method": method})
    config = config_from(run, tmp_path, "new_tasks", model={"method": method})
    tasks = transfer.extend(config.train, new)
    model = build_model(config.model, tasks)
    transfer.initialise(model, config, tasks)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.1, weight_decay=0) if name == "adamw" else torch.optim.SGD(learning, 0.1, 0.9)
    image, dataset = torch.randn(1, 1, 32, 32, 32), tasks.datasets[-1]
    for _ in range(2):
        output = model(image, torch.tensor([dataset.task_ids]), torch.tensor([tasks.modality_id(dataset.modality)]))
        output.mask_logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    tables = {"pools"} if method == "hermes" else {"head"}
    assert {k.split(".")[0] for k in changed} == tables
    for key in changed:
        kept = 2 if key.endswith("modality") else 4
        assert torch.equal(model.state_dict()[key][:kept], before[key][:kept])
    old = old_model(run) if method == "hermes" else build_model(config.model, TASKS).eval()
    old.load_state_dict(read_weights(run))
    with torch.no_grad():
        asked = image, torch.tensor([[0, 1]]), torch.tensor([0])
        assert torch.equal(model.eval()(*asked).mask_logits, old(*asked).mask_logits)


def test_bad_use(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match="needs train.initial_weights"):
        transfer.extend(make_config(tmp_path, train={"trainable": "new_tasks"}).train, NEW)
    with pytest.raises(ConfigError, match="only datasets that"):
        transfer.extend(config_from(run, tmp_path, "new_tasks").train, TASKS)
    clash = TaskTable.build([("organs", "CT", "abdomen", [("spleen", [1])], None)])
    with pytest.raises(ConfigError, match="learnt liver, tumour under that name"):
        transfer.extend(config_from(run, tmp_path, "new_tasks").train, clash)
    values = TaskTable.build([("organs", "CT", "abdomen", [("liver", [1, 2]), ("tumour", [3])], None)])
    with pytest.raises(ConfigError, match="label values .*'tumour': .3.*but .*'tumour': .2"):
        transfer.extend(config_from(run, tmp_path, "new_tasks").train, values)
    decay = make_config(tmp_path, train={"initial_weights": str(run), "trainable": "new_tasks"})
    with pytest.raises(ConfigError, match="weight_decay"):
        transfer.initialise(build_model(decay.model, TASKS), decay, TASKS)
    wide = config_from(run, tmp_path, model={"base_channels": 16})
    with pytest.raises(CheckpointError, match="has shape"):
        transfer.initialise(build_model(wide.model, TASKS), wide, TASKS)
    alone = tmp_path / "alone" / "w.safetensors"
    alone.parent.mkdir()
    save_file({"a": torch.zeros(1)}, alone)
    with pytest.raises(ConfigError, match="tasks.json cannot be read"):
        transfer.read_tasks(alone)
    (run / "tasks.json").write_text(json.dumps({"datasets": 3}))
    with pytest.raises(ConfigError, match="tasks.json cannot be read"):
        transfer.read_tasks(run)


def test_every_table_of_tasks_has_its_rows_mapped():
    """Whatever has one row a task follows the tasks' names, MedFormer's auxiliary head too."""
    for backbone, method in (("resunet", "traditional"), ("medformer", "traditional"), ("medformer", "hermes")):
        config = validate({"model": {"backbone": backbone, "method": method, "base_channels": 16}})
        few, many = (build_model(resolve(config).model, tasks).state_dict() for tasks in (TASKS, transfer_table()))
        rows = transfer._row_map(TASKS, transfer_table())
        for name, tensor in few.items():
            assert (rows(name) is not None) == (tensor.shape != many[name].shape), name


def transfer_table() -> TaskTable:
    """One task and one modality more than TASKS."""
    return TaskTable.build(
        [
            ("organs", "CT", "abdomen", [("liver", [1, 2]), ("tumour", [2])], None),
            ("brains", "T1", "brain", [("stem", [1]), ("liver", [2])], 9),
            ("pelvis", "T2", "pelvis", [("prostate", [1])], None),
        ]
    )
