"""Random 128³ crops: our reader against plain zarr-python on the same store, and blosc2's memory-mapped partial read.

CPU milliseconds a crop (all threads of this process), one process, page cache warm, all sides in one run and on the same crops in
turn. The volume is CT-like: int16 Hounsfield units, a body with organs and noise, air around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
import zarr
from scipy.ndimage import gaussian_filter

from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.layout import Layout
from hermes_dist.shards.store import ShardStore, create_store, open_store
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

SHAPE = (320, 320, 320)
CROP = (128, 128, 128)
ROUNDS = 5
TASKS = TaskTable.build([("ct", "CT", "trunk", [("organ", [1]), ("bone", [2])], None)])


def ct_like() -> tuple[np.ndarray, np.ndarray]:
    """int16 Hounsfield units with 15 HU of noise, and a label map."""
    rng = np.random.default_rng(0)
    tissue = gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), 6)
    tissue /= tissue.std()
    _, y, x = np.ogrid[-1:1:320j, -1:1:320j, -1:1:320j]
    body = np.broadcast_to((y / 0.75) ** 2 + (x / 0.95) ** 2 < 1, SHAPE)
    bone = (tissue > 2) & body
    label = ((tissue > 0.7) & body).astype(np.uint8) + bone
    image = 40 + 30 * tissue + 600 * bone + rng.normal(size=SHAPE) * 15
    return np.where(body, image, -990).clip(-990, 500).round().astype(np.int16), label


@pytest.fixture(scope="module")
def volume() -> tuple[np.ndarray, np.ndarray]:
    return ct_like()


def write(url: Path, volume: tuple[np.ndarray, np.ndarray], form: str, layout: Layout) -> ShardStore:
    writer = create_store(str(url), form, tasks=TASKS, preprocessing=Preprocessing(image_dtype="int16"), layout=layout)
    image, label = volume
    # Hounsfield / 1024 is stored as Hounsfield units exactly: the step of int16 is 1/1024.
    writer.write_case(CaseRecord("ct", "case", "CT", "train", (1.5, 1.5, 1.5), "{}", "hash"), image / np.float32(1024), label)
    writer.finish()
    return open_store(str(url))


def cpu_ms(readers: dict[str, Callable[[tuple[int, ...]], object]], n_crops: int = 24) -> dict[str, float]:
    """The best of several rounds per reader; within a round the readers take turns crop by crop."""
    starts = [tuple(int(v) for v in s) for s in np.random.default_rng(1).integers(0, SHAPE[0] - CROP[0] + 1, (n_crops, 3))]
    for read in readers.values():
        read(starts[0])
    best = dict.fromkeys(readers, np.inf)
    for _ in range(ROUNDS):
        spent = dict.fromkeys(readers, 0.0)
        for start in starts:
            for name, read in readers.items():
                began = time.process_time()
                read(start)
                spent[name] += time.process_time() - began
        best = {name: min(best[name], spent[name] / n_crops * 1e3) for name in readers}
    return best


def stored_crop(store: ShardStore) -> Callable[[tuple[int, ...]], np.ndarray]:
    row = store.manifest.row(0)
    return lambda start: store.read_stored_crop(row, "image", start, CROP)


def box(start: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, CROP, strict=True))


@pytest.mark.bench
def test_crop_against_zarr_python_and_blosc2(tmp_path: Path, volume: tuple[np.ndarray, np.ndarray]) -> None:
    store = write(tmp_path / "store", volume, "zarr", Layout(64))
    plain = zarr.open_group(str(tmp_path / "store" / store.manifest.row(0).uri), mode="r")["image"]
    blosc2.asarray(
        volume[0],
        chunks=(96, 96, 96),
        blocks=(32, 32, 32),
        urlpath=str(tmp_path / "volume.b2nd"),
        mode="w",
        cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1},
    )
    mapped = blosc2.open(str(tmp_path / "volume.b2nd"), mmap_mode="r", dparams={"nthreads": 1})
    ours = stored_crop(store)
    readers: dict[str, Callable[[tuple[int, ...]], object]] = {
        "ours": ours,
        "blosc2 mmap": lambda start: mapped[box(start)],
        "zarr-python": lambda start: plain[box(start)],
        "ours, image float32 + label": lambda start: store.read_crop(0, start, CROP),
    }
    for name in ("blosc2 mmap", "zarr-python"):
        np.testing.assert_array_equal(readers[name]((3, 70, 129)), ours((3, 70, 129)))
    found = cpu_ms(readers)
    ratio = volume[0].nbytes / store.manifest.row(0).file_bytes[0]
    print(f"\n128³ crop of int16 {SHAPE}, 64³ chunks, lz4hc shuffle (ratio {ratio:.2f}), CPU ms a crop:")
    for name, ms in found.items():
        print(f"  {name:<30}{ms:8.2f}  {ms / found['ours']:.2f}× ours")
    assert found["ours"] <= 0.25 * found["zarr-python"], found
    assert found["ours"] <= 2.0 * found["blosc2 mmap"], found


LAYOUTS = [
    ("zarr", Layout(32)),
    ("zarr", Layout(48)),
    ("zarr", Layout(64)),
    ("webdataset", Layout(64)),
    ("webdataset", Layout(96)),
    ("webdataset", Layout(128)),
    ("webdataset", Layout(96, margin_vox=32)),
    ("webdataset", Layout(160, margin_vox=95)),
    ("webdataset", Layout(96, codec="npy")),
]


@pytest.mark.bench
def test_table_of_layouts(tmp_path: Path, volume: tuple[np.ndarray, np.ndarray]) -> None:
    print("\nimage float32 + label, 128³ crops: bytes stored per voxel, bytes read and CPU ms a crop")
    for i, (form, layout) in enumerate(LAYOUTS):
        store = write(tmp_path / str(i), volume, form, layout)
        found = cpu_ms({"read": lambda start, store=store: store.read_crop(0, start, CROP)}, n_crops=12)
        read_mib = store.counters.bytes_read / (store.counters.reads / 2) / 2**20
        per_voxel = sum(store.manifest.row(0).file_bytes) / volume[0].size
        print(
            f"  {form:<11}{layout.block_vox:>4} margin {layout.margin_vox:>3} {layout.codec:<6}{per_voxel:7.2f} B/vox "
            f"{read_mib:7.1f} MiB {found['read']:8.2f} ms"
        )
