"""A small collection, configurations that read it, and what a stream of it holds. Shared by all tests of the stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hermes_dist.config import Config, validate
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.store import ShardStore, create_store, open_store
from hermes_dist.stream.batch import StepBatch
from hermes_dist.stream.loader import open_stream
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

# name, modality, classes (name, values), ignore value, (case shape, …)
DATASETS: Sequence[tuple[str, str, Sequence[tuple[str, Sequence[int]]], int | None, Sequence[tuple[int, int, int]]]] = (
    (
        "liver",
        "CT",
        (("organ", (1, 2)), ("tumour", (2,))),
        None,
        ((40, 44, 48), (36, 40, 44), (50, 30, 41), (33, 47, 35), (40, 40, 40)),
    ),
    ("heart", "MR", (("cavity", (3,)),), 255, ((30, 28, 20), (26, 31, 36))),
    ("brain", "T1", (("grey", (1,)), ("white", (2,)), ("csf", (3,))), None, ((38, 38, 38), (44, 36, 40), (36, 36, 36))),
)


def make_tasks() -> TaskTable:
    """The task table of DATASETS."""
    return TaskTable.build([(name, modality, "body", classes, ignore) for name, modality, classes, ignore, _ in DATASETS])


def write_store(path: Path, form: str, split: str = "train", n_cases: int | None = None) -> ShardStore:
    """The collection, written to `path` in one format: smooth images, labels as boxes."""
    writer = create_store(str(path), form, tasks=make_tasks(), preprocessing=Preprocessing())
    rng = np.random.default_rng(0)
    for name, modality, classes, ignore, shapes in DATASETS:
        for number, shape in enumerate(shapes[:n_cases]):
            image = rng.normal(0, 1, shape).astype(np.float32)
            label = np.zeros(shape, np.uint8)
            for value in sorted({v for _, values in classes for v in values}):
                low = [int(rng.integers(0, s - 8)) for s in shape]
                label[low[0] : low[0] + 8, low[1] : low[1] + 8, low[2] : low[2] + 8] = value
            if ignore is not None:
                label[:2] = ignore
            record = CaseRecord(
                dataset=name,
                case_id=f"case{number}",
                modality=modality,
                split=split,
                spacing_mm_zyx=(1.5, 1.5, 1.5),
                placement="{}",
                content_hash=f"{name}{number}",
                stats={},
            )
            writer.write_case(record, image, label)
    writer.finish()
    return open_store(str(path))


def write_both(root: Path) -> dict[str, Path]:
    """The collection in both formats; folder per format."""
    paths = {form: root / form for form in ("zarr", "webdataset")}
    for form, path in paths.items():
        write_store(path, form)
    return paths


def make_config(**changes: Any) -> Config:
    """A configuration for the collection; arguments are `section__key=value`."""
    return validate(config_data(**changes))


def config_data(**changes: Any) -> dict[str, Any]:
    """The same as plain data."""
    data: dict[str, Any] = {
        "run": {"seed": 5},
        "data": {"patch_vox_zyx": (24, 20, 28), "mixture": {"block": 16}},
        "stream": {"backend": "inline", "workers": 1, "object_store_mib": 100, "wait_limit_s": 120},
        "train": {"global_batch": 6, "micro_batch": 2, "max_steps": 4},
    }
    for key, value in changes.items():
        section, name = key.split("__", 1)
        data.setdefault(section, {})[name] = value
    return data


def steps(config: Config, path: Path, rank: int = 0, world: int = 1, start: int = 0) -> list[StepBatch]:
    """All steps that are left of a rank's stream."""
    store = open_store(str(path))
    tasks = store.collection.tasks
    with open_stream(config, [store], tasks, rank=rank, world_size=world, start_step=start, telemetry=None) as stream:
        return list(stream)


def real_samples(batches: Sequence[StepBatch]) -> list[tuple[int, int, bytes, bytes]]:
    """(position, identity, image bytes, label bytes) of the real samples, in order."""
    out: list[tuple[int, int, bytes, bytes]] = []
    for batch in batches:
        ready = [b.to("cpu") for b in batch.micro_batches]
        images = [(b.image[i], b.label[i]) for b in ready for i in range(len(b.image)) if b.pair_mask[i].any()]
        assert len(images) == len(batch.positions) == len(batch.identities)
        for position, identity, (image, label) in zip(batch.positions, batch.identities, images, strict=True):
            out.append((int(position), int(identity), image.numpy().tobytes(), label.numpy().tobytes()))
    return out
