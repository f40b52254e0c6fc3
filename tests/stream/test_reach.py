"""Rotated patches read only what they touch, and get the bits that reading everything gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hermes_dist.config import AugmentConfig
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.layout import Layout
from hermes_dist.shards.store import ShardStore, create_store, open_store
from hermes_dist.tasks import TaskTable
from hermes_dist.volume import augment
from hermes_dist.volume.preprocess import Preprocessing

SHAPE, PATCH = (150, 110, 130), (40, 36, 44)
ALWAYS = AugmentConfig(spatial_probability=1, intensity_probability=0)


def make_store(path: Path, form: str, dtype: str, layout: Layout) -> ShardStore:
    tasks = TaskTable.build([("ct", "CT", "trunk", [("organ", [1])], None)])
    writer = create_store(str(path), form, tasks=tasks, preprocessing=Preprocessing(image_dtype=dtype), layout=layout)
    rng = np.random.default_rng(0)
    image, label = rng.normal(size=SHAPE).astype(np.float32), (rng.random(SHAPE) < 0.4).astype(np.uint8)
    image[100:, :64, :64] = image.min()  # a block that is not stored
    writer.write_case(CaseRecord("ct", "case", "CT", "train", (1.5, 1.5, 1.5), "{}", "hash"), image, label)
    writer.finish()
    return open_store(str(path))


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize(("form", "layout"), [("zarr", Layout(32)), ("webdataset", Layout(48, margin_vox=8))])
def test_the_same_bits_from_fewer_bytes(form: str, layout: Layout, dtype: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", form, dtype, layout)
    row, read = store.manifest.row(0), {True: 0, False: 0}
    rng = np.random.default_rng(1)
    for seed in range(40):
        affine = augment.draw(seed, ALWAYS).affine
        assert affine is not None
        start = tuple(int(v) for v in rng.integers(-10, np.asarray(SHAPE) - PATCH + 10))
        box, sides = augment.source_box(affine, start, PATCH, SHAPE)
        inside = tuple(a - b for a, b in zip(start, box, strict=True))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for limited in (False, True):
            before = store.counters.bytes_read
            reach = augment.reach(affine, start, PATCH) if limited else None
            image, label = store.read_crop(row, box, sides, reach=reach, stored=limited and dtype == "int16")
            read[limited] += store.counters.bytes_read - before
            scale = row.image_step if image.dtype == np.int16 else 1.0
            found.append(augment.warp(image, label, affine, inside, PATCH, scale))
        for ours, whole in zip(found[1], found[0], strict=True):
            np.testing.assert_array_equal(ours, whole)
    assert read[True] < 0.95 * read[False]


def test_reach_leaves_out_only_what_is_not_read() -> None:
    """Against the definition: every voxel that the interpolation of some patch voxel takes is in a box that is touched."""
    rng = np.random.default_rng(2)
    for seed in range(10):
        affine = augment.draw(seed, ALWAYS).affine
        assert affine is not None
        start = (50, 60, 70)
        reach = augment.reach(affine, start, PATCH)
        half = (np.asarray(PATCH) - 1) / 2
        offsets = rng.uniform(-half, half, (500, 3))
        at = np.asarray(start) + half + offsets @ affine.T
        for corner in (np.floor(at), np.ceil(at)):
            low = corner.astype(np.int64)
            assert reach.touches(low, low + 1).all()
            assert reach.touches(low - 3, low + 2).all()
        far = (np.asarray(start) + half + 3 * (half + 4) @ affine.T).astype(np.int64)
        assert not reach.touches(far, far + 1)
