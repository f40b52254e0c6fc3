"""The proof with the real server: it finds the ranks, takes every expression, and has data where there should be some."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitoring.dashboards.__main__ import BOARDS
from tests.monitoring.server import MONITORING, Prometheus, require, running

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]

FAKE_RANK = Path(__file__).with_name("fake_rank.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, scraping two processes that report like ranks."""
    require("prometheus")
    folder = tmp_path_factory.mktemp("monitoring")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(FAKE_RANK), str(folder / "runs" / "fake"), str(rank), "2", "120"], cwd=MONITORING.parent
        )
        for rank in range(2)
    ]
    try:
        with running(folder / "server", folder / "runs") as server:
            server.wait_for(lambda: len(server.query("up == 1")) == 2, 60, "both ranks to be scraped")
            server.wait_for(
                lambda: len(server.query("min_over_time(hermes_steps_total[12s] offset 8s)")) == 2, 60, "some seconds of history"
            )
            yield server
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_has_data(server: Prometheus, name: str) -> None:
    for panel in BOARDS[name].panels:
        for expression, _ in panel.queries:
            series = server.query(expression)
            assert series or panel.quiet, f"{panel.title}: no data for {expression}"
            assert panel.quiet or any(s["value"][1] != "NaN" for s in series), f"{panel.title}: only NaN for {expression}"


def test_every_rule_is_healthy_and_silent(server: Prometheus) -> None:
    def rules() -> list[dict[str, str]]:
        return [rule for group in server.get("rules")["groups"] for rule in group["rules"]]

    server.wait_for(lambda: all(rule["health"] == "ok" for rule in rules()), 20, "the rules to be evaluated")
    assert {rule["state"] for rule in rules()} == {"inactive"}


def test_promtool_finds_no_fault_in_what_a_rank_serves(server: Prometheus) -> None:
    target = server.get("targets")["activeTargets"][0]["scrapeUrl"]
    with urllib.request.urlopen(target, timeout=10) as answer:
        text = answer.read()
    done = subprocess.run([require("promtool"), "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
