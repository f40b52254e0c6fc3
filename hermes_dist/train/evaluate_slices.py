"""One telling slice of each evaluated scan, kept as a small `.npz` beside the scores, so that the report needs no model.

A file holds the image slice as uint8, reference and prediction as bits (one row a class), class names, and the pixel size.
Plain arrays only: no pickle. Rows run from superior to inferior or anterior to posterior as the report draws them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hermes_dist.shards.case import safe_name

MaskPair = tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""Class name, prediction, reference (Z Y X)."""


@dataclass(frozen=True)
class Slice:
    """An axial slice (Y X) of a scan with its masks (K, Y, X)."""

    case: str
    z: int
    image: npt.NDArray[np.uint8]
    names: list[str]
    prediction: npt.NDArray[np.bool_]
    reference: npt.NDArray[np.bool_]
    spacing_mm_yx: tuple[float, float]


def telling_plane(masks: Sequence[MaskPair]) -> int:
    """The axial plane that shows most: the sum over classes of the voxels there, as a share of the class's fullest plane."""
    total = np.zeros(masks[0][1].shape[0])
    for use_reference in (True, False):
        for _, prediction, reference in masks:
            counts = (reference if use_reference else prediction).sum(axis=(1, 2))
            total += counts / max(int(counts.max()), 1)
        if total.any():
            return int(total.argmax())
    return len(total) // 2


def save_slice(
    folder: Path, case: str, image: npt.NDArray[np.float32], masks: Sequence[MaskPair], spacing_mm_zyx: tuple[float, float, float]
) -> Path:
    """Write the most telling axial slice of a scan into an existing folder, atomically; returns the file."""
    z = telling_plane(masks)
    plane = image[z].astype(np.float32)
    low, high = (float(v) for v in np.percentile(plane, [0.5, 99.5]))
    grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1) * 255
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        case=np.array(case),
        z=np.array(z),
        image=grey.astype(np.uint8),
        names=np.array([name for name, _, _ in masks]),
        prediction=np.packbits([p[z] for _, p, _ in masks], axis=0),
        reference=np.packbits([r[z] for _, _, r in masks], axis=0),
        spacing_mm_yx=np.array(spacing_mm_zyx[1:]),
    )
    path = folder / (safe_name(case) + ".npz")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)
    return path


def read_slice(path: Path) -> Slice:
    """Inverse of `save_slice`."""
    with np.load(path, allow_pickle=False) as data:
        names = [str(n) for n in data["names"]]
        bits = [np.unpackbits(data[key], axis=0, count=len(names)).astype(bool) for key in ("prediction", "reference")]
        y, x = (float(v) for v in data["spacing_mm_yx"])
        return Slice(str(data["case"]), int(data["z"]), data["image"], names, bits[0], bits[1], (y, x))
