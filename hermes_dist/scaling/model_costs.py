"""Parameters, FLOPs and kept activations of Hermes-R, Hermes-M and their bare backbones, layer by layer, from the configuration.

Sources: facts on the published models (stages, fusion, heads) and the paper's section 3. A second implementation, on purpose:
the tests compare it with the parameters of the real models, with torch's FLOP counter and with the tensors that autograd
keeps. Two operations per multiply-add. Norms, activations, pooling and upsampling are not counted as FLOPs (below 1 %).
What it does not do: other backbones; `counted.py` measures those on the real module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from hermes_dist.config import ModelConfig
from hermes_dist.errors import ConfigError
from hermes_dist.scaling.cost_layers import PLACE_LEVELS, WIDTHS, Layer, Request, pool, residual, stem, token_count
from hermes_dist.scaling.medformer_costs import HEAD_WIDTH, aux_voxels, medformer_layers

FUSION_DEPTH = {"enc4": 2, "enc8": 2, "enc16": 4, "dec8": 2, "dec4": 2}


def layers(config: ModelConfig, request: Request) -> list[Layer]:
    """All layers in forward order. Raises ConfigError for a backbone without a formula."""
    if config.backbone not in ("resunet", "medformer"):
        raise ConfigError(
            f"model.backbone = {config.backbone!r} has no cost formula; use hermes_dist.scaling.counted on the built model"
        )
    places = [p for p in PLACE_LEVELS if p in config.priors.scales] if config.method == "hermes" else []
    voxels = [math.prod(side // 2**level for side in request.patch_vox_zyx) for level in range(5)]
    width = [config.base_channels * w for w in WIDTHS]
    posterior = sum(width[PLACE_LEVELS[p]] for p in places)
    if config.backbone == "medformer":
        backbone = medformer_layers(config, places, request, voxels)
        aux = [_head("aux_head", config, request, posterior, width[2], aux_voxels(voxels))]
    else:
        backbone, aux = _resunet(config, places, request, width, voxels), []
    modality = [_modality_head(request, posterior)] if places and config.priors.modality else []
    return [*backbone, _head("head", config, request, posterior, width[0], voxels[0]), *aux, *modality]


def _resunet(config: ModelConfig, places: list[str], request: Request, width: list[int], voxels: list[int]) -> Iterator[Layer]:
    b2, b4, b8, b16 = config.blocks
    yield from stem(width[0], voxels[0])
    for level, blocks in enumerate((b2, b4, b8, b16), start=1):
        pooled = width[level - 1] * voxels[level]
        # Max pooling keeps the position of each maximum as int64: two float32 elements per pooled value, and the value itself.
        yield Layer(f"down{level}.pool", "residual", 0, 0, pooled, 3 * pooled, 3 * pooled)
        yield from residual(f"down{level}", width[level - 1], width[level], blocks, voxels[level])
        yield from _fusion({2: "enc4", 3: "enc8", 4: "enc16"}.get(level), places, config, request, width[level], voxels[level])
    for level, blocks in zip((3, 2, 1, 0), (b8, b4, b2, 2), strict=True):
        yield from residual(f"up{4 - level}", width[level] + width[level + 1], width[level], blocks, voxels[level])
        yield from _fusion({3: "dec8", 2: "dec4"}.get(level), places, config, request, width[level], voxels[level])


def _fusion(
    place: str | None, places: list[str], config: ModelConfig, request: Request, width: int, voxels: int
) -> Iterator[Layer]:
    """A prior pool and its fusion blocks: tokens read features, tokens' MLP, features read tokens, features' MLP."""
    if place is None or place not in places:
        return
    tokens = token_count(config, request)
    yield pool(place, width, config, request)
    inner = max(1, width // HEAD_WIDTH) * min(width, HEAD_WIDTH)
    halves = 2 if config.priors.direction == "bidirectional" else 1
    half = 4 * width * inner + 8 * width**2 + 12 * width
    tokens_read = 2 * width * inner * (2 * tokens + 2 * voxels) + 4 * tokens * voxels * inner + 16 * tokens * width**2
    features_read = 2 * width * inner * (2 * voxels + 2 * tokens) + 4 * tokens * voxels * inner + 16 * voxels * width**2
    for i in range(FUSION_DEPTH[place]):
        flops = tokens_read + (features_read if halves == 2 else 0)
        # Per voxel: key-value norm, keys and values; query norm, queries, attention's result twice (as heads and as rows), two
        # sums; a norm keeps its input, which is one of the sums. The features' MLP is redone: its FLOPs (0.3 to 0.4 % of
        # a step by these formulas) are not counted.
        kept = voxels * (width + 2 * inner + (halves - 1) * (3 * width + 3 * inner)) + tokens * 14 * width
        output = voxels * width + tokens * width
        yield Layer(f"{place}.{i}", "fusion", half * halves, flops, output, kept, output, flops)


def _head(name: str, config: ModelConfig, request: Request, posterior: int, width: int, voxels: int) -> Layer:
    """Logits of the asked tasks on a map: by prototypes made of posteriors, or by one channel per task."""
    columns = request.columns
    logits = 2 * columns * width * voxels
    if config.method == "traditional":
        return Layer(name, "head", request.n_tasks * (width + 1), logits, columns * voxels, width * columns)
    weights = posterior**2 + posterior * width + 2 * width**2
    biases = 3 * posterior + 3 * width
    return Layer(name, "head", weights + biases, 2 * columns * weights + logits, columns * voxels, 4 * columns * posterior)


def _modality_head(request: Request, posterior: int) -> Layer:
    m = request.n_modalities
    weights = posterior**2 + posterior * m
    return Layer("modality_head", "head", weights + 3 * posterior + m, 2 * weights, m, posterior)


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
