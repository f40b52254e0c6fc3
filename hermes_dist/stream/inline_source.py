"""The inline source: samples read in the training process, one after another. For debugging, tests and tiny runs.

What it yields is bit-identical to the ray source, because both run the same reader on the same rows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from hermes_dist.stream.plan import PlanRows
from hermes_dist.stream.reader import Reader, Sample

RUN = 64


def read_run(reader: Reader, positions: range) -> Iterator[Sample]:
    """Samples of consecutive positions, in order."""
    for start in range(positions.start, positions.stop, RUN):
        rows: PlanRows = reader.plan.rows(start, min(start + RUN, positions.stop))
        for index in range(len(rows)):
            yield reader.read(rows, index)


class InlineSource:
    """Yields the samples of a sequence of position ranges, in order."""

    def __init__(self, reader: Reader, parts: Iterator[range]) -> None:
        self._reader = reader
        self._parts = parts

    def __iter__(self) -> Generator[Sample]:
        for part in self._parts:
            yield from read_run(self._reader, part)

    def augment_on_device(self) -> None:
        """From here on leave the augmentation to the training device."""
        self._reader.augment_here = False

    def scale(self, wait_share: float) -> str | None:
        """This process is all there is."""
        del wait_share

    def waits_for(self) -> str:
        """What a wait for the next sample is a wait for."""
        return "this process to read it"

    def gauges(self) -> dict[str, float]:
        """No workers, no object store: nothing to report."""
        return {}

    def give_up(self) -> None:
        """What this process reads, it reads to its end."""

    def close(self, *, still_read: bool = False) -> None:
        """Nothing to release."""
