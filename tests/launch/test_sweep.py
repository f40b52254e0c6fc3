"""`launch/sweep.py` as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "launch/sweep.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_the_members_of_the_scaling_study_are_listed() -> None:
    done = sweep("--config", "scaling.json", "--list")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12


def test_a_slurm_array_is_written_and_results_are_parquet(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(f'{{"name": "s", "base": "demo.json", "output_dir": "{tmp_path}", "grid": {{"run.seed": [0, 1]}}}}')
    done = sweep("--config", str(path), "--backend", "slurm")
    assert done.returncode == 1, "nothing has run yet"
    script = (tmp_path / "s" / "array.sbatch").read_text()
    assert "--array=0,1%1" in script
    assert "--member $SLURM_ARRAY_TASK_ID" in script
    assert pq.read_table(tmp_path / "s" / "results.parquet").column("state").to_pylist() == ["waiting", "waiting"]


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text('{"name": "s", "base": "demo.json", "gird": {}}')
    done = sweep("--config", str(path), "--list")
    assert done.returncode == 2
    assert "gird" in done.stderr


def test_an_override_of_a_key_of_the_grid_is_refused() -> None:
    done = sweep("--config", "scaling.json", "--list", "train.max_steps=7")
    assert done.returncode == 2
    assert "train.max_steps" in done.stderr
