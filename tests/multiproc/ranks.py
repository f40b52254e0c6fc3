"""Starts a module once per rank, as a launcher would, and waits for all of them within a limit.

The ranks are forks of one server that has imported the libraries: a rank that imports them by itself computes for seconds
before it does anything, which was most of the time of these tests. Tests of launchers start whole processes (tests/launch).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.multiproc.preload"])


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What torchrun would set, without torchrun's own processes."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **(extra or {}),
    }


class Rank:
    """One rank: a forked process, with the part of `subprocess.Popen` that tests use. Its output goes to a file."""

    def __init__(self, module: str, args: Sequence[str], environment: Mapping[str, str]) -> None:
        self._output = tempfile.NamedTemporaryFile("r", prefix="rank-", errors="replace")  # noqa: SIM115 (lives as long as the rank)
        # A daemon: what a failed test leaves behind ends with the tests.
        self._process = _SERVER.Process(target=_run, args=(module, list(args), dict(environment), self._output.name), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """Exit code, minus the number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.join()

    def wait(self, limit_s: float) -> tuple[int, str]:
        """Exit code and output; raises `subprocess.TimeoutExpired` if it still runs after the limit."""
        self._process.join(limit_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", limit_s, output=self._output.read())
        return self._process.exitcode, self._output.read()


def _run(module: str, args: list[str], environment: dict[str, str], output: str) -> None:
    """In the fork: become `python -m MODULE ARGS`."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start_ranks(module: str, args: Sequence[str], world_size: int, extra: Mapping[str, str] | None = None) -> list[Rank]:
    """Start all ranks; their output is captured."""
    port = free_port()
    return [Rank(module, args, rank_environment(rank, world_size, port, extra)) for rank in range(world_size)]


def wait_ranks(ranks: Sequence[Rank], limit_s: float = 180) -> list[tuple[int, str]]:
    """(exit code, output) per rank; kills what is left after the limit."""
    try:
        return [rank.wait(limit_s) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()


def run_ranks(module: str, args: Sequence[str], world_size: int, limit_s: float = 180) -> list[str]:
    """Outputs of all ranks; fails with the output of the first rank that did not succeed."""
    results = wait_ranks(start_ranks(module, args, world_size), limit_s)
    failed = {rank: output for rank, (code, output) in enumerate(results) if code != 0}
    # A rank that lost a peer tells nothing: show the one that failed by itself.
    causes = {rank: output for rank, output in failed.items() if "WaitTimeoutError" not in output} or failed
    for rank, output in causes.items():
        raise AssertionError(f"rank {rank} of {world_size} failed:\n{output[-4000:]}")
    return [output for _, output in results]
