"""The MedFormer backbone of Hermes-M (facts 1.6): semantic map tokens and features read each other, priors join the map tokens.

Both directions of the bidirectional attention share one similarity S. Here each direction is an attention of its own with the
roles of queries and keys exchanged, so S (voxels x tokens) is computed twice inside the kernels and stored never.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from hermes_dist.errors import ModelError
from hermes_dist.models.attention import HEAD_WIDTH, AttentionKind, FeedForward, attend
from hermes_dist.models.convolution import Conv3d, channels_last
from hermes_dist.models.instance_norm import instance_norm
from hermes_dist.models.resunet import NO_TOKENS, WIDTHS, BackboneOutput, Fusion, ResidualBlock, Stage, Stem

MAP_TOKENS = 64
FUSION_DEPTH: dict[str, int] = {"enc4": 2, "enc8": 4, "enc16": 8, "dec8": 4, "dec4": 2}
"""Published number of transformer blocks per place."""
CONV_BLOCKS = (2, 2, 2)
"""Residual blocks after the first patch merging, and in the decoder at 2x and 1x."""


def n_heads(channels: int) -> int:
    """Heads about 32 channels wide: the most that divide the channels."""
    return next(h for h in range(max(1, channels // HEAD_WIDTH), 0, -1) if channels % h == 0)


def upsample(x: Float[Tensor, "B C z y x"], like: Float[Tensor, "B _ Z Y X"]) -> Float[Tensor, "B C Z Y X"]:
    """Trilinear with aligned corners, in the input's type."""
    return channels_last(functional.interpolate(x, size=like.shape[2:], mode="trilinear", align_corners=True))


class DepthwiseSeparable(nn.Module):
    """Depthwise 3x3x3, then pointwise convolution, both without bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "B I Z Y X"]) -> Float[Tensor, "B O Z Y X"]:
        """Same grid."""
        return self.pointwise(self.depthwise(x))


class PatchMerging(nn.Module):
    """The 2x2x2 neighbours become channels (x offset innermost), are normed and projected."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduction = DepthwiseSeparable(8 * in_channels, out_channels)

    def forward(self, x: Float[Tensor, "B I Z Y X"]) -> Float[Tensor, "B O z y x"]:
        """Half the grid."""
        batch, channels, depth, height, width = x.shape
        parts = x.reshape(batch, channels, depth // 2, 2, height // 2, 2, width // 2, 2)
        gathered = parts.permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)
        return self.reduction(instance_norm(channels_last(gathered), eps=1e-5))


class MapGeneration(nn.Module):
    """Semantic map: for each token, a softmax-weighted mean of projected features over all voxels."""

    def __init__(self, channels: int, n_tokens: int) -> None:
        super().__init__()
        self.base_proj = Conv3d(channels, channels, 3)
        self.semantic_proj = Conv3d(channels, n_tokens, 3)

    def forward(self, x: Float[Tensor, "B C Z Y X"]) -> Float[Tensor, "B K C"]:
        """Map tokens."""
        weights = self.semantic_proj(x).flatten(2).softmax(dim=-1)
        return weights @ self.base_proj(x).flatten(2).transpose(1, 2)


