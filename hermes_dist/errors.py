"""Every error a person may meet, and how a command ends because of it.

    HermesError                  exit code 1: something was wrong with data, a run or a machine
    ├── UsageError               exit code 2: the command or its configuration is wrong
    │   ├── ConfigError          unknown key, wrong type, values that contradict each other
    │   └── TaskError            a dataset, class or task that the task table does not know
    ├── DataError                data on disk or in an object store
    │   ├── SourceError          a raw scan that cannot be read or means two things
    │   ├── GeometryError        an affine, spacing or grid that cannot be honoured
    │   ├── StoreError           a shard store that is missing, of another version, or inconsistent
    │   └── CorruptShardError    bytes whose checksum does not match: never retried
    ├── TransientStorageError    storage that may work again: retried with backoff
    ├── StorageAccessError       storage that refuses: credentials, permissions, region; never retried, replaces no sample
    ├── StreamError              the sample stream cannot go on
    │   ├── QuarantineLimitError more corrupt cases than `stream.faults.max_quarantined`
    │   └── WaitTimeoutError     a wait that reached its limit; the message says what it waited for
    ├── ModelError               ids out of range, sides too small, weights of another shape
    ├── CheckpointError          a checkpoint that is damaged, or of another model or collection
    └── NumericalError           more NaN/Inf steps than allowed

A message names the file or value, what was expected and what to do, in that order.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class HermesError(Exception):
    """Base of all errors whose message is meant for a person rather than for a traceback."""

    exit_code = 1
    events: Sequence[dict[str, Any]] = ()
    """What had happened before and is not in stream.jsonl yet: attempts, substitutions."""


class UsageError(HermesError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """Unknown key, wrong type, or values that contradict each other."""


class TaskError(UsageError):
    """A dataset, class or task that the task table does not know."""


class DataError(HermesError):
    """Data on disk or in an object store is wrong."""


class SourceError(DataError):
    """A raw scan or raw dataset that cannot be read."""


class GeometryError(DataError):
    """An affine, spacing or grid that cannot be honoured."""


class StoreError(DataError):
    """A shard store that is missing, of another format version, or inconsistent."""


class CorruptShardError(DataError):
    """Bytes whose checksum does not match. Retrying cannot help; the case is quarantined."""


class TransientStorageError(HermesError):
    """Storage that answered with an error that may pass (throttling, time-out, connection reset)."""


class StorageAccessError(HermesError):
    """Storage that answers, but refuses: credentials, permissions, region. Says nothing about the data, so the run stops."""


class StreamError(HermesError):
    """The sample stream cannot go on."""


class QuarantineLimitError(StreamError):
    """More corrupt cases than `stream.faults.max_quarantined`. A restart finds the same: until_done.sh and Slurm stop."""

    exit_code = 2


class WaitTimeoutError(StreamError):
    """A wait reached its limit."""


class ModelError(HermesError):
    """Ids out of range, sides too small for the stages, or weights of another shape."""


class CheckpointError(HermesError):
    """A checkpoint that is damaged, or that belongs to another model or collection."""


class NumericalError(HermesError):
    """More NaN or Inf steps than allowed."""


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?` for the closest of `known`, or an empty string if none is close."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


@contextmanager
def exit_on_error() -> Generator[None]:
    """Wrap a command: a `HermesError` becomes one message on stderr and its exit code, never a traceback."""
    try:
        yield
    except HermesError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
