"""Resampling along all three axes, as matrix products.

Interpolation with any linear kernel is a banded matrix per axis, so a volume is resampled by three matrix multiplications
(BLAS) on blocks of the band: the axis that shrinks most goes first, which also bounds memory. When shrinking, the kernel is
widened by the scale (anti-aliasing), as PIL and torch's `antialias=True` do; taps outside the volume are dropped and the
rest renormalised. Geometry: the centres of the input and the output box coincide (see `geometry.Placement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Integer, Num

Interpolation = Literal["linear", "cubic"]
LabelInterpolation = Literal["nearest", "linear"]
ROWS_PER_BLOCK = 32


class Band(NamedTuple):
    """Output rows [row, row + len(weights)) as `weights @ input[start : start + weights.shape[1]]`."""

    row: int
    start: int
    weights: np.ndarray


def source_positions(n_in: int, n_out: int, scale: float | int) -> np.ndarray:
    """Position of each output voxel's centre in input voxels, float64 of n_out; rounded to 1e-9 so that ties are ties."""
    return np.round((np.arange(n_out) - (n_out - 1) / 2) * scale + (n_in - 1) / 2, 9)


def _kernel(distance: np.ndarray, interpolation: Interpolation) -> np.ndarray:
    """Triangle, or Keys' cubic convolution with a = -0.5 (exact for quadratics), at |distance| in kernel units."""
    d = np.abs(distance)
    if interpolation == "linear":
        return np.maximum(0, 1 - d)
    inner = (1.5 * d - 2.5) * d * d + 1
    outer = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, inner, np.where(d < 2, outer, 0))


def bands(n_in: int, n_out: int, *, scale: float | int, interpolation: Interpolation) -> list[Band]:
    """The interpolation matrix of one axis, cut into dense blocks of its band."""
    position = source_positions(n_in, n_out, scale)
    stretch = max(1.0, scale)
    reach = stretch * (1 if interpolation == "linear" else 2)
    result: list[Band] = []
    for row in range(0, n_out, ROWS_PER_BLOCK):
        x = position[row : row + ROWS_PER_BLOCK]
        start = min(max(0, int(np.ceil(x[0] - reach))), n_in - 1)
        stop = max(min(n_in, int(np.floor(x[-1] + reach)) + 1), start + 1)
        weights = _kernel((np.arange(start, stop)[None, :] - x[:, None]) / stretch, interpolation)
        weights /= weights.sum(axis=1, keepdims=True)
        result.append(Band(row, start, weights.astype(np.float32)))
    return result


def _apply(volume: np.ndarray, axis: int, matrix: Sequence[Band], n_out: int) -> np.ndarray:
    shape = [*volume.shape]
    shape[axis] = n_out
    out = np.empty(shape, np.float32)
    for row, start, weights in matrix:
        rows, columns = weights.shape
        if axis == 0:
            block = np.ascontiguousarray(volume[start : start + columns], np.float32)
            np.matmul(weights, block.reshape(columns, -1), out=out[row : row + rows].reshape(rows, -1))
        elif axis == 1:
            for z in range(shape[0]):
                block = volume[z, start : start + columns].astype(np.float32, copy=False)
                np.matmul(weights, block, out=out[z, row : row + rows])
        else:
            for z in range(shape[0]):
                block = volume[z, :, start : start + columns].astype(np.float32, copy=False)
                out[z, :, row : row + rows] = block @ weights.T
    return out


def resample_image(
    image_zyx: Num[np.ndarray, "z y x"],
    shape_out: tuple[int, int, int],
    *,
    scale_zyx: tuple[float | int, float | int, float | int],
    interpolation: Interpolation = "linear",
) -> Float32[np.ndarray, "d h w"]:
    """Interpolate a volume on all axes, with anti-aliasing where it shrinks.

    Args:
        image_zyx: any numeric type; it is converted in blocks, so an int16 scan is never copied whole as float.
        shape_out: voxels of the result, Z Y X.
        scale_zyx: input voxels per output voxel and axis.
        interpolation: `linear` or `cubic`.
    """
    result = image_zyx
    for axis in sorted(range(3), key=lambda a: shape_out[a] / image_zyx.shape[a]):
        n_in, n_out = image_zyx.shape[axis], shape_out[axis]
        if n_in == n_out and scale_zyx[axis] == 1:
            continue
        matrix = bands(n_in, n_out, scale=scale_zyx[axis], interpolation=interpolation)
        result = _apply(result, axis, matrix, n_out)
    return np.ascontiguousarray(result, np.float32)


def nearest_indices(n_in: int, n_out: int, scale: float | int) -> np.ndarray:
    """Input index nearest to each output voxel; ties go towards the centre of the volume, so that mirroring commutes."""
    x = source_positions(n_in, n_out, scale)
    towards_centre = np.where(x > (n_in - 1) / 2, np.ceil(x - 0.5), np.floor(x + 0.5))
    return np.clip(towards_centre, 0, n_in - 1).astype(np.intp)


def resample_label(
    label_zyx: Integer[np.ndarray, "z y x"],
    shape_out: tuple[int, int, int],
    *,
    scale_zyx: tuple[float | int, float | int, float | int],
    interpolation: LabelInterpolation = "nearest",
) -> Integer[np.ndarray, "d h w"]:
    """Resample an integer map; no value that was not there can appear.

    `nearest` takes the value at the nearest voxel centre. `linear` takes the class with the largest interpolated share (ties:
    the lowest value); it works in blocks and interpolates only the classes that a block's neighbourhood holds, so its cost
    follows the boundaries, not the number of classes.
    """
    if interpolation == "nearest":
        result = label_zyx
        for axis in sorted(range(3), key=lambda a: shape_out[a] / label_zyx.shape[a]):
            n_in, n_out = label_zyx.shape[axis], shape_out[axis]
            if n_in != n_out or scale_zyx[axis] != 1:
                result = result.take(nearest_indices(n_in, n_out, scale_zyx[axis]), axis=axis)
        return np.ascontiguousarray(result)
    matrices = [
        bands(n, m, scale=s, interpolation="linear") for n, m, s in zip(label_zyx.shape, shape_out, scale_zyx, strict=True)
    ]
    out = np.empty(shape_out, label_zyx.dtype)
    for z in matrices[0]:
        for y in matrices[1]:
            for x in matrices[2]:
                source = tuple(slice(b.start, b.start + b.weights.shape[1]) for b in (z, y, x))
                target = tuple(slice(b.row, b.row + b.weights.shape[0]) for b in (z, y, x))
                out[target] = _largest_share(label_zyx[source], z.weights, y.weights, x.weights)
    return out


def _largest_share(block: np.ndarray, wz: np.ndarray, wy: np.ndarray, wx: np.ndarray) -> np.ndarray:
    values = np.unique(block) if block.min() != block.max() else block.ravel()[:1]
    shape = (len(wz), len(wy), len(wx))
    if len(values) == 1:
        return np.full(shape, values[0], block.dtype)
    best = np.full(shape, -1, np.float32)
    winner = np.empty(shape, block.dtype)
    for value in values:
        share = (block == value).astype(np.float32)
        share = np.matmul(wy, np.tensordot(wz, share, axes=(1, 0))) @ wx.T
        better = share > best + 1e-6
        winner[better] = value
        np.maximum(best, share, out=best)
    return winner
