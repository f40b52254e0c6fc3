"""A work queue of files in a folder: cases are dealt out as workers come for them, and nothing ever waits.

A worker claims a case by creating `N.claim` (atomic on any file system that ranks share) and publishes `N.json` when done.
When no case is left to claim, worker 0 computes whatever has no result yet *itself*: cases of a worker that died or is slow.
So the queue cannot hang; at worst one case a worker is computed twice, with the same result. If the folder is not shared
between hosts, worker 0 simply does all the work.

A queue that was interrupted goes on where it was: its finished results are kept, its claims are dropped. A worker that is
asked to stop tells the others through a file `stop`: all of them end with the case they are at.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_STOP = "stop"


def _never() -> bool:
    return False


def _always(_: Row) -> bool:
    return True


class WorkQueue:
    """`count` pieces of work, numbered from 0; results are JSON objects.

    Args:
        folder: private to this work; its name should hold a fingerprint of everything that determines the results.
        count: pieces of work, the dearest first (so that the last ones, which even out the load, are cheap).
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def prepare(self, keep: Callable[[Row], bool] = _always) -> int:
        """Make the folder ready, before any worker calls `work`. Returns how many results an earlier start left.

        Of those that `keep` refuses the work is done again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in (*self.folder.glob("*.claim"), *self.folder.glob(".*"), self.folder / _STOP):
            stale.unlink(missing_ok=True)
        for index in range(self.count):
            result = self._result(index)
            if result.is_file() and not keep(json.loads(result.read_text())):
                result.unlink()
        return self.finished

    def work(self, compute: Callable[[int], Row], *, worker: int = 0, stop: Callable[[], bool] = _never) -> None:
        """Compute cases until none is left to claim; worker 0 then computes those that others claimed and did not finish.

        Once `stop()` is true here or in another worker, no further case is begun: `finished` says how many are done.
        """
        for index in self._claimed(worker):
            if self._stopped(stop):
                return
            self._publish(index, compute(index), worker)
        if worker == 0:
            for index in range(self.count):
                if not self._result(index).is_file():
                    if self._stopped(stop):
                        return
                    self._publish(index, compute(index), worker)

    @property
    def finished(self) -> int:
        """How many cases have their result."""
        return sum(self._result(index).is_file() for index in range(self.count))

    def results(self) -> list[Row]:
        """All results in order. Worker 0 calls it after `work`."""
        return [json.loads(self._result(index).read_text()) for index in range(self.count)]

    def remove(self) -> None:
        """Delete the folder. Workers that are still busy with a case notice it and stop."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _result(self, index: int) -> Path:
        return self.folder / f"{index:06d}.json"

    def _stopped(self, stop: Callable[[], bool]) -> bool:
        if stop():
            with contextlib.suppress(FileNotFoundError):  # worker 0 has everything and removed the folder
                (self.folder / _STOP).touch()
            return True
        return (self.folder / _STOP).is_file()

    def _claimed(self, worker: int) -> Iterator[int]:
        for index in range(self.count):
            if self._result(index).is_file():
                continue
            try:
                descriptor = os.open(self.folder / f"{index:06d}.claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                continue
            except FileNotFoundError:  # worker 0 has everything and removed the folder
                return
            with os.fdopen(descriptor, "w") as file:
                file.write(f"worker {worker}\n")
            yield index

    def _publish(self, index: int, row: Row, worker: int) -> None:
        temporary = self.folder / f".{index:06d}.{worker}"
        try:
            with open(temporary, "w") as file:
                json.dump(row, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._result(index))
        except FileNotFoundError:  # as above: this result is not needed any more
            return
