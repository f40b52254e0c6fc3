"""A DICOM image series as one volume.

Slices are ordered by ImagePositionPatient (names and instance numbers may run backwards), their distances must be even, and
rescale slope and intercept are applied per slice (PET states its own for each). Patient coordinates are LPS; grids are RAS.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import pixel_array

from data_tools.findings import RejectedError
from data_tools.sources.inflate import MAX_EXPANSION
from data_tools.sources.raw import RawVolume
from hermes_dist.errors import GeometryError
from hermes_dist.volume.geometry import Grid

IMAGE_MODALITIES = frozenset({"CT", "MR", "PT", "NM"})
SPACING_TOLERANCE = 0.01
ASIDE_VOX = 0.5
"""Slices that are shifted in their plane by more would be stacked in wrong columns."""
DEFLATED = b"1.2.840.10008.1.2.1.99"
HEAD_BYTES = 2048


def holds_series(path: Path) -> bool:
    """True if a folder directly holds DICOM files."""
    return path.is_dir() and any(is_dicom(f) for f in files_in(path))


def read_series(folder: Path) -> RawVolume:
    """The one image series of a folder; other objects (structure sets, segmentations) are left aside.

    Raises:
        RejectedError: none, several, or damaged.
    """
    digests: list[str] = []
    objects = [read_dataset(f, digests) for f in files_in(folder) if is_dicom(f)]
    series: dict[str, list[Dataset]] = {}
    for data in objects:
        if str(data.Modality) in IMAGE_MODALITIES:
            series.setdefault(str(data.get("SeriesInstanceUID", "")), []).append(data)
    if len(series) != 1:
        raise RejectedError("dicom", f"{len(series)} image series, expected one", "move other series away", str(folder))
    image, grid = stack(next(iter(series.values())), str(folder))
    return RawVolume(image, grid, hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest())


def measure_series(path: Path, slices: int) -> tuple[Grid, int]:
    """(grid, bytes per voxel) of a series, from one slice's header: exact in plane, `slices` thick. Raises RejectedError."""
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True)
        thickness = float(data.get("SliceThickness") or 1.0)
        spacing = [float(v) for v in data.PixelSpacing]
        return Grid(np.diag([spacing[1], spacing[0], thickness, 1.0]), (slices, int(data.Rows), int(data.Columns))), 2
    except Exception as error:  # pydicom raises nearly anything on damaged files
        raise RejectedError("dicom", f"damaged ({type(error).__name__}: {error})", "obtain the file anew", str(path)) from None


def files_in(folder: Path) -> list[Path]:
    """Files directly in a folder, hidden ones left out, sorted by name."""
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def is_dicom(file: Path) -> bool:
    """True if the file carries the DICM mark."""
    with file.open("rb") as data:
        return data.read(132)[128:] == b"DICM"


def read_dataset(path: Path, digests: list[str]) -> Dataset:
    """Read one object and append the hash of its bytes to `digests`. Raises RejectedError."""
    try:
        raw = path.read_bytes()
        digests.append(hashlib.blake2b(raw, digest_size=16).hexdigest())
        _refuse_deflated(raw[:HEAD_BYTES], path)
        data = pydicom.dcmread(io.BytesIO(raw))
        str(data.Modality)
        _check_declared(data, len(raw), path)
        return data
    except RejectedError:
        raise
    except (OSError, InvalidDicomError) as error:
        raise RejectedError("dicom", f"cannot be read: {error}", "obtain the file anew", str(path)) from None
    except Exception as error:  # pydicom raises nearly anything on damaged files
        raise RejectedError("dicom", f"damaged ({type(error).__name__}: {error})", "obtain the file anew", str(path)) from None


def read_header(path: Path) -> Dataset:
    """All of an object but its pixels. Raises RejectedError, or whatever pydicom raises on damaged headers."""
    with path.open("rb") as file:
        _refuse_deflated(file.read(HEAD_BYTES), path)
    return pydicom.dcmread(path, stop_before_pixels=True)


def _refuse_deflated(head: bytes, path: Path) -> None:
    """pydicom inflates this transfer syntax whole, however large it becomes."""
    if DEFLATED in head:
        hint = "write it with an uncompressed transfer syntax (dcmconv +te)"
        raise RejectedError("dicom", "the object is deflated as a whole, which is not read", hint, str(path))


def _check_declared(data: Dataset, file_bytes: int, path: Path) -> None:
    """Refuse pixels of a size that the file cannot hold, before anything is allocated."""
    declared = int(data.get("BitsAllocated") or 8) / 8
    for name in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"):
        declared *= int(data.get(name) or 1)
    if declared > file_bytes * MAX_EXPANSION:
        message = f"the header declares {declared:,.0f} bytes of pixels, which a file of {file_bytes:,} bytes cannot hold"
        raise RejectedError("truncated", message, "obtain the file anew", str(path))


