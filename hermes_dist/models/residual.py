"""The residual block as one differentiable operation: InstanceNorm, ReLU and convolution, without keeping what is cheap to redo.

A pre-activated block computes  out = conv2(nr(conv1(nr(x)))) + shortcut(x),  nr = ReLU(InstanceNorm(·)).  Plain modules keep the
result of every nr for the backward pass, and norm the input twice where the shortcut is a convolution (it has the same
parameterless norm). Here the backward pass redoes nr from the saved statistics (memory-bound, cheap), so that a block keeps its
input and the result of conv1 only; with `recompute` also the latter goes, at the price of one more convolution.

The input may come in two parts, a skip and a low-resolution map that is upsampled to the skip's grid. Norm works per channel and
convolution is linear, so both parts are treated one after the other, a wide low-resolution map in pieces as wide as the output:
the concatenation is never built, few upsampled channels exist at a time, and the backward pass makes them again.

Activations are channels-last (the CPU and tensor-core kernels want that); weights and their gradients stay contiguous, because
DeepSpeed flattens them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

from hermes_dist.models.convolution import channels_last, compute_dtype, conv, data_gradient, weight_gradient
from hermes_dist.models.instance_norm import Statistics, map_of, normalise, normalise_again, nr_backward, rows_of

_aten = torch.ops.aten
NORM_EPS = 1e-4
_HALF = (torch.bfloat16, torch.float16)
Triple = tuple[int, int, int]


class _Part(NamedTuple):
    """Channels of a block's input: a map, the grid to which it is upsampled (None: it has that grid already), and whose it is."""

    values: Tensor
    upsample_to: Triple | None
    source: int = 0


def upsample(x: Float[Tensor, "B C z y x"], grid_vox_zyx: Sequence[int]) -> Float[Tensor, "B C Z Y X"]:
    """Trilinear upsampling with aligned corners, computed in float32 whatever the input's type (facts 1.2)."""
    up = functional.interpolate(
        x.float() if x.dtype in _HALF else x, size=tuple(grid_vox_zyx), mode="trilinear", align_corners=True
    )
    return channels_last(up).to(x.dtype)


def _full_map(part: _Part) -> Tensor:
    return part.values if part.upsample_to is None else upsample(part.values, part.upsample_to)


def _first_half(parts: Sequence[_Part], weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Statistics]]:
    """The sum over the parts of conv(nr(part)), for each of `weights` (conv1 and the shortcut), and the parts' statistics."""
    sums: list[Tensor] = []
    statistics: list[Statistics] = []
    start = 0
    for part in parts:
        a, stats = _nr(_full_map(part), dtype, overwrite=part.upsample_to is not None)
        statistics.append(stats)
        stop = start + part.values.shape[1]
        for i, w in enumerate(weights):  # one result at a time
            result = conv(a, w[:, start:stop])
            if start:
                sums[i].add_(result)
            else:
                sums.append(result)
            del result
        start = stop
    return sums, statistics


def _nr(x: Tensor, dtype: torch.dtype, *, overwrite: bool = False) -> tuple[Tensor, Statistics]:
    normed, stats = normalise(rows_of(x), NORM_EPS, overwrite=overwrite)
    return map_of(normed.relu_().to(dtype), x), stats


