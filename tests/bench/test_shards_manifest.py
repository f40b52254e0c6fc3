"""A manifest of a million rows: time to open, memory over the bare interpreter, time of a row by id.

Rows are as conversion writes them: 13 datasets, three classes with 100 foreground coordinates each, a placement text of about 450
characters. Figures come from a fresh process; a row is found by dataset and case id, then read with all its fields; the second
figure adds the coordinates of one class. All draws are random over the whole manifest, so nearly every one misses the cache. CPU
seconds are compared (one thread does everything), wall seconds are shown beside them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hermes_dist.shards.manifest import ManifestEntry, ManifestRow, write_manifest

N_ROWS = 1_000_000
N_DATASETS = 13

READER = """
import json, os, sys, time

def rss_mb():
    with open("/proc/self/status") as file:
        return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in file if line.startswith(("VmRSS", "VmHWM"))}

bare = rss_mb()["VmRSS"]
import numpy as np
from hermes_dist.shards.manifest import Manifest
imported = rss_mb()["VmRSS"]
began, began_wall = time.process_time(), time.perf_counter()
manifest = Manifest(sys.argv[1])
opened_s, opened_wall_s = time.process_time() - began, time.perf_counter() - began_wall
after_open = rss_mb()
rng = np.random.default_rng(0)
draws = [(f"dataset{i % 13:02d}", f"case_{i:07d}") for i in rng.integers(0, len(manifest), 400)]
row_s, row_wall_s, foreground_s = [], [], []
for dataset, case_id in draws:
    began, began_wall = time.process_time(), time.perf_counter()
    row = manifest.row(manifest.find(dataset, case_id))
    row_s.append(time.process_time() - began)
    row_wall_s.append(time.perf_counter() - began_wall)
    assert row.case_id == case_id
    began = time.process_time()
    manifest.foreground(manifest.find(dataset, case_id), 1)
    foreground_s.append(time.process_time() - began)
began = time.perf_counter()
train = manifest.rows("dataset05", "train")
rows_s = time.perf_counter() - began
end = rss_mb()
print(json.dumps({
    "rows": len(manifest), "open_s": opened_s, "open_wall_s": opened_wall_s,
    "import_mb": imported - bare, "after_open_mb": after_open["VmRSS"] - bare,
    "peak_mb": end["VmHWM"] - bare, "row_ms": float(np.median(row_s) * 1e3), "row_p95_ms": float(np.percentile(row_s, 95) * 1e3),
    "row_wall_ms": float(np.median(row_wall_s) * 1e3),
    "foreground_ms": float(np.median(foreground_s) * 1e3), "rows_of_a_split_ms": rows_s * 1e3, "train_rows": len(train),
}))
"""


def entries(n_rows: int) -> Iterator[ManifestEntry]:
    rng = np.random.default_rng(0)
    placement = json.dumps(
        {"original": {"affine": rng.normal(size=(4, 4)).tolist(), "shape_vox_zyx": [512, 512, 300]}, "axes": [2, 1, 0]}
    )
    ids = np.sort(np.arange(n_rows) * 1.0)
    order = np.lexsort((ids, np.arange(n_rows) % N_DATASETS))
    for i in order.tolist():
        row = ManifestRow(
            dataset=f"dataset{i % N_DATASETS:02d}",
            case_id=f"case_{i:07d}",
            modality="CT" if i % N_DATASETS < 9 else "T1",
            split="train" if i % 10 < 7 else "test",
            shape_vox_zyx=(200, 256, 256),
            spacing_mm_zyx=(1.5, 1.5, 1.5),
            placement=placement,
            class_voxels=(1000 + i, 20, 3),
            stats={"clip_low": -990.0, "clip_high": 500.0, "mean": -300.5, "std": 410.25, "stored_min": -2.0, "stored_max": 3.0},
            content_hash=f"{i:032x}",
            data_hash=f"{i:032x}",
            uri=f"zarr/dataset{i % N_DATASETS:02d}/case_{i:07d}-01234567",
            image_dtype="int16",
            image_step=2**-10,
            image_fill=-2048.0,
            label_dtype="uint8",
            block_vox_zyx=(64, 64, 64),
            file_bytes=(12_345_678, 234_567),
            file_crc32c=(i, i + 1),
        )
        yield ManifestEntry(row, (np.arange(300, dtype=np.uint32) * 4001 + i), (100, 100, 100))


@pytest.mark.bench
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_rows(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    began = time.perf_counter()
    write_manifest(entries(N_ROWS), str(path))
    print(f"\nwritten in {time.perf_counter() - began:.0f} s, {path.stat().st_size / 2**20:.0f} MiB")
    found = json.loads(
        subprocess.run([sys.executable, "-c", READER, str(path)], check=True, capture_output=True, text=True).stdout
    )
    for name, value in found.items():
        print(f"  {name:<20}{value:12.3f}" if isinstance(value, float) else f"  {name:<20}{value:>12}")
    assert found["rows"] == N_ROWS
    assert found["open_s"] <= 1.5
    assert found["peak_mb"] <= 300
    assert found["row_ms"] <= 1
