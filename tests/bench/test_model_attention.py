"""Fused against plain attention on the 4x, 8x and 16x maps of a 128^3 patch: CPU seconds, peak memory, same numbers.

One prior fusion exchange (tokens read features, features read tokens) forward and backward, with 25 tokens (15 tasks, 10 of the
modality), at base width 32; and Hermes-M's bidirectional attention with 64 map tokens more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("model_attention_worker.py")
MAPS = {"4x": (32, 128), "8x": (16, 256), "16x": (8, 320)}


def measure(out: Path, **options: Any) -> tuple[dict[str, float], torch.Tensor]:
    """Figures and gradient of one kind, from a process of its own."""
    command = [sys.executable, str(WORKER), json.dumps({**options, "out": str(out)})]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    return json.loads(text.splitlines()[-1]), torch.load(out, weights_only=True)


@pytest.mark.bench
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", ["Hermes-R", "Hermes-M"])
def test_fused_attention_against_the_plain_formula(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"\n{model}:", "| map | plain CPU s | fused CPU s | plain MiB | fused MiB |", "|---|---|---|---|---|"]
    for name, (side, channels) in MAPS.items():
        options = {"model": model, "side": side, "channels": channels}
        plain, expected = measure(tmp_path / "plain.pt", kind="reference", **options)
        fused, found = measure(tmp_path / "fused.pt", kind="fused", **options)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)
        figures = f"{plain['cpu_s']:.2f} | {fused['cpu_s']:.2f} | {plain['peak_mib']:.0f} | {fused['peak_mib']:.0f}"
        lines.append(f"| {name} | {figures} |")
    with capsys.disabled():
        print("\n".join(lines))
