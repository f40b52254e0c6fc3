"""One training step over all ranks: DeepSpeed moves gradients and parameters, this file says what they mean.

The only door to DeepSpeed. It is imported when an engine is made, not with this module: the import takes seconds and picks the
accelerator on the spot. The loss handed in is already a share of the global mean, so gradients are summed over ranks and
micro-batches: DeepSpeed's averaging is undone. A step whose loss or gradient is not finite changes nothing on any rank.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hermes_dist.config import Config
from hermes_dist.errors import ConfigError
from hermes_dist.parallel.clock import StepClock
from hermes_dist.parallel.ds_config import BUFFER_ELEMENTS, build_ds_config, offloads, zero_stage
from hermes_dist.parallel.ema import Ema
from hermes_dist.parallel.lamb import Lamb
from hermes_dist.parallel.partition import Partition, describe_partition
from hermes_dist.parallel.runtime import Runtime
from hermes_dist.parallel.selfcheck import check_conv3d, has_fast_bf16

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class StepStats:
    """What one step did. `grad_norm` is the global norm before clipping (inf where the step was skipped).

    `bad_micro_batches`: those of this rank whose loss was not finite; known where the step was skipped.
    """

    grad_norm: float
    skipped: bool
    parts_s: dict[str, float] = field(default_factory=dict)
    bad_micro_batches: tuple[int, ...] = ()


class _LossModule(nn.Module):
    """What DeepSpeed wraps: model and loss in one forward pass, so that it sees one scalar whatever the model returns."""

    def __init__(self, model: nn.Module, device_type: str, *, bf16: bool, cache: bool) -> None:
        super().__init__()
        self.model = model
        self._device_type, self._bf16, self._cache = device_type, bf16, cache

    def forward(self, loss_fn: LossFn, batch: Any) -> Tensor:
        if not self._bf16:
            return loss_fn(self.model, batch)
        # With partitioned weights (stage 3) the cache would keep a bf16 copy of every gathered weight alive.
        with torch.autocast(self._device_type, torch.bfloat16, cache_enabled=self._cache):
            return loss_fn(self.model, batch)


class Engine:
    """A model under DeepSpeed with our optimizer, clipping, guard and average of the weights.

    `module` is the model itself; under stage 3 its parameters are gathered while its forward pass runs.
    """

    def __init__(self, model: nn.Module, config: Config, runtime: Runtime) -> None:
        """Raises ConfigError where the `deepspeed` section contradicts the others (see ds_config).

        On a device without bf16 arithmetic bf16 becomes fp32, and says so.
        """
        ds_config = build_ds_config(config, runtime.world_size)
        bf16 = config.train.precision == "bf16"
        if bf16 and not has_fast_bf16(runtime.device):
            runtime.say(f"train.precision=bf16: this {runtime.device.type} has no bf16 arithmetic; computing in fp32")
            bf16 = False
        if bf16 or runtime.device.type == "cuda":
            for warning in check_conv3d(runtime.device):
                runtime.say(f"warning: {warning}")
        self.config, self.runtime, self.stage = config, runtime, zero_stage(config)
        model.to(runtime.device)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        self._base = make_optimizer([p for p in model.parameters() if p.requires_grad], config, shapes)
        wrapped = _LossModule(model, runtime.device.type, bf16=bf16, cache=self.stage < 3)
        self._ds = _initialize(wrapped, self._base, ds_config, runtime.group_limit_s)
        self._clock = StepClock(runtime.device)
        self._finite: list[Tensor] = []
        # What the backward pass could not hide: the reduction that is left when it ends.
        # Stage 0 copies a bucket of gradients together for it: DeepSpeed's own bucket would hold them all.
        reduce = functools.partial(self._ds.allreduce_gradients, bucket_size=BUFFER_ELEMENTS["reduce_bucket_size"])
        self._ds.allreduce_gradients = self._clock.measured("communication", reduce)
        self.partition: Partition = describe_partition(model, self._ds.optimizer, self.stage, shapes)
        if isinstance(self._base, Lamb):
            self._base.bind(self.partition)
        self._branches = BranchGuard(model) if self.stage >= 2 and offloads(config) else None
        self.ema = Ema(self.partition, config.train.ema.decay) if config.train.ema.enabled else None
        self.steps = 0
        self.skipped_steps = 0

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._ds.module.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over this rank's buffers; its state is keyed by `partition.buffers[i].key`."""
        return self._base

    def step(self, micro_batches: Sequence[Any], loss_fn: LossFn, lr: float) -> StepStats:
        """One update from the sum of `loss_fn` over all ranks' micro-batches.

        Args:
            micro_batches: this rank's part, the same number on every rank.
            loss_fn: `(module, batch) -> scalar`, normalised by global counts.
            lr: learning rate of this step.

        Returns:
            The statistics; `skipped` is the same on every rank.

        Raises:
            WaitTimeoutError: a collective reached `train.step_limit_s`, or a peer died; names rank, step and operation.
            ConfigError: stage 2 or 3 with offload, and a parameter was used in some micro-batches of the step only.
        """
        for group in self._base.param_groups:
            group["lr"] = lr
        self._finite.clear()
        try:
            for index, batch in enumerate(micro_batches):
                self._accumulate(batch, loss_fn, index, last=index == len(micro_batches) - 1)
            if self._branches is not None:
                self._branches.check(len(micro_batches))
            # Here, behind the update: a signal that came during the passes, the long part, stops after this very step.
            self.runtime.begin_vote()
            stats = self._update()
            self.runtime.end_vote()
        except RuntimeError as error:
            raise self.runtime.explain(error, "step") from error
        finally:
            self.runtime.watchdog.beat(self.steps, None)
        return stats

    def _accumulate(self, batch: Any, loss_fn: LossFn, index: int, *, last: bool) -> None:
        beat = self.runtime.watchdog.beat
        beat(self.steps, f"forward of micro-batch {index}")
        self._ds.set_gradient_accumulation_boundary(last)
        with self._clock.measure("forward"):
            loss = self._ds(loss_fn, batch)
        # A loss that is not finite poisons every gradient, so that the norm tells all ranks (no synchronisation here).
        self._finite.append(torch.isfinite(loss.detach()))
        loss = loss * torch.where(self._finite[-1], 1.0, torch.nan)
        beat(self.steps, f"backward of micro-batch {index}")
        with self._clock.measure("backward"):
            # DeepSpeed averages over ranks: undo it. scale_wrt_gas=False: it does not divide by the accumulation steps.
            self._ds.backward(loss * self.runtime.world_size, scale_wrt_gas=False)

    def _update(self) -> StepStats:
        self.runtime.watchdog.beat(self.steps, "optimizer step")
        with self._clock.measure("optimizer"):
            norm = self._update_replicated() if self.stage == 0 else self._update_partitioned()
            skipped = not norm < float("inf")
            if not skipped and self.ema is not None:
                self.ema.update()
            self.partition.clear_gradients()
        self.steps += 1
        self.skipped_steps += skipped
        bad = tuple(i for i, finite in enumerate(self._finite) if not finite) if skipped else ()
        return StepStats(float("inf") if skipped else norm, skipped, self._clock.parts_s(), bad)

    def _update_replicated(self) -> float:
        """Stage 0: norm, guard and clipping are ours. A parameter without gradient counts as gradient 0, as under ZeRO."""
        params = [b.key for b in self.partition.buffers]
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        total = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        norm = float(total)
        if norm < float("inf"):
            if self.config.optimizer.clip_norm > 0:
                nn.utils.clip_grads_with_norm_(params, self.config.optimizer.clip_norm, total)
        else:
            for p in params:
                p.grad = None
        self._ds.step()
        return norm

    def _update_partitioned(self) -> float:
        """Stages 1 to 3: DeepSpeed's optimizer reduces the norm, skips on every rank if it is not finite, and clips."""
        self._ds.step()
        if self._ds.optimizer.overflow:
            return float("inf")
        return float(self._ds.get_global_grad_norm())

    def averaged_weights(self) -> dict[str, Tensor]:
        """Whole averaged weights (the plain ones without EMA) as a CPU state dict, on every rank. Collective."""
        return self.gather_weights(averaged=True)

    def gather_weights(self, *, averaged: bool) -> dict[str, Tensor]:
        """Whole parameters and buffers by name, on the CPU of every rank. Collective."""
        average = self.ema.averages if averaged and self.ema is not None else [b.master for b in self.partition.buffers]
        pieces: dict[str, list[tuple[int, Tensor]]] = {}
        for buffer, flat in zip(self.partition.buffers, average, strict=True):
            for s in buffer.segments:
                pieces.setdefault(s.name, []).append((s.start, flat[s.flat_start : s.flat_start + s.length]))
        for buffer in self.partition.frozen:
            for s in buffer.segments:
                pieces.setdefault(s.name, []).append((s.start, buffer.master[s.flat_start : s.flat_start + s.length]))
        trainable = set(self.partition.trainable_names)
        whole = {name: self._assemble(name, pieces.get(name, []), name not in trainable) for name in self.partition.shapes}
        buffers = {name: b.detach().cpu().clone() for name, b in self.module.named_buffers()}
        return {**whole, **{n: b for n, b in buffers.items() if n in self.module.state_dict()}}

    def _assemble(self, name: str, pieces: list[tuple[int, Tensor]], frozen: bool) -> Tensor:
        """Sum of zero-padded pieces over ranks: exact, since each element has one owner (or the sum is not needed)."""
        shape = self.partition.shapes[name]
        whole = torch.zeros(shape.numel())
        for start, piece in pieces:
            whole[start : start + piece.numel()] = piece.detach().float().cpu()
        if not (self.partition.replicated or (frozen and self.stage < 3)):
            self.runtime.sum(whole)
        return whole.view(shape)


