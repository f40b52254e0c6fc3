"""A world of one for tests of the parallel room, started once per session."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

from hermes_dist.config import Config, validate
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.runtime import Runtime, start
from tests.multiproc import toy


@pytest.fixture(scope="session")
def runtime() -> Generator[Runtime]:
    session = start(validate({"train": {"step_limit_s": 60}}))
    yield session
    session.close()


def make_config(stage: int = 1, **sections: Any) -> Config:
    train = {"global_batch": 4, "micro_batch": 2, "step_limit_s": 60, **sections.pop("train", {})}
    return validate({"train": train, "deepspeed": {"zero_optimization": {"stage": stage}}, **sections})


def make_engine(runtime: Runtime, stage: int = 1, **sections: Any) -> Engine:
    return Engine(toy.make_model(), make_config(stage, **sections), runtime)


def train_steps(engine: Engine, begin: int, end: int) -> list[float]:
    """Losses of toy steps on one rank."""
    losses: list[float] = []
    for step in range(begin, end):
        samples = toy.make_samples(step, 4)
        local = torch.zeros(1)
        loss_fn = toy.make_loss(int(sum(s.pair_mask.sum() for s in samples)), local.add_)
        engine.step(toy.split(samples, 0, 1, 2), loss_fn, lr=0.02)
        losses.append(float(local))
    return losses
