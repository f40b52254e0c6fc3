"""Bytes by URL: the local file system here, everything else through obstore in `remote.py`.

A `Storage` reads and writes whole objects and byte ranges below one root. It classifies what goes wrong: missing → StoreError,
shorter than promised → CorruptShardError, refused → StorageAccessError, anything else → TransientStorageError. Only the first two
say something about the data; a sample is replaced for nothing else, or the order would depend on the machine. It never follows a
path or a symbolic link out of its root, and a write is complete or invisible.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote

from hermes_dist.errors import CorruptShardError, HermesError, StorageAccessError, StoreError, TransientStorageError

REMOTE_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "adl", "azure", "http", "https")
ACCESS_ERRNO = frozenset({errno.EACCES, errno.EPERM})
STORE_ERRNO = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What lies there is not what a store holds …"""
FULL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""… or nothing can be written there. Whatever else an operating system may say is no property of the data, and may pass."""
MAX_GAP_BYTES = 65536
"""Ranges closer than this are read as one (local disk) …"""
MAX_JOINED_BYTES = 1 << 19
"""… up to this size, so that what was read is decoded while it is in the processor's cache."""
KEPT_BUFFER_BYTES = 64 << 20
KEPT_PATHS = 4096
_thread = threading.local()


class Storage(Protocol):
    """Objects below one root, named by relative paths with `/`."""

    @property
    def url(self) -> str:
        """The root, without credentials."""
        ...

    def read(self, path: str, limit_bytes: int = 1 << 33) -> bytes:
        """A whole object. Raises StoreError if it is missing or larger than the limit."""
        ...

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """The `(start, length)` ranges of one object, in the given order.

        A view is valid until the next one is asked for (its buffer is used again: what is read and decoded at once stays in the
        processor's cache). Raises CorruptShardError if the object ends before.
        """
        ...

    def size(self, path: str) -> int | None:
        """Bytes of an object, or None if there is none."""
        ...

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Create or replace an object; complete or invisible."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Paths of all objects below a folder, in any order."""
        ...

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens if there is none."""
        ...

    def sweep(self) -> None:
        """Remove what killed writers left behind; only while nobody writes."""
        ...


def check_path(path: str) -> str:
    """Refuse names that could leave the store.

    Raises:
        StoreError: absolute, with `..`, a backslash, a control character or a drive letter.
    """
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or re.search(r"[\\\x00-\x1f]|^[A-Za-z]:", path):
        raise StoreError(f"path {path!r} does not stay inside the store; this store was tampered with: do not use it")
    return path


def split_url(url: str) -> tuple[str, str]:
    """`(scheme, path or url)`: `file` for plain paths and file URLs.

    Raises:
        StoreError: a scheme that no storage speaks, or a URL that is not complete.
    """
    prefix = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?", url)
    scheme = prefix[1].lower() if prefix else "file"
    if prefix is None or (not prefix[2] and scheme not in ("file", *REMOTE_SCHEMES)):
        return "file", url  # a path, which may hold a colon
    rest = url[prefix.end() :]
    if scheme == "file":
        rest = rest.removeprefix("localhost")
    if not prefix[2] or (scheme == "file" and not rest.startswith("/")):  # a path library swallows one of two slashes
        raise StoreError(f"store {url!r} is no complete URL; expected {scheme}://{'/absolute/path' if scheme == 'file' else '…'}")
    if scheme == "file":
        return scheme, unquote(rest)
    if scheme not in REMOTE_SCHEMES:
        raise StoreError(f"store {url!r}: scheme {scheme!r} is not one of file, s3, gs, az, http, https")
    return scheme, f"{scheme}://{rest}"


def storage_error(name: str, error: OSError) -> HermesError:
    """What an error of the operating system means for whoever reads or writes `name`."""
    text = error.strerror or str(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return StoreError(f"{name} does not exist; check the URL, or convert again")
    if error.errno in ACCESS_ERRNO:
        return StorageAccessError(f"{name}: {text}; check its owner and permissions, and as whom this program runs")
    if error.errno in STORE_ERRNO:
        return StoreError(f"{name}: {text}; this is no file of a store, convert again")
    if error.errno in FULL_ERRNO:
        return StoreError(f"{name}: {text}; make room, or name another place")
    return TransientStorageError(f"{name}: {text}")


def coalesce(ranges: Sequence[tuple[int, int]], max_gap: int, max_joined: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Join neighbours that lie near: `[(start, length, [(offset inside, length)])]`, keeping the order."""
    groups: list[tuple[int, int, list[tuple[int, int]]]] = []
    for start, length in ranges:
        if groups:
            first, total, members = groups[-1]
            stop = start + length
            if first + total <= start <= first + total + max_gap and stop - first <= max_joined:
                members.append((start - first, length))
                groups[-1] = (first, stop - first, members)
                continue
        groups.append((start, length, [(0, length)]))
    return groups


