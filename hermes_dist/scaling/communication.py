"""What a step sends: bytes per rank by ZeRO stage, and the time of ring collectives over two levels of links.

Sources: ZeRO paper (section 7: stages 1 and 2 send what data parallelism sends, stage 3 half as much again), ring all-reduce =
reduce-scatter + all-gather, each (W − 1)/W of the buffer. Gradients and parameters travel in float32, as this trainer keeps them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LATENCY_S = 20e-6
"""Start-up time of one hop of a collective."""
BUCKETS = 10
"""Collectives a pass is split into, order of magnitude."""


@dataclass(frozen=True)
class Cluster:
    """Links: `link_bytes_per_s` per device inside a node, `node_bytes_per_s` per node between nodes."""

    devices_per_node: int
    link_bytes_per_s: float
    node_bytes_per_s: float


def step_bytes(parameters: int, stage: int, world_size: int, *, micro_steps: int = 1) -> float:
    """Bytes that each rank sends per global step.

    Stages 0 and 1 reduce gradients once a step; stage 2 reduces after each micro-batch (that is how it frees them); stage 3
    also gathers the parameters in the forward and in the backward pass of each micro-batch.
    """
    if world_size == 1:
        return 0.0
    once = 4.0 * parameters * (world_size - 1) / world_size
    if stage <= 1:
        return 2 * once
    if stage == 2:
        return (micro_steps + 1) * once
    return 3 * micro_steps * once


def step_seconds(parameters: int, stage: int, world_size: int, cluster: Cluster, *, micro_steps: int = 1) -> float:
    """Time of a step's collectives if nothing overlaps: the slowest link of the ring decides, plus a latency per hop."""
    volume = step_bytes(parameters, stage, world_size, micro_steps=micro_steps)
    if not volume:
        return 0.0
    nodes = math.ceil(world_size / cluster.devices_per_node)
    # One ring through all devices crosses each node's link once in each direction, whatever the devices per node.
    slowest = cluster.link_bytes_per_s if nodes == 1 else min(cluster.link_bytes_per_s, cluster.node_bytes_per_s)
    hops = min(world_size, cluster.devices_per_node) + nodes
    return volume / slowest + BUCKETS * LATENCY_S * hops
