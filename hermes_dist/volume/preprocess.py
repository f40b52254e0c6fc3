"""One scan in, one training volume out, and the way back.

Order (paper, implementation details): RAS axes → crop to the body → resample → clip → z-score over the volume. Training,
evaluation and prediction call these same functions, so preprocessing is identical everywhere by construction. Labels follow the
image's placement and never influence it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Integer, Num
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hermes_dist.errors import GeometryError
from hermes_dist.volume.geometry import Grid, Int3, Placement, closest_ras
from hermes_dist.volume.intensity import body_box, clip_and_standardise, clip_range
from hermes_dist.volume.resample import Interpolation, LabelInterpolation, nearest_indices, resample_image, resample_label

SpacingMm = Annotated[float, Field(ge=0.05, le=100)]
MAX_SHEAR = 0.01
"""Largest |cosine| between two axes that passes as rounding noise of a header."""
SPACING_TOLERANCE = 1e-3
"""Relative difference to the wanted spacing up to which an axis is kept as it is."""


class Preprocessing(BaseModel):
    """How scans become training volumes; stored in a shard store's `collection.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    spacing_mm_zyx: tuple[SpacingMm, SpacingMm, SpacingMm] | None = (1.5, 1.5, 1.5)
    """Spacing of stored volumes; null keeps every scan's own."""
    ct_clip_hu: tuple[float, float] = (-990.0, 500.0)
    """CT is clipped to these Hounsfield units."""
    percentiles: tuple[float, float] = (2.0, 98.0)
    """Everything else is clipped at these percentiles of its own volume."""
    interpolation: Interpolation = "linear"
    """Images: linear or cubic, on all axes, anti-aliased where they shrink."""
    label_interpolation: LabelInterpolation = "nearest"
    """Labels: nearest, or linear = the class with the largest interpolated share."""
    crop_body: bool = True
    """Crop away air around the body, by a rule that looks at the image alone."""
    body_margin_mm: float = Field(default=10.0, ge=0, le=1000)
    """Air kept around the body."""
    image_dtype: Literal["int16", "float16", "float32"] = "int16"
    """How normalised images are stored."""

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> Preprocessing:
        (low, high), (first, last) = self.ct_clip_hu, self.percentiles
        if not -1e6 <= low < high <= 1e6:
            raise ValueError(f"ct_clip_hu {self.ct_clip_hu}: expected two Hounsfield units, the lower one first")
        if not 0 <= first < last <= 100:
            raise ValueError(f"percentiles {self.percentiles}: expected two numbers from 0 to 100, the lower one first")
        return self


class Prepared(NamedTuple):
    """A normalised volume, where it lies, and the intensities it was made from.

    `stats`: clip_low, clip_high, mean, std (after clipping) in the scan's own units; stored = (clip(raw) - mean) / std.
    """

    image_zyx: np.ndarray
    placement: Placement
    stats: dict[str, float]


def place(grid: Grid, box_zyx: tuple[slice, slice, slice] | None, params: Preprocessing) -> Placement:
    """Where a scan's stored volume will lie; `box_zyx` is the body box in oriented voxels (None = everything).

    Raises:
        GeometryError: the axes are sheared beyond `MAX_SHEAR`.
    """
    if grid.shear > MAX_SHEAR:
        raise GeometryError(
            f"the axes of this scan are not perpendicular (cosine {grid.shear:.3f}, at most {MAX_SHEAR} passes); "
            "resample it to an orthogonal grid first (gantry tilt is the usual cause)"
        )
    orientation = closest_ras(grid.affine)
    oriented = orientation.apply_to_grid(grid)
    starts, sides, shape, scale = list[int](), list[int](), list[int](), list[float]()
    for axis, header_mm in enumerate(oriented.spacing_mm_zyx):
        spacing_mm = float(f"{header_mm:.6g}")  # headers in single precision: noise must not decide where a tie goes
        n_all = oriented.shape_vox_zyx[axis]
        margin = int(np.ceil(params.body_margin_mm / spacing_mm))
        start = max(0, box_zyx[axis].start - margin) if box_zyx else 0
        n = (min(n_all, box_zyx[axis].stop + margin) if box_zyx else n_all) - start
        wanted_mm = params.spacing_mm_zyx[axis] if params.spacing_mm_zyx else spacing_mm
        keep = abs(spacing_mm - wanted_mm) <= SPACING_TOLERANCE * wanted_mm
        starts.append(start)
        sides.append(n)
        shape.append(n if keep else max(1, int(np.floor(round(n * spacing_mm / wanted_mm, 4) + 0.5))))
        scale.append(1.0 if keep else wanted_mm / spacing_mm)
    return Placement(grid, orientation, _int3(starts), _int3(sides), _int3(shape), (scale[0], scale[1], scale[2]))


def _int3(values: list[int]) -> Int3:
    return values[0], values[1], values[2]


