"""The same synthetic scans for every loader that is compared: body-like, smooth, noisy, a few organs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.store import ShardStore, create_store, open_store
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

SIDES = {"small": (128, 160, 160), "large": (232, 232, 232)}
"""3.3 and 12.5 million voxels."""
CLASSES = 4
CASES = 3


def scan(number: int, sides: tuple[int, int, int], classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """Normalised image float32 and label uint8 of one case."""
    rng = np.random.default_rng(number)
    coarse = rng.normal(size=[s // 8 + 2 for s in sides]).astype(np.float32)
    smooth = ndimage.zoom(coarse, 8, order=1)[: sides[0], : sides[1], : sides[2]]
    image = smooth + 0.05 * rng.standard_normal(sides, dtype=np.float32)
    label = np.zeros(sides, np.uint8)
    for value in range(1, classes + 1):
        low = [int(rng.integers(0, s - 40)) for s in sides]
        box = tuple(slice(a, a + 40) for a in low)
        label[box][smooth[box] > 0] = value
    return np.ascontiguousarray(image), label


def write_store(path: Path, cases: Sequence[tuple[np.ndarray, np.ndarray]], classes: int = CLASSES) -> ShardStore:
    """The cases as a zarr store in its default layout."""
    tasks = TaskTable.build([("bench", "CT", "body", [(f"organ{v}", (v,)) for v in range(1, classes + 1)], None)])
    writer = create_store(str(path), "zarr", tasks=tasks, preprocessing=Preprocessing())
    for number, (image, label) in enumerate(cases):
        record = CaseRecord("bench", f"case{number}", "CT", "train", (1.5, 1.5, 1.5), "{}", str(number), {})
        writer.write_case(record, image, label)
    writer.finish()
    return open_store(str(path))
