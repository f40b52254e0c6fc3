"""Compiled loops of the augmentation: affine resampling, blur, noise, moments. One thread each, no GIL, cached on disk.

Compiled with numba, because the affine is the dearest part of a sample and a loop that interpolates image and label together
takes a sixth of the CPU time of `grid_sample` (which needs a coordinate grid, and a second pass for the label). Nothing here
draws a random number or knows a configuration: see `augment`. `no_type_check` keeps the run-time shape checks of the tests
out of compiled code.
"""

# numba publishes no types for its decorators; the kernels themselves are annotated.
# pyright: reportUntypedFunctionDecorator=false

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np
import numpy.typing as npt
from numba import njit

F32 = npt.NDArray[np.float32]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@njit(cache=True, nogil=True, fastmath={"contract", "nsz", "nnan", "ninf"}, error_model="numpy")
@no_type_check
def _places(affine: F32, origin: F32, shape, z: int, y: int, corner, nearest, weights: F32):
    """For one row of the result: flat index of the first of eight corners and of the nearest voxel, and weights (3, X) Z Y X.

    Coordinates are clamped to the source.
    """
    nz, ny, nx = shape
    step_z, step_y = np.int32(ny * nx), np.int32(nx)
    last_z, last_y, last_x = np.int32(nz - 2), np.int32(ny - 2), np.int32(nx - 2)
    top_z, top_y, top_x = np.float32(nz - 1), np.float32(ny - 1), np.float32(nx - 1)
    zero, half = np.float32(0.0), np.float32(0.5)
    base_z = affine[0, 0] * z + affine[0, 1] * y + origin[0]
    base_y = affine[1, 0] * z + affine[1, 1] * y + origin[1]
    base_x = affine[2, 0] * z + affine[2, 1] * y + origin[2]
    for x in range(corner.size):
        step = np.float32(x)
        at_z = min(max(base_z + affine[0, 2] * step, zero), top_z)
        at_y = min(max(base_y + affine[1, 2] * step, zero), top_y)
        at_x = min(max(base_x + affine[2, 2] * step, zero), top_x)
        nearest[x] = np.int32(at_z + half) * step_z + np.int32(at_y + half) * step_y + np.int32(at_x + half)
        iz, iy, ix = min(np.int32(at_z), last_z), min(np.int32(at_y), last_y), min(np.int32(at_x), last_x)
        weights[0, x], weights[1, x], weights[2, x] = at_z - np.float32(iz), at_y - np.float32(iy), at_x - np.float32(ix)
        corner[x] = iz * step_z + iy * step_y + ix


@njit(cache=True, nogil=True, fastmath={"contract", "nsz", "nnan", "ninf"}, error_model="numpy")
@no_type_check
def warp_into(image: F32, label, affine: F32, origin: F32, image_out: F32, label_out):
    """image_out[o] = trilinear image at `affine @ o + origin`, label_out[o] = nearest label there. Source sides must be >= 2.

    Coordinates are clamped to the source, so its outermost voxels continue to infinity. Row by row, in three loops: places and
    weights, corners, interpolation. The first and the last become vector instructions, the one between is loads only.
    """
    source, labels = image.reshape(-1), label.reshape(-1)
    down, deep, one = np.uint64(image.shape[2]), np.uint64(image.shape[1] * image.shape[2]), np.uint64(1)
    width = image_out.shape[2]
    corner, nearest = np.empty(width, np.int32), np.empty(width, np.int32)
    weights, values = np.empty((3, width), np.float32), np.empty((8, width), np.float32)
    for z in range(image_out.shape[0]):
        for y in range(image_out.shape[1]):
            _places(affine, origin, image.shape, z, y, corner, nearest, weights)
            for x in range(width):
                a = np.uint64(corner[x])  # unsigned: numba then leaves out the code for negative indices
                b, c, d = a + down, a + deep, a + deep + down
                values[0, x], values[1, x], values[2, x], values[3, x] = source[a], source[a + one], source[b], source[b + one]
                values[4, x], values[5, x], values[6, x], values[7, x] = source[c], source[c + one], source[d], source[d + one]
                label_out[z, y, x] = labels[np.uint64(nearest[x])]
            for x in range(width):
                fz, fy, fx = weights[0, x], weights[1, x], weights[2, x]
                p = values[0, x] + fx * (values[1, x] - values[0, x])
                q = values[2, x] + fx * (values[3, x] - values[2, x])
                r = values[4, x] + fx * (values[5, x] - values[4, x])
                s = values[6, x] + fx * (values[7, x] - values[6, x])
                p += fy * (q - p)
                r += fy * (s - r)
                image_out[z, y, x] = p + fz * (r - p)


