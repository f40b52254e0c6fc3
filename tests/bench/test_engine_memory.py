"""Peak memory per rank beside the formula of `scaling/memory.py`: ZeRO 0 to 3, checkpointing modes, Hermes-R base and large.

Small blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_), so that resident memory is what is in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hermes_dist.scaling.memory import activation_bytes, resident_buffer_bytes, state_bytes, transient_bytes
from hermes_dist.scaling.model_costs import Request, parameter_count
from tests.bench.engine_ranks import COLUMNS, TASKS, make_config

ROOT = Path(__file__).resolve().parents[2]
LARGE = [("large", stage, 2) for stage in range(4)] + [("large", stage, 4) for stage in (2, 3)]


def measure(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All cases in one process that forks the ranks (see engine_memory_worker.py), each as soon as it is known."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.engine_memory_worker", json.dumps(cases)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
            assert process.wait() == 0
        finally:
            process.terminate()


def predicted(case: dict[str, Any]) -> tuple[float, float]:
    """Bytes of the states between steps, and of the peak."""
    config = make_config(case, case["ranks"])
    request = Request(config.data.patch_vox_zyx, COLUMNS, TASKS.n_tasks, len(TASKS.modalities))
    n = parameter_count(config.model, request)
    states = state_bytes(n, case["stage"], case["ranks"])
    active = activation_bytes(config.model, request, case["mode"], micro_batch=1, bytes_per_element=4)
    rest = states.at_rest + resident_buffer_bytes(case["stage"])
    return rest, rest + transient_bytes(n, case["stage"], case["ranks"], active, gloo=case["ranks"] > 1)


def check(cases: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    rows = list[dict[str, Any]]()
    with capsys.disabled():
        print(
            "\n| model | patch | mode | ranks | ZeRO | states MiB | formula | peak MiB | formula | ratio |\n" + "|---" * 10 + "|"
        )
        for row in measure(cases):
            rows.append(row)
            rest, peak = predicted(row)
            mib = [round(b / 2**20) for b in (row["state"], rest, row["peak"], peak)]
            patch = "x".join(map(str, row["patch"]))
            cells = [row["size"], patch, row["mode"], row["ranks"], row["stage"], *mib, f"{row['peak'] / peak:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    assert len(rows) == len(cases)
    for row in rows:
        rest, peak = predicted(row)
        assert row["state"] == pytest.approx(rest, rel=0.15), row
        assert row["peak"] == pytest.approx(peak, rel=0.15), row


@pytest.mark.bench
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "mode"), [(4, "none"), (4, "full"), (2, "full"), (2, "none"), (2, "selective"), (2, "blocks")])
def test_base(ranks: int, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    check([{"size": "base", "stage": stage, "ranks": ranks, "patch": [32, 64, 64], "mode": mode} for stage in range(4)], capsys)


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_large(capsys: pytest.CaptureFixture[str]) -> None:
    """Stages 0 and 1 with four ranks would need more than 20 GiB and are left out."""
    cases = [
        {"size": size, "stage": stage, "ranks": ranks, "patch": [32, 32, 32], "mode": "full"} for size, stage, ranks in LARGE
    ]
    check(cases, capsys)
