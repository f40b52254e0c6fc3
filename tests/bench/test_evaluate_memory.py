"""Peak memory of predicting a scan with 61 classes: streamed planes against full float32 accumulators (MONAI's inferer).

Each side runs in a process of its own, with a model that costs nothing, so that only the bookkeeping is measured.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE, TASKS, WINDOW = (200, 256, 256), 61, 96
COMMON = f"""
import resource, numpy as np, torch
image = np.random.default_rng(0).standard_normal({SHAPE}).astype(np.float32)
model = lambda x: x.to(torch.float32).expand(-1, {TASKS}, -1, -1, -1)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
SIDES = {
    "bits": "from hermes_dist.seg import sliding_window as s\n"
    + COMMON
    + "s.packed_masks(s.slabs(model, image, window=({w},) * 3), 200)",
    "bytes": "from hermes_dist.seg import sliding_window as s\n"
    + COMMON
    + "s.quantised(s.slabs(model, image, window=({w},) * 3), 200)",
    "monai": "from monai.inferers import sliding_window_inference\n"
    + COMMON
    + "volume = torch.from_numpy(image)[None, None]\n"
    + "sliding_window_inference(volume, ({w},) * 3, 1, model, overlap=0.5, mode='gaussian').sigmoid() > 0.5",
}


def peak_mib(side: str) -> float:
    code = SIDES[side].replace("{w}", str(WINDOW)) + "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1]) / 1024


@pytest.mark.bench
@pytest.mark.timeout(1200)
def test_peak_memory_for_61_classes():
    peaks = {side: peak_mib(side) for side in SIDES}
    print(f"\n{TASKS} classes, {SHAPE} voxels, window {WINDOW}³: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in peaks.items()))
    assert peaks["bits"] < peaks["monai"] / 2
    assert peaks["bytes"] < peaks["monai"] / 2