def _conv_unit_backward(
    part: _Part, stats: Statistics, weight: Tensor, g: Tensor, want: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the full map and of the weight for conv(nr(map)), each where wanted.

    Keeps few maps at a time: one gradient after the other, and a map that is upsampled is made for each.
    """
    gw = None
    if want[1]:
        a = _redo_nr(_full_map(part), stats, g.dtype, overwrite=part.upsample_to is not None)
        gw = weight_gradient(g, a, weight)
        del a
    if not want[0]:
        return None, gw
    x = _full_map(part)
    ga = data_gradient(g, x if x.dtype == g.dtype else torch.empty_like(x, dtype=g.dtype), weight)
    gx = nr_backward(rows_of(channels_last(ga.to(x.dtype))), rows_of(x), stats)
    return map_of(gx, x), gw


def _redo_nr(x: Tensor, stats: Statistics, dtype: torch.dtype, *, overwrite: bool) -> Tensor:
    return map_of(normalise_again(rows_of(x), stats, overwrite=overwrite).relu_().to(dtype), x)


def _part_backward(
    part: _Part, stats: Statistics, weight: Tensor, g: Tensor, want: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    gx, gw = _conv_unit_backward(part, stats, weight, g, want)
    if gx is not None and part.upsample_to is not None:
        wide = gx.float() if gx.dtype in _HALF else gx
        gx = _aten.upsample_trilinear3d_backward(wide, list(part.upsample_to), list(part.values.shape), True).to(gx.dtype)
    return gx, gw


class _ResidualBlock(Function):
    """forward(recompute, grid, n_parts, *parts, w1, w2[, shortcut]) -> out. See the module's head."""

    @staticmethod
    def forward(ctx: Any, recompute: bool, n_parts: int, *tensors: Tensor | None) -> Tensor:
        values, (w1, w2, shortcut) = [t for t in tensors[:n_parts] if t is not None], tensors[n_parts:]
        assert w1 is not None
        assert w2 is not None
        dtype = compute_dtype(values[0])
        parts = _parts(values, len(w1))
        with torch.autocast(values[0].device.type, enabled=False):
            firsts, statistics = _first_half(parts, [w1] if shortcut is None else [w1, shortcut], dtype)
            h = firsts[0]
            a, h_stats = _nr(h, dtype)
            out = conv(a, w2)
            out = out.add_(values[0] if shortcut is None else firsts[1])
        flat = [t for s in [*statistics, h_stats] for t in s]
        ctx.save_for_backward(*values, w1, w2, shortcut, None if recompute else h, *flat)
        ctx.n_parts, ctx.dtype = n_parts, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = ctx.n_parts
        saved = ctx.saved_tensors
        values, (w1, w2, shortcut, h), flat = saved[:n], saved[n : n + 4], saved[n + 4 :]
        statistics = [Statistics(*flat[i : i + 2]) for i in range(0, len(flat), 2)]
        parts = _parts(values, len(w1))
        wants = ctx.needs_input_grad[2:]
        with torch.autocast(g.device.type, enabled=False):
            g = channels_last(g.to(ctx.dtype))
            if h is None:
                h = _first_half(parts, [w1], ctx.dtype)[0][0]
            gh, gw2 = _conv_unit_backward(_Part(h, None), statistics[-1], w2, g, (True, wants[n + 1]))
            assert gh is not None
            del h
            # conv1 and the shortcut read the same map: their gradients are those of one convolution with both kernels.
            both, g_both = (w1, gh) if shortcut is None else (torch.cat([w1, shortcut]), torch.cat([gh, g], dim=1))
            del gh
            want_weights = wants[n] or wants[n + 2]
            gxs: list[list[Tensor | None]] = [[] for _ in values]
            pieces: list[Tensor | None] = []
            stop = w1.shape[1]
            # The upsampled maps first: they need the most memory, and then the first part's gradient does not exist yet.
            for part, stats in zip(reversed(parts), reversed(statistics[:-1]), strict=True):
                start = stop - part.values.shape[1]
                want = wants[part.source], want_weights
                gx, piece = _part_backward(part, stats, both[:, start:stop], g_both, want)
                gxs[part.source].insert(0, gx)
                pieces.insert(0, piece)
                stop = start
            whole = [_along_channels(found) for found in gxs]
            if shortcut is None and whole[0] is not None:
                whole[0] = whole[0].add_(g)
        outputs = w1.shape[0]
        gw1 = _join(pieces, w1, slice(None, outputs))
        gw_shortcut = None if shortcut is None else _join(pieces, shortcut, slice(outputs, None))
        gw2 = None if gw2 is None else gw2.to(w2.dtype).contiguous()
        return None, None, *whole, gw1, gw2, gw_shortcut


def _parts(values: Sequence[Tensor], width: int) -> list[_Part]:
    """The input, in the order of its channels; a map that is upsampled in pieces of about `width` channels."""
    z, y, x = values[0].shape[2:]
    parts = [_Part(values[0], None)]
    for source, low in enumerate(values[1:], start=1):
        count = max(low.shape[1] // width, 1)
        parts += [_Part(channels_last(piece), (z, y, x), source) for piece in low.tensor_split(count, dim=1)]
    return parts


def _along_channels(pieces: Sequence[Tensor | None]) -> Tensor | None:
    known = [p for p in pieces if p is not None]
    return known[0] if len(known) == 1 else channels_last(torch.cat(known, dim=1)) if known else None


def _join(pieces: Sequence[Tensor | None], weight: Tensor, outputs: slice) -> Tensor | None:
    """One contiguous gradient of the weight's type from its slices' gradients along the input channels."""
    known = [p[outputs] for p in pieces if p is not None]
    return torch.cat(known, dim=1).to(weight.dtype).contiguous() if known else None


def residual_block(
    parts: Sequence[Float[Tensor, "B _ _ _ _"]],
    w1: Float[Tensor, "O I k k k"],
    w2: Float[Tensor, "O O k k k"],
    *,
    shortcut: Float[Tensor, "O I k k k"] | None = None,
    recompute: bool = False,
) -> Float[Tensor, "B O Z Y X"]:
    """Pre-activated residual block (facts 1.2) over the channel concatenation of `parts`.

    Args:
        parts: the map on the output's grid; then maps that are upsampled to it. Their channels follow one another.
        w1, w2: 3x3x3 kernels.
        shortcut: kernel of the shortcut convolution; None = identity (then there is one part of O channels).
        recompute: keep only the inputs, and redo the first convolution in the backward pass.
    """
    return _ResidualBlock.apply(recompute, len(parts), *(channels_last(p) for p in parts), w1, w2, shortcut)
