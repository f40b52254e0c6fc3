"""A small training run for tests of death and resume. Usage: train_worker.py RUN_DIR STEPS [OPTIONS_JSON].

It resumes from RUN_DIR, saves every `save_every` steps, and rank 0 appends `step loss` lines (loss as hex: bitwise) to
RUN_DIR/losses.txt. Options: stage, save_every, background, limit_s, sleep_s, and what goes wrong: die / hang / fail =
[rank, step, name of a file that is made first, so that it happens once], full_disk = a rank that cannot write checkpoints,
stale = [rank, n]: what that rank sees of the file system is old: its listing lacks the newest checkpoint, and a checkpoint opened
by its path appears only at the n-th look.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hermes_dist.config import Config, validate
from hermes_dist.errors import CheckpointError, exit_on_error
from hermes_dist.parallel import checkpoint, stored
from hermes_dist.parallel.checkpoint import Checkpointer
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.runtime import EXIT_REQUEUE, Runtime, start
from tests.multiproc import toy

BATCH = 4


def make_config(options: dict[str, Any]) -> Config:
    return validate(
        {
            "train": {"global_batch": BATCH, "micro_batch": 1, "step_limit_s": options.get("limit_s", 60)},
            "checkpoint": {"background": options.get("background", True), "keep": 2},
            "deepspeed": {"zero_optimization": {"stage": options.get("stage", 1)}},
        }
    )


def go_wrong(options: dict[str, Any], rank: int, step: int, run_dir: Path) -> None:
    for what, (who, when, flag) in ((k, options[k]) for k in ("die", "hang", "fail") if k in options):
        if rank == who and step == when and not (run_dir / flag).exists():
            (run_dir / flag).touch()
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "fail":
                raise SystemExit(3)
            time.sleep(3600)


def no_space(*_: object) -> dict[str, int]:
    raise OSError(28, "No space left on device")


def look_late(looks: int) -> None:
    """This process's view of the checkpoints lags behind."""
    listed, opened = stored.list_checkpoints, stored.open_checkpoint
    left = [looks]

    def late(path: Path) -> stored.Stored:
        left[0] -= 1
        if left[0] > 0:
            raise CheckpointError(f"{path} is not here yet")
        return opened(path)

    stored.open_checkpoint = late
    checkpoint.list_checkpoints = lambda run_dir: listed(run_dir)[1:]


def train(run_dir: Path, steps: int, options: dict[str, Any]) -> int:
    runtime = start(make_config(options))
    try:
        return loop(run_dir, steps, options, runtime)
    finally:
        runtime.close()


def loop(run_dir: Path, steps: int, options: dict[str, Any], runtime: Runtime) -> int:
    config = make_config(options)
    engine = Engine(toy.make_model(), config, runtime)
    if options.get("full_disk") == runtime.rank:
        checkpoint.write_tensors = no_space
    if options.get("stale", [None])[0] == runtime.rank:
        look_late(options["stale"][1])
    checkpointer = Checkpointer(run_dir, config.checkpoint, runtime)
    state = checkpointer.load(engine)
    for step in range(state["step"] if state else 0, steps):
        go_wrong(options, runtime.rank, step, run_dir)
        samples = toy.make_samples(step, BATCH)
        local = torch.zeros(1)
        loss_fn = toy.make_loss(int(sum(s.pair_mask.sum() for s in samples)), local.add_)
        engine.step(toy.split(samples, runtime.rank, runtime.world_size, 1), loss_fn, lr=0.02)
        loss = float(runtime.sum(local))
        if runtime.rank == 0:
            with (run_dir / "losses.txt").open("a") as file:
                file.write(f"{step} {loss.hex()}\n")
        if runtime.stop_requested or (step + 1) % options.get("save_every", 1) == 0:
            checkpointer.save(engine, {"step": step + 1}, step + 1)
        if runtime.stop_requested:
            checkpointer.finish()
            return EXIT_REQUEUE
        time.sleep(options.get("sleep_s", 0))
    checkpointer.finish()
    return 0


def read_losses(run_dir: Path) -> dict[int, str]:
    """Loss by step; asserts that a step that was computed twice gave the same loss. A torn last line is left out."""
    losses: dict[int, str] = {}
    for line in (run_dir / "losses.txt").read_text().split("\n")[:-1]:
        step, loss = line.split()
        assert losses.setdefault(int(step), loss) == loss, f"step {step} gave {losses[int(step)]}, then {loss}"
    return losses


if __name__ == "__main__":
    with exit_on_error():
        raise SystemExit(train(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}))
