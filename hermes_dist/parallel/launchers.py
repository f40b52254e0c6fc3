"""Who started this process: the place in the world as the launcher's environment describes it.

Pure: reads a mapping, returns values. Known are `deepspeed` and `torchrun` (RANK, WORLD_SIZE, MASTER_ADDR), `srun`
(SLURM_STEP_*), and plain python, which is a world of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hermes_dist.errors import UsageError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Place:
    """One process among all. `master` is None for a world of one, which needs no rendezvous."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str
    master: tuple[str, int] | None


def read_place(env: Mapping[str, str]) -> Place:
    """Rank and world from the launcher's variables.

    Raises:
        UsageError: half a launcher's variables are set (for example RANK without MASTER_ADDR), or a value is no integer.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment"
        return _place(env, launcher, ("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return _place(env, "srun", ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"), ("SLURM_NTASKS_PER_NODE",))
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = "WORLD_SIZE" if "RANK" in env else "RANK"
        raise UsageError(f"{missing} is not set although its partner is: start with deepspeed, torchrun or srun, or unset both")
    return Place(0, 0, 1, 1, "python", None)


def _place(env: Mapping[str, str], launcher: str, names: tuple[str, str, str], local_sizes: tuple[str, ...]) -> Place:
    rank, local_rank, world_size = (_integer(env, name, 0) for name in names)
    local_size = next((_integer(env, name, 1) for name in local_sizes if name in env), world_size)
    if not 0 <= rank < world_size:
        raise UsageError(f"{names[0]}={rank} does not lie in a world of {names[2]}={world_size}")
    if world_size == 1:
        return Place(0, local_rank, 1, 1, launcher, None)
    address = env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR") or _first_host(env.get("SLURM_STEP_NODELIST", ""))
    if not address:
        raise UsageError(
            f"MASTER_ADDR is not set, and {world_size} processes need an address to meet: export the first host's name"
        )
    # Two jobs on one host must not meet each other, so srun's default port comes from the job's number.
    port = _integer(env, "MASTER_PORT", DEFAULT_PORT + _integer(env, "SLURM_JOB_ID", 0) % 1000)
    return Place(rank, local_rank, world_size, local_size, launcher, (address, port))


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}={text!r} is not an integer; it is set by the launcher") from None


def _first_host(nodelist: str) -> str:
    """First host of a Slurm list such as `gpu[07-09,12],cpu3` → `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodelist)
    return "" if match is None else match.group(1) + (match.group(2) or "")
