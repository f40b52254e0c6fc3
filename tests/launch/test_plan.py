"""`launch/plan.py` as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "launch/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_documented_example_works() -> None:
    done = plan("--config", "large.json", "--gpus", "64")
    assert done.returncode == 0, done.stderr
    assert "Recommended" in done.stdout


def test_hermes_m_over_epochs_on_a_thousand_cards_with_its_data_path() -> None:
    options = ["--gpus", "1024", "--epochs", "10", "--cases", "2438", "--simulate-storage", "100"]
    done = plan("--config", "large.json", *options, "model.backbone=medformer", "train.global_batch=2048")
    assert done.returncode == 0, done.stderr
    assert "for 12 steps of 2048 samples" in done.stdout
    assert "1024 ranks × 8 workers" in done.stdout, "stream.workers of the configuration"


@pytest.mark.parametrize("wrong", [["--gpus", "0"], ["--gpus-per-node", "0"], ["--workers", "-1"]])
def test_a_cluster_of_nothing_is_refused(wrong: list[str]) -> None:
    done = plan("--config", "large.json", *wrong)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: {wrong[0]} {wrong[1]}: expected more than 0\n"


def test_bad_use_names_the_nearest_device() -> None:
    done = plan("--config", "large.json", "--device", "H10")
    assert done.returncode == 2
    assert "Did you mean 'H100'" in done.stderr
    assert "Traceback" not in done.stderr
