"""A world of one: collectives are identities, signals become a request to stop. Several ranks: tests/multiproc."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hermes_dist.config import validate
from hermes_dist.errors import WaitTimeoutError
from hermes_dist.parallel.runtime import STOP_SIGNALS, Runtime, interface_towards, start


def test_collectives_of_one(runtime: Runtime) -> None:
    runtime.barrier()
    assert runtime.sum(torch.tensor([2.0])).tolist() == [2.0]
    assert runtime.broadcast_int(7) == 7
    assert [a.tolist() for a in runtime.gather_int64(np.array([1, 2], dtype=np.int64))] == [[1, 2]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_ask_to_stop_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    session = start(validate({}))
    os.kill(os.getpid(), number)
    assert session.stop_requested
    session.close()
    assert signal.getsignal(number) == before


def test_ranks_that_stop_ignore_what_srun_sends_them_then(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that died of the signal would hide exit code 75."""
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    session = start(validate({}))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)  # the group of one is the fixture's
    session.world_size = 2
    session.stop_requested = True
    try:
        session.close()
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_only_lost_peers_are_explained(runtime: Runtime) -> None:
    bug = RuntimeError("shape mismatch")
    assert runtime.explain(bug, "step") is bug
    lost = runtime.explain(RuntimeError("[pair.cc:537] Read error: Connection reset by peer\nmore"), "sum over ranks")
    assert isinstance(lost, WaitTimeoutError)
    assert "rank 0, step" in str(lost)
    assert "sum over ranks did not complete within 60 s" in str(lost)


def test_the_interface_is_the_one_that_reaches_the_master() -> None:
    assert interface_towards("127.0.0.1", 29500) == "lo"
    assert interface_towards("no-such-host.invalid", 29500) is None
