"""The proof with the real server: a real two-rank training, started by a real sweep, over a web server that needs a cache.

Prometheus finds its ranks by itself, takes every expression of every panel and rule, and has data where there should be some.
Damaged cases and failing reads are injected, so that the panels about faults have something to show.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hermes_dist.telemetry.metrics import METRICS
from monitoring.dashboards.__main__ import BOARDS
from monitoring.dashboards.panels import PanelSpec
from tests.faults.range_server import RangeServer
from tests.monitoring.server import MONITORING, Prometheus, require, running
from tests.stream.tools import write_store

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = MONITORING.parent
RULES = yaml.safe_load((MONITORING / "alerts" / "rules.yml").read_text())["groups"][0]["rules"]
NEVER_HERE = {"hermes_law_value"}
"""What this short run does not have: a law needs seven runs."""


def base_config(url: str, cache: Path) -> dict[str, Any]:
    """A tiny Hermes-R over a store behind `url`, with everything that is monitored switched on."""
    faults = {"chaos": {"corrupt": 0.3, "transient": 0.2}, "backoff_s": 0.01}
    return {
        "run": {"seed": 3},
        "data": {"stores": [url], "patch_vox_zyx": [32, 32, 32]},
        "stream": {"object_store_mib": 100, "cache_mib": 64, "cache_dir": str(cache), "faults": faults},
        "model": {"base_channels": 8, "blocks": [1, 1, 1, 1]},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "train": {"global_batch": 2},
        "checkpoint": {"every_steps": 5, "keep": 1},
        "evaluate": {"every_steps": 5, "split": "train", "max_cases": 1, "overlap": 0, "bootstrap": 0},
        "monitor": {"prometheus_port": 0, "tensorboard": True, "log_every": 1},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the runs of a sweep under way: two ranks that go on and on, and one run that ends soon."""
    require("prometheus")
    folder = tmp_path_factory.mktemp("monitoring")
    write_store(folder / "store", "zarr")
    store = RangeServer(folder / "store")
    threading.Thread(target=store.serve_forever, daemon=True).start()
    (folder / "base.json").write_text(json.dumps(base_config(store.url, folder / "cache")))
    sweep = {
        "name": "proof",
        "study": "throughput",
        "base": str(folder / "base.json"),
        "output_dir": str(folder / "runs"),
        "points": [{"ranks": 2, "train.max_steps": 10_000}, {"train.max_steps": 3, "stream.backend": "inline"}],
        "at_once": 2,
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "launch/sweep.py", "--config", str(folder / "sweep.json")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield folder / "runs"
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
            store.shutdown()
            store.server_close()
    assert code == 143, (folder / "log").read_text()


@pytest.fixture(scope="module")
def server(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the committed configuration, once it has some seconds of history of both ranks."""
    with running(tmp_path_factory.mktemp("prometheus") / "server", runs) as server:
        history = 'min_over_time(hermes_steps_total{run=~"max_steps10000.*"}[8s] offset 4s) > 6'
        try:
            server.wait_for(lambda: len(server.query(history)) == 2, 400, "both ranks to be scraped for some seconds")
        except AssertionError as error:
            logs = [path.read_text()[-3000:] for path in [runs.parent / "log", *runs.glob("proof/*/log.txt")]]
            raise AssertionError("\n".join([str(error), *logs])) from None
        yield server


def has_data(server: Prometheus, expression: str) -> bool:
    return any(series["value"][1] != "NaN" for series in server.query(expression))


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_has_data(server: Prometheus, name: str) -> None:
    """Those that are empty while nothing goes wrong too: here something does."""
    panels: list[PanelSpec] = [p for p in BOARDS[name].panels if not any(m in q for q, _ in p.queries for m in NEVER_HERE)]
    for panel in panels:
        for expression, _ in panel.queries:
            server.wait_for(lambda e=expression: has_data(server, e), 60, f"{panel.title}: {expression}")


def test_every_metric_of_the_table_has_a_real_series(server: Prometheus) -> None:
    missing = [
        name
        for name, metric in METRICS.items()
        if not server.query(f"count({name}_count)" if metric.kind == "histogram" else f"count({name})")
    ]
    assert set(missing) <= NEVER_HERE | {"hermes_telemetry_errors_total"}
    steps = server.query('sum by (rank) (hermes_samples_total{run=~"max_steps10000.*"})')
    assert {series["metric"]["rank"] for series in steps} == {"0", "1"}
    parts = server.query('count by (part) (hermes_step_part_seconds_sum{run=~"max_steps10000.*",rank="0"})')
    expected = {"data_wait", "forward", "backward", "optimizer", "communication", "checkpoint"}
    assert {series["metric"]["part"] for series in parts} == expected
    causes = server.query("count by (cause) (hermes_data_wait_seconds_total)")
    assert {series["metric"]["cause"] for series in causes} == {"storage", "decode", "augment", "transfer", "queue"}


def test_waits_are_attributed_in_full_and_caches_and_faults_are_counted(server: Prometheus) -> None:
    def value(expression: str) -> float:
        return float(server.query(expression)[0]["value"][1])

    waited = value('sum(hermes_step_part_seconds_sum{part="data_wait"}) / sum(hermes_data_wait_seconds_total)')
    assert waited == pytest.approx(1, rel=0.2), "two numbers of one scrape"
    assert value("sum(hermes_cache_misses_total)") > 0
    assert value("sum(hermes_cache_hits_total)") > value("sum(hermes_cache_misses_total)") / 10
    assert value("max(hermes_cache_used_bytes)") > 0
    assert 0 < value("sum(hermes_fetched_bytes_total)") < value("sum(hermes_read_bytes_total)")
    assert value("sum(hermes_quarantined_cases_total)") > 0
    assert value("sum(hermes_quarantine_cases)") > 0
    assert value("sum(hermes_storage_retries_total)") > 0
    assert value("sum(hermes_read_bytes_total) / sum(hermes_samples_total)") > 1e3
    assert value("max(hermes_mfu_ratio)") > 0
    assert value("min(hermes_object_store_limit_bytes)") == pytest.approx(2 * (100 << 20), rel=0.01)  # for each of two ranks


def test_every_rule_is_healthy_and_has_the_series_that_it_asks_for(server: Prometheus) -> None:
    def rules() -> list[dict[str, str]]:
        return [rule for group in server.get("rules")["groups"] for rule in group["rules"]]

    server.wait_for(lambda: all(rule["health"] == "ok" for rule in rules()), 20, "the rules to be evaluated")
    for rule in RULES:
        for series in re.findall(r"(hermes_[a-z0-9_]+(?:\{[^}]*\})?|up\{[^}]*\})", rule["expr"]):
            assert server.query(f"count({series})"), f"{rule['alert']}: no {series}"
    firing = {rule["name"] for rule in rules() if rule["state"] == "firing"}
    assert firing <= {"HermesQuarantineGrowing"}


def test_promtool_finds_no_fault_in_what_a_rank_serves(server: Prometheus) -> None:
    for target in server.get("targets")["activeTargets"]:
        if target["health"] != "up":
            continue
        with urllib.request.urlopen(target["scrapeUrl"], timeout=10) as answer:
            text = answer.read()
        done = subprocess.run([require("promtool"), "check", "metrics"], input=text, capture_output=True, timeout=30)
        assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_tensorboard_has_the_same_run(server: Prometheus, runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = runs.glob("proof/max_steps10000*/tensorboard")
    found = EventAccumulator(str(events))
    found.Reload()
    assert {"loss", "lr", "grad_norm", "parts_s/backward", "wait_parts_s/storage"} <= set(found.Tags()["scalars"])
