"""The fit of step times over the measured table of docs/results/scaling.md: terms, residual, and the largest world predicted.

pytest tests/bench/test_throughput_table.py -m bench -s
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hermes_dist.scaling.throughput import Measured, ThroughputFit, fit_throughput

TABLE = Path(__file__).resolve().parents[2] / "docs" / "results" / "scaling.md"
ROW = re.compile(r"\| ZeRO-(\d) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \|")
PARAMETERS = 2_857_732
"""Of the sweep's model: base 8, one block a stage."""


@pytest.mark.bench
def test_the_fit_explains_the_measured_table(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        Measured(int(ranks), int(stage), int(batch), PARAMETERS, float(step_s), 0.0, int(devices), -(-int(batch) // int(ranks)))
        for stage, ranks, devices, batch, step_s in ROW.findall(TABLE.read_text())
    ]
    assert len(runs) == 20
    fit = fit_throughput(runs)
    assert isinstance(fit, ThroughputFit)
    with capsys.disabled():
        terms = ", ".join(f"{name} {value:.3g}" for name, value in fit.terms.items())
        print(f"\n{terms}; residual {fit.relative_error:.1%}, four ranks from one and two within {fit.held_out_error:.1%}")
    assert fit.relative_error < 0.15
    assert fit.held_out_error is not None
    assert fit.held_out_error < 0.15
