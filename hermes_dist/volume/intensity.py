"""Intensity arithmetic of preprocessing: where the body is, what to clip to, z-score (paper, implementation details).

CT has absolute units, so it is clipped to fixed Hounsfield values; everything else at percentiles of its own volume. The body box
looks at the image alone: published pipelines crop with the ground truth, which no one has at prediction time.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Num

CT_AIR_HU = -600
"""Above this a CT voxel is taken for tissue (or table), below for air; lung inside the body stays inside the box."""
AIR_FRACTION = 0.01
"""Outside CT: a voxel is air below this share of the range from the minimum to the 99.9th percentile."""
SAMPLE_VOXELS = 4_000_000
CONTRAST = 1e-6
"""A standard deviation below this share of the largest magnitude is rounding of float32 (8 of its steps), not contrast."""
SMALLEST_STD = float(np.finfo(np.float32).tiny)
"""Below this, 1 / std leaves float32."""


def is_ct(modality: str) -> bool:
    """True for CT, i.e. intensities in Hounsfield units."""
    return modality.strip().upper() == "CT"


def count_not_finite(image_zyx: Num[np.ndarray, "z y x"]) -> int:
    """Voxels that are NaN or infinite: resampling would spread them, and percentiles know no answer."""
    if image_zyx.dtype.kind != "f":
        return 0
    return sum(int(plane.size - np.count_nonzero(np.isfinite(plane))) for plane in image_zyx)


def _sample(image_zyx: np.ndarray) -> np.ndarray:
    """All voxels, or a regular subset of at least `SAMPLE_VOXELS` of a large volume (for percentiles)."""
    step = image_zyx.size // SAMPLE_VOXELS
    if step < 2:
        return image_zyx.ravel()
    return image_zyx[np.unravel_index(np.arange(0, image_zyx.size, step), image_zyx.shape)]  # ravel would copy a turned view


def body_box(image_zyx: Num[np.ndarray, "z y x"], modality: str) -> tuple[slice, slice, slice]:
    """Smallest box that holds every voxel above the air threshold; the whole volume where nothing is above it."""
    if is_ct(modality):
        threshold = float(CT_AIR_HU)
    else:
        low, high = float(image_zyx.min()), float(np.percentile(_sample(image_zyx), 99.9))
        threshold = low + AIR_FRACTION * (high - low)
    in_plane = np.zeros(image_zyx.shape[1:], bool)
    planes = np.zeros(image_zyx.shape[0], bool)
    for z, plane in enumerate(image_zyx):
        body = plane > threshold
        planes[z] = body.any()
        in_plane |= body
    if not planes.any():
        return slice(0, image_zyx.shape[0]), slice(0, image_zyx.shape[1]), slice(0, image_zyx.shape[2])
    z, y, x = (np.flatnonzero(p) for p in (planes, in_plane.any(axis=1), in_plane.any(axis=0)))
    return slice(int(z[0]), int(z[-1]) + 1), slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)


def clip_range(
    image_zyx: Num[np.ndarray, "z y x"], modality: str, *, ct_clip_hu: tuple[float, float], percentiles: tuple[float, float]
) -> tuple[float, float]:
    """Lowest and highest intensity to keep: fixed for CT, percentiles of this volume for everything else."""
    if is_ct(modality):
        return float(ct_clip_hu[0]), float(ct_clip_hu[1])
    low, high = np.percentile(_sample(image_zyx), percentiles)
    return float(low), float(high)


def clip_and_standardise(image_zyx: Float32[np.ndarray, "z y x"], low: float, high: float) -> tuple[float, float]:
    """Clip and z-score in place, and return (mean, std) after clipping.

    A volume without contrast, whatever its unit, becomes zeros and has std 0; so does one whose values leave float32, and its std
    is not finite.
    """
    np.clip(image_zyx, low, high, out=image_zyx)
    mean = float(image_zyx.mean(dtype=np.float64))
    with np.errstate(over="ignore"):  # what leaves float32 shows in std
        image_zyx -= np.float32(mean)
    flat = image_zyx.ravel()
    squares = 0.0
    for chunk in np.array_split(flat, 1 + flat.size // 65536):
        wide = chunk.astype(np.float64)  # squares of 1e20 leave float32, those of 1e-23 vanish in it
        squares += float(np.dot(wide, wide))
    std = float(np.sqrt(squares / flat.size))
    if not np.isfinite(std):
        image_zyx[...] = 0
        return mean, std
    if std <= max(CONTRAST * max(abs(low), abs(high)), SMALLEST_STD):
        image_zyx[...] = 0
        return mean, 0.0
    image_zyx *= np.float32(1 / std)
    return mean, std
