"""A hang is named, with stacks; progress keeps the watchdog quiet."""

from __future__ import annotations

import subprocess
import sys
import time

from hermes_dist.parallel.watchdog import EXIT_HANG, Watchdog


def test_quiet_while_things_move_and_while_idle() -> None:
    dog = Watchdog(rank=0, limit_s=0.2, exit_code=None, poll_s=0.01)
    for step in range(5):
        with dog.watch(step, "work"):
            time.sleep(0.02)
    time.sleep(0.3)
    dog.close()
    assert dog.reports == 0


def test_a_hang_is_reported_with_stacks_and_ends_the_process() -> None:
    code = """
import threading
from hermes_dist.parallel.watchdog import Watchdog
dog = Watchdog(rank=3, limit_s=0.1, poll_s=0.01)
def stuck_in_a_lock():
    with dog.watch(17, "backward of micro-batch 2"):
        threading.Event().wait(60)
stuck_in_a_lock()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == EXIT_HANG
    assert "hang: rank 3, step 17, backward of micro-batch 2: nothing moved for" in result.stderr
    assert "stuck_in_a_lock" in result.stderr
