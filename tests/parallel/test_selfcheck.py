"""The convolution check passes on a sound machine and knows the bad versions."""

from __future__ import annotations

import pytest
import torch

from hermes_dist.parallel import selfcheck


def test_sound_here() -> None:
    assert selfcheck.check_conv3d(torch.device("cpu")) == []


def test_emulated_bf16_of_an_old_gpu_is_neither_used_nor_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says yes for a V100 or T4 unless it is asked about the hardware."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr(selfcheck, "relative_error", lambda device: 1.0)
    assert not selfcheck.has_fast_bf16(torch.device("cuda"))
    assert selfcheck.check_conv3d(torch.device("cuda")) == []


def test_a_wrong_result_is_reported_with_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(image: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
        out = torch.nn.functional.conv3d(image, weight, padding=padding)
        return out * 1.2 if image.dtype == torch.bfloat16 else out

    monkeypatch.setattr(selfcheck, "conv3d", broken)
    (warning,) = selfcheck.check_conv3d(torch.device("cpu"))
    assert "differs from fp32 by 0." in warning
    assert f"torch {torch.__version__}" in warning


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "count"),
    [("2.13.0", None, 0), ("2.8.0", 90701, 0), ("2.9.1+cu128", 90800, 1), ("2.9.0+cu128", 91002, 3), ("2.10.0", 91500, 0)],
)
def test_known_defects(torch_version: str, cudnn: int | None, count: int) -> None:
    assert len(selfcheck.known_defects(torch_version, cudnn)) == count
