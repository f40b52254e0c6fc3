"""Losses and gradient norm of a small Hermes, plain and with compiled blocks, as one JSON line. Run by test_compilation.py.

In a process of its own: the tests' runtime type checks of shapes cannot be compiled.
"""

from __future__ import annotations

import json
import sys

import torch

from hermes_dist.config import ModelConfig, PriorsConfig
from hermes_dist.models import build_model
from hermes_dist.models.checkpointing import Mode, apply_activation_checkpointing
from hermes_dist.models.compilation import compile_blocks
from hermes_dist.tasks import TaskTable

TASKS = TaskTable.build([("a", "CT", "", [(f"c{i}", [i + 1]) for i in range(4)], None)])


def run(mode: Mode, *, compiled: bool) -> list[float]:
    """Squared logits for one and two tasks (so that the number of tokens varies), then the norm of all gradients."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(base_channels=8, blocks=(1, 1, 1, 1), priors=PriorsConfig(scales=("enc16",))), TASKS)
    apply_activation_checkpointing(model, mode)
    if compiled:
        assert compile_blocks(model) > 0
    image = torch.randn(1, 1, 32, 16, 16, generator=torch.Generator().manual_seed(1))
    values: list[float] = []
    for n in (1, 2):
        loss = model(image, torch.arange(n)[None], torch.tensor([0])).mask_logits.square().mean()
        loss.backward()
        values.append(loss.item())
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return [*values, norm.item()]


if __name__ == "__main__":
    json.dump([run("none", compiled=False), run("none", compiled=True), run("full", compiled=True)], sys.stdout)
