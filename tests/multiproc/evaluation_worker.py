"""A true training whose first evaluation is met by a signal. Usage: evaluation_worker.py CONFIG STOP_RANK (-1 = no signal).

The rank STOP_RANK gets SIGUSR1 while it scores its first scan; the others wait in their second one until it has told them.
Every rank appends `step case` lines to RUN_DIR/scored_RANK.txt.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hermes_dist.config import load_config
from hermes_dist.errors import exit_on_error
from hermes_dist.parallel.runtime import EXIT_REQUEUE, start
from hermes_dist.train import evaluate
from hermes_dist.train.trainer import train


def main(config_path: Path, stop_rank: int) -> int:
    config = load_config(config_path)
    runtime = start(config)
    plain, seen = evaluate.score_scan, 0

    def watched(model: Any, job: evaluate.Job, case: evaluate.Case) -> Any:
        nonlocal seen
        seen += 1
        with (config.run_dir / f"scored_{runtime.rank}.txt").open("a") as file:
            file.write(f"{int(job.checkpoint.removeprefix('step_'))} {case.row.case_id}\n")
        if stop_rank == runtime.rank and seen == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 60
        while stop_rank not in (-1, runtime.rank) and seen == 2 and time.monotonic() < deadline:
            if (job.work_dir / "stop").exists():
                break
            time.sleep(0.02)
        return plain(model, job, case)

    evaluate.score_scan = watched
    try:
        return EXIT_REQUEUE if train(config, runtime).stopped_early else 0
    finally:
        runtime.close()


if __name__ == "__main__":
    with exit_on_error():
        raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2])))
