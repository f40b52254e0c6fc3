"""A plan for a configuration and a cluster: what fits, how fast, what the data path must hold, what it costs.

All figures are estimates; each comes with the assumption that made it (`Assumptions`), and replacing an assumption by a measured
value (a sweep's fit, a bench) makes the plan better. Pure functions over `Config`, the task table's sizes and the tables here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hermes_dist.config import Config
from hermes_dist.scaling.communication import Cluster, step_bytes, step_seconds
from hermes_dist.scaling.cost_layers import Request
from hermes_dist.scaling.data_path import DataNeed, data_need
from hermes_dist.scaling.devices import Device
from hermes_dist.scaling.memory import (
    MODES,
    OVERHEAD_BYTES,
    activation_bytes,
    resident_buffer_bytes,
    state_bytes,
    transient_bytes,
)
from hermes_dist.scaling.model_costs import parameter_count, recomputed_flops, training_flops

STAGES = (1, 2, 0, 3)
"""In order of preference at equal speed: stage 1 shares the optimizer's work for the communication of stage 0."""


@dataclass(frozen=True)
class Assumptions:
    """What the estimates rest on.

    `utilisation`: share of the peak that convolutions reach on one device; 3D convolutions of 32–48 channels stay far below
    matrix products (no published MFU for 3D segmentation was found; nnU-Net's 13.7 patches/s on an A100 and NVIDIA's 9.5 images/s
    of a comparable network are about 15–25 %). `overlap`: share of the communication hidden behind the backward pass.
    `cpu_s_per_sample`: reading and augmenting one 128³ crop on one core (0.4 s: issue targets; scaled by voxels).
    """

    utilisation: float = 0.2
    overlap: float = 0.5
    cpu_s_per_sample: float = 0.4
    memory_headroom: float = 0.1
    compression: float = 2.4


@dataclass(frozen=True)
class Option:
    """One way to run: ZeRO stage, checkpointing mode, largest micro-batch that fits (0 = none does), and what it gives."""

    stage: int
    mode: str
    micro_batch: int
    state_bytes: float
    activation_bytes: float
    step_s: float
    communication_bytes: float
    communication_s: float
    mfu: float
    recomputed_share: float

    @property
    def fits(self) -> bool:
        """At least one sample fits."""
        return self.micro_batch > 0


@dataclass(frozen=True)
class Plan:
    """All options, the recommended one, and what follows from it. `best` is None where nothing fits."""

    parameters: int
    flops_per_sample: int
    world_size: int
    options: tuple[Option, ...]
    best: Option | None
    samples_per_s: float
    need: DataNeed | None
    hours: float
    usd: float


def make_plan(
    config: Config, request: Request, device: Device, cluster: Cluster, world_size: int, assumptions: Assumptions | None = None
) -> Plan:
    """Plan `train.max_steps` steps of `train.global_batch` samples on `world_size` devices."""
    assume = assumptions or Assumptions()
    options = tuple(
        _option(config, request, device, cluster, world_size, assume, stage, mode) for stage in STAGES for mode in MODES
    )
    fitting = [option for option in options if option.fits]
    best = min(fitting, key=lambda o: (round(o.step_s, 6), STAGES.index(o.stage), o.recomputed_share)) if fitting else None
    rate = config.train.global_batch / best.step_s if best else 0.0
    per_node = rate * min(cluster.devices_per_node, world_size) / world_size
    scale = math.prod(config.data.patch_vox_zyx) / 128**3
    need = (
        data_need(
            per_node,
            config.data.patch_vox_zyx,
            cpu_s_per_sample=assume.cpu_s_per_sample * scale,
            compression=assume.compression,
        )
        if best
        else None
    )
    hours = config.train.max_steps * best.step_s / 3600 if best else math.inf
    return Plan(
        parameter_count(config.model, request),
        training_flops(config.model, request),
        world_size,
        options,
        best,
        rate,
        need,
        hours,
        hours * world_size * device.usd_per_hour,
    )


def _option(
    config: Config,
    request: Request,
    device: Device,
    cluster: Cluster,
    world_size: int,
    assume: Assumptions,
    stage: int,
    mode: str,
) -> Option:
    parameters, train = parameter_count(config.model, request), config.train
    held = state_bytes(parameters, stage, world_size, ema=train.ema.enabled)
    element = 2 if train.precision == "bf16" else 4
    one = activation_bytes(config.model, request, mode, micro_batch=1, bytes_per_element=element)
    free = device.memory_bytes * (1 - assume.memory_headroom) - OVERHEAD_BYTES - held.at_rest - resident_buffer_bytes(stage)
    share = math.ceil(train.global_batch / world_size)
    fits = (m for m in range(share, 0, -1) if transient_bytes(parameters, stage, world_size, m * one) <= free)
    micro = next(fits, 0)
    flops = training_flops(config.model, request)
    again = recomputed_flops(config.model, request, mode)
    compute = share * (flops + again) / (device.peak(train.precision) * assume.utilisation)
    steps = math.ceil(share / max(micro, 1))
    talk = step_seconds(parameters, stage, world_size, cluster, micro_steps=steps)
    exposed = max(talk * (1 - assume.overlap), talk - compute * 2 / 3)  # nothing hides behind a shorter backward pass
    step_s = compute + exposed
    return Option(
        stage,
        mode,
        micro,
        held.total,
        micro * one,
        step_s,
        step_bytes(parameters, stage, world_size, micro_steps=steps),
        exposed,
        share * flops / step_s / device.peak(train.precision),
        again / flops,
    )


def recommended_sections(plan: Plan) -> dict[str, dict[str, object]]:
    """The configuration sections of the best option, to paste into the JSON. Empty where nothing fits."""
    if plan.best is None:
        return {}
    zero: dict[str, object] = {"stage": plan.best.stage}
    if plan.best.stage >= 2:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    return {
        "train": {"micro_batch": plan.best.micro_batch, "activation_checkpointing": plan.best.mode},
        "deepspeed": {"zero_optimization": zero},
    }
