"""Prometheus' own tool checks the configuration and runs the rules' unit tests."""

from __future__ import annotations

import subprocess

import pytest

from tests.monitoring.server import MONITORING, require


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts/rules.yml"), ("test", "rules", "alerts/rules_test.yml")],
    ids=" ".join,
)
def test_promtool(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([require("promtool"), *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
