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
    places = [_place(to_index, data, origin, row, column, file) for origin, row, column in geometry]
    _check_step(data, places, grid, file)
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


def _place(to_index: np.ndarray, data: Dataset, origin: np.ndarray, row: np.ndarray, column: np.ndarray, file: str) -> np.ndarray:
    """Whole-number image index (i, j, k) of pixel (0, 0) and its change per row and column: int (3, 3)."""
    ras = np.array([-1, -1, 1])
    start = to_index[:3, :3] @ (origin * ras) + to_index[:3, 3]
    exact = np.stack([start, to_index[:3, :3] @ (row * ras), to_index[:3, :3] @ (column * ras)])
    whole = np.rint(exact)
    # an error of the step adds up over the frame
    off = float((np.abs(exact - whole) * [[1], [int(data.Rows)], [int(data.Columns)]]).max())
    one_voxel = (np.abs(whole[1:]).sum(axis=1) == 1).all() and not (whole[1] * whole[2]).any()
    if not off <= OFF_GRID_VOX or not one_voxel:
        what = f"are up to {off:.2f} voxels off" if one_voxel else "have pixels of another size or direction"
        message = f"segmentation frames {what} the voxels of the image, expected at most {OFF_GRID_VOX}"
        raise RejectedError("label grid", message, "resample the segmentation to the image series", file)
    return whole.astype(int)


def _check_step(data: Dataset, places: list[np.ndarray], grid: Grid, file: str) -> None:
    """Refuse frames of thicker slices than the image's: every second slice would stay empty.

    Frames on neighbouring slices prove the step. Without any, few labelled slices (frames without labels are left out, which is
    usual) look like a larger step, so that one is believed only where the object states it or at least four frames keep it.
    """
    across = {int(np.flatnonzero(~place[1:].any(axis=0))[0]) for place in places}
    if len(across) != 1:
        return
    (axis,) = across
    steps = np.diff(np.unique([place[0, axis] for place in places]))
    if grid.shape_vox_zyx[2 - axis] == 1 or (steps.size and steps.min() == 1):
        return
    slice_mm = float(np.linalg.norm(grid.affine[:3, axis]))
    spacing_mm, thickness_mm = _measure(data, "SpacingBetweenSlices"), _measure(data, "SliceThickness")
    largest_mm = (1 + OFF_GRID_VOX) * slice_mm
    if spacing_mm is not None and spacing_mm > largest_mm:
        found = f"slices {spacing_mm:g} mm apart"
    elif thickness_mm is not None and thickness_mm > largest_mm and _is_step(steps, thickness_mm / slice_mm):
        found = f"slices {thickness_mm:g} mm thick"
    elif steps.size >= 3 and np.ptp(steps) == 0:
        found = f"frames {steps[0]} slices of the image apart"
    else:
        return
    message = f"the segmentation has {found}, expected the image's step of {slice_mm:g} mm; the slices between would stay empty"
    raise RejectedError("label grid", message, "resample the segmentation to the image series (nearest neighbour)", file)


def _is_step(steps: np.ndarray, slices: float) -> bool:
    """True if all distances between frames are multiples of the smallest one, and that is this many slices."""
    return bool(steps.size and not (steps % steps.min()).any() and abs(steps.min() - slices) <= OFF_GRID_VOX * slices)


def _measure(data: Dataset, name: str) -> float | None:
    """A length that the first frame's pixel measures state, in mm."""
    try:
        value = _group(data, 0, "PixelMeasuresSequence").get(name)
        return None if value is None else float(value)
    except Exception:  # pydicom raises nearly anything on damaged values; this one is optional
        return None


def _paint(mask: np.ndarray, frame: np.ndarray, place: np.ndarray) -> int:
    """Set the voxels of one frame; returns how many lie outside."""
    rows, columns = np.nonzero(frame)
    i, j, k = (place[0][:, None] + place[1][:, None] * rows + place[2][:, None] * columns).astype(int)
    inside = (i >= 0) & (j >= 0) & (k >= 0) & (k < mask.shape[0]) & (j < mask.shape[1]) & (i < mask.shape[2])
    mask[k[inside], j[inside], i[inside]] = True
    return int((~inside).sum())
