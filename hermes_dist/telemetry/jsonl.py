"""Append-only JSON lines that survive kill -9: a line is there as a whole or not at all.

Each line is one `write` on a descriptor opened for appending, so a killed process leaves at most one torn last line, which
the next opening removes. There is no fsync per line: a killed *process* loses nothing, a killed *machine* may lose the last
seconds, and those steps are repeated from the checkpoint anyway.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def encode(row: Mapping[str, Any]) -> bytes:
    """One strict JSON line. NaN and Inf, which JSON does not know, become null; numpy and torch scalars become numbers."""
    return (json.dumps(_plain(row), separators=(", ", ": "), allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return _plain(value.tolist())
    return str(value)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """All complete rows of a file; a torn last line is left out. A missing file has none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


class RowFollower:
    """Reads what was appended to a file since the last look: for watching a long run without reading it all again."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset = path, 0, 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(from the start, new complete rows). A resumed run replaces its file: then all rows come again, `True`."""
        if not self._path.is_file():
            return False, []
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            fresh = status.st_ino != self._inode or status.st_size < self._offset
            if fresh:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return fresh, [json.loads(line) for line in complete.splitlines()]


def last_row(path: Path, window_bytes: int = 1 << 17) -> dict[str, Any] | None:
    """The last complete row, from the end of the file; None if there is none in the last `window_bytes`."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - window_bytes)
        file.seek(start)
        lines = file.read().split(b"\n")[(1 if start else 0) : -1]
    return json.loads(lines[-1]) if lines else None


FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_LATE = 10_000
"""Lines that wait for space, at most: a step's line has a few kilobytes."""


class JsonlFile:
    """A file of JSON lines, open for appending; several processes may share one.

    A full disk must not end a training run: what does not fit waits in memory, in order, for the next line that does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._late: deque[bytes] = deque()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._locked(self._drop_torn_line)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line. The lock keeps lines of several hosts apart on network file systems, where appending is not atomic.

        Raises:
            OSError: the storage failed; or it is full, and MOST_LATE lines wait already.
        """
        self._late.append(encode(row))
        try:
            self._write_late()
        except OSError as error:
            if error.errno not in FULL or len(self._late) > MOST_LATE:
                raise
            if len(self._late) == 1:
                print(f"warning: {self.path}: {error.strerror}; lines wait in memory for space", file=sys.stderr, flush=True)

    def _write_late(self) -> None:
        while self._late:
            line = self._late[0]
            self._locked(lambda line=line: self._write(line))
            self._late.popleft()

    def keep_steps_before(self, next_step: int) -> None:
        """Remove the rows of `next_step` and later: a resumed run writes them again. Replaces the file atomically."""
        kept = [encode(row) for row in read_rows(self.path) if row["step"] < next_step]
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)

    def close(self) -> None:
        """Flush to the disk and close. Lines that still find no space are lost, with a warning."""
        if self._descriptor >= 0:
            try:
                self._write_late()
                os.fsync(self._descriptor)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                print(f"warning: {self.path}: {len(self._late)} lines are lost: {error.strerror}", file=sys.stderr, flush=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, line: bytes) -> None:
        written = os.write(self._descriptor, line)
        if written < len(line):  # a full disk takes a part: leave no torn line in the middle of the file
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, "no space left; free some", str(self.path))

    def _locked(self, action: Callable[[], object]) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            action()
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def _drop_torn_line(self) -> None:
        end = os.fstat(self._descriptor).st_size
        position = end
        while position > 0:
            start = max(0, position - 4096)
            cut = os.pread(self._descriptor, position - start, start).rfind(b"\n")
            if cut >= 0:
                position = start + cut + 1
                break
            position = start
        if position < end:
            os.ftruncate(self._descriptor, position)
