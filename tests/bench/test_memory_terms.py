"""Two terms of `scaling/memory.py`, each measured alone: the workspace of the weights, and what gloo gathers into.

pytest tests/bench/test_memory_terms.py -m bench -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hermes_dist.scaling.memory import activation_bytes
from hermes_dist.scaling.model_costs import Request
from tests.bench.engine_ranks import COLUMNS, TASKS, make_config
from tests.multiproc.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
SMALL_BLOCKS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}

BACKWARD = """
import json, sys
from tests.bench.engine_ranks import make_batch, make_config, make_loss, make_model, reset_peak, resident_bytes
config = make_config(json.loads(sys.argv[1]), 1)
model, batch, loss_fn = make_model(config), make_batch(config, 0), make_loss(config, 1)
for parameter in model.parameters():  # gradients go at once: what is left is what the backward pass itself needs
    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
for _ in range(3):
    rest = resident_bytes()
    reset_peak()
    loss_fn(model, batch).backward()
    peak = resident_bytes("VmHWM") - rest
print(peak)
"""

GATHER = """
import sys
import torch
import torch.distributed as dist
from tests.bench.engine_ranks import reset_peak, resident_bytes
rank, world, port = map(int, sys.argv[1:])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
whole, part = torch.ones(20_000_000), torch.ones(20_000_000 // world)
for _ in range(2):
    rest = resident_bytes()
    reset_peak()
    dist.barrier()
    dist.all_gather_into_tensor(whole, part)
    peak = resident_bytes("VmHWM") - rest
dist.barrier()
print(peak)
dist.destroy_process_group()
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **SMALL_BLOCKS}, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> float:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return float(out.splitlines()[-1])


@pytest.mark.bench
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", ["base", "large"])
def test_the_backward_pass_of_small_patches(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    case: dict[str, Any] = {"size": size, "stage": 0, "mode": "full", "patch": [32, 32, 32]}
    config = make_config(case, 1)
    request = Request(config.data.patch_vox_zyx, COLUMNS, TASKS.n_tasks, len(TASKS.modalities))
    formula = activation_bytes(config.model, request, "full", micro_batch=1, bytes_per_element=4)
    peak = answer(start(BACKWARD, json.dumps(case)))
    with capsys.disabled():
        print(f"\n{size}, 32³, full, without gradients: {peak / MIB:.0f} MiB above rest, formula {formula / MIB:.0f}")
    assert peak == pytest.approx(formula, rel=0.15)


@pytest.mark.bench
@pytest.mark.timeout(900)
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_gloo_gathers_into_a_copy(world: int, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    peaks = [answer(rank) for rank in [start(GATHER, rank, world, port) for rank in range(world)]]
    with capsys.disabled():
        print(f"\n{world} ranks gather 76 MiB: at most {max(peaks) / MIB:.0f} MiB more")
    assert max(peaks) == pytest.approx(8e7, rel=0.15)
