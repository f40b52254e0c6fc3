"""Layers of the MedFormer backbone (Hermes-M and the traditional one), as `model_costs` has them for the ResUNet.

Source: facts 1.6 on the published Hermes-M. Depthwise convolutions cost 27 multiply-adds a voxel and channel; semantic map tokens
cost little beside voxels, but are counted, so that parameters agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

from hermes_dist.config import ModelConfig
from hermes_dist.scaling.cost_layers import PLACE_LEVELS, WIDTHS, Layer, Request, pool, residual, stem, token_count

DEPTH = {"enc4": 2, "enc8": 4, "enc16": 8, "dec8": 4, "dec4": 2}
CONV_BLOCKS = 2
MAP_TOKENS = 64
MAP_LAYERS = 2
EXPANSION = 4
HEAD_WIDTH = 32


def medformer_layers(config: ModelConfig, places: list[str], request: Request, voxels: list[int]) -> Iterator[Layer]:
    """All layers of the backbone and its prior pools, in forward order; `voxels` by level."""
    c = [config.base_channels * w for w in WIDTHS]
    yield from stem(c[0], voxels[0])
    yield _merge("merge1", c[0], c[1], voxels[1])
    yield from residual("down1", c[1], c[1], CONV_BLOCKS, voxels[1])
    for level, place in ((2, "enc4"), (3, "enc8"), (4, "enc16")):
        yield _merge(f"merge{level}", c[level - 1], c[level], voxels[level])
        yield _map(f"map{level}", c[level], voxels[level])
        yield from _fused(place, c[level], c[level], places, config, request, voxels[level])
    yield _map_fusion(c[2:])
    for level, place in ((3, "dec8"), (2, "dec4")):
        wide = c[level + 1] + c[level]
        yield Layer(f"reduce{level}", "input", wide * c[level], 2 * MAP_TOKENS * wide * c[level], MAP_TOKENS * c[level])
        # Joined features: the input of the first block's norm and of its shortcut.
        yield Layer(f"join{level}", "input", 0, 0, wide * voxels[level], wide * voxels[level], wide * voxels[level])
        yield from _fused(place, wide, c[level], places, config, request, voxels[level])
    yield from residual("up1", c[2] + c[1], c[1], CONV_BLOCKS, voxels[1])
    yield from residual("up2", c[1] + c[0], c[0], CONV_BLOCKS, voxels[0])


def _merge(name: str, wide: int, out: int, voxels: int) -> Layer:
    """Eight neighbours become channels, are normed, convolved per channel and projected; each of the three is kept."""
    joined = 8 * wide
    weights = 27 * joined + joined * out
    kept = (3 * joined + out) * voxels
    return Layer(name, "residual", weights, 2 * weights * voxels, out * voxels, kept, kept)


def _map(name: str, width: int, voxels: int) -> Layer:
    """Two 3x3x3 convolutions, softmax over voxels, and a weighted mean: 64 tokens."""
    weights = 27 * width * (width + MAP_TOKENS)
    flops = 2 * weights * voxels + 2 * MAP_TOKENS * width * voxels
    kept = (width + MAP_TOKENS) * voxels
    return Layer(name, "residual", weights, flops, MAP_TOKENS * width, kept, kept)


def _fused(
    place: str, first: int, width: int, places: list[str], config: ModelConfig, request: Request, voxels: int
) -> Iterator[Layer]:
    """The prior pool of a place and its transformer blocks; the first block narrows `first` channels to `width`."""
    read = place in places
    if read:
        yield pool(place, width, config, request)
    tokens = MAP_TOKENS + (token_count(config, request) if read else 0)
    seen = tokens if config.priors.direction == "bidirectional" else MAP_TOKENS
    for i in range(DEPTH[place]):
        wide = first if i == 0 else width
        last = place == "dec4" and i == DEPTH[place] - 1
        yield _block(f"{place}.{i}", wide, width, voxels, tokens, seen, project_tokens=not last)


def _block(name: str, wide: int, width: int, voxels: int, tokens: int, seen: int, *, project_tokens: bool) -> Layer:
    """Bidirectional attention between voxels and tokens, then the inverted bottleneck."""
    hidden, excite = EXPANSION * width, EXPANSION * width // 4
    feature_maps = 27 * wide + 2 * width * wide + 27 * width + width**2
    shortcut = wide * width if wide != width else 0
    token_maps = 2 * width**2 + (width**2 if project_tokens else 0)
    bottleneck = 2 * width * hidden + 27 * hidden
    gate = 2 * hidden * excite
    parameters = feature_maps + shortcut + token_maps + bottleneck + gate + excite + hidden + 2 * width
    attention = 4 * (tokens + seen) * voxels * width
    flops = 2 * (feature_maps + shortcut + bottleneck) * voxels + attention + 2 * token_maps * tokens + 2 * gate
    # Per voxel: norm and depthwise (wide each), queries and values, attention as heads and as rows, depthwise, sum, norm;
    # hidden: expanded, normed, depthwise, gated, normed; the result; the shortcut's norm.
    per_voxel = 2 * wide + 7 * width + 5 * hidden + width // HEAD_WIDTH + (wide if shortcut else 0)
    output = (voxels + tokens) * width
    kept = per_voxel * voxels + 8 * tokens * width
    return Layer(name, "fusion", parameters, flops, output, kept, output, flops)


def _map_fusion(widths: list[int]) -> Layer:
    """Map tokens of three scales read one another in two layers of the widest scale's width."""
    wide, rows = widths[-1], MAP_TOKENS * len(widths)
    projections = 2 * sum(c * wide for c in widths)
    layer = 4 * wide**2 + wide + 2 * wide + 2 * wide**2 + 2 * wide + 2 * wide
    flops = 2 * MAP_TOKENS * projections + MAP_LAYERS * (2 * rows * 6 * wide**2 + 4 * rows**2 * wide)
    return Layer("map_fusion", "input", projections + MAP_LAYERS * layer, flops, rows * wide, 12 * rows * wide, 12 * rows * wide)


def aux_voxels(voxels: list[int]) -> int:
    """Voxels on which the auxiliary head answers."""
    return voxels[PLACE_LEVELS["dec4"]]
