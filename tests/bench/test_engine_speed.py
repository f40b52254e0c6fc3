"""What the engine costs: a step against a bare PyTorch loop, two ranks against one, and steps while a checkpoint is written.

CPU seconds mean something on a busy machine too, wall seconds only on an idle one with two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASE = {"size": "small", "stage": 1, "ranks": 1, "patch": [48, 48, 48]}


def measure(what: str, **case: Any) -> dict[str, Any]:
    """One bench of engine_speed_worker.py in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.engine_speed_worker", what, json.dumps({**CASE, **case})]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.bench
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_overhead_over_a_bare_loop(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure("overhead", optimizer=optimizer, ema=False, repeats=15)
    ratios = {kind: found["engine"][kind] / found["bare"][kind] for kind in ("cpu_s", "wall_s")}
    with capsys.disabled():
        print(f"\n{optimizer}: bare {found['bare']}, engine {found['engine']}, ratios {ratios}")
    assert ratios["cpu_s"] <= 1.1


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_weak_scaling_from_one_rank_to_two(capsys: pytest.CaptureFixture[str]) -> None:
    found = measure("scaling", repeats=5, rounds=2)
    efficiency = found["one"] / found["two"]
    with capsys.disabled():
        machine = found["one"] / found["apart"]
        print(f"\nweak scaling 1 to 2 ranks: {efficiency:.1%} ({found}); two processes that do not talk: {machine:.1%}")
    assert efficiency >= 0.85


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_step_time_while_a_checkpoint_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    found = measure("checkpoint", size="base", ranks=2, patch=[32, 32, 32], rounds=3)
    with capsys.disabled():
        print(f"\n{found}")
    assert found["steps_while_writing"] > 3, "the checkpoints were written within one step each: take a larger model"
    assert found["writing"]["wall_s"] <= 1.3 * found["quiet"]["wall_s"]
