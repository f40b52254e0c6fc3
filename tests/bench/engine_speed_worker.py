"""Step times of the engine. Called by test_engine_speed.py: `engine_speed_worker.py WHAT CASE_JSON`, one JSON line of results.

overhead    one rank: the engine and a bare PyTorch loop with the same model, loss, optimizer and clipping, turn by turn
scaling     1 rank, 2 ranks, and 2 processes that do not talk to each other (what the machine itself allows), turn by turn
checkpoint  step times while nothing is written, and while a checkpoint is being written behind the steps

Medians; wall and CPU seconds of a step on rank 0, and the part of the CPU seconds that the kernel took (pages of new memory).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hermes_dist.config import Config
from hermes_dist.parallel.checkpoint import Checkpointer
from hermes_dist.parallel.engine import make_optimizer
from hermes_dist.parallel.lamb import Lamb
from hermes_dist.parallel.partition import FlatBuffer, Partition, Segment
from tests.bench.engine_ranks import fork_ranks, make_batch, make_loss, make_model, open_engine

Seconds = tuple[float, float, float]


def timed(step: Callable[[], Any]) -> Seconds:
    wall, cpu, kernel = time.perf_counter(), time.process_time(), os.times().system
    step()
    return time.perf_counter() - wall, time.process_time() - cpu, os.times().system - kernel


def median(times: list[Seconds]) -> dict[str, float]:
    return {name: statistics.median(t[i] for t in times) for i, name in enumerate(("wall_s", "cpu_s", "kernel_s"))}


def bare_step(config: Config) -> Callable[[], None]:
    """A plain loop's step."""
    model = make_model(config)
    named = dict(model.named_parameters())
    optimizer = make_optimizer(list(named.values()), config, {n: p.shape for n, p in named.items()})
    if isinstance(optimizer, Lamb):
        buffers = tuple(FlatBuffer(p, p.detach().view(-1), (Segment(n, 0, 0, p.numel()),)) for n, p in named.items())
        shapes = {n: p.shape for n, p in named.items()}
        optimizer.bind(Partition(buffers, (), shapes, tuple(named), True, lambda: None, lambda: None))
    batch, loss_fn = make_batch(config, 0), make_loss(config, 1)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        nn.utils.clip_grad_norm_(named.values(), config.optimizer.clip_norm)
        optimizer.step()

    return step


def overhead(case: dict[str, Any]) -> dict[str, Any]:
    engine, runtime, config = open_engine(case)
    batch, loss_fn = make_batch(config, runtime.rank), make_loss(config, 1)
    sides: dict[str, Callable[[], Any]] = {"bare": bare_step(config), "engine": lambda: engine.step([batch], loss_fn, lr=1e-4)}
    times: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(case["repeats"] + 1):
        for name, step in sides.items():
            times[name].append(timed(step))
    return {name: median(rows[1:]) for name, rows in times.items()}


def steps_of_one_rank(case: dict[str, Any]) -> dict[str, Any]:
    engine, runtime, config = open_engine(case)
    batch, loss_fn = make_batch(config, runtime.rank), make_loss(config, runtime.world_size)
    times = [timed(lambda: engine.step([batch], loss_fn, lr=1e-4)) for _ in range(case["repeats"] + 1)]
    return median(times[1:])


def alone(case: dict[str, Any]) -> dict[str, Any]:
    """One rank in a world of its own, in a process of its own: two of these run at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        return fork_ranks(steps_of_one_rank, {**case, "ranks": 1, "folder": folder})[0]


def scaling(case: dict[str, Any]) -> dict[str, Any]:
    rounds: dict[str, list[float]] = {"one": [], "two": [], "apart": []}
    for _ in range(case["rounds"]):
        with tempfile.TemporaryDirectory() as folder:
            rounds["one"].append(alone(case)["wall_s"])
            rounds["two"].append(fork_ranks(steps_of_one_rank, {**case, "ranks": 2, "folder": folder})[0]["wall_s"])
        with ThreadPoolExecutor(2) as pool:
            rounds["apart"].append(max(r["wall_s"] for r in pool.map(alone, [case, case])))
    return {name: statistics.median(times) for name, times in rounds.items()}


def checkpoint(case: dict[str, Any]) -> dict[str, Any]:
    engine, runtime, config = open_engine(case)
    batch, loss_fn = make_batch(config, runtime.rank), make_loss(config, runtime.world_size)
    checkpointer = Checkpointer(Path(case["folder"]) / "run", config.checkpoint, runtime)
    quiet: list[Seconds] = []
    writing: list[Seconds] = []
    saves: list[Seconds] = []
    write_s: list[float] = []

    def step() -> Seconds:
        return timed(lambda: engine.step([batch], loss_fn, lr=1e-4))

    step()
    for number in range(case["rounds"]):
        quiet += [step() for _ in range(3)]
        saves.append(timed(lambda number=number: checkpointer.save(engine, {}, number)))
        begun = time.perf_counter()
        # Every rank takes the same number of steps, whoever still writes.
        while int(runtime.sum(torch.tensor([int(checkpointer.writing)]))[0]):
            writing.append(step())  # the last one only partly meets the writing
        write_s.append(time.perf_counter() - begun)
        checkpointer.finish()
    size = sum(f.stat().st_size for f in (Path(case["folder"]) / "run").rglob("*.safetensors")) / config.checkpoint.keep
    return {
        "quiet": median(quiet),
        "writing": median(writing) if writing else None,
        "steps_while_writing": len(writing),
        "snapshot_s": statistics.median(s[0] for s in saves),
        "write_s": statistics.median(write_s),
        "bytes": size,
    }


def main() -> None:
    what, case = sys.argv[1], json.loads(sys.argv[2])
    os.environ["DS_ACCELERATOR"] = "cpu"
    if what == "scaling":
        result: Any = scaling(case)
    else:
        with tempfile.TemporaryDirectory(dir=case.get("disk")) as folder:
            result = fork_ranks({"overhead": overhead, "checkpoint": checkpoint}[what], {**case, "folder": folder})[0]
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
