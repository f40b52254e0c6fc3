"""Ends what is left of a private Ray cluster when the process that started it is gone, also after kill -9.

The kernel ends Ray's main processes with their starter, but their agents wait a minute for a head that will not come back, and
nobody removes the cluster's files. This small process waits for the end of its standard input, which the starter holds open,
then ends every process that carries the cluster's mark in its environment or writes into its folder (a process that changes its
title overwrites its environment), and removes folder and rendezvous file.

Usage: python -m hermes_dist.stream.ray_reaper HOME RENDEZVOUS
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

MARK = "HERMES_RAY_HOME"
"""Environment variable by which the processes of a cluster are known: its folder."""
GRACE_S, LIMIT_S = 1.0, 15.0


def start(home: Path, rendezvous: Path) -> subprocess.Popen[bytes]:
    """Start the reaper of a cluster; closing its `stdin` (or dying) sets it to work. It keeps no signal of the terminal."""
    command = [sys.executable, "-m", "hermes_dist.stream.ray_reaper", str(home), str(rendezvous)]
    environment = {key: value for key, value in os.environ.items() if key != MARK}
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)


def members(home: str) -> list[psutil.Process]:
    """Processes of this user that belong to a cluster; not the ranks, which write their logs there too."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == home or (process.name().startswith("ray::") and _writes_into(process, home)):
                found.append(process)
    return found


def _writes_into(process: psutil.Process, home: str) -> bool:
    return any(file.path.startswith(f"{home}/") for file in process.open_files())


def reap(home: str) -> None:
    """End the processes of a cluster: those that do not go by themselves within a moment are killed."""
    deadline = time.monotonic() + LIMIT_S
    psutil.wait_procs(members(home), timeout=GRACE_S)
    while (left := members(home)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=GRACE_S)


def main(home: str, rendezvous: str) -> None:
    """Wait for the starter's end, then clean up."""
    sys.stdin.buffer.read()
    reap(home)
    deadline = time.monotonic() + LIMIT_S
    while Path(home).exists() and time.monotonic() < deadline:  # ranks that die a little later still write their logs there
        shutil.rmtree(home, ignore_errors=True)
        time.sleep(0.2)
    with contextlib.suppress(OSError, ValueError):
        if f'"home": "{home}"' in Path(rendezvous).read_text():
            Path(rendezvous).unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