class BidirectionalAttention(nn.Module):
    """Features and tokens read each other at once, by one similarity; head-minor channel split (width outer, heads inner)."""

    def __init__(self, in_channels: int, channels: int, *, project_tokens: bool, fusion: Fusion) -> None:
        super().__init__()
        self.heads, self.bidirectional = n_heads(channels), fusion.bidirectional
        self.kind: AttentionKind = fusion.kind
        self.feat_qv = DepthwiseSeparable(in_channels, 2 * channels)
        self.feat_out = DepthwiseSeparable(channels, channels)
        self.map_qv = nn.Linear(channels, 2 * channels, bias=False)
        self.map_out = nn.Linear(channels, channels, bias=False) if project_tokens else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B I Z Y X"],
        tokens: Float[Tensor, "B K C"],
        keep: Bool[Tensor, "B K"] | None,
        n_map: int,
    ) -> tuple[Float[Tensor, "B C Z Y X"], Float[Tensor, "B K C"]]:
        """Updates of features and tokens. Unidirectional priors (all tokens after the first `n_map`) are not read."""
        feat_q, feat_v = (self._split(t.flatten(2).transpose(1, 2)) for t in self.feat_qv(x).chunk(2, dim=1))
        map_q, map_v = (self._split(t) for t in self.map_qv(tokens).chunk(2, dim=-1))
        scale = feat_q.shape[-1] ** -0.5
        token_update = attend(map_q, feat_q, feat_v, scale=scale, keep=None, kind=self.kind)
        if not self.bidirectional:
            map_q, map_v, keep = map_q[:, :, :n_map], map_v[:, :, :n_map], None
        feat_update = attend(feat_q, map_q, map_v, scale=scale, keep=keep, kind=self.kind)
        feat_rows = self._join(feat_update).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.feat_out(channels_last(feat_rows)), self.map_out(self._join(token_update))

    def _split(self, rows: Float[Tensor, "B N C"]) -> Float[Tensor, "B H N d"]:
        return rows.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)

    def _join(self, heads: Float[Tensor, "B H N d"]) -> Float[Tensor, "B N C"]:
        return heads.permute(0, 2, 3, 1).flatten(2)


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze and excitation; norms have eps 1e-4."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        wide = expansion * channels
        self.expand_proj = Conv3d(channels, wide, 1)
        self.depthwise = nn.Conv3d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.squeeze = nn.Linear(wide, wide // 4)
        self.excite = nn.Linear(wide // 4, wide)
        self.pointwise = Conv3d(wide, channels, 1)

    def forward(self, x: Float[Tensor, "B C Z Y X"]) -> Float[Tensor, "B C Z Y X"]:
        """The update, without the residual."""
        y = self.expand_proj(instance_norm(x, eps=1e-4, relu=True))
        y = self.depthwise(instance_norm(y, eps=1e-4, relu=True))
        gate = self.excite(functional.relu(self.squeeze(y.mean(dim=(2, 3, 4))))).sigmoid()
        return self.pointwise(instance_norm(y * gate[..., None, None, None], eps=1e-4))


class TransformerBlock(nn.Module):
    """Bidirectional attention with residuals on the un-normalised inputs, then MBConv on the features."""

    def __init__(self, in_channels: int, channels: int, *, project_tokens: bool, fusion: Fusion) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(channels)
        self.attention = BidirectionalAttention(in_channels, channels, project_tokens=project_tokens, fusion=fusion)
        self.shortcut = Conv3d(in_channels, channels, 1) if in_channels != channels else None
        self.feedforward = MBConv(channels)

    def forward(
        self,
        x: Float[Tensor, "B I Z Y X"],
        tokens: Float[Tensor, "B K C"],
        keep: Bool[Tensor, "B K"] | None,
        n_map: int,
    ) -> tuple[Float[Tensor, "B C Z Y X"], Float[Tensor, "B K C"]]:
        """Updated features and tokens."""
        update, token_update = self.attention(instance_norm(x, eps=1e-5), self.norm_tokens(tokens), keep, n_map)
        x = (x if self.shortcut is None else self.shortcut(instance_norm(x, eps=1e-4, relu=True))) + update
        return x + self.feedforward(x), tokens + token_update


class FusedStage(nn.Module):
    """Transformer blocks over one map, its map tokens and the priors of its place."""

    def __init__(self, widths: tuple[int, int], depth: int, *, fusion: Fusion, last_identity: bool = False) -> None:
        super().__init__()
        in_channels, channels = widths
        self.blocks = nn.ModuleList(
            TransformerBlock(
                in_channels if i == 0 else channels,
                channels,
                project_tokens=not (last_identity and i == depth - 1),
                fusion=fusion,
            )
            for i in range(depth)
        )

    def forward(
        self,
        x: Float[Tensor, "B I Z Y X"],
        map_tokens: Float[Tensor, "B S C"],
        priors: Float[Tensor, "B K C"] | None,
        keep: Bool[Tensor, "B K"] | None,
    ) -> tuple[Float[Tensor, "B C Z Y X"], Float[Tensor, "B S C"], Float[Tensor, "B _ C"]]:
        """Updated features, map tokens and priors (no rows if there are none)."""
        n_map = map_tokens.shape[1]
        tokens = map_tokens if priors is None else torch.cat([map_tokens, priors], dim=1)
        all_keep = None if keep is None or priors is None else functional.pad(keep, (n_map, 0), value=True)
        for block in self.blocks:
            x, tokens = block(x, tokens, all_keep, n_map)
        return x, tokens[:, :n_map], tokens[:, n_map:]


class MapAttention(nn.Module):
    """Pre-norm self-attention over the map tokens of all scales; head-major, one qkv projection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = n_heads(channels)
        self.norm = nn.LayerNorm(channels, eps=1e-4)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """The update, without the residual."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        out = attend(q, k, v, scale=q.shape[-1] ** -0.5, keep=None, kind="fused")
        return self.to_out(out.transpose(1, 2).flatten(2))


class MapFusion(nn.Module):
    """The encoder's map tokens of three scales read one another in two transformer layers."""

    def __init__(self, widths: Sequence[int], depth: int = 2) -> None:
        super().__init__()
        width = widths[-1]
        self.in_proj = nn.ModuleList(nn.Linear(c, width, bias=False) for c in widths)
        self.out_proj = nn.ModuleList(nn.Linear(width, c, bias=False) for c in widths)
        self.attentions = nn.ModuleList(MapAttention(width) for _ in range(depth))
        self.mlps = nn.ModuleList(FeedForward(width, width) for _ in range(depth))

    def forward(self, maps: Sequence[Float[Tensor, "B S _"]]) -> list[Float[Tensor, "B S _"]]:
        """One fused map per scale."""
        x = torch.cat([project(m) for project, m in zip(self.in_proj, maps, strict=True)], dim=1)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return [project(m) for project, m in zip(self.out_proj, x.chunk(len(maps), dim=1), strict=True)]


class MedFormer(nn.Module):
    """Backbone of Hermes-M and of the traditional MedFormer."""

    def __init__(
        self,
        base_channels: int,
        depth: Mapping[str, int],
        *,
        fusion: Fusion,
        conv_blocks: Sequence[int] = CONV_BLOCKS,
        map_tokens: int = MAP_TOKENS,
        fusion_layers: int = 2,
    ) -> None:
        """`depth`: transformer blocks per place; `conv_blocks`: see CONV_BLOCKS; `fusion` says how tokens are read."""
        super().__init__()
        c = [base_channels * w for w in WIDTHS]
        self.out_channels, self.aux_channels = c[0], c[2]
        self.place_channels = {"enc4": c[2], "enc8": c[3], "enc16": c[4], "dec8": c[3], "dec4": c[2]}
        self.stem = Stem(c[0])
        self.merge = nn.ModuleList(PatchMerging(c[i], c[i + 1]) for i in range(4))
        self.down1 = Stage(c[1], c[1], conv_blocks[0])
        self.maps = nn.ModuleList(MapGeneration(width, map_tokens) for width in c[2:])
        self.fusion = nn.ModuleDict(
            {
                "enc4": FusedStage((c[2], c[2]), depth["enc4"], fusion=fusion),
                "enc8": FusedStage((c[3], c[3]), depth["enc8"], fusion=fusion),
                "enc16": FusedStage((c[4], c[4]), depth["enc16"], fusion=fusion),
                "dec8": FusedStage((c[4] + c[3], c[3]), depth["dec8"], fusion=fusion),
                "dec4": FusedStage((c[3] + c[2], c[2]), depth["dec4"], fusion=fusion, last_identity=True),
            }
        )
        self.map_fusion = MapFusion(c[2:], fusion_layers)
        self.map_reduction = nn.ModuleList([nn.Linear(c[4] + c[3], c[3], bias=False), nn.Linear(c[3] + c[2], c[2], bias=False)])
        self.up = nn.ModuleList([Stage(c[2] + c[1], c[1], conv_blocks[1]), Stage(c[1] + c[0], c[0], conv_blocks[2])])

    def forward(
        self,
        image: Float[Tensor, "B 1 Z Y X"],
        tokens: Mapping[str, Float[Tensor, "B K _"]] = NO_TOKENS,
        keep: Bool[Tensor, "B K"] | None = None,
    ) -> BackboneOutput:
        """Features at full resolution and at 4x, posteriors of every place in `tokens`. Raises ModelError for odd sides."""
        check_sides(image)
        posteriors: dict[str, Tensor] = {}

        def fuse(place: str, x: Tensor, map_tokens: Tensor) -> tuple[Tensor, Tensor]:
            x, map_tokens, posterior = self.fusion[place](x, map_tokens, tokens.get(place), keep)
            if place in tokens:
                posteriors[place] = posterior
            return x, map_tokens

        x1 = self.stem(image)
        x2 = self.down1(self.merge[0](x1))
        x, features, maps = x2, list[Tensor](), list[Tensor]()
        for i, place in enumerate(("enc4", "enc8", "enc16")):
            x = self.merge[i + 1](x)
            x, map_tokens = fuse(place, x, self.maps[i](x))
            features.append(x)
            maps.append(map_tokens)
        fused = self.map_fusion(maps)
        x, map_tokens = features[2], fused[2]
        for i, place in enumerate(("dec8", "dec4")):
            skip = features[1 - i]
            x = torch.cat([upsample(x, skip), skip], dim=1)
            x, map_tokens = fuse(place, x, self.map_reduction[i](torch.cat([map_tokens, fused[1 - i]], dim=-1)))
        aux = x
        for stage, skip in zip(self.up, (x2, x1), strict=True):
            x = stage(skip, x)
        return BackboneOutput(x, aux, posteriors)

    def segments(self) -> dict[str, Sequence[nn.Module]]:
        """Modules that each checkpointing mode recomputes as a whole."""
        transformers = [m for m in self.modules() if isinstance(m, TransformerBlock)]
        residuals = [m for m in self.modules() if isinstance(m, ResidualBlock)]
        stages = [self.stem, *self.merge, self.down1, *self.maps, *self.up]
        return {
            "selective": transformers,
            "blocks": [*transformers, *residuals, *self.merge, *self.maps],
            "full": [*stages, *self.fusion.values()],
        }


def check_sides(image: Float[Tensor, "B 1 Z Y X"]) -> None:
    """Patch merging needs even sides at each level, instance norm more than one voxel at 16x. Raises ModelError."""
    sides = tuple(image.shape[2:])
    if any(s % 16 for s in sides) or math.prod(s // 16 for s in sides) <= 1:
        raise ModelError(
            f"image sides {sides} (Z Y X): MedFormer expects multiples of 16, at least one of them >= 32; pad the image"
        )
