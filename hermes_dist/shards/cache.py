"""A bounded cache of byte ranges on a local disk, shared by all processes of a host.

One file per range, named by a hash of store, path and range; stores never change an object in place, so an entry cannot go stale.
Space is reserved under a file lock before anything is written, and the least recently used entries go first, so the folder never
holds more than its bound, whoever writes. The lock is held for one small read and write: entries are listed and deleted without
it, by one process at a time. Every entry carries a checksum: a damaged one is a miss. Trouble with the disk (full, read-only, a
lock that nobody frees) costs the cache, never a sample, and next to no time: who finds the lock busy keeps nothing for a moment.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hermes_dist.errors import StoreError
from hermes_dist.shards.codec import crc32c
from hermes_dist.shards.storage import Storage

LOCK_WAIT_S = 0.002
"""Others hold the lock for less; whoever does not get it so soon does without the cache …"""
BUSY_PAUSE_S = 0.2
"""… for this long."""
KEEP_FRACTION = 0.8
"""Eviction goes down to this share of the bound, so that it is rare."""
TOUCH_S = 30
"""An entry's time of use is exact to this many seconds."""
TRAILER_BYTES = 4


class DiskCache:
    """Ranges below one folder, at most `limit_bytes` of them. Any number of processes may share the folder.

    Raises:
        StoreError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self._folder = Path(folder)
        self._limit = limit_bytes
        self._resume_s = 0.0
        self.failures = 0
        """Entries that could not be written (disk full, lock busy, another process is making room)."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cache folder {folder}: {error.strerror}; set stream.cache_dir to a folder that can be written"
            ) from None

    def get(self, key: str) -> bytes | None:
        """The bytes of an entry, or None."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data = file.read()
                if time.time() - os.fstat(file.fileno()).st_mtime > TOUCH_S:
                    os.utime(path)
        except OSError:
            return None
        body = data[:-TRAILER_BYTES]
        if len(data) < TRAILER_BYTES or crc32c(body) != int.from_bytes(data[-TRAILER_BYTES:], "little"):
            self.drop(key)
            return None
        return body

    def put(self, key: str, data: memoryview | bytes) -> None:
        """Keep a copy. Does nothing (and counts a failure) if there is no room, or the disk refuses."""
        path = self._path(key)
        n_bytes = len(data) + TRAILER_BYTES
        if n_bytes > self._limit * KEEP_FRACTION or path.exists():
            return
        if time.monotonic() < self._resume_s:
            self.failures += 1
            return
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            self._reserve(n_bytes)
            path.parent.mkdir(exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.write(crc32c(data).to_bytes(TRAILER_BYTES, "little"))
            os.replace(temporary, path)
        except BlockingIOError:
            self.failures += 1
            self._resume_s = time.monotonic() + BUSY_PAUSE_S
        except OSError:
            self.failures += 1
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def drop(self, key: str) -> None:
        """Forget an entry (its space is counted until the next eviction)."""
        with suppress(OSError):
            self._path(key).unlink()

    def counted_bytes(self) -> int:
        """Bytes as the ledger counts them: one small read, for metrics."""
        try:
            text = (self._folder / "ledger").read_text()
        except OSError:
            return 0
        return int(text) if text.strip().isdigit() else 0

    def used_bytes(self) -> int:
        """Bytes that entries take now."""
        return sum(size for _, size, _ in self._entries())

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.range"

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        for folder in os.scandir(self._folder):
            if folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder.path):
                    with suppress(FileNotFoundError):
                        stat = entry.stat(follow_symlinks=False)
                        yield stat.st_mtime, stat.st_size, Path(entry.path)

    def _reserve(self, n_bytes: int) -> None:
        """Count bytes that are about to be written; evict first if they would not fit.

        Raises:
            BlockingIOError: a lock is busy, or others took the room.
        """
        with self._locked("ledger") as ledger:
            used = self._counted(ledger)
            if used + n_bytes <= self._limit:
                os.pwrite(ledger, f"{used + n_bytes:<32}".encode(), 0)
                return
        with self._locked("eviction"):
            with self._locked("ledger") as ledger:
                before = self._counted(ledger)
            left = self._evict(n_bytes)
            with self._locked("ledger") as ledger:
                used = left + max(self._counted(ledger) - before, 0)  # what others reserved meanwhile
                fits = used + n_bytes <= self._limit
                os.pwrite(ledger, f"{used + n_bytes * fits:<32}".encode(), 0)
        if not fits:
            raise BlockingIOError

    def _counted(self, ledger: int) -> int:
        """The ledger's number; one that cannot be read counts as full, so that eviction heals it."""
        text = os.pread(ledger, 32, 0)
        return int(text) if text.strip().isdigit() else self._limit

    def _evict(self, n_bytes: int) -> int:
        """Delete the least recently used entries; returns what is left. Also heals a ledger that a killed process left wrong."""
        entries = sorted(self._entries())
        used = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if used + n_bytes <= self._limit * KEEP_FRACTION:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            used -= size
        return used

    @contextmanager
    def _locked(self, name: str = "ledger") -> Generator[int]:
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            limit = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > limit:
                        raise
                    time.sleep(0.0002)
            yield descriptor
        finally:
            os.close(descriptor)


class CachedStorage:
    """A `Storage` whose byte ranges are kept in a `DiskCache`; everything else goes straight through.

    Ranges are kept before anybody knows whether their checksums match. With `anew`, for one that did not, what is kept is
    dropped and fetched again.
    """

    def __init__(self, inner: Storage, cache: DiskCache, *, anew: bool = False) -> None:
        self._inner = inner
        self._cache = cache
        self._anew = anew
        self.hits = 0
        self.misses = 0
        self.missed_bytes = 0
        self.read = inner.read
        self.size = inner.size
        self.write = inner.write
        self.list = inner.list
        self.delete = inner.delete
        self.sweep = inner.sweep

    @property
    def url(self) -> str:
        """The root of the storage behind it."""
        return self._inner.url

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """See `Storage.read_ranges`; what is not cached is fetched together."""
        keys = [self._key(path, *part) for part in ranges]
        if self._anew:
            for key in keys:
                self._cache.drop(key)
        kept = [self._cache.get(key) for key in keys]
        missing = [part for part, data in zip(ranges, kept, strict=True) if data is None]
        self.hits += len(ranges) - len(missing)
        self.misses += len(missing)
        missed_bytes = sum(length for _, length in missing)
        self.missed_bytes += missed_bytes
        fetched = self._inner.read_ranges(path, missing) if missing else iter(())
        for key, data in zip(keys, kept, strict=True):
            if data is not None:
                yield memoryview(data)
            else:
                view = next(fetched)
                self._cache.put(key, view)
                yield view

    def _key(self, path: str, start: int, length: int) -> str:
        return hashlib.blake2b(f"{self.url}\0{path}\0{start}\0{length}".encode(), digest_size=16).hexdigest()
