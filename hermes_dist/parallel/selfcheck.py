"""Is 3D convolution sound here? A small comparison at start, and a list of library pairs that are known not to be.

Pairs of torch and cuDNN have given wrong bf16 results for large 3D outputs (cuDNN 9.8 to 9.10.2, pytorch#163539), a broken TF32
kernel (9.10.2 to before 9.15, pytorch#167024) and a fourfold slowdown (torch 2.9.0, pytorch#166122). The numerical check is
small, so that it costs well under a second; the list covers what only shows at full size.
"""

from __future__ import annotations

import torch
from torch.nn.functional import conv3d

TOLERANCE = 0.03
"""Largest relative error of bf16 against fp32, output and gradient: rounding of 27·8 products gives about 0.005."""


def has_fast_bf16(device: torch.device) -> bool:
    """Can this device compute in bf16? A CPU without AVX-512 emulates it: conv3d takes hundreds of times as long as in fp32.

    torch calls bf16 supported on older GPUs (V100, T4), where it emulates it too.
    """
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cuda.is_bf16_supported(including_emulation=False)


def check_conv3d(device: torch.device) -> list[str]:
    """Warnings for a person, each with the library versions; empty if all is well."""
    versions = f"torch {torch.__version__}"
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    if cudnn is not None:
        versions += f", cuDNN {cudnn}"
    warnings = [f"{text} ({versions})" for text in known_defects(torch.__version__, cudnn)]
    if device.type == "cuda" and not has_fast_bf16(device):
        return warnings  # bf16 is not used here
    error = relative_error(device)
    if not error < TOLERANCE:
        warnings.append(
            f"conv3d in bf16 differs from fp32 by {error:.2g}, expected below {TOLERANCE}; train in fp32 ({versions})"
        )
    return warnings


def known_defects(torch_version: str, cudnn: int | None) -> list[str]:
    """What is known of these versions. cuDNN 9.10.2 reports 91002."""
    found: list[str] = []
    if cudnn is None:
        return found
    if 90800 <= cudnn <= 91002:
        found.append("this cuDNN gives wrong bf16 results in conv3d with large outputs; use cuDNN 9.15 or later, or fp32")
    if 91002 <= cudnn < 91500:
        found.append(
            "this cuDNN has a broken TF32 kernel for conv3d; use 9.15 or later, or torch.backends.cudnn.allow_tf32 = False"
        )
    if torch_version.split("+")[0].startswith("2.9.0"):
        found.append("torch 2.9.0 runs conv3d under autocast about four times slower than 2.8 and 2.10")
    return found


def relative_error(device: torch.device) -> float:
    """Relative L2 error of a bf16 convolution and its weight gradient against fp32, the larger of both."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 8, 16, 16, 16, generator=generator).to(device)
    weight = torch.randn(16, 8, 3, 3, 3, generator=generator).to(device)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        w = weight.to(dtype).requires_grad_()
        out = conv3d(image.to(dtype), w, padding=1)
        (gradient,) = torch.autograd.grad(out.float().square().mean(), w)
        results.append((out.detach().float(), gradient.float()))
    (out, gradient), (out16, gradient16) = results
    errors = [float((b - a).norm() / a.norm()) for a, b in ((out, out16), (gradient, gradient16))]
    return max(errors) if all(e == e for e in errors) else float("inf")
