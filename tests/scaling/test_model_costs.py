"""The formulas against the real model: parameters exactly, FLOPs within 1 %, kept activations within 15 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hermes_dist.config import Config, ModelConfig, resolve, validate
from hermes_dist.errors import ConfigError
from hermes_dist.models import build_model
from hermes_dist.models.checkpointing import apply_activation_checkpointing
from hermes_dist.models.output import ModelOutput
from hermes_dist.scaling.cost_layers import Request
from hermes_dist.scaling.counted import counted_flops, extrapolated_flops
from hermes_dist.scaling.memory import kept_activation_elements
from hermes_dist.scaling.model_costs import (
    backbone_parameters,
    forward_flops,
    layers,
    parameter_count,
    recomputed_flops,
    training_flops,
)
from hermes_dist.tasks import TaskTable

TASKS = TaskTable.build(
    [
        ("a", "CT", "abdomen", [(f"c{i}", [i + 1]) for i in range(15)], None),
        ("b", "T1", "brain", [(f"c{i}", [i + 1]) for i in range(3)], None),
    ]
)
VARIANTS: dict[str, dict[str, Any]] = {
    "narrow": {"base_channels": 8, "blocks": [1, 1, 1, 1]},
    "base": {"base_channels": 32},
    "large": {"base_channels": 48, "blocks": [4, 4, 4, 4]},
    "published": {"base_channels": 8, "reading": "published"},
    "one scale": {"base_channels": 8, "priors": {"scales": ["enc16"]}},
    "unidirectional": {"base_channels": 8, "priors": {"direction": "unidirectional"}},
    "no modality": {"base_channels": 8, "priors": {"modality": False}},
    "traditional": {"base_channels": 8, "method": "traditional"},
    "M": {"backbone": "medformer", "base_channels": 8},
    "M published": {"backbone": "medformer", "base_channels": 8, "reading": "published"},
    "M large": {"backbone": "medformer", "base_channels": 48},
    "M one scale": {"backbone": "medformer", "base_channels": 8, "priors": {"scales": ["enc16"], "modality": False}},
    "M unidirectional": {"backbone": "medformer", "base_channels": 8, "priors": {"direction": "unidirectional"}},
    "M traditional": {"backbone": "medformer", "base_channels": 8, "method": "traditional"},
}
M_VARIANTS = ("M published", "M unidirectional", "M traditional")


def model_config(**model: Any) -> ModelConfig:
    return resolve(validate({"model": {"attention": "reference", **model}})).model


def request(patch: tuple[int, int, int] = (32, 32, 32), columns: int = 15) -> Request:
    return Request(patch, columns, TASKS.n_tasks, len(TASKS.modalities))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_equal_those_of_the_real_model(name: str) -> None:
    config = model_config(**VARIANTS[name])
    with torch.device("meta"):
        model = build_model(config, TASKS)
    assert parameter_count(config, request()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("base", "blocks", "millions"), [(16, (2, 2, 2, 2), 10.140336), (32, (2, 2, 2, 2), 40.56048), (48, (4, 4, 4, 4), 157.9)]
)
def test_sizes_of_the_paper(base: int, blocks: tuple[int, int, int, int], millions: float) -> None:
    assert backbone_parameters(ModelConfig(base_channels=base, blocks=blocks)) / 1e6 == pytest.approx(millions, rel=5e-4)


@pytest.mark.parametrize("name", ["published", "one scale", "unidirectional", "no modality", "traditional", *M_VARIANTS])
def test_flops_agree_with_the_counter_within_one_per_cent(name: str) -> None:
    config = model_config(**VARIANTS[name])
    model = build_model(config, TASKS)
    asked = request()
    assert forward_flops(config, asked) == pytest.approx(counted_flops(model, asked.patch_vox_zyx, 15, training=False), rel=0.01)
    assert training_flops(config, asked) == pytest.approx(counted_flops(model, asked.patch_vox_zyx, 15), rel=0.01)


def test_a_grouped_convolution_costs_a_group_forward_and_backward() -> None:
    """torch's own counter takes the weight gradient of a depthwise convolution for that of a dense one."""

    class Depthwise(torch.nn.Conv3d):
        def forward(self, image: torch.Tensor, *_: torch.Tensor) -> ModelOutput:
            return ModelOutput(super().forward(image.expand(-1, 16, -1, -1, -1).contiguous().requires_grad_()), None, None)

    model = Depthwise(16, 16, 3, padding=1, groups=16, bias=False)
    forward = 2 * 27 * 16 * 8**3
    assert counted_flops(model, (8, 8, 8), 1, training=False) == forward
    assert counted_flops(model, (8, 8, 8), 1) == 3 * forward


def test_two_small_counts_give_the_large_patch() -> None:
    config = model_config(**VARIANTS["narrow"])
    model = build_model(config, TASKS)
    assert extrapolated_flops(model, (128, 128, 128), 15) == pytest.approx(
        training_flops(config, request((128, 128, 128))), rel=0.01
    )


def saved_elements(config: ModelConfig, mode: Any, patch: tuple[int, int, int]) -> int:
    """float32 elements that autograd holds after a forward pass, each storage once, parameters left out."""
    model = build_model(config, TASKS)
    apply_activation_checkpointing(model, mode)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    image = torch.randn(1, 1, *patch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(image, torch.arange(15)[None], torch.zeros(1, dtype=torch.int64))
    assert output.mask_logits.requires_grad
    return sum(storage.nbytes() for storage in storages.values()) // 4


@pytest.mark.parametrize("mode", ["none", "selective", "blocks", "full"])
@pytest.mark.parametrize("name", ["narrow", "published", "traditional", "M published"])
def test_kept_activations_agree_with_autograd(name: str, mode: str) -> None:
    config = model_config(**{**VARIANTS[name], "attention": "fused"})
    patch = (32, 32, 64)
    measured = saved_elements(config, mode, patch)
    assert kept_activation_elements(config, request(patch), mode) == pytest.approx(measured, rel=0.15)


def test_recomputation_is_ordered() -> None:
    config = model_config(base_channels=16)
    costs = [recomputed_flops(config, request(), mode) for mode in ("none", "selective", "blocks", "full")]
    assert costs[0] == 0 < costs[1] < costs[2] == costs[3] < forward_flops(config, request())


def test_other_backbones_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="scaling.counted"):
        layers(ModelConfig(backbone="swinunetr", method="traditional"), request())


def test_flops_of_the_published_base_at_its_patch() -> None:
    """A plain figure to compare with: forward and backward of one 128³ patch, 15 tasks."""
    config = resolve(Config()).model
    assert training_flops(config, request((128, 128, 128))) / 1e12 == pytest.approx(8.03, rel=0.01)
