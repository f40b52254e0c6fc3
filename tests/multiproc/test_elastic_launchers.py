"""A rank dies once: torchrun and the deepspeed launcher bring the run to its end unattended, from the last checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multiproc.ranks import ROOT, free_port
from tests.multiproc.train_worker import read_losses

BIN = Path(sys.executable).parent
SCRIPT = "tests/multiproc/train_worker.py"


def launch(command: list[str], run_dir: Path, **env: str) -> subprocess.CompletedProcess[str]:
    options = json.dumps({"die": [1, 3, "died"]})
    path = f"{BIN}:{os.environ.get('PATH', '')}"
    return subprocess.run(
        [*command, SCRIPT, str(run_dir), "6", options],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.multiproc
@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_dead_rank_costs_a_restart_and_nothing_else(launcher: str, tmp_path: Path) -> None:
    if launcher == "torchrun":
        command = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    else:
        start = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "--no_local_rank"]
        command = ["launch/until_done.sh", *start]
    result = launch(command, tmp_path, DS_ACCELERATOR="cpu", RESTART_PAUSE_S="0")
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert (tmp_path / "died").exists()
    assert sorted(read_losses(tmp_path)) == list(range(6))
