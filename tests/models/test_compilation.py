"""torch.compile of blocks: the same numbers, alone and together with activation checkpointing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hermes_dist.config import ModelConfig
from hermes_dist.models import build_model
from hermes_dist.models.compilation import compile_blocks
from hermes_dist.tasks import TaskTable

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_compute_the_same() -> None:
    command = [sys.executable, "-m", "tests.models.compile_worker"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, compiled, recomputed = json.loads(done.stdout)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert recomputed == pytest.approx(plain, rel=1e-4)


def test_parameter_names_stay() -> None:
    tasks = TaskTable.build([("a", "CT", "", [("x", [1])], None)])
    model = build_model(ModelConfig(base_channels=8), tasks)
    names = [name for name, _ in model.named_parameters()]
    compile_blocks(model)
    assert [name for name, _ in model.named_parameters()] == names
