"""The unit in which models are counted, and what several backbones share: stem, residual blocks, prior pools."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hermes_dist.config import ModelConfig, Vox3

WIDTHS = (1, 2, 4, 8, 10)
PLACE_LEVELS = {"enc4": 2, "enc8": 3, "enc16": 4, "dec8": 3, "dec4": 2}


@dataclass(frozen=True)
class Layer:
    """One unit of recomputation and counting.

    `flops` of one forward pass of one sample; `backward` = FLOPs of the backward pass over those of the forward pass (2, or 1
    where the input needs no gradient); `redo_flops` = what mode `selective` computes again; `kept` = elements that autograd keeps
    without checkpointing, `kept_selective` with it; `output` = elements of the result; `unit` = residual, fusion, head, input.
    """

    name: str
    unit: str
    parameters: int
    flops: int
    output: int
    kept: int = 0
    kept_selective: int = 0
    redo_flops: int = 0
    backward: int = 2


@dataclass(frozen=True)
class Request:
    """What a sample asks of the model: patch in voxels (Z Y X), task columns, and the sizes of the prior tables."""

    patch_vox_zyx: Vox3
    columns: int
    n_tasks: int
    n_modalities: int


def stem(width: int, voxels: int) -> Iterator[Layer]:
    """The first convolution, whose input needs no gradient, and a residual block."""
    kept = (1 + width) * voxels
    yield Layer("stem.conv", "input", 27 * width, 2 * 27 * width * voxels, width * voxels, kept, kept, backward=1)
    yield from residual("stem", width, width, 1, voxels)


def residual(name: str, in_width: int, out_width: int, blocks: int, voxels: int) -> Iterator[Layer]:
    """Residual blocks: two convolutions and, where the width changes, a third one as the shortcut.

    Kept: conv1's result, which checkpointing mode `selective` computes again, and the output.
    """
    for i in range(blocks):
        wide = in_width if i == 0 else out_width
        conv1, conv2 = 27 * wide * out_width, 27 * out_width * out_width
        shortcut = conv1 if wide != out_width else 0
        yield Layer(
            f"{name}.{i}",
            "residual",
            conv1 + conv2 + shortcut,
            2 * (conv1 + conv2 + shortcut) * voxels,
            out_width * voxels,
            kept=2 * out_width * voxels,
            kept_selective=out_width * voxels,
            redo_flops=2 * conv1 * voxels,
        )


def token_count(config: ModelConfig, request: Request) -> int:
    """Prior tokens of one sample: its task columns and the tokens of its modality."""
    return request.columns + (config.priors.length if config.priors.modality else 0)


def pool(place: str, width: int, config: ModelConfig, request: Request) -> Layer:
    """The prior pool of a place: a token per task, `length` per modality, and the null token of attended padding."""
    null = int(config.priors.padding == "attended")
    modalities = request.n_modalities * config.priors.length if config.priors.modality else 0
    return Layer(f"{place}.pool", "input", (request.n_tasks + null + modalities) * width, 0, token_count(config, request) * width)