def require_size(
    image_zyx: Num[np.ndarray, "z y x"], grid: Grid, modality: str, params: Preprocessing, *, below_vox: int
) -> None:
    """Refuse what a wrong spacing would make of a scan before memory is asked for: lack of it ends a command, not a case.

    Raises:
        GeometryError: the stored volume would have `below_vox` voxels or more, or the axes are sheared.
    """
    shape = place(grid, None, params).stored_shape_vox_zyx
    if math.prod(shape) >= below_vox and params.crop_body:
        shape = place(grid, body_box(closest_ras(grid.affine).apply(image_zyx), modality), params).stored_shape_vox_zyx
    if math.prod(shape) >= below_vox:
        spacing = " × ".join(f"{s:.4g}" for s in grid.spacing_mm_zyx)
        raise GeometryError(
            f"resampling would make {' × '.join(map(str, shape))} voxels of a scan with spacing {spacing} mm; below "
            f"{below_vox:,} pass, so repair the header's spacing"
        )


def preprocess_image(image_zyx: Num[np.ndarray, "z y x"], grid: Grid, modality: str, params: Preprocessing) -> Prepared:
    """Orient, crop, resample, clip and z-score one scan.

    Args:
        image_zyx: the scan as it was read, any numeric type, array axes as in `grid`.
        grid: the scan's own grid.
        modality: `CT` clips in Hounsfield units; any other name clips at percentiles.
        params: the settings.

    Raises:
        GeometryError: shape and grid disagree, or the axes are sheared.
    """
    if image_zyx.shape != grid.shape_vox_zyx:
        raise GeometryError(
            f"image of shape {image_zyx.shape} was given the grid of shape {grid.shape_vox_zyx}; pass its own grid"
        )
    oriented = closest_ras(grid.affine).apply(image_zyx)
    placement = place(grid, body_box(oriented, modality) if params.crop_body else None, params)
    image = resample_image(
        oriented[placement.crop_slices],
        placement.stored_shape_vox_zyx,
        scale_zyx=placement.scale_zyx,
        interpolation=params.interpolation,
    )
    if np.shares_memory(image, image_zyx):
        image = image.copy()
    low, high = clip_range(image, modality, ct_clip_hu=params.ct_clip_hu, percentiles=params.percentiles)
    mean, std = clip_and_standardise(image, low, high)
    return Prepared(image, placement, {"clip_low": low, "clip_high": high, "mean": mean, "std": std})


def preprocess_label(
    label_zyx: Integer[np.ndarray, "z y x"], grid: Grid, placement: Placement, params: Preprocessing
) -> Integer[np.ndarray, "d h w"]:
    """Bring a label map to the stored grid: exact reorientation, the image's crop, resampling without new values.

    Raises:
        GeometryError: the label's shape is not that of the image (`grid` is the label's grid).
    """
    if label_zyx.shape != placement.original.shape_vox_zyx or grid.shape_vox_zyx != label_zyx.shape:
        raise GeometryError(
            f"label of shape {label_zyx.shape} lies on another grid than the image {placement.original.shape_vox_zyx}; "
            "resample the label to the image's grid with nearest neighbour first"
        )
    return resample_label(
        placement.orientation.apply(label_zyx)[placement.crop_slices],
        placement.stored_shape_vox_zyx,
        scale_zyx=placement.scale_zyx,
        interpolation=params.label_interpolation,
    )


def restore_label(label_zyx: Integer[np.ndarray, "d h w"], placement: Placement) -> Integer[np.ndarray, "z y x"]:
    """A label map on the stored grid, on the original scan's own grid (nearest neighbour; 0 outside the crop).

    Exact inverse of `preprocess_label` with nearest interpolation on every axis that was kept or refined.
    """
    _check_stored(label_zyx, placement)
    for axis in range(3):
        n_in, n_out, scale = label_zyx.shape[axis], placement.crop_shape_vox_zyx[axis], placement.scale_zyx[axis]
        if n_in != n_out or scale != 1:
            label_zyx = label_zyx.take(nearest_indices(n_in, n_out, 1 / scale), axis=axis)
    return _uncrop(label_zyx, placement)


def restore_probability(prob_zyx: Float[np.ndarray, "d h w"], placement: Placement) -> Float32[np.ndarray, "z y x"]:
    """A probability map on the stored grid, interpolated linearly to the original scan's grid (0 outside the crop)."""
    _check_stored(prob_zyx, placement)
    inverse = (1 / placement.scale_zyx[0], 1 / placement.scale_zyx[1], 1 / placement.scale_zyx[2])
    restored = resample_image(prob_zyx, placement.crop_shape_vox_zyx, scale_zyx=inverse, interpolation="linear")
    return _uncrop(restored, placement)


def _check_stored(volume_zyx: np.ndarray, placement: Placement) -> None:
    if volume_zyx.shape != placement.stored_shape_vox_zyx:
        raise GeometryError(
            f"volume of shape {volume_zyx.shape} does not fit the placement's stored shape {placement.stored_shape_vox_zyx}; "
            "restore a case with its own placement"
        )


def _uncrop(crop_zyx: np.ndarray, placement: Placement) -> np.ndarray:
    axes = placement.orientation.axes_zyx
    full = np.zeros([placement.original.shape_vox_zyx[a] for a in axes], crop_zyx.dtype)
    full[placement.crop_slices] = crop_zyx
    return np.ascontiguousarray(placement.orientation.invert(full))
