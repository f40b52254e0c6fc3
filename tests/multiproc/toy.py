"""A small universal model for engine tests: odd sizes, tiny tensors, frozen parameters, an unused branch, a table of tasks.

Samples carry different tasks; the loss is normalised by the global number of (sample, task) pairs, as in training. Ranks may hold
filler samples with no valid pair.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

N_TASKS = 5


class Toy(nn.Module):
    """3D convolutions, norm, a task table, a scalar gate, a frozen stem and a head that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 3, 3, padding=1)
        self.stem.requires_grad_(False)
        # No bias before the norm: its gradient would be rounding noise, which LAMB scales up to a full step.
        self.body = nn.Conv3d(3, 7, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm3d(7, affine=True)
        self.mix = nn.Conv3d(7, 7, 1)
        self.tasks = nn.Parameter(torch.randn(N_TASKS, 7) * 0.3)
        self.gate = nn.Parameter(torch.ones(1))
        self.sometimes = nn.Conv3d(7, 7, 1)
        self.unused = nn.Linear(7, 3)
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, image: Tensor, task_ids: Tensor, branch: bool) -> Tensor:
        """(B,1,Z,Y,X), (B,T) → logits (B,T,Z,Y,X). `branch`: go through the layer that only some steps use."""
        x = torch.tanh(self.norm(self.body(self.stem(image)))) * self.gate
        x = self.mix(x) + x
        if branch:
            x = x + self.sometimes(x)
        return torch.einsum("bczyx,btc->btzyx", x, self.tasks[task_ids]) * self.scale


@dataclass
class ToyBatch:
    """`pair_mask` is false for filler samples and padding columns."""

    image: Tensor
    task_ids: Tensor
    target: Tensor
    pair_mask: Tensor
    branch: bool


def make_model(seed: int = 0) -> Toy:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Toy()


def make_samples(step: int, count: int) -> list[ToyBatch]:
    """The global batch of a step, sample by sample; every sample has its own one or two tasks of two columns."""
    g = torch.Generator().manual_seed(1000 + step)
    samples: list[ToyBatch] = []
    for index in range(count):
        image = torch.randn(1, 1, 5, 4, 3, generator=g)
        tasks = torch.randint(N_TASKS, (1, 2), generator=g)
        target = (torch.rand(1, 2, 5, 4, 3, generator=g) > 0.5).float()
        samples.append(ToyBatch(image, tasks, target, torch.tensor([[True, index % 3 != 1]]), step % 3 == 0))
    return samples


def collate(samples: Sequence[ToyBatch]) -> ToyBatch:
    """One batch from several samples."""
    parts = (torch.cat([getattr(s, f) for s in samples]) for f in ("image", "task_ids", "target", "pair_mask"))
    return ToyBatch(*parts, branch=samples[0].branch)


def pair_count(samples: Sequence[ToyBatch]) -> int:
    """Valid (sample, task) pairs."""
    return int(sum(s.pair_mask.sum() for s in samples))


def filler(branch: bool) -> ToyBatch:
    """A sample that counts nothing."""
    empty = torch.zeros(1, 2)
    return ToyBatch(torch.zeros(1, 1, 5, 4, 3), empty.long(), torch.zeros(1, 2, 5, 4, 3), empty.bool(), branch)


def split(samples: Sequence[ToyBatch], rank: int, world_size: int, micro_batch: int) -> list[ToyBatch]:
    """The contiguous part of one rank, filled up, in micro-batches of equal size on every rank."""
    per_rank = -(-len(samples) // world_size)
    count = -(-per_rank // micro_batch)
    mine = list(samples[rank * per_rank : (rank + 1) * per_rank])
    mine += [filler(samples[0].branch)] * (count * micro_batch - len(mine))
    return [collate(mine[i * micro_batch : (i + 1) * micro_batch]) for i in range(count)]


def make_loss(pair_count: int, record: Callable[[Tensor], None] = lambda _: None) -> Callable[[nn.Module, ToyBatch], Tensor]:
    """`(module, batch) → loss` normalised by the global pair count."""

    def loss_fn(module: nn.Module, batch: ToyBatch) -> Tensor:
        logits = module(batch.image, batch.task_ids, batch.branch).float()
        per_pair = nn.functional.binary_cross_entropy_with_logits(logits, batch.target, reduction="none").mean((2, 3, 4))
        loss = (per_pair * batch.pair_mask).sum() / pair_count
        record(loss.detach())
        return loss

    return loss_fn


def reference_lamb(
    params: Sequence[Tensor], moments: list[tuple[Tensor, Tensor]], *, step: int, lr: float, eps: float, decay: float
) -> list[float]:
    """LAMB tensor by tensor, straight from the formula, in float64; returns the trust ratios."""
    ratios: list[float] = []
    for p, (m, v) in zip(params, moments, strict=True):
        assert p.grad is not None
        g, w = p.grad.double(), p.detach().double()
        m.copy_(0.9 * m + 0.1 * g)
        v.copy_(0.999 * v + 0.001 * g * g)
        u = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + eps) + decay * w
        norm_w, norm_u = w.norm(), u.norm()
        ratio = float(norm_w / norm_u) if norm_w > 0 and norm_u > 0 else 1.0
        p.data.copy_(w - lr * ratio * u)
        ratios.append(ratio)
    return ratios


def reference_run(
    optimizer: str,
    *,
    steps: int,
    batch: int,
    lr: float,
    decay: float,
    clip: float,
    eps: float = 1e-3,
    kit: Any = None,
    micro_batch: int | None = None,
) -> dict[str, list]:
    """The single process with the whole batch in plain PyTorch: losses, gradient norms, LAMB's ratios, EMA at the end.

    `kit`: what has `make_model`, `make_samples`, `pair_count`, `collate`, `make_loss` (default: this module). `micro_batch`: take
    the batch in parts of so many samples instead.
    """
    kit = kit or sys.modules[__name__]
    model = kit.make_model()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    moments = [(torch.zeros_like(p, dtype=torch.float64), torch.zeros_like(p, dtype=torch.float64)) for p in params]
    adamw = torch.optim.AdamW(params, lr=lr, eps=eps, weight_decay=decay)
    average = [p.detach().clone() for p in params]
    out: dict[str, list] = {"loss": [], "norm": [], "ratios": []}
    for step in range(steps):
        samples = kit.make_samples(step, batch)
        model.zero_grad(set_to_none=False)
        loss_fn, size, losses = kit.make_loss(kit.pair_count(samples)), micro_batch or batch, list[float]()
        for part in (samples[i : i + size] for i in range(0, batch, size)):
            loss = loss_fn(model, kit.collate(part))
            loss.backward()
            losses.append(float(loss.detach()))
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        out["norm"].append(float(nn.utils.clip_grad_norm_(params, clip)))
        out["loss"].append(sum(losses))
        if optimizer == "lamb":
            out["ratios"].append(reference_lamb(params, moments, step=step + 1, lr=lr, eps=eps, decay=decay))
        else:
            adamw.step()
        decay_now = min(1 - 1 / (step + 1), 0.9)
        average = [decay_now * a + (1 - decay_now) * p.detach() for a, p in zip(average, params, strict=True)]
    out["names"] = [n for n, _ in named]
    out["weights"] = [p.detach().flatten().tolist() for p in params]
    out["ema"] = [a.flatten().tolist() for a in average]
    return out
