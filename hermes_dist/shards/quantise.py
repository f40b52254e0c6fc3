"""A normalised float32 image ↔ what is stored: int16 with a power-of-two step, float16, or float32.

int16 (recommended): `stored = round(image / step)`, `step = 2^k` with the smallest k ≥ −10 that fits the volume, so decoding is
exact in float32 and |error| ≤ max(2^−11, max|image| / 32767): at most 0.0005 of a standard deviation for a z-scored volume, far
below the noise of any scan, and small enough a step that nothing is spent on compressing noise.
float16: |error| ≤ max(|image| · 2^−11, 2^−25), refused above 65504; decoding costs five times as much. float32 is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hermes_dist.errors import DataError

FINEST_EXPONENT = -10
INT16_MAX = 32767


class Quantised(NamedTuple):
    """Stored voxels (int16, float16 or float32) and the step: `image = stored * step` (step 1 for floats)."""

    stored_zyx: np.ndarray
    step: float


def quantise(image_zyx: np.ndarray, dtype: str) -> Quantised:
    """Bring an image to its stored type.

    Raises:
        DataError: NaN or Inf, or a float16 that overflows.
    """
    image = np.asarray(image_zyx, np.float32)
    largest = max(abs(float(image.min(initial=0))), abs(float(image.max(initial=0))))  # NaN and Inf come through
    if not np.isfinite(largest):
        raise DataError("the image holds NaN or Inf; remove them before storing it (hermes-shard check names such cases)")
    if dtype == "float32":
        return Quantised(image + np.float32(0), 1.0)  # + 0 turns -0 into 0, which compares equal but has other bits
    if dtype == "float16":
        if largest > 65504:
            raise DataError(f"the image reaches {largest:g}, float16 ends at 65504; normalise it or use image_dtype int16")
        return Quantised(image.astype(np.float16) + np.float16(0), 1.0)
    if dtype != "int16":
        raise DataError(f"image_dtype {dtype!r}: expected int16, float16 or float32")
    exponent = max(FINEST_EXPONENT, int(np.ceil(np.log2(largest / INT16_MAX))) if largest else FINEST_EXPONENT)
    step = 2.0**exponent
    stored = np.empty(image.shape, np.int16)
    for plane, out in zip(image, stored, strict=True):  # in pieces that stay in the processor's cache, and no whole copy in float
        scaled = plane * np.float32(1 / step)
        out[...] = np.rint(scaled, out=scaled)
    return Quantised(stored, step)


def error_bound(dtype: str, step: float, largest: float) -> float:
    """Largest |decoded − image| that `quantise` may cause for an image whose largest magnitude is `largest`."""
    return {"int16": step / 2, "float16": max(largest * 2.0**-11, 2.0**-25), "float32": 0.0}[dtype]
