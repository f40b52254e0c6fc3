"""Fault injection, driven by hashes so that a run with faults can be repeated.

`corrupt` = share of the cases whose bytes count as damaged; `transient` = chance that an attempt to read fails once or more;
`slow_s` = seconds that every sample is held up; `kill` = chance that a worker process dies at a sample (once per sample, so
that the repeated attempt can succeed; without effect in the training process itself).
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

from hermes_dist.errors import ConfigError, CorruptShardError, TransientStorageError, nearest
from hermes_dist.stream.keyed import text_key, uniform

_CORRUPT, _TRANSIENT, _KILL = range(101, 104)
KINDS = ("corrupt", "transient", "slow_s", "kill")


class Chaos:
    """Injects the configured faults. Raises ConfigError for an unknown kind or a value out of range."""

    def __init__(self, rates: dict[str, float], seed: int) -> None:
        for kind, rate in rates.items():
            if kind not in KINDS:
                raise ConfigError(
                    f"stream.faults.chaos: unknown fault {kind!r}; known: {', '.join(KINDS)}.{nearest(kind, KINDS)}"
                )
            if rate < 0 or (kind != "slow_s" and rate > 1):
                raise ConfigError(f"stream.faults.chaos[{kind!r}] = {rate}: expected a probability (or seconds >= 0 for slow_s)")
        self.rates = dict(rates)
        self.seed = seed
        self.kill_dir: str | None = None
        """Folder for marks of killed workers; None in the training process, which is never killed."""

    def before_sample(self, position: int) -> None:
        """Hold up the sample, or kill this worker."""
        if not self.rates:
            return
        if self.rates.get("slow_s"):
            time.sleep(self.rates["slow_s"])
        if self.kill_dir and self._hit("kill", _KILL, position) and self._first_time(position):
            os.kill(os.getpid(), signal.SIGKILL)

    def before_read(self, position: int, case: int, attempt: int, name: tuple[str, str]) -> None:
        """Raise CorruptShardError or TransientStorageError as configured."""
        if not self.rates:
            return
        if self._hit("corrupt", _CORRUPT, text_key("/".join(name))):
            raise CorruptShardError(f"{'/'.join(name)}: injected damage (stream.faults.chaos.corrupt)")
        if self._hit("transient", _TRANSIENT, position, case, attempt):
            raise TransientStorageError("injected storage failure (stream.faults.chaos.transient)")

    def _hit(self, kind: str, key: int, *parts: int) -> bool:
        return float(uniform(key, self.seed, *parts)) < self.rates.get(kind, 0.0)

    def _first_time(self, position: int) -> bool:
        try:
            Path(self.kill_dir or tempfile.gettempdir(), f"killed-{self.seed}-{position}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
