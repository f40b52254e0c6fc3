"""The traditional paradigm: a bare backbone with one output channel per task, nothing conditions it.

Only the asked channels are computed, so that everything downstream is the same as with Hermes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hermes_dist.config import ModelConfig
from hermes_dist.errors import ConfigError
from hermes_dist.models import medformer
from hermes_dist.models.hermes import decoder_blocks
from hermes_dist.models.ids import check_columns
from hermes_dist.models.medformer import MedFormer
from hermes_dist.models.output import ModelOutput
from hermes_dist.models.plain_unet import PlainUNet
from hermes_dist.models.priors import dot_product
from hermes_dist.models.resunet import Fusion, ResUNet
from hermes_dist.tasks import TaskTable


class ChannelHead(nn.Module):
    """A 1x1x1 convolution with one output channel per task, of which the asked ones are computed."""

    def __init__(self, in_channels: int, n_tasks: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_channels)
        self.weight = nn.Parameter(torch.empty(n_tasks, in_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_tasks).uniform_(-bound, bound))

    def forward(self, features: Float[Tensor, "B C Z Y X"], task_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T Z Y X"]:
        """Channels `task_ids` of the convolution; padding columns hold those of task 0."""
        ids = task_ids.clamp(min=0)
        return dot_product(self.weight[ids], features) + self.bias[ids][..., None, None, None]


class Traditional(nn.Module):
    """A bare backbone and a channel head; modality ids are ignored."""

    def __init__(self, backbone: Any, n_tasks: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.n_tasks = n_tasks
        self.head = ChannelHead(backbone.out_channels, n_tasks)
        aux_channels = getattr(backbone, "aux_channels", 0)
        self.aux_head = ChannelHead(aux_channels, n_tasks) if aux_channels else None

    def forward(
        self, image: Float[Tensor, "B 1 Z Y X"], task_ids: Int[Tensor, "B T"], modality_ids: Int[Tensor, " B"]
    ) -> ModelOutput:
        """Logits of the asked tasks. Raises ModelError for ids out of range or sides too small for the stages."""
        columns = check_columns(task_ids, modality_ids, n_tasks=self.n_tasks, modality_range=None, device=image.device)
        features, aux_features, _ = self.backbone(image)
        aux = None
        if self.aux_head is not None:
            low = self.aux_head(aux_features, columns.task_ids)
            aux = functional.interpolate(low, size=image.shape[2:], mode="trilinear", align_corners=True)
        return ModelOutput(self.head(features, columns.task_ids), aux, None)


def build_traditional(config: ModelConfig, tasks: TaskTable) -> Traditional:
    """The configured backbone without priors. Raises ConfigError for an unknown backbone."""
    if config.backbone not in TRADITIONAL_BACKBONES:
        raise ConfigError(f"model.backbone = {config.backbone!r}: expected one of {', '.join(TRADITIONAL_BACKBONES)}")
    return Traditional(TRADITIONAL_BACKBONES[config.backbone](config), tasks.n_tasks)


def _resunet(config: ModelConfig) -> ResUNet:
    return ResUNet(config.base_channels, config.blocks, decoder_blocks(config.blocks), None)


def _medformer(config: ModelConfig) -> MedFormer:
    return MedFormer(config.base_channels, medformer.FUSION_DEPTH, fusion=Fusion({}, True, config.attention))


def _swinunetr(config: ModelConfig) -> nn.Module:
    from hermes_dist.models.swinunetr import SwinBackbone  # MONAI takes seconds to import, and only this backbone needs it.

    return SwinBackbone(config.base_channels)


TRADITIONAL_BACKBONES: dict[str, Callable[[ModelConfig], Any]] = {
    "resunet": _resunet,
    "medformer": _medformer,
    "nnunet": lambda config: PlainUNet(config.base_channels),
    "swinunetr": _swinunetr,
}
