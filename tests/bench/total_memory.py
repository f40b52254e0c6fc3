"""Peak memory of a command and all its processes: `total_memory.py COMMAND…`; prints GiB to stderr, keeps the exit code.

Sampled four times a second as proportional set size, so that pages that processes share count once.
"""

from __future__ import annotations

import subprocess
import sys
import time

import psutil


def total_bytes(root: psutil.Process) -> int:
    """PSS of a process and all its descendants."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            continue
    return total


def main() -> int:
    child = subprocess.Popen(sys.argv[1:])
    root, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        try:
            peak = max(peak, total_bytes(root))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.25)
    print(f"peak of all processes: {peak / 2**30:.2f} GiB", file=sys.stderr)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
