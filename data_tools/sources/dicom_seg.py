"""DICOM-SEG (binary, fractional or label map): frames → masks on the image grid, however they are oriented in plane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import iter_pixels

from data_tools.findings import Finding, RejectedError
from hermes_dist.volume.geometry import Grid

OFF_GRID_VOX = 0.1


def segment_masks(
    data: Dataset, grid: Grid, names: Sequence[str], file: str, findings: list[Finding]
) -> Iterator[tuple[str, np.ndarray]]:
    """(segment label, mask Z Y X) of the wanted segments, in the order of `names`; segments of one label follow each other.

    Raises:
        RejectedError: the object is damaged, or its frames do not lie on the image's voxels.
    """
    try:
        label_of = {int(s.SegmentNumber): str(s.SegmentLabel) for s in data.SegmentSequence}
        n_frames = int(data.get("NumberOfFrames", 1))
        geometry = [_frame_geometry(data, i) for i in range(n_frames)]
        number_of = [_segment_number(data, i) for i in range(n_frames)]
    except Exception as error:  # pydicom raises nearly anything on damaged objects
        message = f"segments cannot be read ({type(error).__name__}: {error})"
        raise RejectedError("dicom", message, "obtain the file anew", file) from None
    to_index = np.linalg.inv(grid.affine)
    places = [_place(to_index, origin, row, column, grid, file) for origin, row, column in geometry]
    outside = 0
    wanted = [(number, name) for name in names for number, label in sorted(label_of.items()) if label == name]
    for number, name in wanted:
        mask = np.zeros(grid.shape_vox_zyx, bool)
        chosen = [i for i in range(n_frames) if number_of[i] in (number, None)]
        for i, frame in zip(chosen, _frames(data, chosen, file), strict=True):
            outside += _paint(mask, frame == number if number_of[i] is None else frame > 0, places[i])
        yield name, mask
    if outside:
        findings.append(
            Finding("segment", "warn", f"{outside:,} voxels lie outside the image", "check the referenced series", file)
        )


def _frames(data: Dataset, numbers: list[int], file: str) -> Iterator[np.ndarray]:
    """Frames one by one: all of a large object unpacked may take many times the image's memory."""
    threshold = 0.5 * float(data.get("MaximumFractionalValue", 255))
    fractional = str(data.get("SegmentationType", "")) == "FRACTIONAL"
    try:
        for frame in iter_pixels(data, indices=numbers) if numbers else ():
            yield frame >= threshold if fractional else frame
    except Exception as error:  # pixel data of another length, unknown transfer syntaxes
        message = f"segments cannot be decoded ({type(error).__name__}: {error})"
        raise RejectedError("dicom", message, "obtain the file anew", file) from None


def _group(data: Dataset, frame: int, name: str) -> Dataset:
    for source in (data.PerFrameFunctionalGroupsSequence[frame], data.SharedFunctionalGroupsSequence[0]):
        if name in source:
            return source[name].value[0]
    raise KeyError(name)


def _segment_number(data: Dataset, frame: int) -> int | None:
    """The frame's segment; None for a label map, whose pixels are segment numbers."""
    if str(data.get("SegmentationType", "")) == "LABELMAP":
        return None
    return int(_group(data, frame, "SegmentIdentificationSequence").ReferencedSegmentNumber)


def _frame_geometry(data: Dataset, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position of the first pixel, step per row and step per column, LPS mm."""
    cosines = np.array(_group(data, frame, "PlaneOrientationSequence").ImageOrientationPatient, float)
    rows_mm, columns_mm = (float(v) for v in _group(data, frame, "PixelMeasuresSequence").PixelSpacing)
    origin = np.array(_group(data, frame, "PlanePositionSequence").ImagePositionPatient, float)
    return origin, cosines[3:] * rows_mm, cosines[:3] * columns_mm


def _place(to_index: np.ndarray, origin: np.ndarray, row: np.ndarray, column: np.ndarray, grid: Grid, file: str) -> np.ndarray:
    """Whole-number image index (i, j, k) of pixel (0, 0) and its change per row and column: int (3, 3)."""
    ras = np.array([-1, -1, 1])
    start = to_index[:3, :3] @ (origin * ras) + to_index[:3, 3]
    exact = np.stack([start, to_index[:3, :3] @ (row * ras), to_index[:3, :3] @ (column * ras)])
    whole = np.rint(exact)
    if (
        np.abs(exact - whole) * [[1], [grid.shape_vox_zyx[1]], [grid.shape_vox_zyx[2]]] > OFF_GRID_VOX * max(grid.shape_vox_zyx)
    ).any():
        message = "segmentation frames do not lie on the voxels of the image"
        raise RejectedError("label grid", message, "resample the segmentation to the image series", file)
    return whole.astype(int)


def _paint(mask: np.ndarray, frame: np.ndarray, place: np.ndarray) -> int:
    """Set the voxels of one frame; returns how many lie outside."""
    rows, columns = np.nonzero(frame)
    i, j, k = (place[0][:, None] + place[1][:, None] * rows + place[2][:, None] * columns).astype(int)
    inside = (i >= 0) & (j >= 0) & (k >= 0) & (k < mask.shape[0]) & (j < mask.shape[1]) & (i < mask.shape[2])
    mask[k[inside], j[inside], i[inside]] = True
    return int((~inside).sum())
