"""The starter's thread: in order, errors in the futures, and no hold on the interpreter."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from hermes_dist.stream.starter import Starter


def test_calls_run_one_after_another_in_one_thread() -> None:
    starter, seen = Starter("test"), list[object]()
    futures = [starter.submit(lambda i=i: seen.append((i, threading.current_thread().name))) for i in range(20)]
    failing, last = starter.submit(lambda: 1 // 0), starter.submit(lambda a: a + 1, 41)
    starter.finish()
    assert last.result(timeout=20) == 42
    with pytest.raises(ZeroDivisionError):
        failing.result()
    assert all(f.done() for f in futures)
    assert seen == [(i, "test") for i in range(20)]


def test_a_cancelled_call_does_not_run() -> None:
    starter, gate, seen = Starter("test"), threading.Event(), list[int]()
    starter.submit(gate.wait, 20)
    cancelled, kept = starter.submit(lambda: seen.append(1)), starter.submit(lambda: seen.append(2))
    assert cancelled.cancel()
    gate.set()
    kept.result(timeout=20)
    assert seen == [2]


def test_a_call_that_never_returns_does_not_keep_the_interpreter() -> None:
    program = "import threading; from hermes_dist.stream.starter import Starter; Starter('x').submit(threading.Event().wait)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
