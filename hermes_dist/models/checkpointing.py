"""Activation checkpointing: what the backward pass redoes instead of keeping it.

| mode | recomputed | kept |
|---|---|---|
| `none` | norm and ReLU of residual blocks, the features' MLP of Hermes-R's fusion | inputs of both convolutions of a block |
| `selective` | the first convolution of a residual block, and everything of an attention block | block inputs |
| `blocks` | every residual and attention block | block inputs |
| `full` | every stage | stage inputs |

Blocks and stages go through torch's non-reentrant checkpointing; gradients are the same, bitwise on a CPU. `offload` moves what
is kept from an accelerator to host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hermes_dist.errors import ModelError

Mode = Literal["none", "blocks", "full", "selective"]


def apply_activation_checkpointing(model: nn.Module, mode: Mode, offload: bool = False) -> None:
    """Make a model of this room recompute activations, in place. Parameter names stay as they are.

    Args:
        model: from `build_model`, not yet wrapped in an engine.
        mode: see the module's head.
        offload: keep the inputs of what is recomputed as a whole in host memory: all but the residual blocks of `selective`.
            No effect for a model on the CPU.

    Raises:
        ModelError: the mode is applied a second time, or offloading is asked for where nothing is recomputed.
    """
    if offload and mode == "none":
        raise ModelError("train.offload_activations needs train.activation_checkpointing = blocks, full or selective, not none")
    if getattr(model, "checkpointing", None):
        raise ModelError("activation checkpointing is applied already; build the model anew to change its mode")
    model.__dict__["checkpointing"] = mode
    if mode == "none":
        return
    segments: dict[str, Sequence[nn.Module]] = model.backbone.segments()  # type: ignore[union-attr]
    for module in segments[mode]:
        module.forward = partial(_recomputed, module.forward, offload)  # type: ignore[method-assign]
    if mode == "selective":
        for module in model.modules():
            if hasattr(module, "recompute"):
                module.recompute = True  # type: ignore[assignment]


def _recomputed(forward: Callable[..., Any], offload: bool, *args: Any) -> Any:
    if not offload:
        return checkpoint(forward, *args, use_reentrant=False)
    devices = [a.device if isinstance(a, Tensor) else None for a in args]

    def from_host(*host: Any) -> Any:
        return forward(*(a if d is None else a.to(d, non_blocking=True) for a, d in zip(host, devices, strict=True)))

    return checkpoint(from_host, *(a.cpu() if isinstance(a, Tensor) else a for a in args), use_reentrant=False)
