"""Parameters, FLOPs and kept activations of the ResUNet models, layer by layer, from the configuration alone.

Sources: facts on the published Hermes-R (stages, fusion, heads) and the paper's section 3. A second implementation, on purpose:
the tests compare it with the parameters of the real model, with torch's FLOP counter and with the tensors that autograd
keeps. Two operations per multiply-add. Norms, activations, pooling and upsampling are not counted as FLOPs (below 1 %).
What it does not do: other backbones; `counted.py` measures those on the real module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hermes_dist.config import ModelConfig, Vox3
from hermes_dist.errors import ConfigError

WIDTHS = (1, 2, 4, 8, 10)
PLACE_LEVELS = {"enc4": 2, "enc8": 3, "enc16": 4, "dec8": 3, "dec4": 2}
FUSION_DEPTH = {"enc4": 2, "enc8": 2, "enc16": 4, "dec8": 2, "dec4": 2}
HEAD_WIDTH = 32


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


def layers(config: ModelConfig, request: Request) -> list[Layer]:
    """All layers in forward order. Raises ConfigError for a backbone without a formula."""
    if config.backbone != "resunet":
        raise ConfigError(
            f"model.backbone = {config.backbone!r} has no cost formula; use hermes_dist.scaling.counted on the built model"
        )
    fused = config.method == "hermes"
    places = [p for p in PLACE_LEVELS if p in config.priors.scales] if fused else []
    b2, b4, b8, b16 = config.blocks
    width = [config.base_channels * w for w in WIDTHS]
    voxels = [
        math.prod(-(-side // 2**level) if level == 0 else side // 2**level for side in request.patch_vox_zyx)
        for level in range(5)
    ]
    result = [
        Layer(
            "stem.conv",
            "input",
            27 * width[0],
            2 * 27 * width[0] * voxels[0],
            width[0] * voxels[0],
            (1 + width[0]) * voxels[0],
            (1 + width[0]) * voxels[0],
            backward=1,
        ),
        *_residual("stem", width[0], width[0], 1, voxels[0]),
    ]
    for level, blocks in enumerate((b2, b4, b8, b16), start=1):
        pooled = width[level - 1] * voxels[level]
        # Max pooling keeps the position of each maximum as int64: two float32 elements per pooled value, and the value itself.
        result.append(Layer(f"down{level}.pool", "residual", 0, 0, pooled, 3 * pooled, 3 * pooled))
        result += _residual(f"down{level}", width[level - 1], width[level], blocks, voxels[level])
        result += _fusion({2: "enc4", 3: "enc8", 4: "enc16"}.get(level), places, config, request, width[level], voxels[level])
    for level, blocks in zip((3, 2, 1, 0), (b8, b4, b2, 2), strict=True):
        result += _residual(f"up{4 - level}", width[level] + width[level + 1], width[level], blocks, voxels[level])
        result += _fusion({3: "dec8", 2: "dec4"}.get(level), places, config, request, width[level], voxels[level])
    posterior = sum(width[PLACE_LEVELS[p]] for p in places)
    result += _heads(config, request, posterior, width[0], voxels[0])
    return result


def _residual(name: str, in_width: int, out_width: int, blocks: int, voxels: int) -> Iterator[Layer]:
    """Residual blocks: two convolutions and, where the width changes, a third one as the shortcut. Kept: conv1's result and "
    "the output."""
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


def _fusion(
    place: str | None, places: list[str], config: ModelConfig, request: Request, width: int, voxels: int
) -> Iterator[Layer]:
    """A prior pool and its fusion blocks: tokens read features, tokens' MLP, features read tokens, features' MLP."""
    if place is None or place not in places:
        return
    tokens = request.columns + (config.priors.length if config.priors.modality else 0)
    null = int(config.priors.padding == "attended")
    modalities = request.n_modalities * config.priors.length if config.priors.modality else 0
    yield Layer(f"{place}.pool", "input", (request.n_tasks + null + modalities) * width, 0, tokens * width)
    inner = max(1, width // HEAD_WIDTH) * min(width, HEAD_WIDTH)
    halves = 2 if config.priors.direction == "bidirectional" else 1
    half = 4 * width * inner + 8 * width**2 + 12 * width
    tokens_read = 2 * width * inner * (2 * tokens + 2 * voxels) + 4 * tokens * voxels * inner + 16 * tokens * width**2
    features_read = 2 * width * inner * (2 * voxels + 2 * tokens) + 4 * tokens * voxels * inner + 16 * voxels * width**2
    for i in range(FUSION_DEPTH[place]):
        flops = tokens_read + (features_read if halves == 2 else 0)
        # Per voxel: key-value norm, keys and values; query norm, queries, attention's result twice (as heads and as rows), sum,
        # MLP norm, hidden before and after GELU, sum; a norm keeps its input, which is one of the sums.
        kept = voxels * (width + 2 * inner + (halves - 1) * (12 * width + 3 * inner)) + tokens * 14 * width
        output = voxels * width + tokens * width
        yield Layer(f"{place}.{i}", "fusion", half * halves, flops, output, kept, output, flops)


def _heads(config: ModelConfig, request: Request, posterior: int, width: int, voxels: int) -> Iterator[Layer]:
    columns = request.columns
    if config.method == "traditional":
        yield Layer(
            "head", "head", request.n_tasks * (width + 1), 2 * columns * width * voxels, columns * voxels, width * columns
        )
        return
    weights = posterior**2 + posterior * width + 2 * width**2
    logits = 2 * columns * width * voxels
    yield Layer(
        "head",
        "head",
        weights + 3 * posterior + 3 * width,
        2 * columns * weights + logits,
        columns * voxels,
        4 * columns * posterior,
    )
    if config.priors.modality:
        m = request.n_modalities
        yield Layer(
            "modality_head",
            "head",
            posterior**2 + 3 * posterior + posterior * m + m,
            2 * (posterior**2 + posterior * m),
            m,
            posterior,
        )


def parameter_count(config: ModelConfig, request: Request) -> int:
    """Trainable parameters."""
    return sum(layer.parameters for layer in layers(config, request))


def backbone_parameters(config: ModelConfig) -> int:
    """Parameters of the bare backbone, as the paper counts sizes: 10.1, 40.6 and 157.9 M."""
    request = Request((32, 32, 32), 1, 1, 1)
    bare = config.model_copy(update={"method": "traditional"})
    return sum(layer.parameters for layer in layers(bare, request) if layer.unit != "head")


def forward_flops(config: ModelConfig, request: Request) -> int:
    """FLOPs of one sample's forward pass."""
    return sum(layer.flops for layer in layers(config, request))


def training_flops(config: ModelConfig, request: Request) -> int:
    """FLOPs of one sample's forward and backward pass, without recomputation: what MFU counts."""
    return sum(layer.flops * (1 + layer.backward) for layer in layers(config, request))


def recomputed_flops(config: ModelConfig, request: Request, mode: str) -> int:
    """FLOPs that activation checkpointing adds per sample: `none`, `selective`, `blocks` or `full`."""
    units = [layer for layer in layers(config, request) if layer.unit in ("residual", "fusion")]
    if mode == "none":
        return 0
    return sum(layer.redo_flops if mode == "selective" else layer.flops for layer in units)
