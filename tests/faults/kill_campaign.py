"""Kills a run at random instants, again and again. Usage: kill_campaign.py RUN_DIR KILLS SEED [WORLD_SIZE].

The libraries are imported once and each attempt is a fork, so that fifty kills take minutes rather than an hour. Prints one
JSON line: kills, how many hit while a checkpoint was being written, and the step reached. Then the run finishes five more steps.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tests.multiproc.preload  # noqa: F401 (before forking: an attempt then takes tenths of a second)
from tests.multiproc.ranks import free_port
from tests.multiproc.train_worker import train

FAR = 10**6


def fork_rank(rank: int, world_size: int, port: int, run_dir: Path, steps: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    log = os.open(run_dir / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = train(run_dir, steps, {"stage": 1, "save_every": 1, "limit_s": 60})
    except BaseException as error:  # the child must not run the parent's code, whatever happens
        print(f"attempt failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def last_step(run_dir: Path) -> int:
    latest = run_dir / "checkpoints" / "latest"
    return int(latest.read_text().split("_")[1]) if latest.exists() else 0


def main() -> None:
    run_dir, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    world_size = int(sys.argv[4]) if len(sys.argv) > 4 else 2
    during_save = 0
    for _ in range(kills):
        before, port = last_step(run_dir), free_port()
        pids = [fork_rank(rank, world_size, port, run_dir, FAR) for rank in range(world_size)]
        # Sometimes before it has got anywhere (while it starts or loads), otherwise after it has.
        deadline = time.monotonic() + (rng.uniform(0, 1) if rng.random() < 0.15 else 60)
        while last_step(run_dir) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        during_save += any((run_dir / "checkpoints").glob(".tmp-step_*"))
        rng.shuffle(pids)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            time.sleep(rng.choice([0, 0.05]))
        for pid in pids:
            os.waitpid(pid, 0)
    reached = last_step(run_dir)
    port = free_port()
    codes = [os.waitpid(pid, 0)[1] for pid in [fork_rank(r, world_size, port, run_dir, reached + 5) for r in range(world_size)]]
    print(json.dumps({"kills": kills, "during_save": during_save, "reached": reached, "codes": codes}))


if __name__ == "__main__":
    main()
