"""Figures of the reports: what the lines of the throughput figure are."""

from __future__ import annotations

import pytest

from hermes_dist.scaling.figures import fitted_lines, throughput_figure, throughput_groups
from hermes_dist.scaling.throughput import TERMS, Measured, ThroughputFit

FIT = ThroughputFit(dict(zip(TERMS, (0.02, 0.1, 0.01, 1e-3, 0.05, 0.03), strict=True)), 0.0, 0.0)


def test_solid_lines_go_through_runs_that_share_devices_and_each_size_has_its_own() -> None:
    runs = [Measured(w, 1, 2 * w, n, FIT.step_s(w, 1, 2 * w, n, devices=2), devices=2) for n in (10**6, 10**8) for w in (1, 2, 4)]
    groups = throughput_groups(runs)
    assert list(groups) == [(10**6, 1, 2, 1), (10**8, 1, 2, 1)]
    for group, members in groups.items():
        lines = {style: dict(zip(worlds, rates, strict=True)) for style, worlds, rates in fitted_lines(group, members, FIT, 8)}
        assert [lines["-"][run.ranks] for run in members] == pytest.approx([run.samples_per_s for run in members])
        assert lines["--"][2] == lines["-"][2]
        assert lines["--"][8] > 1.5 * lines["-"][8]
    page = throughput_figure(runs, FIT)
    assert page.count("stroke-dasharray") >= 2


def test_one_line_where_every_rank_has_a_device() -> None:
    runs = [Measured(w, 1, 2 * w, 10**6, 0.3, devices=64) for w in (1, 2, 4)]
    (group, members), *_ = throughput_groups(runs).items()
    assert [style for style, *_ in fitted_lines(group, members, FIT, 8)] == ["-"]
