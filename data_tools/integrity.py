"""Verdicts on one case as read: reject, fix and note, or accept. Nothing here changes a voxel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_tools.collection import ResolvedDataset
from data_tools.findings import Finding, RejectedError
from data_tools.sources.raw import ClassValues, RawCase
from data_tools.sources.volumes import SAME_GRID_VOX
from hermes_dist.volume.geometry import SPACING_RANGE_MM, Grid, closest_ras, grid_difference_vox
from hermes_dist.volume.intensity import count_not_finite
from hermes_dist.volume.preprocess import MAX_SHEAR

NOTED_DIFFERENCE_VOX = 1e-3
USUAL_SPACING_MM = (0.1, 20.0)
MAX_ANISOTROPY_NOTED = 10.0
LARGEST_VALUE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Expected:
    """What a dataset declares, as far as a case can be checked against it."""

    classes: tuple[ClassValues, ...]
    declared_values: frozenset[int]
    ignore_value: int | None
    trust_image_grid: bool = False

    @staticmethod
    def of(dataset: ResolvedDataset) -> Expected:
        """The declarations of a dataset."""
        return Expected(tuple(dataset.classes), dataset.declared_values, dataset.ignore_value, dataset.trust_image_grid)


def inspect_case(case: RawCase, expected: Expected) -> list[Finding]:
    """Check one case.

    Returns:
        warnings and notes; the label grid is then to be taken as the image's.

    Raises:
        RejectedError: the case must not be converted.
    """
    return [*_grids(case, expected), *_spacing(case.grid), *_image(case.image_zyx), *_label(case.label_zyx, expected)]


def image_hash(case: RawCase) -> str:
    """Hash of an image's voxels and spacing, on RAS axes and in single precision.

    Equal for copies, whatever their file name, compression, header text, axis order, flips or voxel type.
    """
    orientation = closest_ras(case.grid.affine)
    oriented, spacing = orientation.apply(case.image_zyx), orientation.apply_to_grid(case.grid).spacing_mm_zyx
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{oriented.shape} {np.round(spacing, 3).tolist()}".encode())
    for plane in oriented:
        digest.update(plane.astype(np.float32, order="C") + np.float32(0))  # + 0 turns -0 into 0, an equal value of other bits
    return digest.hexdigest()


def _grids(case: RawCase, expected: Expected) -> Iterable[Finding]:
    if case.image_zyx.shape != case.label_zyx.shape:
        message = f"label has {case.label_zyx.shape} voxels, the image {case.image_zyx.shape}"
        raise RejectedError(
            "label grid", message, "resample the label to the image with nearest neighbour, or pair the right files"
        )
    difference = grid_difference_vox(case.grid, case.label_grid)
    if difference > SAME_GRID_VOX and not expected.trust_image_grid:
        message = f"label and image headers place the voxels up to {difference:.2f} voxels apart"
        hint = 'copy the image\'s header, or set "trust_image_grid": true if only the header of the label is wrong'
        raise RejectedError("label grid", message, hint)
    if difference > NOTED_DIFFERENCE_VOX:
        message = f"label header differs from the image's by {difference:.4f} voxels; the image's is used"
        yield Finding("label grid", "warn" if difference > SAME_GRID_VOX else "note", message, "none needed")
    if case.grid.shear > MAX_SHEAR:
        message = f"axes are not perpendicular (cosine {case.grid.shear:.3f})"
        raise RejectedError("shear", message, "resample the scan to an orthogonal grid first (gantry tilt is the usual cause)")


def _spacing(grid: Grid) -> Iterable[Finding]:
    spacing = grid.spacing_mm_zyx
    text = " × ".join(f"{s:.4g}" for s in spacing)
    if min(spacing) < SPACING_RANGE_MM[0] or max(spacing) > SPACING_RANGE_MM[1]:
        raise RejectedError(
            "spacing", f"spacing {text} mm is impossible", "repair the header (metres or inches are usual causes)"
        )
    if min(spacing) < USUAL_SPACING_MM[0] or max(spacing) > USUAL_SPACING_MM[1]:
        yield Finding("spacing", "warn", f"spacing {text} mm is unusual", "check the header")
    if min(grid.shape_vox_zyx) == 1:
        yield Finding("dimensions", "warn", f"{grid.shape_vox_zyx} voxels: a single slice", "check that this is a volume")
    elif max(spacing) / min(spacing) > MAX_ANISOTROPY_NOTED:
        yield Finding("spacing", "note", f"spacing {text} mm is very anisotropic", "none needed")


def _image(image_zyx: np.ndarray) -> Iterable[Finding]:
    bad = count_not_finite(image_zyx)
    if bad:
        message = f"{bad:,} voxels are NaN or infinite"
        raise RejectedError("nan", message, "replace them by the value of air, or leave the case out")
    if image_zyx.dtype.kind == "f":
        peak = max(abs(float(image_zyx.min())), abs(float(image_zyx.max())))
        if peak > LARGEST_VALUE:  # resampling works in single precision, where it would become infinite
            message = f"a voxel is {peak:g} in magnitude, more than single precision holds ({LARGEST_VALUE:.4g})"
            raise RejectedError("intensity", message, "replace such voxels by the value of air, or scale the image")
    if image_zyx.min() == image_zyx.max():
        raise RejectedError("constant", f"every voxel is {image_zyx.flat[0]:g}", "the scan is empty; leave the case out")
    return ()


def _label(label_zyx: np.ndarray, expected: Expected) -> Iterable[Finding]:
    top = 256 if label_zyx.dtype.itemsize == 1 else 65536
    counts = sum((np.bincount(plane.ravel(), minlength=top) for plane in label_zyx), start=np.zeros(top, np.int64))
    present = {int(v) for v in np.flatnonzero(counts)} - {0}
    undeclared = sorted(present - expected.declared_values)
    if undeclared:
        message = f"label holds undeclared values {undeclared[:10]}"
        raise RejectedError("undeclared label", message, "declare them in the dataset's labels, or correct the label")
    if not present - {expected.ignore_value}:
        yield Finding("empty label", "warn", "no voxel is labelled", "leave the case out if it should show a structure")


def find_duplicates(images: dict[tuple[str, str], str], split_of: dict[tuple[str, str], str]) -> list[Finding]:
    """Findings on images that occur more than once.

    A copy in a held-out split stays; one in training (or validation, against a test copy) is rejected, since it leaks. Copies
    within one split are warned of (same dataset) or noted (two datasets may annotate one scan differently).
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, digest in sorted(images.items()):
        groups.setdefault(digest, []).append(key)
    order = {"test": 0, "val": 1, "train": 2}
    findings: list[Finding] = []
    for keys in groups.values():
        keys.sort(key=lambda k: (order.get(split_of.get(k, ""), 3), k))
        first = keys[0]
        for key in keys[1:] if len(keys) > 1 else ():
            other, mine = (f"{first[0]}/{first[1]}", split_of.get(key))
            if mine != split_of.get(first):
                message = f"same image as {other}, which is in {split_of.get(first)}; this copy in {mine} would leak"
                hint = "put both into one split, or remove one"
                findings.append(Finding("leakage", "reject", message, hint, dataset=key[0], case_id=key[1]))
            else:
                severity = "warn" if key[0] == first[0] else "note"
                findings.append(
                    Finding("duplicate", severity, f"same image as {other}", "remove one of them", dataset=key[0], case_id=key[1])
                )
    return findings
