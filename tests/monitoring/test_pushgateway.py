"""The real Pushgateway takes what a rank pushes, and gives it to the real Prometheus under the rank's own labels."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hermes_dist.config import MonitorConfig
from hermes_dist.telemetry import prometheus
from hermes_dist.telemetry.telemetry import Telemetry
from tests.monitoring.server import free_port, require, running


@pytest.fixture(autouse=True)
def pushed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "PUSH_EVERY_S", 0.2)


@contextmanager
def pushgateway() -> Iterator[str]:
    """`host:port` of a running Pushgateway."""
    program, address = require("prometheus-pushgateway"), f"127.0.0.1:{free_port()}"
    gateway = subprocess.Popen([program, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(f"http://{address}/-/ready")
        yield address
    finally:
        gateway.terminate()
        gateway.wait(20)


def pushing(folder: Path, address: str, rank: int) -> Telemetry:
    """A rank of two that has trained 8 + rank steps."""
    config = MonitorConfig(prometheus_port=-1, pushgateway=f"http://{address}")
    telemetry = Telemetry(folder, config, rank=rank, world_size=2, run_name="demo")
    telemetry.step({"step": 7 + rank, "step_s": 0.5, "loss": 0.25})
    return telemetry


def test_ranks_push_side_by_side_and_leave_nothing_behind(tmp_path: Path) -> None:
    with pushgateway() as address:
        ranks = [pushing(tmp_path, address, rank) for rank in range(2)]
        for rank in range(2):
            _await(f"http://{address}/metrics", f'hermes_step{{instance="",job="hermes",rank="{rank}",run="demo"}} {7 + rank}')
        ranks[0].close()
        text = _await(f"http://{address}/metrics")
        assert 'rank="0",run="demo"' not in text
        assert 'rank="1",run="demo"' in text
        ranks[1].close()
        assert "hermes_step{" not in _await(f"http://{address}/metrics")


@pytest.mark.slow
def test_prometheus_scrapes_what_was_pushed_until_the_run_ends(tmp_path: Path) -> None:
    require("prometheus")
    with pushgateway() as address, running(tmp_path / "server", tmp_path / "runs", address) as server:
        telemetry = pushing(tmp_path / "runs" / "demo", address, 0)
        step = 'hermes_step{run="demo",rank="0",job="hermes"}'
        server.wait_for(lambda: server.query(step), 30, "the pushed step")
        telemetry.close()
        server.wait_for(lambda: not server.query(step), 30, "the step of the finished run to go")


def _await(url: str, text: str = "") -> str:
    for _ in range(200):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found = answer.read().decode()
            if text in found:
                return found
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} does not answer, or not with {text!r}")
