"""Trying again where storage may work again: one loop for whoever reads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from hermes_dist.errors import TransientStorageError

MAX_PAUSE_S = 30.0
T = TypeVar("T")


def pause_before(attempt: int, backoff_s: float, jitter: float) -> float:
    """Seconds to wait after failed attempt 0, 1, …: doubling from backoff_s, ±25 % by `jitter` in [0, 1), at most 30 s."""
    return min(backoff_s * 2.0**attempt * (0.75 + 0.5 * jitter), MAX_PAUSE_S)


def retried(
    call: Callable[[int], T],
    retries: int,
    backoff_s: float,
    *,
    jitter: Callable[[int], float] | None = None,
    on_retry: Callable[[TransientStorageError, int, float], None] | None = None,
    limit_s: float = float("inf"),
) -> T:
    """`call(attempt)` for attempts 0, 1, … until it works.

    Args:
        call: what may raise TransientStorageError; every other error passes at once.
        retries: attempts after the first.
        backoff_s: first pause.
        jitter: attempt → [0, 1); random where nothing depends on it.
        on_retry: told of the error, the attempt (from 1) and the pause before each further one.
        limit_s: no attempt begins later than this after the first: storage that hangs makes each one long.

    Raises:
        TransientStorageError: of the last attempt.
    """
    began = time.monotonic()
    for attempt in range(retries):
        try:
            return call(attempt)
        except TransientStorageError as error:
            pause_s = pause_before(attempt, backoff_s, jitter(attempt) if jitter else random.random())
            if time.monotonic() + pause_s - began > limit_s:
                raise
            if on_retry:
                on_retry(error, attempt + 1, pause_s)
            time.sleep(pause_s)
    return call(retries)
