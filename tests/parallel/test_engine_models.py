"""The engine around Hermes itself: every ZeRO stage with every way of recomputing activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hermes_dist.config import ModelConfig
from hermes_dist.models import build_model
from hermes_dist.models.checkpointing import Mode, apply_activation_checkpointing
from hermes_dist.models.output import ModelOutput
from hermes_dist.parallel.engine import Engine
from hermes_dist.parallel.runtime import Runtime
from hermes_dist.tasks import TaskTable
from tests.parallel.conftest import make_config

TASKS = TaskTable.build([("a", "CT", "", [("x", [1]), ("y", [2])], None), ("b", "T1", "", [("z", [1])], None)])
MODES: tuple[Mode, ...] = ("none", "selective", "blocks", "full")


def losses(runtime: Runtime, stage: int, mode: Mode) -> list[float]:
    torch.manual_seed(0)
    model = build_model(ModelConfig(base_channels=8, blocks=(1, 1, 1, 1)), TASKS)
    apply_activation_checkpointing(model, mode)
    engine = Engine(model, make_config(stage, train={"global_batch": 2, "micro_batch": 1}), runtime)
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(1, 1, 32, 16, 16, generator=generator) for _ in range(2)]
    seen: list[float] = []

    def loss_fn(module: nn.Module, image: Tensor) -> Tensor:
        output: ModelOutput = module(image, torch.tensor([[0, 1, -1]]), torch.tensor([0]))
        loss = (output.mask_logits[:, :2] - image).square().mean()
        seen.append(float(loss.detach()))
        return loss / 2

    for _ in range(2):
        assert not engine.step(images, loss_fn, lr=1e-3).skipped
    return seen


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_recomputing_activations_changes_no_loss(stage: int, runtime: Runtime) -> None:
    expected = losses(runtime, stage, "none")
    assert len(set(expected)) == 4
    for mode in MODES[1:]:
        assert losses(runtime, stage, mode) == expected, mode
