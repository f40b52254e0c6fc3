"""The DeepSpeed configuration: what we compute from our sections, plus what the user's `deepspeed` section adds.

One truth per value: a key that we state is refused in the user's section, and so is one that would change results or that has no
effect here. DeepSpeed itself ignores unknown keys; here they are errors that name the nearest known one.

DeepSpeed always runs in float32. bf16 is `torch.autocast` around the forward pass: the parameters themselves are the fp32 master
weights, gradients are accumulated and reduced in fp32, and every stage works alike.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pydantic

from hermes_dist.config import Config
from hermes_dist.errors import ConfigError, nearest

STATED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.schedule",
    "gradient_clipping": "optimizer.clip_norm",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "the checkpoint section",
    "elasticity": "nothing: every run can resume at another world size",
    "steps_per_print": "monitor.log_every",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
}
"""Keys of DeepSpeed that our sections state, and where."""

PASSED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "csv_monitor",
    "wandb",
)
"""Keys of DeepSpeed that are handed through as they are."""

REFUSED_ZERO = {
    "offload_param": "parameters in host memory are not supported; use stage 3, or offload_optimizer",
    "zero_hpz_partition_size": "secondary partitions are not supported",
    "mics_shard_size": "MiCS is not supported",
    "zero_quantized_weights": "quantised weights change the result",
    "zero_quantized_gradients": "quantised gradients change the result",
    "zero_quantized_nontrainable_weights": "quantised weights change the result",
    "zenflow": "ZenFlow changes the result",
    "cpu_offload": "it is DeepSpeed's old name; write offload_optimizer: {device: cpu}",
    "cpu_offload_params": "parameters in host memory are not supported",
    "load_from_fp32_weights": "checkpoints are ours; see the checkpoint section",
    "elastic_checkpoint": "every checkpoint is elastic",
}
"""Keys inside `zero_optimization` that cannot work here, and why."""


BUFFER_ELEMENTS = {
    "reduce_bucket_size": 20_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 40_000_000,
    "stage3_max_reuse_distance": 10_000_000,
}
"""Where the user's section says nothing. DeepSpeed's own values are made for models a hundred times as large: a gradient bucket
of 2 GB (two where communication overlaps), and under stage 3 all gathered weights stay from the forward to the backward pass, so
that at its peak nothing is saved. 20 million elements are 80 MB, above the largest kernel of Hermes-Large (11 million)."""


def zero_stage(config: Config) -> int:
    """The ZeRO stage of the user's section (default 0). Raises ConfigError if it is not 0, 1, 2 or 3."""
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed.zero_optimization = {zero!r}: expected an object such as {{'stage': 1}}")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"deepspeed.zero_optimization.stage = {stage!r}: expected 0, 1, 2 or 3")
    return int(stage)


def offloads(config: Config) -> bool:
    """Whether optimizer states are kept in host memory (`offload_optimizer`)."""
    return _offload_device(config.deepspeed.get("zero_optimization", {})) == "cpu"


def _offload_device(zero: dict[str, Any]) -> str:
    offload = zero.get("offload_optimizer") or {}
    return offload.get("device", "none") if isinstance(offload, dict) else offload


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches per rank and step: the rank's share of the global batch over `train.micro_batch`, rounded up."""
    per_rank = -(-config.train.global_batch // world_size)
    return -(-per_rank // config.train.micro_batch)


def build_ds_config(config: Config, world_size: int) -> dict[str, Any]:
    """The complete dict for `deepspeed.initialize`.

    Raises:
        ConfigError: the `deepspeed` section repeats our keys, has unknown ones, or asks for what cannot work.
    """
    section = config.deepspeed
    for key in section:
        if key in STATED:
            raise ConfigError(f"deepspeed.{key} is stated by {STATED[key]}; remove it from the deepspeed section")
        if key not in PASSED:
            raise ConfigError(f"unknown key 'deepspeed.{key}'.{nearest(key, [*PASSED, *STATED])}")
    stage = zero_stage(config)
    _check_zero(section.get("zero_optimization", {}), stage)
    if config.train.compile and stage == 3:
        raise ConfigError(
            "train.compile with ZeRO stage 3: its hooks that gather weights break the compiler; use stage 2 or less"
        )
    optimizer = config.optimizer
    if optimizer.name != "lamb":
        for key, value, default in (
            ("decay_exclude", optimizer.decay_exclude, "none"),
            ("max_trust_ratio", optimizer.max_trust_ratio, None),
        ):
            if value != default:
                raise ConfigError(f"optimizer.{key} = {value!r} is an option of lamb; remove it, or set optimizer.name=lamb")
    zero = {k: v for k, v in BUFFER_ELEMENTS.items() if stage == 3 or (stage > 0 and not k.startswith("stage3"))}
    steps, micro_batch = accumulation_steps(config, world_size), config.train.micro_batch
    return {
        **section,
        "zero_optimization": {**zero, **section.get("zero_optimization", {})},
        # DeepSpeed insists that these three multiply; filler samples make the last micro-batch full.
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro_batch * steps * world_size,
        # Stage 0 has no norm of its own to guard with; the engine clips there.
        "gradient_clipping": config.optimizer.clip_norm if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _check_zero(zero: dict[str, Any], stage: int) -> None:
    if zero.get("compute_grad_norm", True) is False:
        raise ConfigError("deepspeed.zero_optimization.compute_grad_norm = False: the norm is what finds NaN; remove the key")
    for key, reason in REFUSED_ZERO.items():
        if zero.get(key):
            raise ConfigError(f"deepspeed.zero_optimization.{key} = {zero[key]!r}: {reason}")
    if set(zero) - {"stage"}:
        _check_with_deepspeed(zero)
    offload = zero.get("offload_optimizer") or {}
    device = _offload_device(zero)
    if device == "nvme":
        raise ConfigError("deepspeed.zero_optimization.offload_optimizer.device = 'nvme': expected 'cpu' or 'none'")
    if device == "cpu" and stage == 0:
        raise ConfigError(
            "deepspeed.zero_optimization.offload_optimizer needs stage 1, 2 or 3; stage 0 keeps all states on the device"
        )
    if isinstance(offload, dict) and float(offload.get("ratio", 1.0)) != 1.0:
        raise ConfigError(f"deepspeed.zero_optimization.offload_optimizer.ratio = {offload['ratio']!r}: only 1.0 is supported")


def _check_with_deepspeed(zero: dict[str, Any]) -> None:
    """What DeepSpeed itself would refuse, as one line. Imports it, which takes seconds: only where a key asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: type[pydantic.BaseModel] = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    known = [name for key, field in model.model_fields.items() for name in (key, field.alias) if name]
    for key in zero:
        if key not in known:
            raise ConfigError(f"unknown key 'deepspeed.zero_optimization.{key}'.{nearest(key, known)}")
    try:
        model.model_validate(zero)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"deepspeed.zero_optimization.{place} = {first['input']!r}: {first['msg']}") from None
