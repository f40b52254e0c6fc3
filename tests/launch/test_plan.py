"""`launch/plan.py` as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import plan as launch_plan

ROOT = Path(__file__).resolve().parents[2]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "launch/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_documented_example_works() -> None:
    done = plan("--config", "large.json", "--gpus", "64")
    assert done.returncode == 0, done.stderr
    assert "Recommended" in done.stdout


def test_hermes_m_over_epochs_on_a_thousand_cards_with_its_data_path() -> None:
    options = ["--gpus", "1024", "--epochs", "10", "--cases", "2438", "--simulate-storage", "100", "--price", "0"]
    done = plan("--config", "large.json", *options, "model.backbone=medformer", "train.global_batch=2048")
    assert done.returncode == 0, done.stderr
    assert "for 12 steps of 2048 samples" in done.stdout
    assert "1024 ranks × 8 workers" in done.stdout, "stream.workers of the configuration"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--gpus", "0"),
        ("--gpus-per-node", "0"),
        ("--workers", "-1"),
        ("--simulate-storage", "-5.0"),
        ("--simulate-storage", "0.0"),
        ("--simulate-storage", "nan"),
        ("--cpu-s", "-0.4"),
        ("--price", "-2.0"),
        ("--utilisation", "inf"),
        ("--epochs", "0.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--config", "large.json", f"{option}={value}"])
    with pytest.raises(SystemExit) as end:
        launch_plan.main()
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.err == f"error: {option} {value}: expected more than 0, and finite\n"
    assert output.out == ""


def test_bad_use_names_the_nearest_device() -> None:
    done = plan("--config", "large.json", "--device", "H10")
    assert done.returncode == 2
    assert "Did you mean 'H100'" in done.stderr
    assert "Traceback" not in done.stderr
