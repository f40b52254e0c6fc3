"""One rank that reports what a training reports, a few times a second: `python fake_rank.py RUN_DIR RANK WORLD SECONDS`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hermes_dist.config import MonitorConfig
from hermes_dist.telemetry.telemetry import Telemetry


def row(step: int, rank: int) -> dict[str, object]:
    """A plausible step."""
    return {
        "step": step,
        "loss": 1 / (1 + step),
        "loss_bce": 0.4,
        "loss_dice": 0.5,
        "loss_modality": 1.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "skipped": 0,
        "step_s": 0.2,
        "data_wait_s": 0.004,
        "samples": 2,
        "patches": 2,
        "voxels": 2 * 32**3,
        "flops": 1e9,
        "mfu": 0.3,
        "parts_s": {
            "forward": 0.06 + 0.01 * rank,
            "backward": 0.1,
            "optimizer": 0.01,
            "communication": 0.01,
            "checkpoint": 0.0,
        },
        "wait_parts_s": {"storage": 0.003, "decode": 0.001},
        "dataset_loss": {"lits": {"bce": 0.4, "dice": 0.5}},
        "task_loss": {"lits/liver": {"bce": 0.2, "dice": 0.4}, "kits/kidney": {"bce": float("nan")}},
        "task_pairs": {"lits/liver": 5, "kits/kidney": 3},
        "dataset_samples": {"lits": 2},
    }


def main(run_dir: str, rank: int, world_size: int, seconds: float) -> None:
    """Report until the time is over."""
    telemetry = Telemetry(Path(run_dir), MonitorConfig(prometheus_port=0), rank=rank, world_size=world_size, run_name="fake")
    telemetry.set("hermes_run_info", 1, world_size=str(world_size), device="cpu", commit="0")
    telemetry.set("hermes_max_steps", 1000)
    telemetry.set("hermes_parameters", 1e6)
    telemetry.set("hermes_queue_limit_samples", 4)
    telemetry.watch("hermes_ready_samples", lambda: 3.0)
    scores = {"dice": 0.9, "nsd": 0.8, "hd95_mm": 3.0}
    telemetry.evaluation("val", {"mean": scores, "per_class": [{"dataset": "lits", "task": "liver", **scores}]})
    telemetry.set("hermes_checkpoint_size_bytes", 1e9)
    end = time.monotonic() + seconds
    step = 0
    while time.monotonic() < end:
        telemetry.step(row(step, rank))
        telemetry.add("hermes_read_bytes_total", 1e6)
        telemetry.add("hermes_sample_stage_seconds_total", 0.05, stage="decode")
        telemetry.observe("hermes_checkpoint_duration_seconds", 0.2, phase="snapshot")
        step += 1
        time.sleep(0.2)
    telemetry.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
