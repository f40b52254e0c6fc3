"""A straightforward eager Hermes-R: plain modules, concatenate and convolve, unfused attention, published parameter names.

The second implementation that tests compare with, and the "before" of the benches. It takes a published state dict as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvUnit(nn.Module):
    """InstanceNorm, ReLU, 3x3x3 convolution."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(i, eps=1e-4)
        self.conv = nn.Conv3d(i, o, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.relu(self.norm(x)))


class Block(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvUnit(i, o), ConvUnit(o, o)
        self.shortcut = ConvUnit(i, o) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.shortcut(x)


class Stem(nn.Module):
    def __init__(self, b: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(1, b, 3, padding=1, bias=False), Block(b, b)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Down(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.MaxPool3d(2), Block(i, o), Block(o, o))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(Block(i + o, o), Block(o, o))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = functional.interpolate(x.float(), size=skip.shape[2:], mode="trilinear", align_corners=True).to(skip.dtype)
        return self.conv(torch.cat([skip, x], 1))


class Attention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.heads = c // 32
        inner = 32 * self.heads
        self.to_q, self.to_kv = nn.Linear(c, inner, bias=False), nn.Linear(c, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, c)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, 32)).transpose(1, 2) for t in (self.to_q(x), *self.to_kv(y).chunk(2, -1)))
        weights = (q @ k.transpose(-1, -2) * 32**-0.5).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class PreNormAttention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.fn = nn.LayerNorm(c), nn.LayerNorm(c), Attention(c)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fn(self.norm1(x), self.norm2(y))


class Mlp(nn.Module):
    def __init__(self, i: int, hidden: int, o: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(i, hidden), nn.Linear(hidden, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class PreNormMlp(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(c, eps=1e-4), Mlp(c, 4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class FusionBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.prior_aggregate_block, self.prior_ffn = PreNormAttention(c), PreNormMlp(c)
        self.feat_aggregate_block, self.feat_ffn = PreNormAttention(c), PreNormMlp(c)

    def forward(self, f: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t + self.prior_aggregate_block(t, f)
        t = t + self.prior_ffn(t)
        f = f + self.feat_aggregate_block(f, t)
        return f + self.feat_ffn(f), t


class Fusion(nn.Module):
    def __init__(self, c: int, depth: int, n_rows: int, n_modalities: int) -> None:
        super().__init__()
        self.task_prior = nn.Parameter(torch.empty(n_rows, c))
        self.modality_prior = nn.Parameter(torch.empty(n_modalities, 10, c))
        nn.init.xavier_uniform_(self.task_prior)
        nn.init.xavier_uniform_(self.modality_prior)
        self.attn_layers = nn.ModuleList(FusionBlock(c) for _ in range(depth))

    def forward(self, x: Tensor, task_ids: Tensor, modality_ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([self.task_prior[task_ids], self.modality_prior[modality_ids]], 1)
        rows = x.flatten(2).transpose(1, 2)
        for layer in self.attn_layers:
            rows, tokens = layer(rows, tokens)
        return rows.transpose(1, 2).reshape(x.shape), tokens


class Out(nn.Module):
    def __init__(self, p: int, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(p)
        self.classifier_pred = nn.Sequential(Mlp(p, p, c), Mlp(c, c, c))

    def forward(self, posteriors: Tensor, features: Tensor) -> Tensor:
        return torch.einsum("btc,bczyx->btzyx", self.classifier_pred(self.norm(posteriors)), features)


class ModalityOut(nn.Module):
    def __init__(self, p: int, n_modalities: int) -> None:
        super().__init__()
        self.norm, self.classifier = nn.LayerNorm(p), Mlp(p, p, n_modalities)

    def forward(self, posteriors: Tensor) -> Tensor:
        return self.classifier(self.norm(posteriors).mean(1))


class BaselineHermesR(nn.Module):
    """Published architecture with two blocks per stage; `n_rows` counts the null row."""

    def __init__(self, b: int, n_rows: int = 73, n_modalities: int = 6) -> None:
        super().__init__()
        c = [b * w for w in (1, 2, 4, 8, 10)]
        self.inc = Stem(b)
        self.down1, self.down2, self.down3, self.down4 = (Down(c[i], c[i + 1]) for i in range(4))
        self.up1, self.up2, self.up3, self.up4 = (Up(c[4 - i], c[3 - i]) for i in range(4))
        counts = n_rows, n_modalities
        self.prior_init_fuse_2, self.prior_init_fuse_3 = Fusion(c[2], 2, *counts), Fusion(c[3], 2, *counts)
        self.prior_init_fuse_4 = Fusion(c[4], 4, *counts)
        self.prior_fuse_5, self.prior_fuse_6 = Fusion(c[3], 2, *counts), Fusion(c[2], 2, *counts)
        self.out, self.mod_out = Out(34 * b, b), ModalityOut(34 * b, n_modalities)

    def forward(self, image: Tensor, task_ids: Tensor, modality_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits and modality logits."""
        ids = task_ids, modality_ids
        x1 = self.inc(image)
        x2 = self.down1(x1)
        x3, p2 = self.prior_init_fuse_2(self.down2(x2), *ids)
        x4, p3 = self.prior_init_fuse_3(self.down3(x3), *ids)
        x5, p4 = self.prior_init_fuse_4(self.down4(x4), *ids)
        x, p5 = self.prior_fuse_5(self.up1(x5, x4), *ids)
        x, p6 = self.prior_fuse_6(self.up2(x, x3), *ids)
        x = self.up4(self.up3(x, x2), x1)
        posteriors = torch.cat([p2, p3, p4, p5, p6], -1)
        n = task_ids.shape[1]
        return self.out(posteriors[:, :n], x), self.mod_out(posteriors[:, n:])


def baseline_pair_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean BCE and adaptive Tversky per pair, written plainly."""
    y = targets.to(logits.dtype)
    bce = functional.binary_cross_entropy_with_logits(logits, y, reduction="none").mean((2, 3, 4))
    p = logits.sigmoid()
    tp, fp, fn = ((a * b).sum((2, 3, 4)) for a, b in ((p, y), (p, 1 - y), (1 - p, y)))
    alpha = (fp / (fp + fn + 1e-6)).clamp(0.2, 0.8)
    return bce, 1 - tp / (tp + alpha * fp + (1 - alpha) * fn + 1e-6)
