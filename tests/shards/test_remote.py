"""A store in S3 (moto's server on loopback): written, read, grown, verified; errors by class; no credentials in a URL."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from hermes_dist.errors import CorruptShardError, StoreError, TransientStorageError
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.layout import Layout
from hermes_dist.shards.remote import RemoteStorage, open_storage
from hermes_dist.shards.store import create_store, open_store
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing
from tests.servers import s3_bucket

TASKS = TaskTable.build([("ct", "CT", "trunk", [("liver", [1])], None)])


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


def make(i: int) -> tuple[CaseRecord, np.ndarray, np.ndarray]:
    image = np.random.default_rng(i).normal(size=(40, 50, 70)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[10:20, 5:30, 20:40] = 1
    return CaseRecord("ct", f"case {i}", "CT", "train", (1.5, 1.5, 1.5), "{}", f"hash{i}"), image, label


@pytest.mark.parametrize(("form", "layout"), [("zarr", Layout(32)), ("webdataset", Layout(40, margin_vox=8))])
def test_write_read_grow(bucket: str, form: str, layout: Layout, tmp_path: object) -> None:
    url = f"{bucket}/{form}/nested"
    prep = Preprocessing(image_dtype="int16")
    for first, stop in ((0, 2), (2, 3)):
        writer = pickle.loads(pickle.dumps(create_store(url, form, tasks=TASKS, preprocessing=prep, layout=layout)))
        assert [writer.existing("ct", f"case {i}") for i in range(3)] == [f"hash{i}" if i < first else None for i in range(3)]
        for i in range(first, stop):
            writer.write_case(*make(i))
        assert writer.existing("ct", f"case {first}") == f"hash{first}"
        assert writer.finish().n_cases == stop
    assert not [path for path in open_storage(url).list("") if "staging" in path]
    remote = pickle.loads(pickle.dumps(open_store(url, cache_dir=str(tmp_path), cache_mib=64)))
    local_url = f"{tmp_path}/local"
    writer = create_store(local_url, form, tasks=TASKS, preprocessing=prep, layout=layout)
    for i in range(3):
        writer.write_case(*make(i))
    local = open_store(local_url) if writer.finish() else None
    assert local is not None
    assert remote.collection == local.collection
    for _ in range(2):
        for i in range(3):
            for ours, theirs in zip(
                remote.read_crop(i, (-3, 10, 20), (33, 41, 60)), local.read_crop(i, (-3, 10, 20), (33, 41, 60)), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
    assert remote.counters.cache_hits > 0
    assert remote.counters.cache_misses > 0
    once = remote.counters.bytes_read / 2  # the second time all came from the cache; shards' indices come on top
    assert once <= remote.counters.bytes_fetched < 1.01 * once
    assert local.counters.bytes_read == local.counters.bytes_fetched == remote.counters.bytes_read
    remote.close()


def test_errors_by_class(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RemoteStorage(f"{bucket}/errors")
    storage.write("a/b", b"0123456789")
    assert storage.size("a/b") == 10
    assert storage.size("a/c") is None
    assert storage.read("a/b") == b"0123456789"
    assert [bytes(v) for v in storage.read_ranges("a/b", [(2, 3), (8, 2)])] == [b"234", b"89"]
    assert list(storage.list("a")) == ["a/b"]
    with pytest.raises(StoreError, match="more than 5"):
        storage.read("a/b", 5)
    with pytest.raises(CorruptShardError, match="convert this case again"):
        list(storage.read_ranges("a/b", [(8, 20)]))
    with pytest.raises(CorruptShardError, match="convert this case again"):
        list(storage.read_ranges("a/b", [(50, 20)]))
    with pytest.raises(StoreError, match="does not exist"):
        storage.read("a/c")
    with pytest.raises(StoreError, match="does not exist"):
        list(storage.read_ranges("a/c", [(0, 1)]))
    storage.delete("a/c")
    storage.delete("a/b")
    assert storage.size("a/b") is None
    with pytest.raises(StoreError):
        RemoteStorage("s3://nosuchbucket/x").read("y")
    with pytest.raises(StoreError, match="no finished shard store"):
        open_store(f"{bucket}/empty")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(TransientStorageError) as refused:
            RemoteStorage(f"{bucket}/errors").read("a/b")
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "https://host/x?sig=secret", "az://account/x#secret"])
def test_credentials_do_not_belong_into_urls(url: str) -> None:
    with pytest.raises(StoreError, match="environment") as refused:
        open_storage(url)
    assert "secret" not in str(refused.value)


def test_unknown_scheme() -> None:
    with pytest.raises(StoreError, match="ftp"):
        open_storage("ftp://host/x")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\\b", "C:x", "", "a\x00b"])
def test_paths_stay_inside(path: str) -> None:
    with pytest.raises(StoreError, match="stay inside"):
        RemoteStorage("s3://bucket/x").read(path)