@njit(cache=True, nogil=True, fastmath={"contract", "nsz", "nnan", "ninf"}, error_model="numpy")
@no_type_check
def warp_pairs_into(pairs, label, affine: F32, origin: F32, scale: float, image_out: F32, label_out):
    """`warp_into` for an int16 source, times `scale`: half the bytes, and half the loads.

    `pairs[i]` holds voxels i (low half) and i + 1 of the flat source: an int32 view with steps of two bytes.
    """
    labels, factor, half_word = label.reshape(-1), np.float32(scale), np.int32(16)
    down, deep = np.uint64(label.shape[2]), np.uint64(label.shape[1] * label.shape[2])
    width = image_out.shape[2]
    corner, nearest = np.empty(width, np.int32), np.empty(width, np.int32)
    weights, values = np.empty((3, width), np.float32), np.empty((4, width), np.int32)
    for z in range(image_out.shape[0]):
        for y in range(image_out.shape[1]):
            _places(affine, origin, label.shape, z, y, corner, nearest, weights)
            for x in range(width):
                a = np.uint64(corner[x])
                values[0, x], values[1, x], values[2, x], values[3, x] = (
                    pairs[a],
                    pairs[a + down],
                    pairs[a + deep],
                    pairs[a + deep + down],
                )
                label_out[z, y, x] = labels[np.uint64(nearest[x])]
            for x in range(width):
                fz, fy, fx = weights[0, x], weights[1, x], weights[2, x]
                v, w = values[0, x], values[1, x]
                p, q = np.float32(np.int32(v << half_word) >> half_word), np.float32(np.int32(w << half_word) >> half_word)
                p += fx * (np.float32(v >> half_word) - p)
                q += fx * (np.float32(w >> half_word) - q)
                p += fy * (q - p)
                v, w = values[2, x], values[3, x]
                r, q = np.float32(np.int32(v << half_word) >> half_word), np.float32(np.int32(w << half_word) >> half_word)
                r += fx * (np.float32(v >> half_word) - r)
                q += fx * (np.float32(w >> half_word) - q)
                r += fy * (q - r)
                image_out[z, y, x] = (p + fz * (r - p)) * factor


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
@no_type_check
def moments(flat: F32) -> tuple[float, float, float, float]:
    """(minimum, maximum, mean, standard deviation) in one pass over a flat array, sums in blocks of double precision."""
    low, high = flat[0], flat[0]
    total, squares = 0.0, 0.0
    for start in range(0, flat.size, 4096):
        part, part_squares = np.float32(0), np.float32(0)
        pivot = flat[0]
        for i in range(start, min(start + 4096, flat.size)):
            value = flat[i]
            low, high = min(low, value), max(high, value)
            part += value - pivot
            part_squares += (value - pivot) * (value - pivot)
        total += part
        squares += part_squares
    shift = total / flat.size
    mean = float(flat[0]) + shift
    return float(low), float(high), float(mean), math.sqrt(max(squares / flat.size - shift * shift, 0.0))


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
@no_type_check
def linear_clamped(flat: F32, factor: float, offset: float, low: float, high: float):
    """In place: clamp(x * factor + offset, low, high)."""
    a, b, lo, hi = np.float32(factor), np.float32(offset), np.float32(low), np.float32(high)
    for i in range(flat.size):
        flat[i] = min(max(flat[i] * a + b, lo), hi)


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
@no_type_check
def blur_into(image: F32, kernel: F32, scratch: F32, out: F32):
    """Separable convolution with a symmetric kernel of odd length; edges are replicated. All arrays have one shape."""
    nz, ny, nx = image.shape
    radius = kernel.size // 2
    row = np.empty(nx + 2 * radius, np.float32)
    for z in range(nz):
        for y in range(ny):
            row[radius : radius + nx] = image[z, y]
            row[:radius] = image[z, y, 0]
            row[radius + nx :] = image[z, y, nx - 1]
            for x in range(nx):
                out[z, y, x] = kernel[0] * row[x]
            for k in range(1, kernel.size):
                for x in range(nx):
                    out[z, y, x] += kernel[k] * row[x + k]
    for z in range(nz):
        for y in range(ny):
            scratch[z, y, :] = 0
            for k in range(kernel.size):
                source = min(max(y + k - radius, 0), ny - 1)
                for x in range(nx):
                    scratch[z, y, x] += kernel[k] * out[z, source, x]
    for z in range(nz):
        for y in range(ny):
            out[z, y, :] = 0
            for k in range(kernel.size):
                source = min(max(z + k - radius, 0), nz - 1)
                for x in range(nx):
                    out[z, y, x] += kernel[k] * scratch[source, y, x]


@njit(cache=True, nogil=True)
@no_type_check
def add_noise(flat: F32, key: np.uint64, scale: float, quantiles: F32):
    """In place: x[i] += scale * quantiles[16 bits of hash(key, i // 4)]; `quantiles` has 65,536 entries.

    A hash of the voxel's number instead of a generator's state, so that any device computes the same noise.
    """
    std = np.float32(scale)
    mask, sixteen = np.uint64(0xFFFF), np.uint64(16)
    for block in range((flat.size + 3) // 4):
        h = key + np.uint64(block + 1) * _GOLDEN
        h = (h ^ (h >> np.uint64(30))) * _MIX_1
        h = (h ^ (h >> np.uint64(27))) * _MIX_2
        h = h ^ (h >> np.uint64(31))
        for i in range(4 * block, min(4 * block + 4, flat.size)):
            flat[i] += std * quantiles[h & mask]
            h = h >> sixteen
