"""kill -9 at random instants, also while a checkpoint is being written: the run always goes on, bitwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multiproc.ranks import ROOT, run_ranks
from tests.multiproc.train_worker import read_losses

TRAIN = "tests.multiproc.train_worker"


def run_campaign(run_dir: Path, kills: int, seed: int) -> dict[str, int]:
    run_dir.mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.kill_campaign", str(run_dir), str(kills), str(seed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.faults
@pytest.mark.multiproc
@pytest.mark.timeout(1500)
def test_killed_at_fifty_random_instants_the_curve_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    report = run_campaign(tmp_path / "killed", kills=50, seed=50)
    assert report["codes"] == [0, 0], (tmp_path / "killed" / "log-0.txt").read_text()[-3000:]
    print(report)
    whole = tmp_path / "whole"
    whole.mkdir()
    steps = report["reached"] + 5
    run_ranks(TRAIN, [str(whole), str(steps), '{"save_every": 1000000}'], 2)
    killed = read_losses(tmp_path / "killed")
    assert sorted(killed) == list(range(steps))
    assert killed == read_losses(whole)
