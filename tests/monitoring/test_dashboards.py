"""The dashboards: code and JSON agree, every panel explains itself, every expression uses metrics and labels that exist."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from hermes_dist.telemetry.metrics import METRICS, RUN_LABELS
from monitoring.dashboards.__main__ import BOARDS, FOLDER, render
from monitoring.dashboards.panels import PanelSpec

PANELS = [pytest.param(panel, id=f"{name}-{panel.title}") for name, board in BOARDS.items() for panel in board.panels]
RULES = yaml.safe_load((FOLDER.parent.parent / "alerts" / "rules.yml").read_text())["groups"][0]["rules"]
SERIES = re.compile(r"(hermes_[a-z0-9_]+)(?:\{([^}]*)\})?")
OWN_TITLES = {"Hermes · Run overview", "Hermes · Data path", "Hermes · Per-dataset learning", "Hermes · Distributed health"}


def metric_of(series: str) -> str:
    return next(name for name in (series, re.sub(r"_(bucket|sum|count)$", "", series)) if name in METRICS)


@pytest.mark.parametrize("name", BOARDS)
def test_committed_json_is_what_the_code_makes(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == render(BOARDS[name]), "run: python -m monitoring.dashboards"


def test_the_five_dashboards_have_their_own_ids() -> None:
    assert {board.title for board in BOARDS.values()} == OWN_TITLES | {"Hermes · Scaling studies"}
    assert len({board.uid for board in BOARDS.values()}) == 5


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_explains_itself_and_asks_for_things_that_exist(panel: PanelSpec) -> None:
    assert len(panel.description) > 50
    for expression, _ in panel.queries:
        for series, selector in SERIES.findall(expression):
            metric = METRICS[metric_of(series)]
            labels = set(re.findall(r"([a-z_]+)=~?\"", selector))
            assert labels <= {*RUN_LABELS, *metric.labels}, series
            assert series == metric.name or metric.kind == "histogram"


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_the_grid_without_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((FOLDER / f"{name}.json").read_text())["panels"]:
        grid = panel["gridPos"]
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert grid["x"] + grid["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_metric_is_shown_or_alerted_on() -> None:
    text = " ".join(expression for board in BOARDS.values() for panel in board.panels for expression, _ in panel.queries)
    text += " ".join(rule["expr"] for rule in RULES)
    used = {metric_of(series) for series, _ in SERIES.findall(text)}
    not_shown = {
        "hermes_device_peak_flops",  # MFU is exported beside it
        "hermes_last_gradient_norm",  # the histogram is shown
        "hermes_cache_used_bytes",
        "hermes_checkpoint_step",
        "hermes_evaluation_duration_seconds",
        "hermes_telemetry_errors_total",
    }
    assert set(METRICS) - used == not_shown


def test_parts_of_a_step_are_spread_over_all_steps() -> None:
    """A checkpoint is observed only in the steps that save one: its own count would show seconds per checkpoint."""
    expressions = [expression for board in BOARDS.values() for panel in board.panels for expression, _ in panel.queries]
    assert any("hermes_step_part_seconds_sum" in e and "hermes_step_duration_seconds_count" in e for e in expressions)
    assert not [e for e in expressions if "hermes_step_part_seconds_count" in e]


def test_pushed_metrics_are_scraped_under_their_own_labels() -> None:
    jobs = yaml.safe_load((FOLDER.parent.parent / "prometheus.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["hermes", "pushgateway"]
    assert jobs[1]["honor_labels"] is True
    down = [rule["expr"] for rule in RULES if "up{" in rule["expr"]]
    assert down == ['up{job="hermes"} == 0'], "a Pushgateway that is not there is no fault"


def test_alerts_ask_for_metrics_that_exist_and_say_what_to_do() -> None:
    for rule in RULES:
        for series, _ in SERIES.findall(rule["expr"]):
            assert metric_of(series)
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert len(rule["annotations"]["description"]) > 50


@pytest.mark.parametrize("name", BOARDS)
def test_grafana_s_own_types_read_the_json_without_loss(name: str) -> None:
    """Parsed into the SDK's classes, made from Grafana's schema, and written again: nothing unknown, nothing lost."""
    data = json.loads((FOLDER / f"{name}.json").read_text())
    again = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(data)))
    assert again == data
    for panel in data["panels"]:
        refs = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(refs)) == len(refs)
    assert len({panel["id"] for panel in data["panels"]}) == len(data["panels"])


@pytest.mark.parametrize("name", BOARDS)
def test_every_variable_that_is_used_is_offered(name: str) -> None:
    data = json.loads((FOLDER / f"{name}.json").read_text())
    offered = {variable["name"] for variable in data["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(data)))
    assert used <= offered
    for variable in data["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            assert label in (*RUN_LABELS, *METRICS[metric].labels)


def test_the_compose_file_puts_everything_where_it_is_looked_for() -> None:
    """Mounts, provisioning paths and the scrape configuration name the same places."""
    folder = FOLDER.parent.parent
    services = yaml.safe_load((folder / "docker-compose.yml").read_text())["services"]
    mounts = {s: dict(reversed(v.split(":")[:2]) for v in services[s]["volumes"]) for s in ("grafana", "prometheus")}
    (provider,) = yaml.safe_load((folder / "grafana/provisioning/dashboards/hermes.yml").read_text())["providers"]
    boards = provider["options"]["path"]
    assert (folder / mounts["grafana"][boards]).resolve() == FOLDER
    assert (folder / mounts["grafana"]["/etc/grafana/provisioning"]).resolve() == folder / "grafana" / "provisioning"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (FOLDER / home.removeprefix(f"{boards}/")).is_file()
    (source,) = yaml.safe_load((folder / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    listen = next(c for c in services["prometheus"]["command"] if "listen-address" in c).split("=")[1]
    assert source["url"] == f"http://{listen}"
    scrape = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert scrape == ["../runs/.prometheus/*.json"]
    assert {"/etc/hermes/monitoring", "/etc/hermes/runs"} <= set(mounts["prometheus"])
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "a pinned version"
