"""Sliding windows over whole scans, with memory that does not grow with tasks × volume on the device.

Windows run in Z order. As soon as no later window can touch a plane, the plane is finished: it is normalised, handed out as
part of a slab and forgotten. So the accumulator holds T × (one window's depth) planes on the host, and the device holds one
batch of windows. Consumers reduce each slab at once: to one byte a voxel and task (`quantised`), which can still be
interpolated on another grid, or to one bit (`packed_masks`).

Window starts are spread evenly and never repeat; the published code runs the last window of a side twice when the side is a
multiple of the stride, and cuts long scans without overlap. Small volumes are padded with the scan's minimum ("air"), as in
training.

A task's logits depend on which tasks are asked together (their tokens meet in the prior fusion), so blocks of tasks are
never separate forward passes: `task_block` only bounds what is moved to the host at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from hermes_dist.errors import NumericalError, UsageError

ModelFn = Callable[[Tensor], Tensor]
"""(B, 1, z, y, x) windows → (B, T, z, y, x) logits."""
Vox3 = tuple[int, int, int]
Weights = Literal["gaussian", "uniform"]
LEVELS = 256


@dataclass(frozen=True)
class Slab:
    """Finished planes `[start_z, start_z + probability.shape[1])` of the scan, (T, z, Y, X) float32 in [0, 1]."""

    start_z: int
    probability: Float32[np.ndarray, "T z Y X"]


def window_starts(side_vox: int, window_vox: int, overlap: float) -> list[int]:
    """First voxels of the windows along one side: evenly spread, no duplicates, at least `overlap` of a window shared.

    A side that fits into one window gives `[0]`; the caller pads.
    """
    if not 0 <= overlap < 1:
        raise UsageError(f"overlap {overlap}: expected 0 ≤ overlap < 1")
    if window_vox < 1:
        raise UsageError(f"window of {window_vox} voxels: expected at least 1")
    last = side_vox - window_vox
    if last <= 0:
        return [0]
    stride = max(1, int(window_vox * (1 - overlap)))
    return sorted({round(float(v)) for v in np.linspace(0, last, -(-last // stride) + 1)})


def profile(size_vox: int, weights: Weights) -> Float32[Tensor, " n"]:
    """Weight along one axis of a window: uniform, or a Gaussian with σ = size / 8, at least 1 % of its peak.

    A window's weight is the product of its three profiles, so that the sum of all windows' weights is a product too.
    """
    if weights == "uniform":
        return torch.ones(size_vox)
    offset = torch.arange(size_vox, dtype=torch.float32) - (size_vox - 1) / 2
    return torch.exp(-0.5 * (offset / (size_vox / 8)) ** 2).clamp_min(0.01)


def slabs(
    model_fn: ModelFn,
    image: Float32[np.ndarray, "Z Y X"],
    *,
    window: Vox3,
    overlap: float = 0.5,
    weights: Weights = "gaussian",
    batch: int = 1,
    task_block: int = 16,
) -> Iterator[Slab]:
    """Predict a whole scan and hand out finished planes, from the lowest Z to the highest.

    Args:
        model_fn: logits of a batch of windows; it moves its input to its own device.
        image: preprocessed scan on the stored grid.
        window: window in voxels, Z Y X.
        overlap: least shared part of neighbouring windows.
        weights: how windows are averaged where they overlap.
        batch: windows per forward pass.
        task_block: task columns that are moved to the host at once.

    Raises:
        NumericalError: the model gave NaN or Inf (which would silently become "no voxel").
    """
    padded, inside = _pad(image, window)
    starts = [window_starts(side, size, overlap) for side, size in zip(padded.shape, window, strict=True)]
    profiles = [profile(size, weights) for size in window]
    norms = [_sum_of_profiles(p, side, s) for p, side, s in zip(profiles, padded.shape, starts, strict=True)]
    weight = torch.einsum("z,y,x->zyx", *profiles)
    columns = list(product(starts[1], starts[2]))
    total: Tensor | None = None
    for index, z in enumerate(starts[0]):
        for first in range(0, len(columns), batch):
            corners = columns[first : first + batch]
            logits = _forward(model_fn, padded, z, corners, window)
            if total is None:
                total = torch.zeros(logits.shape[1], window[0], padded.shape[1], padded.shape[2])
            _accumulate(total, logits, corners, weight, task_block)
        if total is None:
            raise AssertionError("a scan has at least one window")
        stop = starts[0][index + 1] if index + 1 < len(starts[0]) else padded.shape[0]
        low, high = max(z, inside[0].start), min(stop, inside[0].stop)
        if low < high:
            yield Slab(low - inside[0].start, _finish(total[:, low - z : high - z], norms, low, inside))
        _advance(total, stop - z)


def quantised(parts: Iterator[Slab], depth_vox: int) -> UInt8[np.ndarray, "T Z Y X"]:
    """All probabilities as one byte each: q = floor(256 p), so that `q >= 128` is exactly `p >= 0.5`.

    A quarter of float32's memory; `(q + 0.5) / 256` is within 0.002 of p, which is enough to interpolate on another grid.
    """
    result: np.ndarray | None = None
    for part in parts:
        if result is None:
            tasks, _, height, width = part.probability.shape
            result = np.empty((tasks, depth_vox, height, width), dtype=np.uint8)
        levels = np.minimum(part.probability * LEVELS, LEVELS - 1)
        result[:, part.start_z : part.start_z + levels.shape[1]] = levels.astype(np.uint8)
    if result is None:
        raise AssertionError("a scan has at least one slab")
    return result


def dequantised(levels: UInt8[np.ndarray, "Z Y X"]) -> Float32[np.ndarray, "Z Y X"]:
    """Probabilities at the middle of each level of `quantised`."""
    return (levels.astype(np.float32) + 0.5) / LEVELS


def packed_masks(parts: Iterator[Slab], depth_vox: int, threshold: float = 0.5) -> UInt8[np.ndarray, "P Z Y X"]:
    """Thresholded masks of all tasks, eight tasks to a byte (P = ⌈T / 8⌉): 61 classes of a scan take 8 bytes a voxel."""
    result: np.ndarray | None = None
    for part in parts:
        bits = np.packbits(part.probability >= threshold, axis=0)
        if result is None:
            result = np.empty((bits.shape[0], depth_vox, *bits.shape[2:]), dtype=np.uint8)
        result[:, part.start_z : part.start_z + bits.shape[1]] = bits
    if result is None:
        raise AssertionError("a scan has at least one slab")
    return result


def unpacked(masks: UInt8[np.ndarray, "P Z Y X"], task: int) -> Bool[np.ndarray, "Z Y X"]:
    """The mask of one task column of `packed_masks`."""
    return (masks[task // 8] & np.uint8(128 >> (task % 8))) != 0


def _pad(image: np.ndarray, window: Vox3) -> tuple[np.ndarray, tuple[slice, slice, slice]]:
    """Pad to at least one window, on both sides, with the scan's minimum; and where the scan then lies."""
    short = [max(0, size - side) for side, size in zip(image.shape, window, strict=True)]
    z, y, x = (slice(s // 2, s // 2 + side) for s, side in zip(short, image.shape, strict=True))
    if any(short):
        image = np.pad(image, [(s // 2, s - s // 2) for s in short], constant_values=image.min())
    return image, (z, y, x)


def _sum_of_profiles(one: Tensor, side_vox: int, starts: list[int]) -> Tensor:
    total = torch.zeros(side_vox)
    for start in starts:
        total[start : start + len(one)] += one
    return total


def _forward(model_fn: ModelFn, padded: np.ndarray, z: int, corners: list[tuple[int, int]], window: Vox3) -> Tensor:
    depth, height, width = window
    crops = [padded[z : z + depth, y : y + height, x : x + width] for y, x in corners]
    with torch.inference_mode():
        logits = model_fn(torch.from_numpy(np.stack(crops)[:, None]))
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError(
            f"the model gave NaN or Inf for the window at voxel z={z}, y, x in {corners}; "
            "expected finite logits: check the weights, the precision and the intensities of this scan"
        )
    return logits


def _accumulate(total: Tensor, logits: Tensor, corners: list[tuple[int, int]], weight: Tensor, task_block: int) -> None:
    height, width = weight.shape[1:]
    for one, (y, x) in zip(logits, corners, strict=True):
        part = total[:, :, y : y + height, x : x + width]
        for first in range(0, one.shape[0], task_block):
            probability = torch.sigmoid(one[first : first + task_block].float()).to("cpu")
            part[first : first + task_block].addcmul_(probability, weight)


def _finish(planes: Tensor, norms: list[Tensor], low: int, inside: tuple[slice, slice, slice]) -> np.ndarray:
    """Divide by the summed weights of all windows and cut the padding off."""
    _, y, x = inside
    share = torch.einsum("z,y,x->zyx", norms[0][low : low + planes.shape[1]], norms[1][y], norms[2][x])
    return (planes[:, :, y, x] / share).clamp_(0, 1).numpy()


def _advance(total: Tensor, done: int) -> None:
    """Move the unfinished planes to the front in place, block by block, and clear the rest."""
    depth = total.shape[1]
    for first in range(0, depth - done, done):
        size = min(done, depth - done - first)
        total[:, first : first + size] = total[:, first + done : first + done + size]
    total[:, max(0, depth - done) :] = 0
