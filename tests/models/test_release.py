"""Import of released checkpoints: the paper's table, safe loading, a run directory whose model gives the published numbers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hermes_dist.config import load_config
from hermes_dist.errors import ModelError
from hermes_dist.models import build_model
from hermes_dist.models.published import from_state_dict, published_name, rename
from hermes_dist.models.release import MODALITIES, paper_tasks, read_checkpoint, release_config, release_weights
from hermes_dist.tasks import TaskTable
from tests.models.published_state import BLOCKS, published_state

ROOT = Path(__file__).resolve().parents[2]


def test_the_papers_table() -> None:
    tasks = paper_tasks()
    assert tasks.n_tasks == 71
    assert sum(len(d.classes) for d in tasks.datasets if d.name != "chaos_t2") == 84
    first_and_last = {d.name: (d.task_ids[0], d.task_ids[-1]) for d in tasks.datasets}
    assert first_and_last == {
        "lits": (0, 1),
        "kits": (2, 3),
        "amos_ct": (4, 18),
        "amos_mr": (4, 16),
        "bcv": (19, 31),
        "structseg_oar": (32, 37),
        "chaos_t1": (38, 41),
        "chaos_t2": (38, 41),
        "structseg_head_oar": (42, 63),
        "mnm": (64, 66),
        "brain_structure": (67, 69),
        "autopet": (70, 70),
    }
    assert set(tasks.modalities) == set(MODALITIES)


def import_run(tmp_path: Path, content: Any) -> Path:
    checkpoint, out = tmp_path / "latest.pth", tmp_path / "runs" / "imported"
    torch.save(content, checkpoint)
    command = [sys.executable, str(ROOT / "launch" / "import_published.py"), str(checkpoint), "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return out


def test_imported_run_gives_the_published_numbers(tmp_path: Path) -> None:
    state = published_state()
    ema = {f"module.{name}": tensor for name, tensor in state.items()}
    plain = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    out = import_run(tmp_path, {"epoch": 3, "model_state_dict": plain, "ema_model_state_dict": ema, "optimizer_state_dict": {}})
    config = load_config(out / "config.json")
    tasks = TaskTable.from_json(json.loads((out / "tasks.json").read_text()))
    assert config.model.blocks == BLOCKS
    assert config.model.priors.padding == "attended"
    assert config.loss.overlap == "tversky"
    model = build_model(config.model, tasks)
    model.load_state_dict(load_file(out / "weights.safetensors"))
    published = from_state_dict(state)
    image = torch.randn(1, 1, 16, 16, 32)
    for modality in ("CT", "MR", "PET"):
        row = MODALITIES.index(modality)
        ids = torch.tensor([[4, 18, 70, -1]])
        with torch.no_grad():
            ours = model(image, ids, torch.tensor([tasks.modality_id(modality)]))
            theirs = published(image, ids, torch.tensor([-1 if modality == "MR" else row]))
        torch.testing.assert_close(ours.mask_logits, theirs.mask_logits)
        order = [MODALITIES.index(m) for m in tasks.modalities]
        torch.testing.assert_close(ours.modality_logits, theirs.modality_logits[:, order])


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (tmp_path / "executed", "x"))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"ema_model_state_dict": Evil()}))
    with pytest.raises(ModelError, match=r"evil\.pth: not a checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("content", "message"), [({"epoch": 1}, "expected a state dict"), (7, "expected a state dict")])
def test_files_without_a_state_dict_are_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ModelError, match=message):
        read_checkpoint(tmp_path / "odd.pth")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.pth"):
        read_checkpoint(tmp_path / "absent.pth")


def test_wrong_tensors_are_named_with_both_shapes() -> None:
    state = published_state()
    wrong = {**state, "down2.conv.1.conv2.conv.weight": torch.zeros(32, 31, 3, 3, 3)}
    with pytest.raises(ModelError, match=r"down2\.conv\.1\.conv2\.conv\.weight: .*\(32, 31, 3, 3, 3\).*\(32, 32, 3, 3, 3\)"):
        from_state_dict(wrong)
    with pytest.raises(ModelError, match=r"unexpected names in the state dict: decoder\.weight"):
        from_state_dict({**state, "decoder.weight": torch.zeros(1)})
    del state["out.norm.bias"]
    with pytest.raises(ModelError, match=r"missing out\.norm\.bias"):
        from_state_dict(state)


def test_table_and_recipe_use_the_same_names() -> None:
    """Rows of an imported run and datasets of a store meet by name; the order of both gives the ids."""
    recipe = json.loads((ROOT / "configs" / "collections" / "hermes_upstream.json").read_text())
    rows = [(d["name"], d["modality"], d["region"], [(label, [1]) for label in d["labels"]], None) for d in recipe["datasets"]]
    wanted = TaskTable.build(rows, recipe["shared_tasks"])
    tasks = paper_tasks()
    assert tasks.modalities == wanted.modalities
    for ours, theirs in zip(tasks.datasets, wanted.datasets, strict=True):
        assert (ours.name, ours.modality, ours.region) == (theirs.name, theirs.modality, theirs.region)
        assert ours.class_names == theirs.class_names
        assert ours.task_ids == theirs.task_ids


def test_published_names_and_back() -> None:
    state = published_state()
    for published, here in rename(state).items():
        assert published_name(here, medformer=False) == published
    assert published_name("pools.enc4.null", medformer=False) == "prior_init_fuse_2.task_prior"


@pytest.mark.parametrize("name", [*list(published_state())[::150], "inc.conv1.weight", "prior_init_fuse_2.modality_prior"])
def test_every_missing_tensor_is_named_as_published(name: str) -> None:
    state = {n: tensor for n, tensor in published_state().items() if n != name}
    with pytest.raises(ModelError) as error:
        from_state_dict(state)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("inc.conv1.weight", ()),
        ("prior_init_fuse_2.task_prior", (0,)),
        ("prior_init_fuse_2.modality_prior", (6, 64)),
        ("up1.conv.0.conv1.conv.weight", (7,)),
    ],
)
def test_tensors_of_another_rank_are_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    state = {**published_state(), name: torch.zeros(shape)}
    with pytest.raises(ModelError, match=name):
        from_state_dict(state)
    with pytest.raises(ModelError, match=name):
        release_weights(state, release_config(state, tmp_path / "run"), paper_tasks())


@pytest.mark.parametrize(
    "state",
    [{"layer4.0.weight": torch.zeros(3, 3)}, {**published_state(), "prior_fuse_9.task_prior": torch.zeros(3)}],
    ids=["another network", "another place"],
)
def test_files_of_other_networks_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match=r"published Hermes-R or Hermes-M"):
        release_weights(state, release_config(state, tmp_path / "run"), paper_tasks())
