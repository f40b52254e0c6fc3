"""Hermes-R against a straightforward eager implementation of the same arithmetic: CPU seconds and peak memory of a training step.

Both sides run in fresh processes with the same weights, inputs and threads; time is the CPU seconds of forward + loss + backward
(wall seconds are printed too). Run it on an idle machine: threads that wait for each other spin, and that counts. Memory is the
peak resident set above the imports; what the step's tensors held at one time is printed beside it, which does not depend on the
allocator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("model_worker.py")


def measure(side: str, **options: Any) -> dict[str, float]:
    """One side in its own process; see model_worker.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options["threads"])}
    command = [sys.executable, str(WORKER), json.dumps({"side": side, **options})]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=1500).stdout
    return json.loads(out.splitlines()[-1])


@pytest.mark.bench
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("base", [16, 32])
def test_step_against_the_eager_baseline(base: int, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"base": base, "side_vox": 64, "columns": 15, "threads": 2, "repeats": 2}
    # Sides alternate, and each is judged by its best round: the machine's speed drifts.
    rounds = [(measure("baseline", **options), measure("none", **options)) for _ in range(3)]
    baseline, ours = (min(side, key=lambda row: row["cpu_s"]) for side in zip(*rounds, strict=True))
    time_ratio, memory_ratio = ours["cpu_s"] / baseline["cpu_s"], ours["peak_mib"] / baseline["peak_mib"]
    with capsys.disabled():
        for name, row in (("baseline", baseline), ("ours", ours)):
            print(f"\nbase {base} {name}: CPU {row['cpu_s']:.2f} s, wall {row['wall_s']:.2f} s")
            print(f"  peak {row['peak_mib']:.0f} MiB, tensors {row['tensor_mib']:.0f} MiB")
        tensor_ratio = ours["tensor_mib"] / baseline["tensor_mib"]
        print(f"base {base}: {time_ratio:.2f} x time, {memory_ratio:.2f} x peak memory, {tensor_ratio:.2f} x tensors")
    assert ours["loss"] == pytest.approx(baseline["loss"], rel=1e-4)
    assert ours["grad_norm"] == pytest.approx(baseline["grad_norm"], rel=1e-3)
    assert time_ratio <= 0.67
    assert memory_ratio <= 0.6


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_checkpointing_memory_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"base": 32, "side_vox": 96, "columns": 15, "threads": 2, "repeats": 1}
    rows = {mode: measure(mode, **options) for mode in ("baseline", "none", "selective", "blocks", "full")}
    none = rows["none"]
    with capsys.disabled():
        print("\n| mode | CPU s | x | activations MiB | x | tensors MiB | x |\n|---|---|---|---|---|---|---|")
        for mode, row in rows.items():
            cells = [f"{row[key]:.1f} | {row[key] / none[key]:.2f}" for key in ("cpu_s", "activation_mib", "tensor_mib")]
            print(f"| {mode} | {' | '.join(cells)} |")
    for mode, row in rows.items():
        if mode == "baseline":
            continue
        assert row["loss"] == none["loss"], mode
        assert row["grad_norm"] == none["grad_norm"], mode
    assert rows["full"]["activation_mib"] <= 0.35 * none["activation_mib"]
    assert rows["full"]["cpu_s"] <= 1.35 * none["cpu_s"]
