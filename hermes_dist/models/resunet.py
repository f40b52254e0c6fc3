"""The ResUNet backbone (facts 1.2), bare or with prior fusion after its stages.

Four pooled encoder stages of 2, 4, 8 and 10 times the base width, four decoder stages, residual blocks throughout, no
parameters in norms, no convolution bias, no final norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from hermes_dist.errors import ModelError
from hermes_dist.models.attention import AttentionKind, FusionBlock, FusionLayer
from hermes_dist.models.convolution import Conv3d, channels_last
from hermes_dist.models.residual import residual_block

WIDTHS = (1, 2, 4, 8, 10)
"""Channels of the stem and the four encoder stages, in units of the base width."""
ENCODER_PLACES: tuple[str | None, ...] = (None, "enc4", "enc8", "enc16")
DECODER_PLACES: tuple[str | None, ...] = ("dec8", "dec4", None, None)
FUSION_DEPTH: dict[str, int] = {"enc4": 2, "enc8": 2, "enc16": 4, "dec8": 2, "dec4": 2}
"""Published number of fusion blocks per place."""


NO_TOKENS: Mapping[str, Tensor] = MappingProxyType({})
"""No fusion: the bare backbone."""


class Fusion(NamedTuple):
    """How priors are fused into a backbone."""

    depth: Mapping[str, int]
    """Places and the number of fusion blocks there."""
    bidirectional: bool
    kind: AttentionKind


class BackboneOutput(NamedTuple):
    """What a backbone hands to the heads."""

    features: Float[Tensor, "B C Z Y X"]
    """At full resolution."""
    aux_features: Float[Tensor, "B C z y x"] | None
    """At 4x, for an auxiliary head (MedFormer)."""
    posteriors: dict[str, Tensor]
    """Tokens (B, K, C of the place) after each place's fusion."""


def conv_weight(out_channels: int, in_channels: int, kernel: int = 3) -> nn.Parameter:
    """A convolution kernel with torch's default initialisation (uniform, bound 1/sqrt(fan in))."""
    weight = torch.empty(out_channels, in_channels, kernel, kernel, kernel)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return nn.Parameter(weight)


class ResidualBlock(nn.Module):
    """Two norm-ReLU-conv units and a shortcut; owns its kernels, so that ZeRO-3 gathers them where they are used."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.recompute = False
        self.conv1 = conv_weight(out_channels, in_channels)
        self.conv2 = conv_weight(out_channels, out_channels)
        self.shortcut = conv_weight(out_channels, in_channels) if in_channels != out_channels else None

    def forward(self, *parts: Float[Tensor, "B _ _ _ _"]) -> Float[Tensor, "B O Z Y X"]:
        """`parts` are concatenated along channels; all but the first are upsampled to the first one's grid."""
        return residual_block(parts, self.conv1, self.conv2, shortcut=self.shortcut, recompute=self.recompute)


class Stage(nn.Module):
    """Residual blocks one after the other; the first one changes the width."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, *, pool: bool = False) -> None:
        super().__init__()
        self.pool = pool
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nn.ModuleList(ResidualBlock(i, o) for i, o in pairwise(widths))

    def forward(self, *parts: Float[Tensor, "B _ _ _ _"]) -> Float[Tensor, "B O Z Y X"]:
        """Max-pool by 2 if this is an encoder stage; then the blocks, the first one over the parts."""
        first, *rest = self.blocks
        x = first(functional.max_pool3d(parts[0], 2)) if self.pool else first(*parts)
        for block in rest:
            x = block(x)
        return x


class Stem(nn.Module):
    """A plain convolution of the one-channel image, then one residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3d(1, channels, 3)
        self.block = ResidualBlock(channels, channels)

    def forward(self, image: Float[Tensor, "B 1 Z Y X"]) -> Float[Tensor, "B C Z Y X"]:
        """Full-resolution features."""
        return self.block(channels_last(self.conv(image)))


class ResUNet(nn.Module):
    """Backbone of Hermes-R and of the traditional ResUNet."""

    def __init__(
        self, base_channels: int, encoder_blocks: Sequence[int], decoder_blocks: Sequence[int], fusion: Fusion | None
    ) -> None:
        """Block counts are ordered by position: encoder at 2x, 4x, 8x, 16x; decoder at 8x, 4x, 2x, 1x."""
        super().__init__()
        c = [base_channels * w for w in WIDTHS]
        self.out_channels = c[0]
        self.stem = Stem(c[0])
        self.down = nn.ModuleList(Stage(c[i], c[i + 1], encoder_blocks[i], pool=True) for i in range(4))
        self.up = nn.ModuleList(Stage(c[3 - i] + c[4 - i], c[3 - i], decoder_blocks[i]) for i in range(4))
        self.place_channels: dict[str, int] = {
            "enc4": c[2], "enc8": c[3], "enc16": c[4], "dec8": c[3], "dec4": c[2]
        }  # fmt: skip
        depth = {} if fusion is None else fusion.depth
        self.fusion = nn.ModuleDict(
            {
                place: FusionLayer(self.place_channels[place], n, bidirectional=fusion.bidirectional, kind=fusion.kind)
                for place, n in depth.items()
                if fusion is not None
            }
        )

    def forward(
        self,
        image: Float[Tensor, "B 1 Z Y X"],
        tokens: Mapping[str, Float[Tensor, "B K _"]] = NO_TOKENS,
        keep: Bool[Tensor, "B K"] | None = None,
    ) -> BackboneOutput:
        """Features at full resolution, and the posterior of every place in `tokens`. Raises ModelError for too small sides."""
        check_sides(image)
        posteriors: dict[str, Tensor] = {}

        def fuse(place: str | None, x: Tensor) -> Tensor:
            if place is None or place not in self.fusion:
                return x
            x, posteriors[place] = self.fusion[place](x, tokens[place], keep)
            return x

        x = self.stem(image)
        skips: list[Tensor] = []
        for stage, place in zip(self.down, ENCODER_PLACES, strict=True):
            skips.append(x)
            x = fuse(place, stage(x))
        for stage, place in zip(self.up, DECODER_PLACES, strict=True):
            x = fuse(place, stage(skips.pop(), x))
        return BackboneOutput(x, None, posteriors)

    def segments(self) -> dict[str, Sequence[nn.Module]]:
        """Modules that each checkpointing mode recomputes as a whole."""
        stages = [self.stem, *self.down, *self.up]
        fusion_blocks = [m for m in self.modules() if isinstance(m, FusionBlock)]
        residual_blocks = [m for m in self.modules() if isinstance(m, ResidualBlock)]
        return {
            "selective": fusion_blocks,
            "blocks": fusion_blocks + residual_blocks,
            "full": [*stages, *self.fusion.values()],
        }


def check_sides(image: Float[Tensor, "B 1 Z Y X"]) -> None:
    """The 16x map needs more than one voxel, or its instance norm is undefined. Raises ModelError."""
    sides = tuple(image.shape[2:])
    voxels = math.prod(s // 16 for s in sides)
    if voxels <= 1:
        raise ModelError(
            f"image sides {sides} (Z Y X) leave {voxels} voxels at 16x; expected every side >= 16 and at least one >= 32"
        )
