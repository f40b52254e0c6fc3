"""Many small objects at once: a request to an object store takes tens of milliseconds, and a conversion leaves two per case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from hermes_dist.shards.storage import Storage

CONCURRENT = 16
BATCH = 256
"""Objects that are read ahead."""


def read_each(storage: Storage, paths: Sequence[str], limit_bytes: int) -> Iterator[bytes]:
    """The objects in the order asked for. Raises as `Storage.read`."""
    with ThreadPoolExecutor(CONCURRENT, thread_name_prefix="read") as pool:
        for start in range(0, len(paths), BATCH):
            yield from pool.map(lambda path: storage.read(path, limit_bytes), paths[start : start + BATCH])


def delete_each(storage: Storage, paths: Iterable[str]) -> None:
    """Remove objects. Raises as `Storage.delete`."""
    with ThreadPoolExecutor(CONCURRENT, thread_name_prefix="delete") as pool:
        for _ in pool.map(storage.delete, paths):
            pass