def stack(slices: list[Dataset], folder: str) -> tuple[np.ndarray, Grid]:
    """All slices as one volume in RAS millimetres. Raises RejectedError."""
    try:
        return _stack_checked(slices, folder)
    except (RejectedError, GeometryError) as error:
        if isinstance(error, RejectedError):
            raise
        raise RejectedError("geometry", str(error), "repair the headers", folder) from None
    except Exception as error:  # missing or malformed attributes, pixel data of another length, unknown transfer syntaxes
        message = f"slices cannot be decoded ({type(error).__name__}: {error})"
        raise RejectedError("dicom", message, "convert the series to uncompressed DICOM or NIfTI", folder) from None


def slice_order(slices: list[Dataset], folder: str) -> np.ndarray:
    """Numbers of the slices from the first to the last position along their normal. Raises RejectedError."""
    try:
        row, column = (np.array(slices[0].ImageOrientationPatient[a : a + 3], float) for a in (0, 3))
        normal = np.cross(row, column)
        return np.argsort(np.array([s.ImagePositionPatient for s in slices], float) @ normal)
    except Exception as error:  # missing or malformed attributes
        message = f"slices have no usable position ({type(error).__name__}: {error})"
        raise RejectedError("dicom", message, "repair the headers", folder) from None


def _stack_checked(slices: list[Dataset], folder: str) -> tuple[np.ndarray, Grid]:
    first = slices[0]
    if int(first.get("NumberOfFrames", 1)) > 1:
        raise RejectedError("dicom", "an enhanced multi-frame image", "convert it to NIfTI (dcm2niix)", folder)
    row, column = (np.array(first.ImageOrientationPatient[a : a + 3], float) for a in (0, 3))
    normal = np.cross(row, column)
    position = np.array([s.ImagePositionPatient for s in slices], float)
    order = slice_order(slices, folder)
    height = (position @ normal)[order]
    layout = {(int(s.Rows), int(s.Columns), *np.round([*s.ImageOrientationPatient, *s.PixelSpacing], 4)) for s in slices}
    if len(layout) > 1:
        raise RejectedError("dicom", "slices differ in size, spacing or orientation", "separate the series", folder)
    steps = np.diff(height)
    if len(slices) > 1 and (steps.min() <= 0 or np.ptp(steps) > SPACING_TOLERANCE * steps.mean()):
        message = f"slice distances from {steps.min():.3f} to {steps.max():.3f} mm: a slice is missing or there twice"
        raise RejectedError("dicom", message, "complete the series", folder)
    rows_mm, columns_mm = (float(v) for v in first.PixelSpacing)
    step = (
        (position[order[-1]] - position[order[0]]) / (len(slices) - 1)
        if len(slices) > 1
        else normal * float(first.SliceThickness)
    )
    line = position[order[0]] + np.arange(len(slices))[:, None] * step
    beside_mm = float(np.abs((position[order] - line) @ np.stack([row, column], axis=1)).max())
    if beside_mm > ASIDE_VOX * min(rows_mm, columns_mm):
        message = f"slices lie up to {beside_mm:.3f} mm aside of the line from the first to the last"
        raise RejectedError("dicom", message, "resample the series to one grid, or repair the positions", folder)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * columns_mm, column * rows_mm, step], axis=1)
    affine[:3, 3] = position[order[0]]
    affine[:2] *= -1
    volume = _pixels([slices[i] for i in order])
    z, y, x = volume.shape
    return volume, Grid(affine, (z, y, x))


def _pixels(slices: list[Dataset]) -> np.ndarray:
    """All planes in real units: int16 where they fit, int32 or float32 else. Pixel data of a slice are dropped once decoded."""
    shape = (len(slices), int(slices[0].Rows), int(slices[0].Columns))
    volume = np.empty(shape, np.int16)
    for z, data in enumerate(slices):
        slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
        plane = pixel_array(data)  # the attribute of this name would keep a copy
        if plane.shape != shape[1:]:
            raise ValueError(f"a plane of {plane.shape} pixels, expected {shape[1:]}")
        if plane.dtype.kind in "iub" and slope == 1 and intercept == int(intercept):
            plane = plane.astype(np.int64) + int(intercept)
            low, high = int(plane.min()), int(plane.max())
            if low < -(2**31) or high >= 2**31:
                raise ValueError(f"values from {low} to {high} do not fit 32 bits")
            if volume.dtype == np.int16 and (low < -32768 or high > 32767):
                volume = volume.astype(np.int32)
        else:
            plane = plane.astype(np.float32) * np.float32(slope) + np.float32(intercept)
            volume = volume.astype(np.float32, copy=False)
        volume[z] = plane
        data.clear()
    return volume
