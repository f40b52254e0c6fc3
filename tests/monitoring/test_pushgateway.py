"""The real Pushgateway takes what a rank pushes, and gives it to Prometheus under the rank's own labels."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from hermes_dist.config import MonitorConfig
from hermes_dist.telemetry.telemetry import Telemetry
from tests.monitoring.server import free_port, require


def test_ranks_push_side_by_side(tmp_path: Path) -> None:
    program, address = require("prometheus-pushgateway"), f"127.0.0.1:{free_port()}"
    gateway = subprocess.Popen([program, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(f"http://{address}/-/ready")
        config = MonitorConfig(prometheus_port=-1, pushgateway=f"http://{address}")
        for rank in range(2):
            telemetry = Telemetry(tmp_path, config, rank=rank, world_size=2, run_name="demo")
            telemetry.step({"step": 7 + rank, "step_s": 0.5, "loss": 0.25})
            telemetry.close()
        text = _await(f"http://{address}/metrics")
    finally:
        gateway.terminate()
        gateway.wait(20)
    for rank in range(2):
        assert f'hermes_step{{instance="",job="hermes",rank="{rank}",run="demo"}} {7 + rank}' in text


def _await(url: str) -> str:
    for _ in range(200):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")
