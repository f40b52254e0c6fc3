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
    the lowest value); its cost does not depend on the number of classes.
    """
    if interpolation == "nearest":
        result = label_zyx
        for axis in sorted(range(3), key=lambda a: shape_out[a] / label_zyx.shape[a]):
            n_in, n_out = label_zyx.shape[axis], shape_out[axis]
            if n_in != n_out or scale_zyx[axis] != 1:
                result = result.take(nearest_indices(n_in, n_out, scale_zyx[axis]), axis=axis)
        return np.ascontiguousarray(result)
    from hermes_dist.volume.label_kernels import largest_share  # numba takes a third of a second to load

    (start_z, weight_z), (start_y, weight_y), (start_x, weight_x) = (
        _taps(n, m, scale=s) for n, m, s in zip(label_zyx.shape, shape_out, scale_zyx, strict=True)
    )
    out = np.empty(shape_out, label_zyx.dtype)
    largest_share(np.ascontiguousarray(label_zyx), start_z, start_y, start_x, weight_z, weight_y, weight_x, out)
    return out


def _taps(n_in: int, n_out: int, *, scale: float | int) -> tuple[np.ndarray, np.ndarray]:
    """The linear interpolation of one axis per output voxel: first input voxel, and the weights of those that follow."""
    rows: list[tuple[int, np.ndarray]] = []
    for row, start, weights in bands(n_in, n_out, scale=scale, interpolation="linear"):
        for line in weights:
            used = np.flatnonzero(line)
            rows.append((start + int(used[0]), line[used[0] : used[-1] + 1]))
        assert row + len(weights) == len(rows)
    padded = np.zeros((n_out, max(len(line) for _, line in rows)), np.float32)
    for target, (_, line) in zip(padded, rows, strict=True):
        target[: len(line)] = line
    return np.array([start for start, _ in rows], np.intp), padded
