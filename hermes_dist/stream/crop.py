"""The crop rule: where a patch begins, from the sample's seed, the volume's shape and the manifest's foreground voxels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hermes_dist.config import Vox3
from hermes_dist.stream.keyed import integers, uniform

_CLASS, _VOXEL, _JITTER, _START = range(1, 5)


def choose_start(
    *,
    shape: Vox3,
    patch: Vox3,
    seed: int,
    weights: npt.NDArray[np.float64] | None,
    counts: npt.NDArray[np.integer],
    foreground: Callable[[int], npt.NDArray[np.integer]],
) -> Vox3:
    """First voxel of a patch.

    A class is drawn by weight among those that have voxels in this case, then one of its known voxels; the patch is centred on
    it with a jitter of up to a quarter of the patch, and moved inside the volume. Without a class (none wanted, or none there)
    all starts are equally likely, the last one included. An axis that is shorter than the patch is padded on both sides.

    Args:
        shape: sides of the volume, voxels Z Y X.
        patch: sides of the patch.
        seed: the sample's crop seed.
        weights: (classes,) weights of the dataset's classes, or None for a crop anywhere.
        counts: (classes,) known foreground voxels of each class in this case.
        foreground: class → (n, 3) coordinates of them; asked for one class only.

    Returns:
        Start in voxels; negative where the volume is padded.
    """
    room = [s - p for s, p in zip(shape, patch, strict=True)]
    centre = None if weights is None else _foreground_voxel(seed, weights, counts, foreground)
    axes = np.arange(3)
    if centre is None:
        start = integers(np.maximum(np.asarray(room) + 1, 1), _START, seed, axes)
    else:
        reach = np.asarray(patch) // 4
        jitter = integers(2 * reach + 1, _JITTER, seed, axes) - reach
        start = centre + jitter - np.asarray(patch) // 2
    clipped = [(r // 2) if r < 0 else min(max(int(s), 0), r) for s, r in zip(start, room, strict=True)]
    return clipped[0], clipped[1], clipped[2]


def _foreground_voxel(
    seed: int,
    weights: npt.NDArray[np.float64],
    counts: npt.NDArray[np.integer],
    foreground: Callable[[int], npt.NDArray[np.integer]],
) -> npt.NDArray[np.int64] | None:
    """One voxel of one class, or None if no class with a positive weight has voxels here."""
    present = np.where(counts > 0, weights, 0.0)
    if not present.sum() > 0:
        return None
    cumulative = present.cumsum()
    chosen = int(np.searchsorted(cumulative, float(uniform(_CLASS, seed)) * cumulative[-1], side="right"))
    chosen = min(chosen, int(np.flatnonzero(present)[-1]))
    voxels = foreground(chosen)
    return voxels[int(integers(len(voxels), _VOXEL, seed))].astype(np.int64)
