"""Memory of one rank: states exactly, activations by formula.

States as this trainer holds them: parameters, gradients and both moments in float32 for either precision (bf16 is autocast around
the forward pass), the average of the weights on each rank's own part. ZeRO divides the optimizer's states (stage 1), the
gradients too (2), the parameters too (3) over the ranks. Not counted: the allocator's fragmentation, cuDNN's workspace, the
Python process; `OVERHEAD_BYTES` stands for them in recommendations.
"""

from __future__ import annotations

from dataclasses import dataclass

from hermes_dist.config import ModelConfig
from hermes_dist.scaling.cost_layers import Layer, Request
from hermes_dist.scaling.model_costs import layers

MODES = ("none", "selective", "blocks", "full")
OVERHEAD_BYTES = 2 * 2**30
"""CUDA context, cuDNN workspaces and fragmentation on a GPU."""
BUCKET_BYTES = 4 * 20_000_000
"""One bucket of gradients under way to the other ranks: the engine's default of `reduce_bucket_size` (parallel/ds_config.py)."""
WORKSPACE = 2.5
"""Of a block's backward pass, in sizes of its weights: their gradient, and copies in the layouts of the convolution library.
Measured with oneDNN; it shows where patches are small beside the weights."""
LIVE_BYTES = 4 * 40_000_000
"""Gathered weights that stage 3 holds at a time: the engine's default of `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank's states. `gradients_stay`: their buffer lives between steps too (stage 3)."""

    parameters: float
    gradients: float
    optimizer: float
    master: float
    ema: float
    gradients_stay: bool = False

    @property
    def at_rest(self) -> float:
        """Between two steps."""
        return self.total - (0.0 if self.gradients_stay else self.gradients)

    @property
    def total(self) -> float:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.master + self.ema


def state_bytes(parameters: int, stage: int, world_size: int, *, ema: bool = True) -> StateBytes:
    """States of one rank under ZeRO `stage` (0–3), in bytes; float32 everywhere. `master`: DeepSpeed's flat copy under ZeRO."""
    whole, part = 4.0 * parameters, 4.0 * parameters / world_size
    return StateBytes(
        parameters=whole if stage < 3 else part,
        gradients=whole if stage < 2 else part,
        optimizer=2 * (whole if stage == 0 else part),
        master=0.0 if stage == 0 else part,
        ema=(whole if stage == 0 else part) if ema else 0.0,
        gradients_stay=stage == 3,
    )


def resident_buffer_bytes(stage: int) -> float:
    """Buffers that live between steps beside the states: stage 3 keeps its bucket."""
    return BUCKET_BYTES if stage == 3 else 0.0


def transient_bytes(parameters: int, stage: int, world_size: int, activations: float, *, gloo: bool = False) -> float:
    """What a step needs at its peak on top of `StateBytes.at_rest` and `resident_buffer_bytes`.

    Stages 0 and 1: all gradients, and then activations or, when the backward pass is through, one bucket of copies. Stage 2: the
    reduced part of the gradients, and activations with a bucket, or a flat copy of that part. Stage 3: activations,
    gathered weights, and the bucket's copy for the reduction with the part that comes back. `gloo` (ranks on CPUs) gathers into a
    copy of its own: of all parameters after the step, in stage 3 of a bucket.
    """
    whole, part = 4.0 * parameters, 4.0 * parameters / world_size
    bucket = min(whole, BUCKET_BYTES)
    if stage < 2:
        return whole + max(activations, bucket if stage or world_size > 1 else 0.0)
    if stage == 2:
        return max(part + max(activations + bucket, part), whole if gloo else 0.0)
    copies = 1 + 1 / world_size + (1 if gloo else 0)
    return max(activations + min(whole, LIVE_BYTES) + bucket * copies, part)


def kept_activation_elements(config: ModelConfig, request: Request, mode: str) -> int:
    """float32 elements that autograd keeps per sample between forward and backward pass."""
    table = layers(config, request)
    if mode == "none":
        return sum(layer.kept for layer in table)
    if mode == "selective":
        return sum(layer.kept_selective or layer.kept for layer in table)
    if mode == "blocks":
        return sum(layer.output if layer.unit in ("residual", "fusion") and layer.flops else layer.kept for layer in table)
    return sum(_stage_output(stage) for stage in _stages(table))


def activation_bytes(config: ModelConfig, request: Request, mode: str, *, micro_batch: int, bytes_per_element: int) -> float:
    """Peak activations of one micro-batch: what is kept, what the largest recomputed unit keeps meanwhile, and the loss.

    The loss holds logits, targets and their gradient per task column in float32.
    """
    kept = micro_batch * bytes_per_element * kept_activation_elements(config, request, mode)
    redone = redone_bytes(config, request, mode, micro_batch=micro_batch, bytes_per_element=bytes_per_element)
    voxels = request.patch_vox_zyx[0] * request.patch_vox_zyx[1] * request.patch_vox_zyx[2]
    return kept + redone + micro_batch * 4.0 * 4 * request.columns * voxels


def redone_bytes(config: ModelConfig, request: Request, mode: str, *, micro_batch: int, bytes_per_element: int) -> float:
    """What the recomputed unit that needs most keeps while its backward pass runs, with the workspace of its largest weights."""
    table = layers(config, request)
    if mode == "none":
        return 0.0
    units = _stages(table) if mode == "full" else [[layer] for layer in table]
    return max(
        micro_batch * bytes_per_element * sum(layer.kept for layer in unit)
        + WORKSPACE * 4.0 * max(layer.parameters for layer in unit)
        for unit in units
    )


def _stages(table: list[Layer]) -> list[list[Layer]]:
    """Layers of one name before the dot belong together; so a stage and its fusion are two units, as they are recomputed."""
    stages: dict[str, list[Layer]] = {}
    for layer in table:
        stages.setdefault(layer.name.split(".")[0], []).append(layer)
    return list(stages.values())


def _stage_output(stage: list[Layer]) -> int:
    return stage[-1].output if stage[-1].unit in ("residual", "fusion") else sum(layer.kept for layer in stage)
