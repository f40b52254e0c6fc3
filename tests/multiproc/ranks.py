"""Starts a module once per rank, as a launcher would, and waits for all of them within a limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def start_ranks(
    module: str, args: Sequence[str], world_size: int, extra: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Start all ranks; their output is captured."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *args],
            cwd=ROOT,
            env=rank_environment(rank, world_size, port, extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def wait_ranks(processes: Sequence[subprocess.Popen[str]], limit_s: float = 180) -> list[tuple[int, str]]:
    """(exit code, output) per rank; kills what is left after the limit."""
    results: list[tuple[int, str]] = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=limit_s)
            results.append((process.returncode, output))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return results


def run_ranks(module: str, args: Sequence[str], world_size: int, limit_s: float = 180) -> list[str]:
    """Outputs of all ranks; fails with the output of the first rank that did not succeed."""
    results = wait_ranks(start_ranks(module, args, world_size), limit_s)
    failed = {rank: output for rank, (code, output) in enumerate(results) if code != 0}
    # A rank that lost a peer tells nothing: show the one that failed by itself.
    causes = {rank: output for rank, output in failed.items() if "WaitTimeoutError" not in output} or failed
    for rank, output in causes.items():
        raise AssertionError(f"rank {rank} of {world_size} failed:\n{output[-4000:]}")
    return [output for _, output in results]
