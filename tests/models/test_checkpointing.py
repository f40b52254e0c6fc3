"""Recomputed activations: the same gradients to the last bit, for every mode and model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hermes_dist.config import ModelConfig
from hermes_dist.errors import ModelError
from hermes_dist.models import build_model
from hermes_dist.models.checkpointing import Mode, apply_activation_checkpointing
from hermes_dist.tasks import TaskTable

TASKS = TaskTable.build([("a", "CT", "", [("x", [1]), ("y", [2])], None)])


def gradients(backbone: str, method: str, mode: Mode, *, offload: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = {"base_channels": 8, "backbone": backbone, "method": method, "priors": {"padding": "masked"}}
    model = build_model(ModelConfig.model_validate(config), TASKS)
    apply_activation_checkpointing(model, mode, offload)
    image = torch.randn(1, 1, 16, 32, 16)
    output = model(image, torch.tensor([[0, 1, -1]]), torch.tensor([0]))
    loss = output.mask_logits[:, :2].square().mean()
    if output.modality_logits is not None:
        loss = loss + output.modality_logits.square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("backbone", "method"), [("resunet", "hermes"), ("medformer", "hermes"), ("nnunet", "traditional")])
def test_gradients_are_bitwise_the_same(backbone: str, method: str) -> None:
    expected = gradients(backbone, method, "none")
    modes: list[tuple[Mode, bool]] = [("selective", False), ("blocks", False), ("full", False), ("full", True)]
    for mode, offload in modes:
        found = gradients(backbone, method, mode, offload=offload)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), mode


def test_a_second_mode_is_refused() -> None:
    model = build_model(ModelConfig(base_channels=8), TASKS)
    apply_activation_checkpointing(model, "none")
    with pytest.raises(ModelError, match="applied already"):
        apply_activation_checkpointing(model, "full")


def test_offloading_needs_something_that_is_recomputed() -> None:
    with pytest.raises(ModelError, match="needs train.activation_checkpointing"):
        gradients("resunet", "hermes", "none", offload=True)
