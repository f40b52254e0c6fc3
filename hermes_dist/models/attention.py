"""Prior fusion of Hermes-R: tokens and features read each other in turn (facts 1.4).

Attention goes through `scaled_dot_product_attention`, so the tokens x voxels similarity is never stored. A mask is passed only
where a column is padding, because a mask costs the fastest kernels. The plain formula is kept as `reference`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

AttentionKind = Literal["fused", "reference"]
HEAD_WIDTH = 32


def attend(
    q: Float[Tensor, "B H N d"],
    k: Float[Tensor, "B H K d"],
    v: Float[Tensor, "B H K e"],
    *,
    scale: float,
    keep: Bool[Tensor, "B K"] | None,
    kind: AttentionKind,
) -> Float[Tensor, "B H N e"]:
    """softmax(scale · q kᵀ) v over the keys that `keep` names (None = all of them)."""
    mask = None if keep is None else keep[:, None, None, :]
    if kind == "fused":
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    similarity = (q @ k.transpose(-1, -2)).float() * scale
    if mask is not None:
        similarity = similarity.masked_fill(~mask, float("-inf"))
    return similarity.softmax(dim=-1).to(v.dtype) @ v


class CrossAttention(nn.Module):
    """Query rows read key/value rows; pre-norm on both sides, head-major channel split, 32 channels per head."""

    def __init__(self, channels: int, kind: AttentionKind) -> None:
        super().__init__()
        self.kind: AttentionKind = kind
        self.heads = max(1, channels // HEAD_WIDTH)
        inner = self.heads * min(channels, HEAD_WIDTH)
        self.norm_q = nn.LayerNorm(channels)
        self.norm_kv = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(channels, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, channels)

    def forward(
        self, rows: Float[Tensor, "B N C"], sources: Float[Tensor, "B K C"], keep: Bool[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """What `rows` read from `sources`; `keep` masks sources."""
        q = self._split(self.to_q(self.norm_q(rows)))
        k, v = (self._split(half) for half in self.to_kv(self.norm_kv(sources)).chunk(2, dim=-1))
        out = attend(q, k, v, scale=q.shape[-1] ** -0.5, keep=keep, kind=self.kind)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Float[Tensor, "B N I"]) -> Float[Tensor, "B H N d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """LayerNorm (eps 1e-4), Linear, exact GELU, Linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-4)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """The update, without the residual."""
        return self.fc2(functional.gelu(self.fc1(self.norm(x))))


class FusionBlock(nn.Module):
    """One exchange: tokens read features, tokens' MLP; then features read the updated tokens, features' MLP.

    Unidirectional (Table 4): the second half does not exist, features stay unchanged.
    """

    def __init__(self, channels: int, *, bidirectional: bool, kind: AttentionKind) -> None:
        super().__init__()
        self.tokens_read = CrossAttention(channels, kind)
        self.tokens_mlp = FeedForward(channels, 4 * channels)
        self.features_read = CrossAttention(channels, kind) if bidirectional else None
        self.features_mlp = FeedForward(channels, 4 * channels) if bidirectional else None

    def forward(
        self, features: Float[Tensor, "B N C"], tokens: Float[Tensor, "B K C"], keep: Bool[Tensor, "B K"] | None
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B K C"]]:
        """Updated features and tokens. `keep` is False for padding tokens: nobody reads them."""
        tokens = tokens + self.tokens_read(tokens, features)
        tokens = tokens + self.tokens_mlp(tokens)
        if self.features_read is not None and self.features_mlp is not None:
            features = features + self.features_read(features, tokens, keep)
            features = features + _redone(self.features_mlp, features)
        return features, tokens


def _redone(mlp: FeedForward, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
    """The MLP of a map: nine times the map's channels, which the backward pass makes again instead of keeping them."""
    return checkpoint(mlp, x, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else mlp(x)


class FusionLayer(nn.Module):
    """A stack of fusion blocks on a feature map. No positional encoding, no final norm."""

    def __init__(self, channels: int, depth: int, *, bidirectional: bool, kind: AttentionKind) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusionBlock(channels, bidirectional=bidirectional, kind=kind) for _ in range(depth))

    def forward(
        self, x: Float[Tensor, "B C Z Y X"], tokens: Float[Tensor, "B K C"], keep: Bool[Tensor, "B K"] | None
    ) -> tuple[Float[Tensor, "B C Z Y X"], Float[Tensor, "B K C"]]:
        """Fused map (channels-last) and posterior tokens."""
        grid = x.shape[2:]
        features = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
        for block in self.blocks:
            features, tokens = block(features, tokens, keep)
        return features.unflatten(1, grid).permute(0, 4, 1, 2, 3), tokens
