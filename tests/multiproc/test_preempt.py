"""SIGUSR1 or SIGTERM to one rank: all ranks checkpoint after the same step, end with 75, and go on from there."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from hermes_dist.parallel.checkpoint import list_checkpoints
from hermes_dist.parallel.runtime import EXIT_REQUEUE
from tests.multiproc.ranks import run_ranks, start_ranks, wait_ranks
from tests.multiproc.train_worker import read_losses

TRAIN = "tests.multiproc.train_worker"
OPTIONS = '{"save_every": 1000000, "sleep_s": 0.05}'


@pytest.mark.multiproc
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    ranks = start_ranks(TRAIN, [str(tmp_path), "1000000", OPTIONS], 2)
    deadline = time.monotonic() + 240
    while not (tmp_path / "losses.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks[1].send_signal(number)
    results = wait_ranks(ranks)
    assert [code for code, _ in results] == [EXIT_REQUEUE] * 2, results
    (stored,) = list_checkpoints(tmp_path)
    done = max(read_losses(tmp_path)) + 1
    assert stored.step == done
    run_ranks(TRAIN, [str(tmp_path), str(done + 3), OPTIONS], 2)
    assert sorted(read_losses(tmp_path)) == list(range(done + 3))