class BranchGuard:
    """Finds what DeepSpeed does wrong without a word: with offload under stages 2 and 3, a gradient summed over micro-batches is
    lost (or is an old one) where the parameter has none in one of them, as in a branch that only some samples take.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(functools.partial(self._count, name))

    def _count(self, name: str, gradient: Tensor) -> None:
        del gradient
        self._seen[name] += 1

    def check(self, micro_batches: int) -> None:
        """After a step's passes. Raises ConfigError."""
        seen, self._seen = self._seen, Counter()
        for name, count in seen.items():
            if count < micro_batches:
                raise ConfigError(
                    f"parameter {name!r} had a gradient in {count} of a step's {micro_batches} micro-batches, which "
                    "deepspeed.zero_optimization.offload_optimizer under stage 2 or 3 would lose. Use stage 1, no offload, a "
                    "train.micro_batch that makes one micro-batch a step, or a model that uses every parameter each time"
                )


def make_optimizer(params: Sequence[Tensor], config: Config, shapes: Mapping[str, torch.Size]) -> torch.optim.Optimizer:
    """The configured optimizer over `params`, in one group: the formulas that every stage and the single-process tests share.

    `shapes` are those of the whole parameters by name: what the optimizer holds may be flat pieces of them.
    """
    section = config.optimizer
    exempt = {n for n, s in shapes.items() if len(s) <= 1} if section.decay_exclude == "vectors" else set[str]()
    if section.name == "lamb":
        return Lamb(
            params,
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            decays=lambda name: name not in exempt,
            max_ratio=section.max_trust_ratio,
        )
    # Fused: one pass over a rank's flat buffer, which no cache holds, instead of one for each operation.
    return torch.optim.AdamW(
        params, lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay, fused=True
    )


@contextmanager
def _group_limit(limit_s: float) -> Generator[None]:
    """Process groups made inside get our time limit. DeepSpeed clones the world's group and cannot be told one (30 minutes)."""
    plain = dist.new_group
    dist.new_group = functools.partial(plain, timeout=timedelta(seconds=limit_s))
    try:
        yield
    finally:
        dist.new_group = plain


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], limit_s: float) -> Any:
    with warnings.catch_warnings():
        # DeepSpeed's import and set-up warn about operators that are not compiled here; we use none of them.
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
        # On CPU its process group would compile a shared-memory kernel, which only its inference path uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logger = logging.getLogger("DeepSpeed")
        # It warns that it has not tested our optimizer under ZeRO; our tests have.
        logger.setLevel(logging.ERROR)
        with _group_limit(limit_s):
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config, dist_init_required=False)
        logger.setLevel(logging.WARNING)
    # torch 2.13 renames collectives that DeepSpeed calls in every step; nothing that a person could do about it.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    return engine
