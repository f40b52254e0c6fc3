"""A shard store of four coded scans and models whose right answer is known, for the tests of evaluate and predict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hermes_dist.config import Config, load_config, resolve, validate
from hermes_dist.models import build_model
from hermes_dist.models.output import ModelOutput
from hermes_dist.parallel.fragments import Fragment, write_tensors
from hermes_dist.parallel.stored import FORMAT, mark_best
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.store import ShardStore, create_store, open_store
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.geometry import Grid
from hermes_dist.volume.preprocess import Preprocessing, place

TASKS = TaskTable.build(
    [
        ("organs", "CT", "abdomen", [("liver", [1, 2]), ("tumour", [2])], None),
        ("brains", "T1", "brain", [("stem", [1]), ("liver", [2])], 9),
    ]
)


class Oracle(nn.Module):
    """Knows the answer: the image holds the label values, and each task knows its own values. `shift` moves the masks in x."""

    def __init__(self, tasks: TaskTable, shift: int = 0) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.values = {c.task_id: c.values for d in tasks.datasets for c in d.classes}
        self.shift = shift

    def forward(self, image: Tensor, task_ids: Tensor, modality_ids: Tensor) -> ModelOutput:
        image = torch.roll(image, self.shift, dims=-1)
        hits = [sum((image - v).abs() < 0.5 for v in self.values[int(t)]) for t in task_ids[0]]
        return ModelOutput(torch.cat([(h > 0).float() * 20 - 10 for h in hits], dim=1), None, None)


def label_of(case: int, shape: tuple[int, int, int] = (20, 18, 16)) -> np.ndarray:
    """A box of value 1 with a smaller box of value 2 inside; case 1 has no 2; case 2 has a stripe of the ignore value."""
    label = np.zeros(shape, np.uint8)
    label[4:14, 3:13, 2 : 10 + case] = 1
    if case != 1:
        label[6:9, 5:9, 4:8] = 2
    if case == 2:
        label[16:18] = 9
    return label


def make_store(folder: Path) -> ShardStore:
    """organs/a0, a1 and brains/b0, b2 in the test split, organs/t0 in train; spacing 1.5 mm, image = label values."""
    writer = create_store(str(folder), "zarr", tasks=TASKS, preprocessing=Preprocessing(image_dtype="float32"))
    cases = [("organs", "a0", "CT", "test", 0), ("organs", "a1", "CT", "test", 1), ("organs", "t0", "CT", "train", 0)]
    cases += [("brains", "b0", "T1", "test", 0), ("brains", "b2", "T1", "test", 2)]
    for dataset, case_id, modality, split, number in cases:
        label = label_of(number)
        grid = Grid(np.diag([-1.5, 1.5, 1.5, 1.0]), label.shape)
        placement = place(grid, None, Preprocessing(crop_body=False))
        text = json.dumps(placement.to_json())
        record = CaseRecord(dataset, case_id, modality, split, (1.5, 1.5, 1.5), text, f"hash{case_id}")
        writer.write_case(record, label.astype(np.float32), label)
    writer.finish()
    return open_store(str(folder))


def make_config(folder: Path, **sections: dict) -> Config:
    """Window 16³, base 8, run directory `folder/run`."""
    data = {
        "run": {"name": "run", "output_dir": str(folder)},
        "data": {"patch_vox_zyx": [16, 16, 16]},
        "model": {"base_channels": 8, "blocks": [1, 1, 1, 1]},
        "evaluate": {"bootstrap": 20},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return resolve(validate(data))


def make_run(folder: Path, tasks: TaskTable = TASKS, **sections: dict) -> Path:
    """A run directory with random weights of a real small Hermes-R (window 32³)."""
    sections = {"data": {"patch_vox_zyx": [32, 32, 32]}, **sections}
    config = make_config(folder, **sections)
    run = config.run_dir
    run.mkdir(parents=True)
    torch.manual_seed(5)
    save_file(build_model(config.model, tasks).state_dict(), run / "weights.safetensors")
    (run / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (run / "tasks.json").write_text(json.dumps(tasks.to_json()))
    (run / "preprocessing.json").write_text(json.dumps(Preprocessing().model_dump(mode="json")))
    return run


def add_checkpoints(run: Path, steps: Sequence[int], best: int | None = None) -> None:
    """Complete checkpoints with random weights of the run's model, others at each step."""
    config, tasks = load_config(run / "config.json"), TaskTable.from_json(json.loads((run / "tasks.json").read_text()))
    for step in steps:
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        torch.manual_seed(step)
        state = build_model(config.model, tasks).state_dict()
        entry = write_tensors(folder / "rank_00000.safetensors", {f"param/{n}": t.flatten() for n, t in state.items()})
        fragments = [Fragment(n, 0, t.numel(), f"param/{n}", 0).to_json() for n, t in state.items()]
        common = {"shapes": {n: list(t.shape) for n, t in state.items()}}
        files = {"rank_00000.safetensors": {**entry, "fragments": fragments}}
        index = {"format": FORMAT, "step": step, "time": 0.0, "world_size": 1, "common": common, "state": {}, "files": files}
        (folder / "checkpoint.json").write_text(json.dumps(index))
    if best is not None:
        mark_best(run, best)