class LocalStorage:
    """A folder. Reads are positioned reads (a mapped file that is cut short would kill the process)."""

    def __init__(self, root: str | Path) -> None:
        self._root = os.path.realpath(root)
        self._located: dict[str, str] = {}

    @property
    def url(self) -> str:
        """The folder."""
        return self._root

    def _locate(self, path: str) -> str:
        full = os.path.join(self._root, check_path(path))
        real = os.path.realpath(full)
        if real != full and not real.startswith(self._root + os.sep):
            raise StoreError(f"{full} is a link that leaves the store (to {real}); remove it and convert the case again")
        return real

    def _locate_again(self, path: str) -> str:
        """`_locate` for objects that are read many times: asking for every folder's links costs as much as a small crop."""
        real = self._located.get(path)
        if real is None:
            if len(self._located) >= KEPT_PATHS:
                self._located.clear()
            self._located[path] = real = self._locate(path)
        return real

    @contextmanager
    def _errors(self, path: str) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(f"{self._root}/{path}", error) from None

    def read(self, path: str, limit_bytes: int = 1 << 33) -> bytes:
        """See `Storage.read`."""
        with self._errors(path), open(self._locate(path), "rb") as file:
            if os.fstat(file.fileno()).st_size > limit_bytes:
                raise StoreError(f"{self._root}/{path} has more than {limit_bytes} bytes; this is no file of a store")
            return file.read()

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """See `Storage.read_ranges`."""
        groups = coalesce(ranges, MAX_GAP_BYTES, MAX_JOINED_BYTES)
        buffer = self._buffer(max((length for _, length, _ in groups), default=0))
        with self._errors(path), open(self._locate_again(path), "rb", buffering=0) as file:
            for start, length, members in groups:
                got = _read_into(file.fileno(), buffer[:length], start)
                if got != length:
                    raise CorruptShardError(
                        f"{self._root}/{path} ends at byte {start + got}, expected {start + length}; convert this case again"
                    )
                for offset, part in members:
                    yield buffer[offset : offset + part]

    def _buffer(self, n_bytes: int) -> memoryview:
        """Memory of this thread, used again by every read: fresh pages would cost as much as the copy."""
        if n_bytes > KEPT_BUFFER_BYTES:
            return memoryview(bytearray(n_bytes))
        kept: memoryview | None = getattr(_thread, "buffer", None)
        if kept is None or len(kept) < n_bytes:
            _thread.buffer = kept = memoryview(bytearray(max(n_bytes, 1 << 20)))
        return kept

    def size(self, path: str) -> int | None:
        """See `Storage.size`."""
        with self._errors(path):
            try:
                return os.stat(self._locate(path)).st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, path: str, data: bytes | memoryview) -> None:
        """See `Storage.write`."""
        full = self._locate(path)
        temporary = f"{full}.{uuid.uuid4().hex}.tmp"
        with self._errors(path):
            os.makedirs(os.path.dirname(full), exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, full)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            _sync_folder(os.path.dirname(full))

    def list(self, prefix: str) -> Iterator[str]:
        """See `Storage.list`. Leftovers of killed writers (`*.tmp`) are not objects."""
        top = os.path.join(self._root, prefix)
        for folder, _, names in os.walk(top):
            for name in names:
                if not name.endswith(".tmp"):
                    yield Path(folder, name).relative_to(self._root).as_posix()

    def delete(self, path: str) -> None:
        """See `Storage.delete`. Folders that become empty go too."""
        full = Path(self._root, check_path(path))
        with suppress(FileNotFoundError):
            full.unlink()
        for folder in full.parents:
            if folder == Path(self._root) or not folder.is_dir():
                return
            try:
                folder.rmdir()
            except OSError:
                return

    def sweep(self) -> None:
        """See `Storage.sweep`. Folders that are or become empty go too."""
        for folder, _, names in os.walk(self._root, topdown=False):
            for name in names:
                if re.search(r"\.[0-9a-f]{32}\.tmp$", name):
                    with suppress(OSError):
                        os.unlink(os.path.join(folder, name))
            if Path(folder) != Path(self._root):
                with suppress(OSError):  # only an empty folder can be removed
                    os.rmdir(folder)


def _read_into(descriptor: int, buffer: memoryview, start: int) -> int:
    """Fill a buffer; returns how many bytes there were. A file system may give less than asked for before the end of a file."""
    got = 0
    while got < len(buffer):
        n_bytes = os.preadv(descriptor, [buffer[got:]], start + got)
        if not n_bytes:
            break
        got += n_bytes
    return got


def _sync_folder(folder: str) -> None:
    """Make a rename durable. Not every file system can; then the rename itself is all there is."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
