"""RTSTRUCT: planar contours in patient millimetres → masks on the image grid.

A voxel belongs to a region if its centre lies inside an odd number of the slice's contours (even–odd rule), so a contour inside a
contour is a hole. ROIs of one name are one region: what lies inside any of them. Contours are matched to slices by position,
because many files carry no references to the slices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from pydicom.dataset import Dataset

from data_tools.findings import Finding, RejectedError
from hermes_dist.volume.geometry import Grid

OFF_PLANE_VOX = 0.5
NOTED_OFF_PLANE_VOX = 0.1


def fill_even_odd(points_xy: np.ndarray, parity_yx: np.ndarray) -> None:
    """Toggle the pixels whose centre lies inside one closed polygon, in place.

    Args:
        points_xy: (n, 2) corners in pixel units; pixel centres have whole coordinates.
        parity_yx: int array Y X; a pixel's final parity tells whether it is inside.
    """
    height, width = parity_yx.shape
    toggles = np.zeros((height, width + 1), np.int32)
    for (x0, y0), (x1, y1) in zip(points_xy, np.roll(points_xy, -1, axis=0), strict=True):
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        rows = np.arange(max(0, int(np.ceil(y0))), min(height, int(np.ceil(y1))))
        if rows.size:  # an edge crosses the rows y0 ≤ y < y1, each at one x; pixels to the right of it change sides
            crossing = x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
            np.add.at(toggles, (rows, np.clip(np.ceil(crossing), 0, width).astype(int)), 1)
    parity_yx += np.cumsum(toggles, axis=1)[:, :width]


def roi_masks(
    data: Dataset, grid: Grid, names: Sequence[str], file: str, findings: list[Finding]
) -> Iterator[tuple[str, np.ndarray]]:
    """(ROI name, mask Z Y X) of the wanted ROIs, in the order of `names`.

    Raises:
        RejectedError: the object is damaged, or contours do not lie in the image's slices.
    """
    try:
        roi_name = {int(r.ROINumber): str(r.ROIName) for r in data.StructureSetROISequence}
        rois: dict[int, list[np.ndarray]] = {}
        for item in data.ROIContourSequence:
            number, contours = int(item.ReferencedROINumber), list(item.get("ContourSequence", []))
            if contours and roi_name.get(number) in names:
                polygons = [np.array(c.ContourData, float).reshape(-1, 3) for c in contours if len(c.ContourData) >= 9]
                rois.setdefault(number, []).extend(polygons)
    except Exception as error:  # pydicom raises nearly anything on damaged objects
        message = f"contours cannot be read ({type(error).__name__}: {error})"
        raise RejectedError("dicom", message, "obtain the file anew", file) from None
    to_index = np.linalg.inv(grid.affine)
    for name in names:
        same_name = [number for number in rois if roi_name[number] == name]
        # a hole belongs to its own ROI: even-odd within each, then all of the name together
        masks = (_rasterise(name, rois[number], to_index, grid, file, findings) for number in same_name)
        if same_name:
            yield name, functools.reduce(np.logical_or, masks)


def _rasterise(
    name: str, polygons: list[np.ndarray], to_index: np.ndarray, grid: Grid, file: str, findings: list[Finding]
) -> np.ndarray:
    parity = np.zeros(grid.shape_vox_zyx, np.int32)
    worst, outside = 0.0, 0
    drawn: set[int] = set()
    for lps in polygons:
        ijk = (lps * (-1, -1, 1)) @ to_index[:3, :3].T + to_index[:3, 3]
        k = round(float(ijk[:, 2].mean()))
        off = float(np.abs(ijk[:, 2] - k).max())
        if not np.isfinite(ijk).all() or off > OFF_PLANE_VOX + 1e-3:
            message = f"a contour of {name!r} does not lie in a slice ({off:.2f} slices off)"
            raise RejectedError("contour", message, "export contours on the planes of this series", file)
        worst = max(worst, off)
        if 0 <= k < len(parity):
            fill_even_odd(ijk[:, :2], parity[k])
            drawn.add(k)
        else:
            outside += 1
    if worst > NOTED_OFF_PLANE_VOX or outside:
        message = f"contours of {name!r} lie up to {worst:.2f} slices beside the slices, {outside} outside the image"
        findings.append(Finding("contour", "warn", message, "check that the structure set belongs to this series", file))
    steps = np.diff(sorted(drawn))
    if steps.size >= 3 and steps.min() > 1:  # few contours may be few lesions
        message = f"contours of {name!r} lie on every {steps.min()}. slice at most; the slices between stay empty"
        hint = "interpolate them in the program that drew them, or pair them with the series on which they were drawn"
        findings.append(Finding("contour", "warn", message, hint, file))
    return (parity & 1).astype(bool)
