"""Context priors and the heads that turn their posteriors into classifiers (facts 1.3, 1.5, 1.8).

The published code keeps its null token as the last row of the task table, so it moves when tasks are added. Here it is a
tensor of its own, and exists only where padding is attended to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

from hermes_dist.models.convolution import compute_dtype
from hermes_dist.models.ids import Columns

PLACES: tuple[str, ...] = ("enc4", "enc8", "enc16", "dec8", "dec4")
"""All fusion places, in the order in which posteriors are concatenated."""


class PriorPool(nn.Module):
    """Task and modality tokens of one fusion place."""

    def __init__(
        self, channels: int, *, n_tasks: int, n_modalities: int, length: int, null: bool, init_scale: float = 1.0
    ) -> None:
        """`n_modalities` = 0: no modality prior. `null`: one learned token for padding columns. `init_scale`: of task tokens."""
        super().__init__()
        self.init_scale = init_scale
        self.task = nn.Parameter(torch.empty(n_tasks, channels))
        self.null = nn.Parameter(torch.empty(1, channels)) if null else None
        self.modality = nn.Parameter(torch.empty(n_modalities, length, channels)) if n_modalities else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform, task tokens times `init_scale`; the fans count the null row as published, present or not."""
        n_tasks, channels = self.task.shape
        bound = self.init_scale * math.sqrt(6 / (n_tasks + 1 + channels))
        nn.init.uniform_(self.task, -bound, bound)
        if self.null is not None:
            nn.init.uniform_(self.null, -bound, bound)
        if self.modality is not None:
            nn.init.xavier_uniform_(self.modality)

    def forward(self, columns: Columns) -> Float[Tensor, "B K C"]:
        """T task tokens (zero or null in padding columns), then the tokens of each sample's modality (id -1: the last)."""
        ids = columns.task_ids
        if self.null is None:
            tokens = self.task[ids.clamp(min=0)]
            if columns.real is not None:
                tokens = tokens * columns.real[..., None]
        else:
            tokens = torch.cat([self.task, self.null])[torch.where(ids < 0, self.task.shape[0], ids)]
        if self.modality is None:
            return tokens
        return torch.cat([tokens, self.modality[columns.modality_ids]], dim=1)


class PrototypeHead(nn.Module):
    """Posterior of a task at all fusion places -> its classifier on the features of a map."""

    def __init__(self, posterior_channels: int, feature_channels: int) -> None:
        super().__init__()
        p, c = posterior_channels, feature_channels
        self.norm = nn.LayerNorm(p)
        self.fc1, self.fc2, self.fc3, self.fc4 = nn.Linear(p, p), nn.Linear(p, c), nn.Linear(c, c), nn.Linear(c, c)
        for linear in (self.fc1, self.fc2, self.fc3, self.fc4):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, posteriors: Float[Tensor, "B T P"], features: Float[Tensor, "B C Z Y X"]) -> Float[Tensor, "B T Z Y X"]:
        """Dot products of prototypes and features: no bias, scale or temperature."""
        x = self.fc2(functional.gelu(self.fc1(self.norm(posteriors))))
        return dot_product(self.fc4(functional.gelu(self.fc3(x))), features)


class _DotProduct(Function):
    """prototypes @ rowsᵀ; the gradient of the rows is made as rows, so that a channels-last map gets a channels-last gradient."""

    @staticmethod
    def forward(ctx: Any, prototypes: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(prototypes, rows)
        return torch.bmm(prototypes, rows.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        prototypes, rows = ctx.saved_tensors
        want_prototypes, want_rows = ctx.needs_input_grad
        with torch.autocast(g.device.type, enabled=False):
            g_prototypes = torch.bmm(g, rows) if want_prototypes else None
            return g_prototypes, torch.bmm(g.transpose(1, 2), prototypes) if want_rows else None


def dot_product(prototypes: Float[Tensor, "B T C"], features: Float[Tensor, "B C Z Y X"]) -> Float[Tensor, "B T Z Y X"]:
    """Logits of every prototype at every voxel; reads channels-last features without a copy."""
    dtype = compute_dtype(features)
    rows = features.permute(0, 2, 3, 4, 1).flatten(1, 3).to(dtype)
    with torch.autocast(features.device.type, enabled=False):
        return _DotProduct.apply(prototypes.to(dtype), rows).unflatten(2, features.shape[2:])


class ModalityHead(nn.Module):
    """Posterior of the modality tokens -> logits over the modalities."""

    def __init__(self, posterior_channels: int, n_modalities: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(posterior_channels)
        self.fc1 = nn.Linear(posterior_channels, posterior_channels)
        self.fc2 = nn.Linear(posterior_channels, n_modalities)

    def forward(self, posteriors: Float[Tensor, "B l P"]) -> Float[Tensor, "B M"]:
        """LayerNorm, mean over the tokens, two-layer GELU MLP."""
        return self.fc2(functional.gelu(self.fc1(self.norm(posteriors).mean(dim=1))))


def join_posteriors(posteriors: Mapping[str, Float[Tensor, "B K _"]]) -> Float[Tensor, "B K P"]:
    """Concatenate the posteriors of the places that exist, in the fixed order."""
    return torch.cat([posteriors[place] for place in PLACES if place in posteriors], dim=-1)
