"""One conversion at a time writes a store: what ends first deletes what no row names, the other's unfinished cases too."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from hermes_dist.errors import UsageError
from hermes_dist.shards.storage import split_url


@contextmanager
def one_writer(url: str, *, part: bool = False) -> Generator[None]:
    """Hold the store's folder while converting; parts of one conversion (`part`) may hold it together.

    The lock is the kernel's: it ends with the process, however that ends. Object storage and file systems without locks have
    none; there it is a rule for people (docs/convert-my-data.md).

    Raises:
        UsageError: another conversion holds it.
    """
    scheme, place = split_url(url)
    new = scheme == "file" and not os.path.lexists(place)
    folder = _open_folder(place) if scheme == "file" else None
    if folder is None:  # object storage, or what cannot be a store: the writer says so
        yield
        return
    try:
        _lock(folder, url, fcntl.LOCK_SH if part else fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
        if new:
            with suppress(OSError):  # a conversion that failed before it wrote leaves nothing
                os.rmdir(place)


def _open_folder(place: str) -> int | None:
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
        return os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None


def _lock(folder: int, url: str, kind: int) -> None:
    try:
        fcntl.flock(folder, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{url}: another conversion is writing this store; wait for its end, or divide one conversion with --part i/n"
        ) from None
    except OSError:  # a file system that cannot lock folders (NFS)
        return
