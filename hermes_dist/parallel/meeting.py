"""Meeting again after a restart: a part of the launcher's key-value store that no earlier attempt has written to.

torchrun keeps one store over its restarts (measured with torch 2.13: the shared rendezvous store), so new ranks find the
addresses of dead ones and cannot connect. Its restart counter differs between hosts once one of them joined later. So the ranks
agree on a name themselves: each writes a fresh number, rank 0 calls the roll until every rank has answered this very roll.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from hermes_dist.errors import WaitTimeoutError

POLL_S = 0.05
PREFIX = "hermes/meeting"


def agree_on_name(store: dist.Store, rank: int, world_size: int, limit_s: float) -> str:
    """A name that the ranks of this attempt share, and nobody before them.

    Raises:
        WaitTimeoutError: a rank did not answer in time.
    """
    number, deadline = uuid.uuid4().hex, time.monotonic() + limit_s
    store.set(f"{PREFIX}/{world_size}/number/{rank}", number)
    while time.monotonic() < deadline:
        roll = _call_roll(store, world_size) if rank == 0 else _read(store, f"{PREFIX}/{world_size}/roll")
        if number in roll.split(","):
            name = hashlib.blake2b(roll.encode(), digest_size=8).hexdigest()
            store.set(f"{PREFIX}/{name}/here/{rank}", "1")
            if store.check([f"{PREFIX}/{name}/here/{r}" for r in range(world_size)]):
                return name
        time.sleep(POLL_S)
    raise WaitTimeoutError(
        f"rank {rank} of {world_size} met no complete roll of the others in {limit_s:.0f} s; check that every rank was started"
    )


def _call_roll(store: dist.Store, world_size: int) -> str:
    """Rank 0: write down the newest number of every rank."""
    roll = ",".join(_read(store, f"{PREFIX}/{world_size}/number/{r}") for r in range(world_size))
    store.set(f"{PREFIX}/{world_size}/roll", roll)
    return roll


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def agent_store(address: str, port: int, rank: int, world_size: int, limit_s: float) -> dist.Store:
    """The store of torchrun's agent, in a part of its own for this attempt."""
    store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timedelta(seconds=limit_s))
    return dist.PrefixStore(f"{PREFIX}/{agree_on_name(store, rank, world_size, limit_s)}", store)
