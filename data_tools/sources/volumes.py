"""One case from image and label files of any supported format: dispatch by ending, channel choice, labels as one integer map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.findings import Finding, RejectedError
from data_tools.sources.inflate import file_digest
from data_tools.sources.metaimage import measure_metaimage, metaimage_data_files, read_metaimage
from data_tools.sources.nifti import measure_nifti, read_nifti
from data_tools.sources.nrrd import measure_nrrd, nrrd_data_files, read_nrrd
from data_tools.sources.raw import CaseRef, ClassValues, RawCase, RawVolume, case_digest
from data_tools.sources.series import measure_series
from hermes_dist.errors import ConfigError, SourceError
from hermes_dist.volume.geometry import Grid, grid_difference_vox

READERS: dict[str, Callable[[Path], RawVolume]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    ".seg.nrrd": read_nrrd,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
}
SAME_GRID_VOX = 0.05
"""Label and image corners may differ by this many voxels; below it the image's grid is used and the difference noted."""
MEASURES: dict[str, Callable[[Path], tuple[Grid, int]]] = {
    ".nii.gz": measure_nifti,
    ".nii": measure_nifti,
    ".seg.nrrd": measure_nrrd,
    ".nrrd": measure_nrrd,
    ".nhdr": measure_nrrd,
    ".mha": measure_metaimage,
    ".mhd": measure_metaimage,
}
MAX_REGION_CLASSES = 8


def _none(_: Path) -> list[Path]:
    return []


DETACHED: dict[str, Callable[[Path], list[Path]]] = {".nhdr": nrrd_data_files, ".mhd": metaimage_data_files}
"""Endings whose voxels lie in a second file."""


def suffix_of(path: Path) -> str | None:
    """The supported file ending, or None."""
    return next((s for s in READERS if path.name.lower().endswith(s)), None)


def stem_of(path: Path) -> str:
    """File name without its ending."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.name


def is_volume(path: Path) -> bool:
    """A supported volume file; `._name` files (left by macOS archives) and hidden files are not."""
    return not path.name.startswith(".") and suffix_of(path) is not None and path.is_file()


def volumes_in(folder: Path) -> list[Path]:
    """Supported volume files directly in a folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if is_volume(p)) if folder.is_dir() else []


def measure_case(case: CaseRef) -> tuple[Grid, int]:
    """(grid, bytes of the decoded image) from headers alone. Raises RejectedError."""
    path = case.images[0]
    suffix = suffix_of(path)
    grid, voxel_bytes = MEASURES[suffix](path) if suffix else measure_series(path, len(case.images))
    z, y, x = grid.shape_vox_zyx
    return grid, z * y * x * voxel_bytes


