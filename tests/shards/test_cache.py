"""The disk cache: bounded, least recently used first, shared by processes, and never the reason that a read fails."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hermes_dist.errors import StoreError
from hermes_dist.shards import cache as cache_module
from hermes_dist.shards.cache import CachedStorage, DiskCache
from hermes_dist.shards.storage import LocalStorage

KIB = 1024


def key(i: int) -> str:
    return f"{i:032x}"[::-1]


def test_put_get_drop(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "deep" / "cache", 100 * KIB)
    assert cache.get(key(1)) is None
    cache.put(key(1), b"one")
    cache.put(key(2), memoryview(b"two"))
    cache.put(key(3), b"")
    assert [cache.get(key(i)) for i in (1, 2, 3)] == [b"one", b"two", b""]
    assert DiskCache(tmp_path / "deep" / "cache", 100 * KIB).get(key(2)) == b"two"
    cache.drop(key(2))
    assert cache.get(key(2)) is None
    cache.put(key(4), bytes(90 * KIB))
    assert cache.get(key(4)) is None, "an entry near the whole bound is not kept"
    assert cache.failures == 0


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "TOUCH_S", 0)
    cache = DiskCache(tmp_path, 100 * KIB)
    for i in range(9):
        cache.put(key(i), bytes(10 * KIB))
        os.utime(cache._path(key(i)), (1000 + i, 1000 + i))  # pyright: ignore[reportPrivateUsage]
    assert cache.get(key(0)) is not None  # used now
    cache.put(key(9), bytes(10 * KIB))
    cache.put(key(10), bytes(10 * KIB))
    assert cache.used_bytes() <= 100 * KIB
    assert cache.get(key(0)) is not None
    assert cache.get(key(10)) is not None
    assert cache.get(key(1)) is None


def test_damage_is_a_miss(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 100 * KIB)
    cache.put(key(1), b"some bytes")
    (path,) = tmp_path.glob("*/*.range")
    for bad in (b"", b"abc", b"Some bytes" + path.read_bytes()[-4:]):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bad)
        assert cache.get(key(1)) is None
        assert not path.exists()


WRITER = """
import sys
import time
from hermes_dist.shards.cache import DiskCache
cache = DiskCache(sys.argv[1], 200 * 1024)
for i in range(600):  # long enough that those who found the lock busy come back
    time.sleep(0.001)
    name = f"{(int(sys.argv[2]) * 1000 + i) % 100:032x}"[::-1]
    data = cache.get(name)
    assert data is None or data == name.encode() * 100
    cache.put(name, name.encode() * 100)
"""


@pytest.mark.multiproc
def test_processes_share_one_bound(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)]) for i in range(3)]
    cache, largest = DiskCache(tmp_path, 200 * KIB), 0
    while any(w.poll() is None for w in writers):
        with suppress(BlockingIOError), cache._locked():  # nobody evicts meanwhile: a listing is no snapshot
            largest = max(largest, cache.used_bytes())
        time.sleep(0.01)
    assert [w.wait() for w in writers] == [0, 0, 0]
    assert 100 * KIB < largest <= 200 * KIB


def test_a_ledger_left_wrong_is_healed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 100 * KIB)
    for text in (b"garbage", b"99999999999999", b""):
        (tmp_path / "ledger").write_bytes(text)
        cache.put(key(len(text)), bytes(KIB))
        assert cache.get(key(len(text))) is not None
    assert int((tmp_path / "ledger").read_text()) <= 100 * KIB


def test_trouble_with_the_disk_costs_the_cache_not_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 100 * KIB)
    monkeypatch.setattr(cache_module, "BUSY_PAUSE_S", 0)
    with open(tmp_path / "ledger", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        cache.put(key(1), b"x")
    assert (cache.get(key(1)), cache.failures) == (None, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.put(key(2), b"x")
    assert (cache.get(key(2)), cache.failures) == (None, 2)
    assert not list(tmp_path.glob("*/*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cache_dir"):
        DiskCache(tmp_path / "file" / "cache", 100)


def test_a_busy_lock_is_not_waited_for_and_left_alone_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cache_module, "LOCK_WAIT_S", -1)
    cache = DiskCache(tmp_path, 100 * KIB)
    with open(tmp_path / "ledger", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        cache.put(key(1), b"x")
    cache.put(key(1), b"x")
    assert (cache.get(key(1)), cache.failures) == (None, 2)
    now[0] += cache_module.BUSY_PAUSE_S
    cache.put(key(1), b"x")
    assert (cache.get(key(1)), cache.failures) == (b"x", 2)


def test_entries_are_deleted_without_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process makes room others look up and reserve; what they reserve meanwhile is counted."""
    cache, other = (DiskCache(tmp_path, 100 * KIB) for _ in range(2))
    monkeypatch.setattr(cache_module, "LOCK_WAIT_S", -1)
    for i in range(9):
        cache.put(key(i), bytes(11 * KIB - 4))
    unlink, met = Path.unlink, list[int]()

    def unlink_slowly(path: Path, missing_ok: bool = False) -> None:
        if not met:
            other.put(key(20), bytes(KIB - 4))
            other.put(key(21), bytes(50 * KIB))  # no room, and another process is at it
            met.append(other.failures)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_slowly)
    cache.put(key(10), bytes(11 * KIB - 4))
    assert met == [1]
    assert [other.get(key(i)) is not None for i in (10, 20, 21)] == [True, True, False]
    assert cache.counted_bytes() == cache.used_bytes() <= 100 * KIB


class Counting(LocalStorage):
    """A local storage that remembers what it was asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[int, int]] = []

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        self.asked += ranges
        return super().read_ranges(path, ranges)


def test_only_what_is_missing_is_fetched_in_order(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    inner = Counting(tmp_path / "store")
    inner.write("a", data)
    storage = CachedStorage(inner, DiskCache(tmp_path / "cache", 100 * KIB))
    ranges = [(0, 10), (100, 50), (300, 5)]
    for want in ([(0, 10), (300, 5)], ranges, ranges[::-1], []):
        assert [bytes(v) for v in storage.read_ranges("a", want)] == [data[a : a + n] for a, n in want]
    assert inner.asked == [(0, 10), (300, 5), (100, 50)]
    assert (storage.hits, storage.misses) == (5, 3)
    assert storage.size("a") == len(data) == len(storage.read("a"))


def test_a_range_that_was_kept_wrong_is_fetched_again_and_kept_instead(tmp_path: Path) -> None:
    inner, cache = Counting(tmp_path / "store"), DiskCache(tmp_path / "cache", 100 * KIB)
    inner.write("a", b"right, and the rest")
    storage = CachedStorage(inner, cache)
    cache.put(storage._key("a", 0, 5), b"wrong")  # pyright: ignore[reportPrivateUsage]
    assert [bytes(v) for v in storage.read_ranges("a", [(0, 5)])] == [b"wrong"]
    assert [bytes(v) for v in CachedStorage(inner, cache, anew=True).read_ranges("a", [(0, 5)])] == [b"right"]
    assert [bytes(v) for v in storage.read_ranges("a", [(0, 5)])] == [b"right"]
    assert inner.asked == [(0, 5)]
