"""The manifest: round trip, row groups of any number of classes, bounded cache, damaged files."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_dist.errors import CorruptShardError, StoreError, TransientStorageError
from hermes_dist.shards import manifest as manifest_module
from hermes_dist.shards.case import FOREGROUND_PER_CASE, safe_name, sample_foreground
from hermes_dist.shards.manifest import Manifest, ManifestEntry, ManifestRow, write_manifest
from hermes_dist.tasks import DatasetTasks, TaskClass

ROW = ManifestRow(
    dataset="a",
    case_id="c",
    modality="CT",
    split="train",
    shape_vox_zyx=(10, 20, 30),
    spacing_mm_zyx=(1.5, 1.25, 0.1),
    placement='{"ü": 1}',
    class_voxels=(5, 0),
    stats={"mean": 0.1, "std": 1.0},
    content_hash="h",
    data_hash="d",
    uri="zarr/a/c",
    image_dtype="int16",
    image_step=2**-10,
    image_fill=-2048.0,
    label_dtype="uint8",
    block_vox_zyx=(32, 32, 32),
    file_bytes=(2**40, 1),
    file_crc32c=(2**32 - 1, 0),
    block_offsets=(1, 2),
    block_lengths=(3, 4),
    block_crc32c=(5, 6),
)


def entry(i: int, samples: int = 3) -> ManifestEntry:
    row = replace(ROW, dataset="a" if i < 700 else "b", case_id=f"c{i:05d}", split="train" if i % 3 else "test")
    return ManifestEntry(row, (np.arange(samples, dtype=np.uint32) * 7 + i) % 6000, (samples, 0))


@pytest.mark.parametrize("samples", [3, 5000])
def test_round_trip(tmp_path: Path, samples: int) -> None:
    path = tmp_path / "m.parquet"
    n = 1300 if samples == 3 else 120
    assert write_manifest((entry(i, samples) for i in range(n)), str(path)) == n
    manifest = Manifest(str(path))
    assert len(manifest) == n
    for i in [0, 1, 51, 52, 53, n - 1, *np.random.default_rng(0).integers(0, n, 30).tolist()]:
        want = entry(i, samples)
        assert manifest.row(i) == want.row
        np.testing.assert_array_equal(np.ravel_multi_index(tuple(manifest.foreground(i, 0).T), (10, 20, 30)), want.foreground)
        assert manifest.foreground(i, 1).shape == (0, 3)
        assert manifest.find(want.row.dataset, want.row.case_id) == i
    again = list(manifest.entries([5, 6]))
    assert [e.row for e in again] == [entry(5, samples).row, entry(6, samples).row]
    assert again[0].foreground_counts == (samples, 0)
    groups = pq.ParquetFile(path).metadata
    assert all(groups.row_group(g).num_rows <= (512 if samples == 3 else 53) for g in range(groups.num_row_groups))


def test_foreground_in_lists_and_no_packed_rows_as_older_manifests_have_it(tmp_path: Path) -> None:
    """So it is seen, too, that the columns hold the same as the packed rows."""
    write_manifest((entry(i) for i in range(300)), str(tmp_path / "new"))
    table = pq.read_table(tmp_path / "new")
    assert table.schema.field("foreground").type == pa.binary()
    lists = pa.array([np.frombuffer(v, "<u4") for v in table["foreground"].to_pylist()], pa.list_(pa.uint32()))
    column = table.schema.get_field_index("foreground")
    table = table.set_column(column, "foreground", lists).drop_columns(["packed"])
    pq.write_table(table, tmp_path / "old", row_group_size=256, use_dictionary=False)
    old, new = Manifest(str(tmp_path / "old")), Manifest(str(tmp_path / "new"))
    for i in (0, 255, 256, 299):
        np.testing.assert_array_equal(old.foreground(i, 0), new.foreground(i, 0))
    for theirs, ours, i in zip(old.entries(), new.entries(), range(300), strict=True):
        assert theirs.row == ours.row
        for found in (theirs, ours):
            np.testing.assert_array_equal(found.foreground, entry(i).foreground)
            assert found.foreground.dtype == np.uint32


def test_a_packed_row_that_is_none(tmp_path: Path) -> None:
    write_manifest((entry(i) for i in range(3)), str(tmp_path / "m"))
    table = pq.read_table(tmp_path / "m")
    packed = table["packed"].to_pylist()
    column = table.schema.get_field_index("packed")
    pq.write_table(table.set_column(column, "packed", pa.array([packed[0], packed[1][:-1], packed[2]])), tmp_path / "m")
    manifest = Manifest(str(tmp_path / "m"))
    assert manifest.row(0) == entry(0).row
    with pytest.raises(CorruptShardError, match="packed row 1 of its group is damaged"):
        manifest.row(1)


def test_a_case_without_foreground(tmp_path: Path) -> None:
    write_manifest([entry(0, samples=0)], str(tmp_path / "m"))
    manifest = Manifest(str(tmp_path / "m"))
    assert manifest.foreground(0, 0).shape == (0, 3)
    assert [len(e.foreground) for e in manifest.entries()] == [0]


def test_rows_of_dataset_and_split(tmp_path: Path) -> None:
    write_manifest((entry(i) for i in range(1300)), str(tmp_path / "m"))
    manifest = Manifest(str(tmp_path / "m"), datasets=["empty", "a", "b"])
    assert manifest.dataset_names == ("empty", "a", "b")
    assert manifest.rows("empty").dtype == np.int64
    assert len(manifest.rows("empty")) == 0
    assert manifest.rows("a", "test").tolist() == list(range(0, 700, 3))
    assert manifest.rows("b").tolist() == list(range(700, 1300))
    assert manifest.rows(split="test").tolist() == list(range(0, 1300, 3))
    assert np.bincount(manifest.dataset_index).tolist() == [0, 700, 600]
    with pytest.raises(StoreError, match="does not declare"):
        Manifest(str(tmp_path / "m"), datasets=["a"])
    write_manifest([entry(800), entry(1)], str(tmp_path / "unsorted"))
    with pytest.raises(StoreError, match="not sorted"):
        Manifest(str(tmp_path / "unsorted"), datasets=["a", "b"])


def test_the_cache_is_bounded_and_threads_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "CACHE_BYTES", 1 << 20)
    write_manifest((entry(i) for i in range(1300)), str(tmp_path / "m"))
    manifest = Manifest(str(tmp_path / "m"))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 1300, 60).tolist():
            if manifest.row(i) != entry(i).row or manifest.foreground(i, 0).shape != (3, 3):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    kept = manifest._cache  # pyright: ignore[reportPrivateUsage]
    assert sum(t.nbytes for t in kept.values()) == manifest._cache_bytes  # pyright: ignore[reportPrivateUsage]
    assert len(kept) == 1 or manifest._cache_bytes <= 1 << 20  # pyright: ignore[reportPrivateUsage]


def test_an_empty_manifest(tmp_path: Path) -> None:
    assert write_manifest([], str(tmp_path / "m")) == 0
    manifest = Manifest(str(tmp_path / "m"), datasets=["a"])
    assert (len(manifest), manifest.case_ids, manifest.rows("a").tolist()) == (0, [], [])


def test_damage(tmp_path: Path) -> None:
    write_manifest((entry(i) for i in range(10)), str(tmp_path / "m"))
    good = (tmp_path / "m").read_bytes()
    for bad in (b"", good[:100], good[: len(good) // 2], good[:-1], b"PAR1" + bytes(100) + b"PAR1"):
        (tmp_path / "m").write_bytes(bad)
        with pytest.raises(CorruptShardError, match="damaged"):
            Manifest(str(tmp_path / "m"))


def test_storage_that_fails_is_no_damage(tmp_path: Path) -> None:
    """The file that the manifest holds open cannot be read any more; its bytes may be sound."""
    path = tmp_path / "m"
    write_manifest((entry(i) for i in range(10)), str(path))
    manifest = Manifest(str(path), str(path))
    (held,) = (int(fd.name) for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd) == str(path))
    kept, unreadable = os.dup(held), os.open(path, os.O_WRONLY)
    os.dup2(unreadable, held)
    for read in (lambda: manifest.row(3), lambda: manifest.foreground(3, 0), manifest.content_hashes):
        with pytest.raises(TransientStorageError, match=str(path)):
            read()
    os.dup2(kept, held)
    assert manifest.row(3) == entry(3).row
    for number in (kept, unreadable):
        os.close(number)


def test_row_files() -> None:
    made = entry(3)
    text = json.dumps(made.to_json())
    back = ManifestEntry.from_json(json.loads(text))
    assert back.row == made.row
    np.testing.assert_array_equal(back.foreground, made.foreground)
    for bad in ({"dataset": "a"}, {**made.to_json(), "foreground": [-1]}, {**made.to_json(), "foreground": "x"}):
        with pytest.raises(StoreError, match="convert this case again"):
            ManifestEntry.from_json(bad)


@settings(deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=40) | st.text("ab./\\=%", min_size=90, max_size=130), min_size=2, unique=True))
def test_safe_names_are_safe_and_differ(names: list[str]) -> None:
    encodable = [n for n in names if n.isprintable() or n.isascii()]
    safe = [safe_name(n) for n in encodable]
    assert len(set(safe)) == len(safe)
    assert all(len(s) <= 100 and s.isascii() and not set(s) & set("./\\%: ") for s in safe)


def test_foreground_of_many_classes_is_spread_and_bounded() -> None:
    label = np.random.default_rng(0).integers(0, 130, (40, 41, 42)).astype(np.uint8)
    classes = (*(TaskClass(str(v), v, (v,)) for v in range(1, 125)), TaskClass("all", 0, tuple(range(1, 125))))
    voxels, flat, sizes = sample_foreground(label, DatasetTasks("d", "CT", "r", classes))
    assert voxels[-1] == sum(voxels[:-1])
    assert len(flat) == sum(sizes) <= FOREGROUND_PER_CASE
    assert min(sizes) >= 30
    of_all = flat[-sizes[-1] :]
    assert np.histogram(of_all, bins=8, range=(0, label.size))[0].min() >= 2
    one = np.zeros((5, 5, 5), np.uint8)
    one[1, 2, 3] = 9
    assert sample_foreground(one, DatasetTasks("d", "CT", "r", (TaskClass("x", 0, (9,)),)))[1].tolist() == [25 + 10 + 3]
