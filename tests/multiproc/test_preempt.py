"""SIGUSR1 or SIGTERM to one rank: all ranks checkpoint after the same step, end with 75, and go on from there."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from hermes_dist.parallel.checkpoint import list_checkpoints
from hermes_dist.parallel.runtime import EXIT_REQUEUE
from hermes_dist.parallel.stored import read_state
from tests.multiproc.ranks import run_ranks, start_ranks, wait_ranks
from tests.multiproc.train_worker import read_losses
from tests.train.test_trainer import changed, run_config

EVALUATION = "tests.multiproc.evaluation_worker"
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


@pytest.mark.multiproc
@pytest.mark.parametrize("stop_rank", [0, 1])
def test_a_signal_during_an_evaluation_stops_all_ranks_between_scans(stop_rank: int, tmp_path: Path) -> None:
    config = changed(run_config(tmp_path, scans=6, bootstrap=0), "train.global_batch=2", "train.max_steps=2")
    file, run = tmp_path / "config.json", config.run_dir
    file.write_text(json.dumps(config.model_dump(mode="json")))

    def scored() -> list[str]:
        return [line for path in run.glob("scored_*.txt") for line in path.read_text().splitlines()]

    results = wait_ranks(start_ranks(EVALUATION, [str(file), str(stop_rank)], 2))
    assert [code for code, _ in results] == [EXIT_REQUEUE] * 2, results
    (stored,) = list_checkpoints(run)
    assert (stored.step, read_state(stored)["evaluated_step"]) == (1, 0)
    assert 1 <= len(scored()) <= 3
    assert not (run / "evaluation" / "history.jsonl").exists()
    assert not (run / "checkpoints" / "best").exists()
    run_ranks(EVALUATION, [str(file), "-1"], 2)
    lines = (run / "evaluation" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    names = ["val", *(f"val{number}" for number in range(2, 7))]
    # At most the last scan of a step is done twice: rank 0 does not wait for it.
    assert set(scored()) == {f"{step} {name}" for step in (1, 2) for name in names}
    assert list_checkpoints(run)[0].step == 2
