"""The report: complete, self-contained and readable at any state of a run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hermes_dist.config import Config
from hermes_dist.errors import ConfigError
from hermes_dist.parallel.engine import StepStats
from hermes_dist.stream.batch import StepBatch
from hermes_dist.train import evaluate as ev
from hermes_dist.train.record import LossSums, StepRecord
from hermes_dist.train.report import write_overview, write_report
from hermes_dist.train.report_curves import Series, binned, line_chart, ticks
from tests.train.tiny_run import TASKS, Oracle, make_config, make_store


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 60 steps that was evaluated by a model that is a voxel off."""
    config = make_config(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (config.run_dir / "tasks.json").write_text(json.dumps(TASKS.to_json()))
    with open(config.run_dir / "metrics.jsonl", "w") as file:
        for step in range(60):
            file.write(json.dumps(row_of(config, step)) + "\n")
        file.write('{"step": 60, "los')
    ev.evaluate(Oracle(TASKS, shift=1).eval(), ev.Job(config.run_dir, config, [make_store(tmp_path / "s")], TASKS, "test", "x"))
    return config.run_dir


def row_of(config: Config, step: int) -> dict[str, Any]:
    """The line of a step as the trainer writes it; `brains` is in every other one."""
    sums = LossSums.zeros(TASKS, torch.device("cpu"))
    sums.per_class[:] = torch.tensor([0.3, 0.9 - step / 99, 1 / (1 + step / 9), 1.0])[:, None]
    sums.per_class[:, 2:] *= step % 2
    batch = StepBatch(step, [], 4, 1, np.zeros(4, np.int64), np.zeros(4, np.int64), data_wait_s=0.01)
    return StepRecord(batch, StepStats(1.0, False), sums, 1e-3, "", 4, 4, 0.5).row(config, TASKS)


class Checker(HTMLParser):
    """Collects what a page loads, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.loaded += [v for k, v in values.items() if k in ("src", "href") and v]
        if tag not in ("meta", "img", "br", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """`<polyline/>` closes itself."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_complete_and_self_contained(run_dir):
    path = write_report(run_dir)
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert all(v.startswith("data:image/png;base64,") for v in checker.loaded)
    assert "<script" not in text
    assert "http" not in text
    words = ("organs", "tumour", "brains", "Dice", "HD95", "missed", "Throughput", "Loss", "median case", "predict.py")
    for expected in (*words, "Dice loss per dataset"):
        assert expected in text
    mean = json.loads((run_dir / "evaluation" / "test.json").read_text())["mean"]["dice"]
    assert f"{mean:.3f}" in text
    assert [p.name for p in run_dir.iterdir() if p.name.startswith(".")] == []


def test_report_of_a_run_that_just_began(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"run": {"name": "<b>&young"}}))
    text = write_report(tmp_path).read_text()
    assert "Not evaluated yet" in text
    assert "&lt;b&gt;&amp;young" in text


def test_not_a_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        write_report(tmp_path)


def test_overview_picture(run_dir, tmp_path):
    path = write_overview(run_dir, tmp_path / "docs" / "overview.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_chart_draws_finite_points_in_the_frame():
    text = line_chart("a <b>", [Series("s", range(5), [1.0, math.nan, 2.0, math.inf, 3.0])], unit="mm")
    points = re.findall(r"[\d.]+,[\d.]+", re.search(r'class="line c0" points="([^"]+)"', text).group(1))
    assert len(points) == 3
    assert all(0 <= float(v) <= 460 for p in points for v in p.split(","))
    assert "a &lt;b&gt;" in text
    assert line_chart("empty", [Series("s", [1], [math.nan])]) == ""


def test_bins_keep_the_mean():
    x, y = binned(range(10_000), np.random.default_rng(0).normal(size=10_000), points=100)
    assert len(x) == 100
    assert x[0] == 49.5
    assert abs(np.mean(y)) < 0.05


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (1e-5, 9e-5), (0, 80_000), (2, 2)])
def test_ticks_are_few_and_inside(low, high):
    values = ticks(low, high)
    assert 1 <= len(values) <= 7
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)
