"""The plain nnU-Net backbone (comparison methods 2.8): two convolutions per stage, strided down, transposed up.

Features 1, 2, 4, 8, 10 times the base width (10 = the cap of 320 at base 32), affine InstanceNorm (eps 1e-5), LeakyReLU 0.01,
He initialisation. nnU-Net's deep supervision is left out: all backbones here train with the same loss at full resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hermes_dist.errors import ModelError
from hermes_dist.models.resunet import WIDTHS, BackboneOutput

SLOPE = 0.01


class ConvStage(nn.Module):
    """Two units of convolution, InstanceNorm and LeakyReLU; the first one may have a stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        units: list[nn.Module] = []
        for i, s in ((in_channels, stride), (out_channels, 1)):
            conv = nn.Conv3d(i, out_channels, 3, stride=s, padding=1)
            nn.init.kaiming_normal_(conv.weight, a=SLOPE)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            units += [conv, nn.InstanceNorm3d(out_channels, eps=1e-5, affine=True), nn.LeakyReLU(SLOPE, inplace=True)]
        self.units = nn.Sequential(*units)

    def forward(self, x: Float[Tensor, "B I Z Y X"]) -> Float[Tensor, "B O z y x"]:
        """Features."""
        return self.units(x)


class PlainUNet(nn.Module):
    """Five resolutions; sides are multiples of 16."""

    def __init__(self, base_channels: int) -> None:
        super().__init__()
        widths = [base_channels * w for w in WIDTHS]
        self.out_channels = widths[0]
        self.down = nn.ModuleList(ConvStage(i, o, stride=1 if n == 0 else 2) for n, (i, o) in enumerate(pairwise([1, *widths])))
        ups = list(pairwise(reversed(widths)))
        self.transposed = nn.ModuleList(nn.ConvTranspose3d(i, o, 2, stride=2, bias=False) for i, o in ups)
        self.up = nn.ModuleList(ConvStage(2 * o, o) for _, o in ups)

    def forward(self, image: Float[Tensor, "B 1 Z Y X"]) -> BackboneOutput:
        """Features at full resolution; there are no priors. Raises ModelError for sides that do not halve four times."""
        sides = tuple(image.shape[2:])
        if any(s % 16 for s in sides) or all(s < 32 for s in sides):
            raise ModelError(f"image sides {sides} (Z Y X): nnunet expects multiples of 16, at least one of them >= 32")
        x, skips = image, list[Tensor]()
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for transposed, stage in zip(self.transposed, self.up, strict=True):
            x = stage(torch.cat([skips.pop(), transposed(x)], dim=1))
        return BackboneOutput(x, None, {})

    def segments(self) -> dict[str, Sequence[nn.Module]]:
        """Modules that each checkpointing mode recomputes as a whole; all modes are the same here."""
        stages = [*self.down, *self.up]
        return {"selective": stages, "blocks": stages, "full": stages}
