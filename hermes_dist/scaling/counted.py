"""FLOPs of any model, measured on the real module with torch's FLOP counter.

Each model here costs a constant (tokens) plus a multiple of the patch's voxels, so two small patches give the line, and no
128³ patch has to be computed on a laptop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from hermes_dist.config import Vox3


def _onednn_flops(x: list[int], weight: list[int], *_: object, out_shape: list[int], **__: object) -> int:
    return conv_flop_count(x, weight, out_shape)


def _backward_flops(grad: list[int], x: list[int], weight: list[int], *options: Any, **_: object) -> int:
    """Each gradient of a convolution costs what the convolution does.

    torch 2.13 itself counts the weight gradient of a grouped convolution as if it had one group.
    """
    transposed, mask = options[4], options[7]
    data = conv_flop_count(grad, weight, x, not transposed) if mask[0] else 0
    return data + (conv_flop_count(x, weight, grad, transposed) if mask[1] else 0)


def _attention_flops(q: list[int], k: list[int], v: list[int], *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(_: list[int], q: list[int], k: list[int], v: list[int], *__: object, **___: object) -> int:
    """Without the similarity that the fused kernel computes again: model FLOPs do not count recomputation."""
    return 2 * sdpa_flop_count(q, k, v)


UNKNOWN = {
    torch.ops.aten.mkldnn_convolution: _onednn_flops,
    torch.ops.aten.convolution_backward: _backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Operators of the models that the counter does not know, or counts wrongly."""


def counted_flops(model: nn.Module, patch_vox_zyx: Vox3, columns: int, *, training: bool = True) -> int:
    """FLOPs of one sample's forward (and backward) pass at exactly this patch; the model runs on its device."""
    device = next(model.parameters()).device
    image = torch.zeros(1, 1, *patch_vox_zyx, device=device)
    task_ids = torch.arange(columns, device=device)[None]
    modality_ids = torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        output = model(image, task_ids, modality_ids)
        if training:
            parts = [output.mask_logits, output.aux_logits, output.modality_logits]
            torch.stack([part.float().sum() for part in parts if part is not None]).sum().backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def extrapolated_flops(model: nn.Module, patch_vox_zyx: Vox3, columns: int, *, training: bool = True) -> int:
    """FLOPs at a large patch from counts at 32³ and 64×32×32, which every backbone takes."""
    small, double = (32, 32, 32), (64, 32, 32)
    low = counted_flops(model, small, columns, training=training)
    slope = (counted_flops(model, double, columns, training=training) - low) / math.prod(small)
    return round(low + slope * (math.prod(patch_vox_zyx) - math.prod(small)))
