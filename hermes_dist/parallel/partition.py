"""Which piece of which parameter this rank owns: the one file that knows how DeepSpeed lays parameters out.

Every ZeRO stage ends in flat fp32 buffers that the optimizer updates. Here they become `FlatBuffer`s with `Segment`s that name
the parameter behind each stretch. LAMB, the average of the weights and checkpoints work on these alone, so they are the same
code for every stage and world size. Read against DeepSpeed 0.19: runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """`length` elements of parameter `name` from its flat position `start`, at `flat_start` in the buffer."""

    name: str
    start: int
    flat_start: int
    length: int


@dataclass(frozen=True, eq=False)
class FlatBuffer:
    """One flat fp32 tensor that the optimizer updates; `key` is the object that the optimizer's param groups hold."""

    key: Tensor
    master: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Partition:
    """What this rank owns.

    `shapes` and `trainable_names` list all parameters of the model in module order, the same on every rank.
    `replicated`: every rank owns everything (stage 0), so sums over segments are complete without communication.
    `publish` copies masters into the model's parameters on all ranks, after masters were changed by hand (collective).
    `clear_gradients` zeroes gradient buffers that outlive a step: DeepSpeed overwrites only what the next step uses, so a
    parameter that a step leaves out would meet its old gradient again (stage 3, and any stage with offload).
    """

    buffers: tuple[FlatBuffer, ...]
    frozen: tuple[FlatBuffer, ...]
    shapes: dict[str, torch.Size]
    trainable_names: tuple[str, ...]
    replicated: bool
    publish: Callable[[], None]
    clear_gradients: Callable[[], None]

    def owned(self, rank: int, world_size: int) -> tuple[FlatBuffer, ...]:
        """The trainable buffers that this rank writes into a checkpoint: each element is written by one rank."""
        if not self.replicated:
            return self.buffers
        return tuple(b for i, b in enumerate(self.buffers) if i % world_size == rank)


def describe_partition(module: nn.Module, optimizer: Any, stage: int, shapes: dict[str, torch.Size]) -> Partition:
    """Read the layout of a DeepSpeed engine.

    Args:
        module: the user's model, whose parameters DeepSpeed manages.
        optimizer: `engine.optimizer`: the ZeRO optimizer (stages 1 to 3) or the plain one (stage 0).
        stage: the ZeRO stage.
        shapes: full shapes by name, taken before DeepSpeed split them.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    frozen_params = [p for p in module.parameters() if not p.requires_grad]
    trainable = tuple(name for name, p in module.named_parameters() if p.requires_grad)
    if stage == 3:
        frozen = tuple(_frozen_shard(p, names[id(p)], shapes) for p in frozen_params)
        buffers = _stage3_buffers(optimizer, names, shapes)
        return Partition(
            buffers,
            frozen,
            shapes,
            trainable,
            False,
            lambda: _publish_stage3(optimizer),
            lambda: _zero_stage3(optimizer, buffers),
        )
    frozen = tuple(_whole(p, names[id(p)]) for p in frozen_params)
    if stage == 0:
        buffers = tuple(_whole(p, name) for name, p in module.named_parameters() if p.requires_grad)
        return Partition(buffers, frozen, shapes, trainable, True, lambda: None, lambda: _zero_gradients(buffers))
    buffers = _stage12_buffers(optimizer, names)
    return Partition(buffers, frozen, shapes, trainable, False, optimizer.update_lp_params, lambda: _zero_gradients(buffers))


def _whole(param: Tensor, name: str) -> FlatBuffer:
    return FlatBuffer(param, param.detach().view(-1), (Segment(name, 0, 0, param.numel()),))


def _stage12_buffers(optimizer: Any, names: dict[int, str]) -> tuple[FlatBuffer, ...]:
    """Stages 1 and 2: each group is one flat tensor cut into equal parts, so that tensors straddle ranks."""
    buffers: list[FlatBuffer] = []
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
        begin = rank * optimizer.partition_size[group]
        end = begin + optimizer.partition_size[group]
        params, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
        spans = ((names[id(p)], int(offset), p.numel()) for p, offset in zip(params, offsets, strict=True))
        segments: list[Segment] = []
        for name, offset, numel in spans:
            low, high = max(offset, begin), min(offset + numel, end)
            if low < high:
                segments.append(Segment(name, low - offset, low - begin, high - low))
        buffers.append(FlatBuffer(master, master.detach(), tuple(segments)))
    return tuple(buffers)


def _stage3_buffers(optimizer: Any, names: dict[int, str], shapes: dict[str, torch.Size]) -> tuple[FlatBuffer, ...]:
    """Stage 3: each parameter is cut into equal parts by itself; a sub-group's parts follow one another."""
    buffers: list[FlatBuffer] = []
    for sub_group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        rank = torch.distributed.get_rank(optimizer.sub_group_process_groups[sub_group])
        segments: list[Segment] = []
        flat_start = 0
        for param in optimizer.fp16_groups[sub_group]:
            part = int(param.partition_numel())
            name = names[id(param)]
            length = min(part, shapes[name].numel() - rank * part)
            if length > 0:
                segments.append(Segment(name, rank * part, flat_start, length))
            flat_start += part
        buffers.append(FlatBuffer(master, master.detach(), tuple(segments)))
    return tuple(buffers)


def _frozen_shard(param: Any, name: str, shapes: dict[str, torch.Size]) -> FlatBuffer:
    part = int(param.ds_tensor.ds_numel)
    rank = torch.distributed.get_rank(param.ds_process_group)
    length = min(part, shapes[name].numel() - rank * part)
    segments = (Segment(name, rank * part, 0, length),) if length > 0 else ()
    return FlatBuffer(param, param.ds_tensor.detach(), segments)


def _publish_stage3(optimizer: Any) -> None:
    """Masters → parameter shards → the small parameters that every rank keeps gathered."""
    persistent: list[Any] = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
    for sub_group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        shards = optimizer.fp16_partitioned_groups_flat[sub_group]
        shards.data.copy_(master.data)
        parts = optimizer.unflatten(shards, optimizer.fp16_partitioned_groups[sub_group])
        for shard, part in zip(optimizer.fp16_partitioned_groups[sub_group], parts, strict=True):
            shard.data = part.data
    if persistent:
        persistent[0].all_gather(persistent)


def _zero_gradients(buffers: tuple[FlatBuffer, ...]) -> None:
    for buffer in buffers:
        if buffer.key.grad is not None:
            buffer.key.grad.zero_()


def _zero_stage3(optimizer: Any, buffers: tuple[FlatBuffer, ...]) -> None:
    _zero_gradients(buffers)
    optimizer.grad_partitions_flat_buffer.zero_()
