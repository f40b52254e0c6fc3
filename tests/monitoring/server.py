"""A real Prometheus for tests: Debian's package, a private configuration, a free port on loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

MONITORING = Path(__file__).resolve().parents[2] / "monitoring"
WINDOW = "30s"


def require(program: str) -> str:
    """Path of Debian's prometheus or promtool; the test is skipped where it is absent."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed; run monitoring/install_prometheus.sh")
    return path


def free_port() -> int:
    """A TCP port on loopback that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an API answer. Raises RuntimeError with Prometheus' own message for a wrong expression."""
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{parameters}: {json.load(error)['error']}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an expression at this moment, with Grafana's variables filled in as `All`."""
        for variable in ("run", "rank", "dataset"):
            expression = expression.replace(f"${variable}", ".*")
        return self.get("query", query=expression.replace("$__rate_interval", WINDOW))["result"]

    def wait_for(self, condition: Callable[[], object], limit_s: float, what: str) -> None:
        """Poll until true. Raises AssertionError naming what it waited for."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
            time.sleep(0.5)


@contextmanager
def running(folder: Path, runs: Path, pushgateway: str = "127.0.0.1:1") -> Iterator[Prometheus]:
    """The committed configuration with faster scraping, pointed at `runs` and at a Pushgateway; stopped at the end."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(MONITORING / "alerts" / "rules.yml")]
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [f"{runs}/.prometheus/*.json"], "refresh_interval": "1s"}]
    config["scrape_configs"][1]["static_configs"] = [{"targets": [pushgateway]}]
    folder.mkdir(parents=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [require("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    log = (folder / "log").open("w")
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        server = Prometheus(port)
        server.wait_for(lambda: process.poll() is not None or _ready(server), 30, "Prometheus to start")
        assert process.poll() is None, (folder / "log").read_text()
        yield server
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def _ready(server: Prometheus) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/-/ready", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
