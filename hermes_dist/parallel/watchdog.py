"""Hangs: a thread that notices when nothing moves any more, names rank, step and operation, and dumps all stacks.

Collectives have their own limit (the process group's), which raises an error in the thread that waits. This watchdog is for
all that cannot raise: a dead data worker, a lock, a kernel that never ends. Its trade-off: it reports what the Python side was
doing, and leaves ending the process to `exit_code`, because a stuck rank holds all others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from hermes_dist.parallel.alarm import EXIT_HANG, Alarm


class Watchdog:
    """Watches one process. `operation` says what is going on; `beat` moves the deadline."""

    def __init__(
        self, *, rank: int, limit_s: float, alarm: Alarm | None = None, exit_code: int | None = EXIT_HANG, poll_s: float = 1.0
    ) -> None:
        """`exit_code=None` only reports. The limit should exceed the collectives' limit, so that their errors come first."""
        self._rank, self._limit_s, self._exit_code, self._poll_s = rank, limit_s, exit_code, poll_s
        self._alarm = alarm or Alarm(None, rank)
        self._operation: str | None = None
        self._step = -1
        self._beat = time.monotonic()
        self._closed = threading.Event()
        self.reports = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, operation: str | None) -> None:
        """Something moved: from now on `operation` is under way (None = nothing that has a limit)."""
        self._step, self._operation, self._beat = step, operation, time.monotonic()

    @contextmanager
    def watch(self, step: int, operation: str) -> Generator[None]:
        """Watch one block of code."""
        self.beat(step, operation)
        try:
            yield
        finally:
            self.beat(step, None)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def describe(self) -> str:
        """`rank 1, step 17, backward of micro-batch 0`."""
        return f"rank {self._rank}, step {self._step}, {self._operation or 'idle'}"

    def _watch(self) -> None:
        while not self._closed.wait(self._poll_s):
            waited_s = time.monotonic() - self._beat
            if self._operation is None or waited_s < self._limit_s:
                continue
            self._alarm.ring(f"{self.describe()}: nothing moved for {waited_s:.0f} s")
            self.reports += 1
            if self._exit_code is not None:
                os._exit(self._exit_code)
            self._beat = time.monotonic()
