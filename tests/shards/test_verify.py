"""Damage of every kind is found: by `verify`, and by reading, which never returns wrong voxels."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from hermes_dist.errors import CorruptShardError, HermesError, StoreError
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.codec import Scratch, compress, decompress_items
from hermes_dist.shards.layout import Layout
from hermes_dist.shards.store import ShardStore, create_store, open_store
from hermes_dist.shards.tar_store import inspect_tar
from hermes_dist.shards.verify import case_problems, store_problems
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

TASKS = TaskTable.build([("ct", "CT", "trunk", [("liver", [1])], None)])
FORMATS = [("zarr", Layout(32)), ("webdataset", Layout(40, margin_vox=8)), ("webdataset", Layout(40, codec="npy"))]
SHAPE = (40, 50, 70)


@pytest.fixture(scope="module", params=FORMATS, ids=["zarr", "bricks", "npy"])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    form, layout = request.param
    path = tmp_path_factory.mktemp(form)
    writer = create_store(str(path), form, tasks=TASKS, preprocessing=Preprocessing(image_dtype="int16"), layout=layout)
    for i in range(2):
        image = np.random.default_rng(i).normal(size=SHAPE).astype(np.float32)
        label = np.zeros(SHAPE, np.uint8)
        label[10:20, 5:30, 20:40] = 1
        writer.write_case(CaseRecord("ct", f"c{i}", "CT", "train", (1.5, 1.5, 1.5), "{}", f"h{i}"), image, label)
    writer.finish()
    return path


@pytest.fixture
def damaged(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "store"))


def problems(path: Path) -> list[str]:
    store = open_store(str(path))
    return [*store_problems(store), *(p for i in range(len(store.manifest)) for p in case_problems(store, store.manifest.row(i)))]


def voxel_files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and (p.suffix == ".tar" or p.parts[-4:-1] == ("c", "0", "0")))


def test_a_good_store_has_no_problems(pristine: Path) -> None:
    assert problems(pristine) == []


def read_everything(store: ShardStore) -> list[tuple[np.ndarray, np.ndarray]]:
    return [store.read_case(i) for i in range(len(store.manifest))]


def test_flipped_bits(pristine: Path, damaged: Path) -> None:
    want = read_everything(open_store(str(pristine)))
    rng = np.random.default_rng(5)
    for path in voxel_files(damaged):
        good = path.read_bytes()
        for _ in range(25):
            bad = bytearray(good)
            bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            assert problems(damaged), path
            got = want
            with suppress(CorruptShardError):  # else the bit lies where no voxel is (a tar header), and reading is right
                got = read_everything(open_store(str(damaged)))
            for (a, b), (c, d) in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, c)
                np.testing.assert_array_equal(b, d)
        path.write_bytes(good)
    assert problems(damaged) == []


def test_truncated_and_missing_files(damaged: Path) -> None:
    for path in voxel_files(damaged):
        good = path.read_bytes()
        for n_bytes in (0, 3, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:n_bytes])
            assert any("bytes, the manifest says" in p for p in problems(damaged))
            if path.suffix != ".tar" or n_bytes < len(good) - 2000:
                with pytest.raises(CorruptShardError):
                    read_everything(open_store(str(damaged)))
        path.unlink()
        assert any("missing" in p for p in problems(damaged))
        with pytest.raises(StoreError, match="does not exist"):
            read_everything(open_store(str(damaged)))
        path.write_bytes(good)


def test_exchanged_cases(damaged: Path) -> None:
    files = voxel_files(damaged)
    half = len(files) // 2
    for a, b in zip(files[:half], files[half:], strict=True):
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
    assert len(problems(damaged)) >= 2


def test_a_link_out_of_the_store_is_refused(damaged: Path, tmp_path: Path) -> None:
    path = voxel_files(damaged)[0]
    shutil.move(path, tmp_path / "outside")
    os.symlink(tmp_path / "outside", path)
    with pytest.raises(StoreError, match="link that leaves the store"):
        read_everything(open_store(str(damaged)))
    assert any("leaves the store" in p for p in problems(damaged))


def test_damaged_manifest_and_collection(damaged: Path) -> None:
    path = damaged / "manifest.parquet"
    good = path.read_bytes()
    for at in (3, len(good) // 3, len(good) - 20, len(good) - 5):
        bad = bytearray(good)
        bad[at] ^= 0x10
        path.write_bytes(bad)
        with suppress(HermesError):
            assert problems(damaged)
    path.write_bytes(good[:-1])
    with pytest.raises(CorruptShardError, match="hermes-shard merge"):
        open_store(str(damaged))
    path.unlink()
    with pytest.raises(StoreError, match="does not exist"):
        open_store(str(damaged))
    path.write_bytes(good)
    collection = damaged / "collection.json"
    data = json.loads(collection.read_text())
    collection.write_text(json.dumps({**data, "digest": "0" * 32}))
    assert problems(damaged) == ["the content digest of collection.json does not match the manifest"]
    collection.write_text(json.dumps({**data, "surprise": 1, "layout": {"x": 1}}))
    with pytest.raises(StoreError, match="convert again"):
        open_store(str(damaged))


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (tar_of((member("../../etc/passwd"), b"x")), "stay inside"),
        (tar_of((member("/etc/passwd"), b"x")), "stay inside"),
        (tar_of((member("a", tarfile.SYMTYPE, "/etc/passwd"), b"")), "no plain file"),
        (tar_of((member("a", tarfile.LNKTYPE, "b"), b"")), "no plain file"),
        (tar_of((member("a", tarfile.CHRTYPE), b"")), "no plain file"),
        (tar_of((member("a"), b"x"), (member("a"), b"y")), "occurs twice"),
        (tar_of((member("a" * 600), b"x")), "600 characters"),
        (b"not a tar" * 200, "not a readable tar"),
    ],
)
def test_dangerous_tar_members(archive: bytes, says: str) -> None:
    assert any(says in text for text in inspect_tar(archive))


def test_tar_member_larger_than_the_archive() -> None:
    archive = bytearray(tar_of((member("a"), b"x" * 2000)))
    archive[124:136] = b"77777777777\0"
    archive[148:156] = b" " * 8
    archive[148:156] = f"{sum(archive[:512]):06o}\0 ".encode()
    assert any("more than the archive holds" in text for text in inspect_tar(bytes(archive)))


def test_a_block_that_would_blow_up_is_refused() -> None:
    scratch = Scratch(8**3, np.dtype(np.int16))
    good = compress(np.zeros((8, 8, 8), np.int16))
    np.testing.assert_array_equal(decompress_items(memoryview(good), scratch, 64, 128, total=512, where="x"), 0)
    bomb = compress(np.zeros(1 << 24, np.int16))
    with pytest.raises(CorruptShardError, match="x: block states 33554432 bytes"):
        decompress_items(memoryview(bomb), scratch, 0, 512, total=512, where="x")
    for start, value in ((4, 1 << 31), (8, 0), (12, 17)):
        bad = bytearray(good)
        struct.pack_into("<I", bad, start, value)
        with pytest.raises(CorruptShardError):
            decompress_items(memoryview(bytes(bad)), scratch, 0, 512, total=512, where="x")
