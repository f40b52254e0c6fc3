"""What the data path must hold, and a simulation of whether it does: storage, workers, jitter, failures, any number of ranks.

The simulation is a synchronous training: each rank has its own workers and a bounded queue, all ranks start a step together, and
a step begins when the slowest rank has its samples. Pure numpy; 1,024 ranks × 1,000 steps take seconds. It does not know about
Ray's scheduling or network topology: storage is one bandwidth that all running reads share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hermes_dist.config import Vox3

STORED_BYTES_PER_VOXEL = 3.0
"""int16 image and uint8 label, before compression."""
CHUNK_VOX = 64


@dataclass(frozen=True)
class DataNeed:
    """Per sample and per node."""

    read_bytes_per_sample: float
    bytes_per_s_per_node: float
    cpu_cores_per_node: float


def read_bytes(patch_vox_zyx: Vox3, *, compression: float = 2.4, chunk_vox: int = CHUNK_VOX) -> float:
    """Mean bytes read for one random crop: whole chunks are fetched, so a crop of p voxels touches (p − 1)/c + 1 of them per "
    "axis."""
    chunks = math.prod((side - 1) / chunk_vox + 1 for side in patch_vox_zyx)
    return chunks * chunk_vox**3 * STORED_BYTES_PER_VOXEL / compression


def data_need(
    samples_per_s_per_node: float, patch_vox_zyx: Vox3, *, cpu_s_per_sample: float, compression: float = 2.4
) -> DataNeed:
    """What a node must stream and decode to feed its devices."""
    size = read_bytes(patch_vox_zyx, compression=compression)
    return DataNeed(size, size * samples_per_s_per_node, cpu_s_per_sample * samples_per_s_per_node)


@dataclass(frozen=True)
class DataPath:
    """A data path to simulate. Rates per rank; `storage_bytes_per_s` is shared by all ranks."""

    ranks: int
    samples_per_step: int
    """Of each rank."""
    compute_s: float
    """Step time without waiting for data."""
    workers: int
    prefetch: int
    """Finished samples per rank that may wait in the queue; those that workers are busy with come on top."""
    cpu_s_per_sample: float
    bytes_per_sample: float
    storage_bytes_per_s: float
    jitter: float = 0.3
    """Coefficient of variation of a sample's time (log-normal)."""
    failure_probability: float = 0.0
    """Per sample: a read that times out and is repeated."""
    failure_s: float = 5.0


@dataclass(frozen=True)
class Simulated:
    """Result: share of time lost to waiting, 95 % interval of a step's wait, and samples per second over all ranks."""

    stall_fraction: float
    wait_p50_s: float
    wait_p99_s: float
    samples_per_s: float


def simulate(path: DataPath, *, steps: int = 500, seed: int = 0) -> Simulated:
    """Run `steps` synchronous steps; the first tenth (filling the queues) is not counted."""
    rng = np.random.default_rng(seed)
    n, slots = path.samples_per_step, max(path.prefetch, path.samples_per_step)
    free = np.zeros((path.ranks, path.workers))
    released = np.zeros((path.ranks, slots))  # when each place of the queue was emptied
    sigma = math.sqrt(math.log(1 + path.jitter**2))
    mean_s = path.cpu_s_per_sample + _fetch_s(path)
    every = np.arange(path.ranks)
    clock, begin, waits, position = 0.0, 0.0, [], 0
    warm = steps // 10
    for step in range(steps):
        ready = np.zeros(path.ranks)
        for _ in range(n):
            service = mean_s * rng.lognormal(-(sigma**2) / 2, sigma, path.ranks)
            service += path.failure_s * (rng.random(path.ranks) < path.failure_probability)
            worker = free.argmin(axis=1)
            # A worker goes ahead while the queue is full; it holds its finished sample until a place is free.
            done = np.maximum(free[every, worker] + service, released[:, position % slots])
            free[every, worker] = done
            ready = np.maximum(ready, done)
            position += 1
        start = max(clock, float(ready.max()))
        if step >= warm:
            waits.append(start - clock)
        else:
            begin = start + path.compute_s
        used = np.arange(position - n, position) % slots
        released[:, used] = start  # a sample leaves the queue when its step begins
        clock = start + path.compute_s
    counted = max(len(waits), 1)
    return Simulated(
        stall_fraction=float(np.sum(waits)) / (clock - begin),
        wait_p50_s=float(np.quantile(waits, 0.5)),
        wait_p99_s=float(np.quantile(waits, 0.99)),
        samples_per_s=counted * n * path.ranks / (clock - begin),
    )


def _fetch_s(path: DataPath) -> float:
    """Mean time of one read: with its rank's share of the storage, or longer, so that busy workers get what it gives and no more.

    Each of the `streams` workers reads for `fetch` and computes for `cpu` seconds, in turn: together they read
    streams · bytes / (fetch + cpu) bytes per second, which is the storage's rate at `fetch` = streams · bytes / rate − cpu.
    """
    alone = path.bytes_per_sample * path.ranks / path.storage_bytes_per_s
    streams = path.ranks * path.workers
    return max(alone, streams * path.bytes_per_sample / path.storage_bytes_per_s - path.cpu_s_per_sample)
