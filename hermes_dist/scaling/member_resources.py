"""What a member gets of its host: GPUs of its own and a number of threads, through its environment.

Without that, members that run at a time would all start on the first GPU, and a run of one rank would compute on all cores
while launchers give each of several ranks one, so that the two could not be compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch

from hermes_dist.errors import UsageError
from hermes_dist.scaling.sweep import Member, SweepConfig

GPU_HOST_THREADS = 4
"""Most threads of a rank that computes on a GPU: the other cores belong to the data workers."""


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Ids of the GPUs that members may use: those of CUDA_VISIBLE_DEVICES, else all of the host; empty without GPUs."""
    if environment.get("DS_ACCELERATOR") == "cpu":
        return []
    count = torch.cuda.device_count()
    named = environment.get("CUDA_VISIBLE_DEVICES")
    ids = [str(i) for i in range(count)] if named is None else [part.strip() for part in named.split(",") if part.strip()]
    return ids[:count]  # CUDA stops at the first id that does not exist


def check_gpus(members: Iterable[Member], gpus: Sequence[str]) -> None:
    """Raises UsageError if a member has more ranks than there are GPUs. A host without GPUs computes on its CPU."""
    for member in members:
        if 0 < len(gpus) < member.ranks:
            raise UsageError(
                f"{member.name}: {member.ranks} ranks, and {len(gpus)} GPU(s) are visible here ({', '.join(gpus)}); take fewer "
                "ranks or a larger host, or compute on the CPU with DS_ACCELERATOR=cpu"
            )


def threads_per_rank(sweep: SweepConfig, ranks: int, *, at_once: int, gpus: bool) -> int:
    """Threads of each rank: one in a throughput study, so that ranks are compared alike; else a fair share of the cores."""
    if sweep.study == "throughput":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // (at_once * ranks))
    return min(share, GPU_HOST_THREADS) if gpus else share


def member_environment(gpus: Sequence[str], threads: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a member's processes. OMP_NUM_THREADS of the sweep's own environment goes first."""
    changed = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(threads)}
    if gpus:
        changed["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return {**environment, **changed}
