"""The local file system as a storage: what its errors mean, and reads that come in pieces."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hermes_dist.errors import CorruptShardError, DataError, StorageAccessError, StoreError, TransientStorageError
from hermes_dist.shards.storage import LocalStorage, split_url

PASSING = ("EMFILE", "ENFILE", "ENOMEM", "ENOTCONN", "ECONNREFUSED", "ESTALE", "EIO", "ETIMEDOUT", "ENODEV", "EXFULL")
REFUSED = ("EACCES", "EPERM")
MISSING = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP")


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """A store with one object `a/b`, ten digits."""
    made = LocalStorage(tmp_path)
    made.write("a/b", b"0123456789")
    return made


@pytest.mark.parametrize(
    ("kind", "names"), [(TransientStorageError, PASSING), (StorageAccessError, REFUSED), (StoreError, MISSING)]
)
def test_errors_by_class(
    kind: type[Exception], names: Sequence[str], storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        number = getattr(errno, name)

        def fail(*_: Any, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(kind, match="a/b") as error:
            list(storage.read_ranges("a/b", [(2, 3)]))
        assert isinstance(error.value, DataError) == (kind is StoreError), "only what is wrong with the data replaces a sample"


def test_a_size_that_is_refused_is_not_a_missing_object(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (storage.size("a/b"), storage.size("a/c"), storage.size("a/b/c")) == (10, None, None)

    def refuse(*_: Any, **__: Any) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(StorageAccessError, match="owner and permissions"):
        storage.size("a/b")


def test_a_read_that_comes_in_pieces_is_read_to_its_end(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, start: read(file, [buffers[0][:2]], start))
    assert [bytes(v) for v in storage.read_ranges("a/b", [(0, 5), (5, 4)])] == [b"01234", b"5678"]
    with pytest.raises(CorruptShardError, match="ends at byte 10, expected 15"):
        list(storage.read_ranges("a/b", [(5, 10)]))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("stores/a:b", ("file", "stores/a:b")),
        ("file:///data/my%20store#1?", ("file", "/data/my store#1?")),
        ("file://localhost/data", ("file", "/data")),
        ("S3://Bucket/Store", ("s3", "s3://Bucket/Store")),
        ("https://host:8000/store", ("https", "https://host:8000/store")),
    ],
)
def test_urls(url: str, expected: tuple[str, str]) -> None:
    assert split_url(url) == expected


@pytest.mark.parametrize("url", ["file://stores/all", "file:/data", "s3:/bucket/store", "gs:bucket/store", "ftp://host/store"])
def test_incomplete_urls_are_no_local_folders(url: str) -> None:
    with pytest.raises(StoreError, match="no complete URL|is not one of"):
        split_url(url)