def read_volume(path: Path) -> RawVolume:
    """Read one file by its ending.

    Raises:
        RejectedError: it is damaged. SourceError: no reader for this ending.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise SourceError(f"{path}: no reader for this file ending; supported: {', '.join(READERS)}")
    return READERS[suffix](path)


def integer_labels(volume: RawVolume, path: Path, findings: list[Finding]) -> np.ndarray:
    """A label volume as uint8 or uint16, plane by plane.

    Raises:
        RejectedError: fractions, NaN, negative or huge values, or a fourth axis.
    """
    if volume.array.ndim != 3:
        message = f"label has shape {volume.array.shape}, expected three axes"
        raise RejectedError("label", message, "merge its channels into one map", str(path))
    if volume.array.dtype == np.uint8 and volume.values() is volume.array:
        return volume.array
    label = np.empty(volume.array.shape, np.uint8)
    for z, stored in enumerate(volume.array):
        plane = volume.scaled(stored)
        if plane.dtype.kind == "f":
            whole = np.rint(plane)
            with np.errstate(invalid="ignore"):  # Inf - Inf
                broken = ~(np.abs(plane - whole) <= 1e-3)
            if broken.any():
                message = f"label holds {float(plane[broken][0]):g}, not a whole number"
                raise RejectedError("label", message, "it was interpolated or is a probability map; redo it", str(path))
            plane = whole
        low, high = float(plane.min()), float(plane.max())
        if low < 0 or high > 65535:
            message = f"label values from {low:g} to {high:g}"
            raise RejectedError("label", message, "use whole numbers from 0 to 65535", str(path))
        if high > 255 and label.dtype == np.uint8:
            label = label.astype(np.uint16)
        label[z] = plane
    if volume.array.dtype.kind == "f":
        message = f"label stored as {volume.array.dtype}; values are whole"
        findings.append(Finding("label type", "note", message, "none", str(path)))
    return label


def merge_masks(masks: Iterable[tuple[np.ndarray, int]], shape: tuple[int, int, int], *, regions: bool) -> tuple[np.ndarray, int]:
    """One map out of one mask a class, and how many voxels belong to several.

    With `regions` each value is a bit and nothing is lost; otherwise a later mask overwrites an earlier one.
    """
    values = list[int]()
    label: np.ndarray | None = None
    overlap = 0
    for mask, value in masks:
        if label is None:
            label = np.zeros(shape, np.uint8)
        if value > 255 and label.dtype == np.uint8:
            label = label.astype(np.uint16)
        overlap += int(np.count_nonzero(label[mask]))
        if regions:
            label[mask] |= label.dtype.type(value)
        else:
            label[mask] = value
        values.append(value)
    return (label if label is not None else np.zeros(shape, np.uint8)), overlap


def overlap_finding(voxels: int, file: str, *, regions: bool) -> list[Finding]:
    """What to say about voxels that belong to several classes."""
    if not voxels:
        return []
    if regions:
        return [
            Finding("overlap", "note", f"{voxels:,} voxels belong to several classes; all of them are kept", "none needed", file)
        ]
    message = f"{voxels:,} voxels belong to several classes; the class that comes later in the list has them"
    hint = 'set "overlap": "regions" for this dataset and state no label values (at most 8 classes)'
    return [Finding("overlap", "warn", message, hint, file)]


def load_files(case: CaseRef) -> RawCase:
    """Read a case of image and label files. Raises RejectedError."""
    findings: list[Finding] = []
    image = read_volume(case.images[0])
    findings += image.findings
    if image.array.ndim == 4:
        channels = image.array.shape[0]
        if case.channel >= channels:
            message = f"channel {case.channel} asked for, the file has {channels}"
            raise RejectedError("channel", message, 'set "channel" of this dataset', str(case.images[0]))
        if not _is_frame(case):
            message = f"channel {case.channel} of {channels} is used"
            findings.append(Finding("channel", "note", message, 'choose with "channel"', str(case.images[0])))
        image.array = image.array[case.channel].copy()
    elif case.channel and len(case.images) == 1 and not dict(case.options).get("channel_is_file"):
        raise RejectedError(
            "channel", f"channel {case.channel} asked for, the file has one", 'set "channel" to 0', str(case.images[0])
        )
    label, label_grid, digests = _load_label(case, image.grid, findings)
    digest = case_digest([image.digest, *digests], case)
    return RawCase(image.values(), image.grid, label, label_grid, digest, findings)


def _is_frame(case: CaseRef) -> bool:
    """A frame of a cine: `channel` counts time, and holds for the label file as well."""
    return bool(dict(case.options).get("frame"))


def _load_label(case: CaseRef, grid: Grid, findings: list[Finding]) -> tuple[np.ndarray, Grid, list[str]]:
    path, value = case.labels[0]
    if value is None:
        volume = read_volume(path)
        findings += volume.findings
        if _is_frame(case) and volume.array.ndim == 4 and case.channel < len(volume.array):
            volume.array = volume.array[case.channel].copy()
        return integer_labels(volume, path, findings), volume.grid, [volume.digest]
    digests: list[str] = []
    label_grids: list[Grid] = []

    def masks() -> Iterable[tuple[np.ndarray, int]]:
        for file, bit_or_value in case.labels:
            volume = read_volume(file)
            assert bit_or_value is not None
            digests.append(volume.digest)
            label_grids.append(volume.grid)
            if volume.grid.shape_vox_zyx != grid.shape_vox_zyx or grid_difference_vox(grid, volume.grid) > SAME_GRID_VOX:
                message = f"class file {file.name} lies on another grid than the image"
                raise RejectedError("label grid", message, "resample it with nearest neighbour to the image's grid", str(file))
            yield integer_labels(volume, file, findings) > 0, bit_or_value

    regions = bool(dict(case.options).get("regions"))
    label, overlap = merge_masks(masks(), grid.shape_vox_zyx, regions=regions)
    findings += overlap_finding(overlap, str(path.parent), regions=regions)
    return label, label_grids[0], digests


def fingerprint_files(case: CaseRef) -> str:
    """The digest that `load_files` would return, without decoding anything."""
    return case_digest(
        ["".join(file_digest(f) for f in (p, *DETACHED.get(suffix_of(p) or "", _none)(p))) for p in case.files], case
    )


def class_bits(names: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Region values of at most eight classes: class c owns every value with bit c, so overlaps are kept."""
    top = 1 << len(names)
    return [(name, tuple(v for v in range(1, top) if v >> c & 1)) for c, name in enumerate(names)]


