"""What the engine benches share: a model, a batch, and ranks forked from one process that has imported everything once."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hermes_dist.config import Config, resolve, validate
from hermes_dist.models import build_model
from hermes_dist.models.checkpointing import apply_activation_checkpointing
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.runtime import Runtime, start
from hermes_dist.stream.batch import Batch, Collator, StepBatch
from hermes_dist.stream.reader import Sample
from hermes_dist.tasks import TaskTable
from hermes_dist.train.record import LossSums
from hermes_dist.train.step import StepLoss
from tests.multiproc.ranks import free_port

SIZES: dict[str, dict[str, Any]] = {
    "narrow": {"base_channels": 8, "blocks": [1, 1, 1, 1]},
    "small": {"base_channels": 16},
    "base": {"base_channels": 32},
    "large": {"base_channels": 48, "blocks": [4, 4, 4, 4]},
}
COLUMNS = 15
TASKS = TaskTable.build(
    [
        ("a", "CT", "", [(f"c{i}", [i + 1]) for i in range(COLUMNS)], None),
        ("b", "T1", "", [(f"c{i}", [i + 1]) for i in range(71 - COLUMNS)], None),
    ]
)
"""71 tasks, as many as in the paper; every sample asks for the 15 of dataset a."""


def make_config(case: dict[str, Any], world_size: int) -> Config:
    """The configuration of a bench case: size, stage, mode, patch, and optionally optimizer, ema, micro_batches, out."""
    micro_batches = case.get("micro_batches", 1)
    return resolve(
        validate(
            {
                "run": {"output_dir": case.get("out", "unused")},
                "data": {"patch_vox_zyx": case["patch"]},
                "model": SIZES[case["size"]],
                "optimizer": {"name": case.get("optimizer", "lamb")},
                "train": {
                    "global_batch": world_size * micro_batches,
                    "activation_checkpointing": case.get("mode", "none"),
                    "ema": {"enabled": case.get("ema", True)},
                    "step_limit_s": 600,
                },
                "deepspeed": {"zero_optimization": {"stage": case["stage"], **case.get("zero", {})}},
            }
        )
    )


def make_model(config: Config) -> torch.nn.Module:
    """The case's model, the same weights on every rank."""
    torch.manual_seed(0)
    model = build_model(config.model, TASKS)
    apply_activation_checkpointing(model, config.train.activation_checkpointing)
    return model


def make_batch(config: Config, rank: int) -> Batch:
    """One sample of dataset a: noise, with every class in it."""
    patch, random = config.data.patch_vox_zyx, np.random.default_rng(rank)
    image = random.standard_normal(patch, dtype=np.float32)
    label = random.integers(0, COLUMNS + 1, patch).astype(np.uint8)
    return Collator(TASKS, patch).collate([Sample(rank, 0, rank, rank, image, label)])


def make_loss(config: Config, batches: int) -> StepLoss:
    """The loss of a global step of `batches` samples."""
    step = StepBatch(0, [], batches * COLUMNS, batches, np.zeros(0, np.int64), np.zeros(0, np.int64))
    return StepLoss(config.loss, step, LossSums.zeros(TASKS, torch.device("cpu")), null_column=False)


def open_engine(case: dict[str, Any], runtime: Runtime | None = None) -> tuple[Engine, Runtime, Config]:
    """Join the other ranks (unless `runtime` has done so) and wrap the case's model."""
    config = make_config(case, int(os.environ["WORLD_SIZE"]))
    runtime = runtime or start(config)
    return Engine(make_model(config), config, runtime), runtime, config


def fork_ranks(work: Callable[[dict[str, Any]], dict[str, Any]], case: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `work(case)` on `case["ranks"]` forked processes; their results in rank order. Exits if one fails."""
    import deepspeed  # noqa: F401 - once, before forking

    world_size, port = case["ranks"], free_port()
    folder = Path(case["folder"])
    pids: list[int] = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _child(work, case, rank, world_size, port, folder)
        pids.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(codes):
        sys.exit(f"{case}: ranks ended with {codes}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _child(work: Callable[..., Any], case: dict[str, Any], rank: int, world_size: int, port: int, folder: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, world_size, world_size, "127.0.0.1", port)
    os.environ |= {n: str(v) for n, v in zip(names, values, strict=True)}
    torch.set_num_threads(case.get("threads", 1))
    code = 1
    try:
        (folder / f"{rank}.json").write_text(json.dumps(work(case)))
        code = 0
    except BaseException:  # the child must not run the parent's code, whatever happens
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def resident_bytes(field: str = "VmRSS") -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def reset_peak() -> None:
    """Give freed memory back to the system, and start VmHWM afresh."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def live_bytes() -> int:
    """Bytes of all tensors that exist in this process, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
