"""SwinUNETR as published in MONAI, as a traditional backbone: its final 1x1x1 convolution is left to the channel head.

Feature size is 1.5 times `base_channels` rounded to 12 (base 32 gives the papers' 48, base 16 gives MONAI's default 24).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from monai.networks.nets.swin_unetr import BasicLayer, SwinUNETR
from torch import Tensor, nn

from hermes_dist.errors import ModelError
from hermes_dist.models.resunet import BackboneOutput


class SwinBackbone(nn.Module):
    """Sides are multiples of 32."""

    def __init__(self, base_channels: int) -> None:
        super().__init__()
        self.out_channels = max(12, 12 * (base_channels * 3 // 24))
        self.net = SwinUNETR(in_channels=1, out_channels=1, feature_size=self.out_channels)
        self.net.out = nn.Identity()  # type: ignore[assignment]

    def forward(self, image: Float[Tensor, "B 1 Z Y X"]) -> BackboneOutput:
        """Features at full resolution; there are no priors. Raises ModelError for sides that are not multiples of 32."""
        sides = tuple(image.shape[2:])
        if any(s % 32 for s in sides) or all(s < 64 for s in sides):
            raise ModelError(f"image sides {sides} (Z Y X): swinunetr expects multiples of 32, at least one of them >= 64")
        return BackboneOutput(self.net(image), None, {})

    def segments(self) -> dict[str, Sequence[nn.Module]]:
        """Modules that each checkpointing mode recomputes as a whole: Swin stages, and in `full` all convolution stages."""
        layers = [m for m in self.net.modules() if isinstance(m, BasicLayer)]
        convolutions = [m for name, m in self.net.named_children() if name.startswith(("encoder", "decoder"))]
        return {"selective": layers, "blocks": layers, "full": [*layers, *convolutions]}