@dataclass(frozen=True)
class Paint:
    """What a source writes that makes a label map out of one mask a name: `values` holds the value that each name paints."""

    classes: list[ClassValues]
    values: dict[str, int]
    regions: bool


def paint_of(names: Sequence[str], options: Mapping[str, Any], path: Path) -> Paint:
    """Stated values are painted as they are, and the later name wins; else bits (at most eight names), or 1, 2, … in order.

    Args:
        names: the names that are painted, in order.
        options: `label_ids` (one value a name, or None) and `overlap` of the collection.
        path: the dataset, for messages.

    Raises:
        ConfigError: values that one mask a name cannot paint. SourceError: too many names for `"overlap": "regions"`.
    """
    stated, overlap = options.get("label_ids"), options.get("overlap")
    if stated:
        values = dict(zip(names, (_one_value(n, v, path) for n, v in zip(names, stated, strict=True)), strict=True))
        if overlap == "regions":
            hint = 'remove the values ("labels": a list of names), or set "overlap": "priority"'
            raise ConfigError(f'{path}: "overlap": "regions" gives each name a bit, so values cannot be stated; {hint}')
        by_value: dict[int, str] = {}
        for name, value in values.items():
            if other := by_value.get(value):
                raise ConfigError(
                    f"{path}: {other!r} and {name!r} both have the value {value}, and could not be told apart; give each its own"
                )
            by_value[value] = name
        return Paint([(n, (v,)) for n, v in values.items()], values, regions=False)
    if overlap == "regions" and len(names) > MAX_REGION_CLASSES:
        raise SourceError(
            f'{path}: "overlap": "regions" takes at most {MAX_REGION_CLASSES} classes, this dataset has {len(names)}; '
            'name fewer in "labels", or set "overlap": "priority"'
        )
    if overlap == "priority" or len(names) > MAX_REGION_CLASSES:
        return Paint([(n, (v,)) for v, n in enumerate(names, 1)], {n: v for v, n in enumerate(names, 1)}, regions=False)
    return Paint(class_bits(names), {n: 1 << bit for bit, n in enumerate(names)}, regions=True)


def _one_value(name: str, value: int | Sequence[int], path: Path) -> int:
    values = [value] if isinstance(value, int) else list(value)
    if len(values) != 1 or values[0] < 1:
        raise ConfigError(
            f"{path}: label {name!r} has the values {values}; here the mask of a name is painted with one value from 1 to 65535. "
            'State one, or none ("labels": a list of names): then overlaps are kept'
        )
    return values[0]
