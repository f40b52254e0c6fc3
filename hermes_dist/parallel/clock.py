"""Seconds per part of a training step, without making a GPU wait.

On CUDA events are recorded in the stream and read once the step's gradient norm, which is logged, has synchronised anyway. A part
inside another part (the reduction at the end of a backward pass) is taken out of the outer one, so that parts add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch


class StepClock:
    """Collects spans; `parts_s` adds them up and starts afresh."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, str | None, Any, Any]] = []
        self._open: list[str] = []

    @contextmanager
    def measure(self, part: str) -> Generator[None]:
        """Count the time of a block as `part`."""
        outer = self._open[-1] if self._open else None
        begin = self._now()
        self._open.append(part)
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((part, outer, begin, self._now()))

    def measured(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with its time counted as `part`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(part):
                return function(*args, **kwargs)

        return timed

    def parts_s(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        parts: dict[str, float] = {}
        if self._cuda and self._spans:
            self._spans[-1][3].synchronize()
        for part, outer, begin, end in self._spans:
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            parts[part] = parts.get(part, 0.0) + seconds
            if outer is not None:
                parts[outer] = parts.get(outer, 0.0) - seconds
        self._spans.clear()
        return parts

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
