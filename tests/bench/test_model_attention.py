"""Fused against plain attention on the 4x, 8x and 16x maps of a 128^3 patch: CPU seconds, peak memory, same numbers.

One prior fusion exchange (tokens read features, features read tokens) forward and backward, with 25 tokens (15 tasks, 10 of the
modality), at base width 32; and Hermes-M's bidirectional attention with 64 map tokens more.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from hermes_dist.models.attention import AttentionKind, CrossAttention
from hermes_dist.models.medformer import BidirectionalAttention
from hermes_dist.models.resunet import Fusion

MAPS = {"4x": (32, 128), "8x": (16, 256), "16x": (8, 320)}
TOKENS = 25


def exchange(kind: AttentionKind, side: int, channels: int) -> Callable[[], torch.Tensor]:
    """Hermes-R: both cross attentions of one fusion block."""
    torch.manual_seed(0)
    read, write = CrossAttention(channels, kind), CrossAttention(channels, kind)
    features, tokens = torch.randn(1, side**3, channels), torch.randn(1, TOKENS, channels)

    def run() -> torch.Tensor:
        x = features.clone().requires_grad_()
        t = tokens + read(tokens, x)
        write(x, t).square().mean().backward()
        assert x.grad is not None
        return x.grad

    return run


def bidirectional(kind: AttentionKind, side: int, channels: int) -> Callable[[], torch.Tensor]:
    """Hermes-M: one bidirectional attention."""
    torch.manual_seed(0)
    block = BidirectionalAttention(channels, channels, project_tokens=True, fusion=Fusion({}, True, kind))
    features, tokens = torch.randn(1, channels, side, side, side), torch.randn(1, 64 + TOKENS, channels)

    def run() -> torch.Tensor:
        x = features.clone().requires_grad_()
        updates = block(x, tokens, None, 64)
        sum(u.square().mean() for u in updates).backward()  # type: ignore[union-attr]
        assert x.grad is not None
        return x.grad

    return run


MODELS = {"Hermes-R": exchange, "Hermes-M": bidirectional}


def measured(model: str, kind: AttentionKind, side: int, channels: int, connection: Any) -> None:
    """Child process: CPU seconds of the second run, growth of the peak resident set, and the gradient."""
    torch.set_num_threads(2)
    run = MODELS[model](kind, side, channels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    start = time.process_time()
    gradient = run()
    connection.send((time.process_time() - start, peak_mib, gradient.numpy()))


@pytest.mark.bench
@pytest.mark.parametrize("model", list(MODELS))
def test_fused_attention_against_the_plain_formula(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    context = get_context("spawn")
    lines = [f"\n{model}:", "| map | plain CPU s | fused CPU s | plain MiB | fused MiB |", "|---|---|---|---|---|"]
    for name, (side, channels) in MAPS.items():
        results: dict[str, Any] = {}
        for kind in ("reference", "fused"):
            ours, theirs = context.Pipe()
            child = context.Process(target=measured, args=(model, kind, side, channels, theirs))
            child.start()
            assert ours.poll(600), "the child did not answer in 600 s"
            results[kind] = ours.recv()
            child.join(60)
        plain, fused = results["reference"], results["fused"]
        torch.testing.assert_close(torch.from_numpy(fused[2]), torch.from_numpy(plain[2]), rtol=1e-3, atol=1e-8)
        lines.append(f"| {name} | {plain[0]:.2f} | {fused[0]:.2f} | {plain[1]:.0f} | {fused[1]:.0f} |")
    with capsys.disabled():
        print("\n".join(lines))
