"""Nothing in a step's forward and backward pass waits for the device.

Tensors on torch's `meta` device have no values: whatever would make an accelerator wait (`item`, `tolist`, a branch on a tensor,
a boolean index, a copy to the host) is an error there. A pass over a model on `meta`, ids on the host, proves it without a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from hermes_dist.config import resolve, validate
from hermes_dist.models import build_model
from hermes_dist.parallel.lamb import Lamb
from hermes_dist.stream.batch import Collator, StepBatch
from hermes_dist.stream.reader import Sample
from hermes_dist.tasks import TaskTable
from hermes_dist.train.record import LossSums
from hermes_dist.train.step import StepLoss
from tests.parallel.test_lamb import whole_partition

META = torch.device("meta")
TASKS = TaskTable.build(
    [
        ("a", "CT", "abdomen", [("liver", [1, 2]), ("tumour", [2])], None),
        ("b", "T1", "brain", [("stem", [1])], 9),
    ]
)
PATCH = (32, 32, 32)


def samples() -> list[Sample]:
    image, label = np.zeros(PATCH, np.float32), np.zeros(PATCH, np.uint8)
    return [Sample(i, i % 2, i, i, image, label) for i in range(3)]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"reading": "published"},
        {"backbone": "medformer", "base_channels": 32},
        {"method": "traditional"},
    ],
    ids=["hermes-r", "published", "hermes-m", "traditional"],
)
def test_forward_and_backward(model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Autocast, which the models switch off around norms, does not know this device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    config = resolve(validate({"model": {"base_channels": 8, **model}}))
    with META:
        module = build_model(config.model, TASKS)
    batch = Collator(TASKS, PATCH).collate(samples()).to(META)
    step = StepBatch(0, [batch], 4, 3, np.zeros(3, np.int64), np.arange(3))
    sums = LossSums.zeros(TASKS, META)
    loss = StepLoss(config.loss, step, sums, null_column=config.model.priors.padding == "attended")(module, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in module.parameters() if p.requires_grad)
    assert sums.packed().is_meta


def test_the_meta_device_would_notice() -> None:
    x = torch.ones(3, device=META)
    for wait in (x[0].item, x.tolist, lambda: x[x > 0], lambda: bool(x[0]), x.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


@pytest.mark.parametrize("max_ratio", [None, 2.0])
def test_lamb(max_ratio: float | None) -> None:
    params = {"w": torch.ones(4, 3, device=META, requires_grad=True), "b": torch.ones(3, device=META, requires_grad=True)}
    lamb = Lamb(list(params.values()), lr=0.1, weight_decay=0.1, decays=lambda name: name != "b", max_ratio=max_ratio)
    lamb.bind(whole_partition(params))
    for _ in range(2):
        for p in params.values():
            p.grad = torch.ones_like(p)
        lamb.step()
    assert lamb.ratios is not None
    assert lamb.ratios.is_meta
