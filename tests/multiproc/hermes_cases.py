"""Hermes on several ranks against one process with the whole batch: used by a short test and by the bench of the whole grid."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.multiproc.cases import run_cases
from tests.multiproc.hermes import RATES, HermesKit
from tests.multiproc.toy import reference_run

BATCH = 3
"""One sample of each dataset: with two ranks or four there are fillers."""


@cache
def reference(model: str, optimizer: str, steps: int, micro_batch: int | None = None) -> dict[str, list]:
    """Plain PyTorch, one process, the whole batch at once (or in micro-batches)."""
    kit, lr = HermesKit(model), RATES[model]
    return reference_run(optimizer, steps=steps, batch=BATCH, lr=lr, decay=0.01, clip=0.3, kit=kit, micro_batch=micro_batch)


def drift(model: str, optimizer: str, steps: int) -> float:
    """How far one process in micro-batches of one is from itself with the whole batch: largest relative deviation of the loss."""
    whole, parts = (np.array(reference(model, optimizer, steps, size)["loss"]) for size in (None, 1))
    return float(np.abs(parts / whole - 1).max())


def deviations(
    model: str, optimizer: str, stages: list[int], *, world: int, steps: int, folder: Path
) -> list[tuple[float, float]]:
    """Per stage: largest relative deviation of the loss over all steps, relative L2 error of the change of the weights."""
    cases: list[dict[str, Any]] = [
        {
            "model": model, "optimizer": optimizer, "stage": stage, "steps": steps, "batch": BATCH, "micro_batch": 1,
            "lr": RATES[model], "weights": str(folder / f"{stage}.pt"),
        }
        for stage in stages
    ]  # fmt: skip
    want, start = reference(model, optimizer, steps), HermesKit(model).make_model().state_dict()
    found: list[tuple[float, float]] = []
    for stage, got in zip(stages, run_cases(cases, world, folder, limit_s=1200), strict=True):
        loss = float(np.abs(np.array(got["loss"]) / np.array(want["loss"]) - 1).max())
        weights = torch.load(folder / f"{stage}.pt")
        assert torch.equal(weights["backbone.stem.conv.weight"], start["backbone.stem.conv.weight"]), "the frozen stem moved"
        pairs = [
            (weights[n].flatten() - start[n].flatten(), torch.tensor(w) - start[n].flatten())
            for n, w in zip(want["names"], want["weights"], strict=True)
        ]
        ours, theirs = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
        found.append((loss, float((ours - theirs).norm() / theirs.norm())))
    return found
