"""What all ranks must see alike: an answer of rank 0's, and the directory that they write to."""

from __future__ import annotations

import json
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hermes_dist.errors import CheckpointError, HermesError
from hermes_dist.parallel.runtime import Runtime

SHARED_LIMIT_S = 60.0
"""A network file system may show a new file that late."""
_LOOK_S = 0.05


def ask_rank_0(runtime: Runtime, answer: Callable[[], Any]) -> Any:
    """Rank 0's (JSON-able) answer on every rank. Collective.

    Only rank 0 decides from what it sees in a directory: listings of a network file system may be seconds old on other
    hosts. If it fails, all ranks fail, so that none waits for the others.

    Raises:
        CheckpointError: rank 0's error.
    """
    lines: list[str] = []
    if runtime.rank == 0:
        try:
            lines = [json.dumps({"answer": answer()})]
        except (HermesError, OSError) as error:
            lines = [json.dumps({"error": str(error)})]
    reply = json.loads(runtime.gather_lines(lines)[0])
    if "error" in reply:
        raise CheckpointError(reply["error"])
    return reply["answer"]


def check_shared(folder: Path, runtime: Runtime) -> None:
    """See that all ranks mean one directory by `folder`, which is made. Collective. Found later, it costs the first checkpoint.

    Raises:
        CheckpointError: on all ranks, if one does not see what rank 0 wrote; its own message names host and file.
    """
    if runtime.world_size == 1:
        return

    def leave_token() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / f".shared-{secrets.token_hex(5)}"
        token.touch()
        return token.name

    token = folder / ask_rank_0(runtime, leave_token)
    # The others wait in the sum below, for at most the limit.
    deadline = time.monotonic() + min(SHARED_LIMIT_S, runtime.limit_s / 2)
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    if not seen:
        print(f"error: rank {runtime.rank} on {socket.gethostname()} does not see {token}", file=sys.stderr, flush=True)
    unseen = int(runtime.sum(torch.tensor([int(not seen)]))[0])
    if runtime.rank == 0:
        token.unlink(missing_ok=True)
    if unseen:
        raise CheckpointError(
            f"{folder}: {unseen} of {runtime.world_size} ranks do not see a file that rank 0 wrote there; their messages name "
            "the hosts. Checkpoints need one file system, mounted at the same path on all hosts: set run.output_dir to it"
        )
