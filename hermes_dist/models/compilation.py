"""`torch.compile` of the blocks that gain by it, one at a time.

Compiled are the blocks of prior fusion and the tokens' MLPs: many small elementwise operations between matrix products. Residual
blocks are one hand-written operation already (see residual.py) and stay as they are. Block by block, because DeepSpeed's hooks
break a graph of the whole model; parameter names stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from hermes_dist.models.attention import CrossAttention, FeedForward
from hermes_dist.models.priors import ModalityHead

VARIANTS = 64
"""Compiled variants of one piece of code that are allowed."""


def compile_blocks(model: nn.Module) -> int:
    """Compile the blocks of a model of this room, in place, at their first call. Returns how many there are."""
    # All blocks share their code, and each width and fusion place is a variant of it: more than the compiler's default of 8.
    torch._dynamo.config.recompile_limit = VARIANTS  # pyright: ignore[reportPrivateUsage]
    blocks = [m for m in model.modules() if isinstance(m, (CrossAttention, FeedForward, ModalityHead))]
    for block in blocks:
        # The number of tokens differs from batch to batch: after the second one it is compiled as a symbol.
        block.compile()
    return len(blocks)
