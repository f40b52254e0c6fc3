"""The METRICS table keeps the conventions that Prometheus users rely on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hermes_dist.telemetry.metrics import METRICS, RUN_LABELS, Metric, table_markdown

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "watch-a-run.md"
UNITS = ("seconds", "bytes", "ratio", "meters")


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda m: m.name)
def test_names_units_and_help(metric: Metric) -> None:
    assert re.fullmatch(r"hermes_[a-z0-9_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    stem = metric.name.removesuffix("_total")
    assert metric.unit == next((unit for unit in UNITS if stem.endswith(f"_{unit}")), "")
    assert metric.help
    assert not metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda m: m.name)
def test_labels_have_bounded_values(metric: Metric) -> None:
    assert not set(metric.labels) & {*RUN_LABELS, "step", "position", "case_id", "time"}


def test_the_guide_lists_every_metric() -> None:
    table = table_markdown()
    assert all(f"`{name}`" in table for name in METRICS)
    assert table in GUIDE.read_text(), "put metrics.table_markdown() into the guide"
