"""LAMB with one trust ratio per whole tensor, although the optimizer sees flat pieces of many tensors.

Stock LAMB under ZeRO takes the flat partition for one tensor and computes one ratio per rank: silently another optimizer. Here
squares are summed per segment, added over ranks in ONE all-reduce of two numbers per tensor, and applied per segment. Few
parameter groups are needed (one), since weight decay is a property of the tensor's name here.

Rule (You et al. 2020, arXiv 1904.00962, in the form of the published Hermes = apex FusedLAMB): m, v moving averages with bias
correction; u = m̂ / (√v̂ + eps) + decay·p; p ← p − lr · (‖p‖/‖u‖) · u; ratio 1 where a norm is 0; the ratio is not clamped. Global
clipping is done before (engine).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hermes_dist.parallel.partition import FlatBuffer, Partition, Segment

_RUN = 1 << 12
_CHUNK_CPU = 1 << 18
"""Elements per piece on CPU: one piece's gradient, moments and weights (4 MiB) stay in the cache through all operations."""


class Lamb(torch.optim.Optimizer):
    """LAMB over the buffers of a `Partition`.

    The gradient buffers are overwritten by the update directions; nobody reads them after the step.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        decays: Callable[[str], bool] = lambda _: True,
        max_ratio: float | None = None,
    ) -> None:
        """`decays(name)` = False exempts a tensor from decay and, as in apex, from the trust ratio. `max_ratio` clamps ratios."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._decays, self._max_ratio = decays, max_ratio
        self._buffer_of: dict[int, FlatBuffer] = {}
        self._index: dict[str, int] = {}
        self._group: dist.ProcessGroup | None = None
        self._replicated = True
        self._constants: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.ratios: Tensor | None = None
        """Trust ratios of the last step, one per name of `partition.trainable_names` (NaN: not part of the last call)."""

    def bind(self, partition: Partition, group: dist.ProcessGroup | None = None) -> None:
        """Learn where tensors lie in the flat buffers. Call once, after the engine has split the parameters.

        Args:
            partition: this rank's buffers.
            group: ranks that hold the other pieces (None = all ranks).
        """
        self._buffer_of = {id(b.key): b for b in partition.buffers}
        self._index = {name: i for i, name in enumerate(partition.trainable_names)}
        self._group, self._replicated = (
            group,
            partition.replicated or not dist.is_initialized() or dist.get_world_size(group) == 1,
        )
        self._constants = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all parameters that hold a gradient."""
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            buffers = [self._buffer_of[id(p)] for p in group["params"] if p.grad is not None]
            if not buffers:
                continue
            for buffer in buffers:
                self._advance(buffer, group)
            self._apply(buffers, self._trust_ratios(buffers, group), float(group["lr"]))

    def _advance(self, buffer: FlatBuffer, group: dict[str, Any]) -> None:
        """Moments, and the update direction in place of the gradient."""
        grad = buffer.key.grad
        assert grad is not None
        state = self.state[buffer.key]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(buffer.master), exp_avg_sq=torch.zeros_like(buffer.master))
        state["step"] += 1
        (beta1, beta2), step = group["betas"], int(state["step"])
        correct1, correct2 = 1 - beta1**step, 1 - beta2**step
        grad, master = grad.view(-1), buffer.master
        exp_avg, exp_avg_sq = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        for low, high in _pieces(grad):
            g, m, v = grad[low:high], exp_avg[low:high], exp_avg_sq[low:high]
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            torch.sqrt(v, out=g)
            g.mul_(correct1 / correct2**0.5).add_(correct1 * group["eps"])
            torch.div(m, g, out=g)
        self._add_decay(grad, master, buffer.segments, float(group["weight_decay"]))

    def _add_decay(self, update: Tensor, master: Tensor, segments: tuple[Segment, ...], weight_decay: float) -> None:
        if weight_decay == 0:
            return
        for low, high in _runs(segments, self._decays):
            update[low:high].add_(master[low:high], alpha=weight_decay)

    def _trust_ratios(self, buffers: list[FlatBuffer], group: dict[str, Any]) -> Tensor:
        """float32 ratios by tensor index; one all-reduce."""
        views: list[Tensor] = []
        updates: list[Tensor] = []
        for buffer in buffers:
            assert buffer.key.grad is not None
            grad = buffer.key.grad.view(-1)
            for s in buffer.segments:
                views.append(buffer.master[s.flat_start : s.flat_start + s.length])
                updates.append(grad[s.flat_start : s.flat_start + s.length])
        index, exempt = self._on_device(buffers)
        squares = torch.zeros(2, len(self._index), dtype=torch.float64, device=index.device)
        if views:
            norms = torch.stack([*_norms(views), *_norms(updates)]).double()
            squares.index_add_(1, index, norms.square_().view(2, -1))
        if not self._replicated:
            dist.all_reduce(squares, group=self._group)
        weight, update = squares.sqrt_().unbind()
        ratios = torch.where((weight > 0) & (update > 0), weight / update, 1.0).float()
        if self._max_ratio is not None:
            ratios.clamp_(max=self._max_ratio)
        if group["weight_decay"] == 0:
            ratios.fill_(1.0)
        self.ratios = ratios.masked_fill_(exempt, 1.0)
        return self.ratios

    def _on_device(self, buffers: list[FlatBuffer]) -> tuple[Tensor, Tensor]:
        """Tensor number of each segment, and which tensors are exempt from ratios: sent once, since sending makes a GPU wait."""
        key = tuple(map(id, buffers))
        if key not in self._constants:
            device = buffers[0].master.device
            index = torch.tensor([self._index[s.name] for b in buffers for s in b.segments], dtype=torch.int64, device=device)
            exempt = torch.tensor([not self._decays(name) for name in self._index], device=device)
            self._constants[key] = (index, exempt)
        return self._constants[key]

    def _apply(self, buffers: list[FlatBuffer], ratios: Tensor, lr: float) -> None:
        for buffer in buffers:
            assert buffer.key.grad is not None
            update = buffer.key.grad.view(-1)
            for s in buffer.segments:
                ratio = ratios[self._index[s.name]].to(update.device)
                for low, high in _pieces(update[s.flat_start : s.flat_start + s.length], s.flat_start):
                    buffer.master[low:high].addcmul_(update[low:high], ratio, value=-lr)


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """L2 norms, in one kernel on CUDA (torch's own gradient clipping calls the same function).

    On a CPU torch adds squares up in long float32 runs. In the first steps all entries of an update are near ±1, equal squares
    round the same way, and the norm is off by 5e-5: here the runs are short, and their sums are added in float64.
    """
    if tensors and tensors[0].device.type == "cuda":
        return torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateUsage]
    return [_norm(tensor) for tensor in tensors]


def _norm(flat: Tensor) -> Tensor:
    rows = flat.numel() // _RUN
    whole, rest = flat[: rows * _RUN].view(rows, _RUN), flat[rows * _RUN :]
    squares = torch.linalg.vector_norm(whole, dim=1).double().square().sum()
    return (squares + torch.linalg.vector_norm(rest).double().square()).sqrt()


def _pieces(tensor: Tensor, start: int = 0) -> list[tuple[int, int]]:
    size = tensor.numel() if tensor.device.type != "cpu" else _CHUNK_CPU
    return [(start + low, start + min(low + size, tensor.numel())) for low in range(0, tensor.numel(), max(size, 1))]


def _runs(segments: tuple[Segment, ...], decays: Callable[[str], bool]) -> list[tuple[int, int]]:
    """Stretches of neighbouring segments that decay."""
    runs: list[tuple[int, int]] = []
    for s in segments:
        if decays(s.name):
            if runs and runs[-1][1] == s.flat_start:
                runs[-1] = (runs[-1][0], s.flat_start + s.length)
            else:
                runs.append((s.flat_start, s.flat_start + s.length))
    return runs
