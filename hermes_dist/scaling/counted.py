"""FLOPs of any model, measured on the real module with torch's FLOP counter.

Each model here costs a constant (tokens) plus a multiple of the patch's voxels, so two small patches give the line, and no
128³ patch has to be computed on a laptop. Attention should be the plain formula (`model.attention = "reference"`): the counter
does not know the fused CPU kernel.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from hermes_dist.config import Vox3


def _onednn_flops(x: list[int], weight: list[int], *_: object, out_shape: list[int], **__: object) -> int:
    return conv_flop_count(x, weight, out_shape)


UNKNOWN = {torch.ops.aten.mkldnn_convolution: _onednn_flops}
"""Operators of the models that the counter does not know."""


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
