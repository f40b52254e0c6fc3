"""Progress of a long command: a bar with rate and remaining time on a terminal, plain lines otherwise; always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0


class ProgressReport:
    """Counts finished items. `units` (bytes of the inputs) decide the estimate of the remaining time."""

    def __init__(self, what: str, items: int, units: int, stream: TextIO | None = None) -> None:
        self._what, self._items, self._units = what, items, max(1, units)
        self._done = self._done_units = 0
        self._stream = stream or sys.stderr
        self._started = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressReport:
        if self._stream.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._bar.start()
            self._bar.add_task(self._what, total=self._items, rate="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif self._done and kind is None:
            self._print()

    def advance(self, units: int) -> None:
        """One more item is finished."""
        self._done += 1
        self._done_units += units
        if self._bar:
            self._bar.update(self._bar.task_ids[0], advance=1, rate=self._rate())
        elif time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            self._print()

    def _rate(self) -> str:
        seconds = max(1e-6, time.monotonic() - self._started)
        return f"{self._done / seconds:.1f} cases/s, {self._done_units / seconds / 1e6:.1f} MB/s read"

    def _print(self) -> None:
        seconds = time.monotonic() - self._started
        left = seconds * (self._units - self._done_units) / max(1, self._done_units)
        share = 100 * self._done / max(1, self._items)
        text = f"{self._what} {self._done}/{self._items} ({share:.0f} %), {self._rate()}, {clock(seconds)} passed"
        if self._done < self._items:
            text += f", about {clock(left)} left"
        print(text, file=self._stream, flush=True)


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, 140 columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def size_text(count: float) -> str:
    """Bytes for people: `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
