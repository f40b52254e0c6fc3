"""One attention measurement in a process of its own; called by test_model_attention.py with a JSON of options.

Writes the gradient to `out` and prints one JSON line: CPU seconds of the second run, growth of the peak resident set (MiB).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import torch

from hermes_dist.models.attention import AttentionKind, CrossAttention
from hermes_dist.models.medformer import BidirectionalAttention
from hermes_dist.models.resunet import Fusion

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


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(2)
    run = MODELS[options["model"]](options["kind"], options["side"], options["channels"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    start = time.process_time()
    gradient = run()
    cpu_s = time.process_time() - start
    torch.save(gradient, options["out"])
    print(json.dumps({"cpu_s": cpu_s, "peak_mib": peak_mib}))


if __name__ == "__main__":
    main()
