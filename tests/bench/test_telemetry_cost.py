"""What monitoring costs, in CPU seconds: a step's report with 84 classes, a scrape, and both as a share of a real training.

pytest tests/bench/test_telemetry_cost.py -m bench -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from hermes_dist.config import MonitorConfig
from hermes_dist.telemetry.telemetry import Telemetry
from tests.stream.tools import write_store
from tests.telemetry.test_telemetry import ROW

ROOT = Path(__file__).resolve().parents[2]
FASTEST_STEP_S = 0.145
"""Two 128³ patches on the fastest card that figures were found for."""
SCRAPE_EVERY_S = 5
STEPS = 40
SHARE = """
import sys, time
import hermes_dist.telemetry.telemetry as room
spent, step = [], room.Telemetry.step
def timed(self, row):
    begin = time.process_time()
    step(self, row)
    spent.append(time.process_time() - begin)
room.Telemetry.step = timed
import hermes_dist.train.trainer as trainer
one, steps = trainer._one_step, []
def timed_step(*args):
    begin = time.process_time()
    loss = one(*args)
    steps.append(time.process_time() - begin)
    return loss
trainer._one_step = timed_step
sys.argv[0] = "launch/train.py"
from launch.train import main
code = main()
print("SHARE", sum(spent[5:]) / sum(steps[5:]), 1e3 * sum(spent[5:]) / len(spent[5:]), 1e3 * sum(steps[5:]) / len(steps[5:]))
raise SystemExit(code)
"""


def cpu_s(action: Any, times: int) -> float:
    action()
    begin = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - begin) / times


@pytest.mark.bench
def test_a_step_and_a_scrape_cost_less_than_one_per_cent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {f"d{i % 11}/c{i}": {"bce": 0.1, "dice": 0.2} for i in range(84)}
    counts = dict.fromkeys(tasks, 1)
    row = {**ROW, "task_loss": tasks, "task_pairs": counts, "task_foreground": counts}
    telemetry = Telemetry(tmp_path, MonitorConfig(prometheus_port=0), run_name="demo")
    step_s = cpu_s(lambda: telemetry.step(row), 200)
    scrape_s = cpu_s(lambda: generate_latest(telemetry._meters.registry), 20)
    telemetry.close()
    share = step_s / FASTEST_STEP_S + scrape_s / SCRAPE_EVERY_S
    with capsys.disabled():
        print(
            f"\nreport of a step {1e3 * step_s:.2f} ms, a scrape {1e3 * scrape_s:.2f} ms CPU: {share:.2%} of {FASTEST_STEP_S} s"
        )
    assert share < 0.01


@pytest.mark.bench
def test_the_share_of_a_real_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The smallest Hermes-R on 32³ patches: the shortest steps that this project has."""
    write_store(tmp_path / "store", "zarr")
    config = {
        "run": {"name": "share", "output_dir": str(tmp_path)},
        "data": {"stores": [str(tmp_path / "store")], "patch_vox_zyx": [32, 32, 32]},
        "stream": {"backend": "inline"},
        "model": {"base_channels": 8, "blocks": [1, 1, 1, 1]},
        "train": {"global_batch": 2, "max_steps": STEPS},
        "monitor": {"prometheus_port": 0},
    }
    (tmp_path / "share.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", SHARE, "--config", str(tmp_path / "share.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    share, report_ms, step_ms = map(float, done.stdout.split("SHARE")[1].split())
    with capsys.disabled():
        print(f"\ntelemetry {report_ms:.2f} ms of {step_ms:.0f} ms CPU a step: {share:.2%}")
    assert share < 0.01
