"""Where voxels lie: grids, exact reorientation, and the placement that maps a stored volume back to its scan.

Everything here is arithmetic on affines and indices. Reorientation is a permutation and flips of axes, never interpolation, so
it is exact and has an exact inverse. Oblique scans keep their obliqueness: the axes are brought to the *closest* RAS order.
What this module deliberately does not do: rotate voxels, repair sheared affines, guess missing geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from hermes_dist.errors import GeometryError

Int3 = tuple[int, int, int]
Float3 = tuple[float, float, float]
SPACING_RANGE_MM = (0.01, 100.0)
"""Outside of it a header is wrong."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A voxel grid in space.

    Attributes:
        affine: 4×4 float64, voxel index `(i, j, k, 1)` → RAS mm (nibabel's convention). Read-only.
        shape_vox_zyx: voxels per array axis; array axis 0 is k, axis 1 is j, axis 2 is i.

    Raises:
        GeometryError: not 4×4, not finite, singular (a zero spacing), or a side below one voxel.
    """

    affine: np.ndarray
    shape_vox_zyx: Int3

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(f"affine {affine.tolist()} is not a finite 4×4 matrix; repair the header of the scan")
        if len(self.shape_vox_zyx) != 3 or min(self.shape_vox_zyx) < 1:
            raise GeometryError(f"shape {tuple(self.shape_vox_zyx)} is not three sides of at least one voxel")
        columns_mm = np.linalg.norm(affine[:3, :3], axis=0)
        if columns_mm.min() <= 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-6 * columns_mm.prod():
            raise GeometryError(
                f"affine {affine.tolist()} is singular: a spacing is zero or two axes are parallel; repair the header"
            )
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape_vox_zyx", tuple(int(n) for n in self.shape_vox_zyx))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        return self.shape_vox_zyx == other.shape_vox_zyx and bool(np.array_equal(self.affine, other.affine))

    def __hash__(self) -> int:
        return hash((self.affine.tobytes(), self.shape_vox_zyx))

    @property
    def spacing_mm_zyx(self) -> Float3:
        """Distance of neighbouring voxel centres per array axis, in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(k), float(j), float(i)

    @property
    def shear(self) -> float:
        """Largest |cosine| between two axes: 0 for a proper grid."""
        unit = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(np.abs(unit.T @ unit - np.eye(3)).max())

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description; `from_json` is its inverse, bit for bit."""
        return {"affine": self.affine.tolist(), "shape_vox_zyx": list(self.shape_vox_zyx)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Grid:
        """Inverse of `to_json`."""
        return Grid(np.array(data["affine"], dtype=np.float64), int3(data["shape_vox_zyx"]))


@dataclass(frozen=True)
class Orientation:
    """A permutation of array axes and flips: output axis a is input axis `axes_zyx[a]`, reversed where `flips_zyx[a]`."""

    axes_zyx: Int3
    flips_zyx: tuple[bool, bool, bool]

    @property
    def _flipped(self) -> tuple[int, ...]:
        return tuple(a for a in range(3) if self.flips_zyx[a])

    def apply(self, array_zyx: Shaped[np.ndarray, "a b c"]) -> Shaped[np.ndarray, "d e f"]:
        """The array in the new axis order: a view, no copy."""
        return np.flip(array_zyx.transpose(self.axes_zyx), self._flipped)

    def invert(self, array_zyx: Shaped[np.ndarray, "a b c"]) -> Shaped[np.ndarray, "d e f"]:
        """Exact inverse of `apply`: a view, no copy."""
        flipped = np.flip(array_zyx, self._flipped)
        return flipped.transpose(np.argsort(self.axes_zyx))

    def apply_to_grid(self, grid: Grid) -> Grid:
        """The grid of the reoriented array: every voxel stays where it was in space."""
        to_input = np.zeros((4, 4))
        to_input[3, 3] = 1
        for out_axis, (in_axis, flip) in enumerate(zip(self.axes_zyx, self.flips_zyx, strict=True)):
            to_input[2 - in_axis, 2 - out_axis] = -1 if flip else 1
            to_input[2 - in_axis, 3] = grid.shape_vox_zyx[in_axis] - 1 if flip else 0
        z, y, x = (grid.shape_vox_zyx[a] for a in self.axes_zyx)
        return Grid(grid.affine @ to_input, (z, y, x))


def closest_ras(affine: Float64[np.ndarray, "4 4"]) -> Orientation:
    """Orientation that brings an array to the RAS+ axis order closest to its affine.

    All six assignments of array axes to body axes are compared by the sum of |cosines|, so the answer is the optimum. Ties
    (a rotation by exactly 45°) are broken by the resulting matrix, i.e. independently of the order of the input's axes.
    """
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best: tuple[tuple[float, ...], Orientation] | None = None
    for columns in permutations(range(3)):  # columns[w] = affine column that becomes body axis w (0 = R, 1 = A, 2 = S)
        signs = [-1.0 if unit[world, column] < 0 else 1.0 for world, column in enumerate(columns)]
        turned = np.stack([unit[:, c] * s for c, s in zip(columns, signs, strict=True)], axis=1)
        key = (round(float(np.trace(turned)), 6), *(round(float(v), 6) for v in turned.ravel()))
        if best is None or key > best[0]:
            (x, y, z), (fx, fy, fz) = (2 - c for c in columns), (s < 0 for s in signs)
            best = key, Orientation((z, y, x), (fz, fy, fx))
    assert best is not None
    return best[1]


@dataclass(frozen=True)
class Placement:
    """How a stored volume lies in its original scan; JSON-able, kept in the manifest, enough to map a prediction back.

    The scan is reoriented, cropped to `crop_start_vox_zyx … + crop_shape_vox_zyx` (oriented voxels), and resampled such that
    the centres of both boxes coincide: stored index k lies at `(k - (m-1)/2)·scale + (n-1)/2` in the crop (m stored, n cropped).
    Centring makes the rule symmetric: a mirrored scan gives a mirrored result.
    """

    original: Grid
    orientation: Orientation
    crop_start_vox_zyx: Int3
    crop_shape_vox_zyx: Int3
    stored_shape_vox_zyx: Int3
    scale_zyx: Float3

    @cached_property
    def stored(self) -> Grid:
        """The stored volume's grid (RAS+ axes)."""
        to_oriented = np.eye(4)
        for axis in range(3):
            n, m, scale = self.crop_shape_vox_zyx[axis], self.stored_shape_vox_zyx[axis], self.scale_zyx[axis]
            to_oriented[2 - axis, 2 - axis] = scale
            to_oriented[2 - axis, 3] = self.crop_start_vox_zyx[axis] + (n - 1) / 2 - scale * (m - 1) / 2
        return Grid(self.orientation.apply_to_grid(self.original).affine @ to_oriented, self.stored_shape_vox_zyx)

    @property
    def crop_slices(self) -> tuple[slice, slice, slice]:
        """The crop box as slices of the oriented array."""
        z, y, x = (slice(s, s + n) for s, n in zip(self.crop_start_vox_zyx, self.crop_shape_vox_zyx, strict=True))
        return z, y, x

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description; `from_json` is its inverse, bit for bit."""
        return {
            "original": self.original.to_json(),
            "axes_zyx": list(self.orientation.axes_zyx),
            "flips_zyx": list(self.orientation.flips_zyx),
            "crop_start_vox_zyx": list(self.crop_start_vox_zyx),
            "crop_shape_vox_zyx": list(self.crop_shape_vox_zyx),
            "stored_shape_vox_zyx": list(self.stored_shape_vox_zyx),
            "scale_zyx": list(self.scale_zyx),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Placement:
        """Inverse of `to_json`."""
        fz, fy, fx = data["flips_zyx"]
        sz, sy, sx = data["scale_zyx"]
        return Placement(
            Grid.from_json(data["original"]),
            Orientation(int3(data["axes_zyx"]), (bool(fz), bool(fy), bool(fx))),
            int3(data["crop_start_vox_zyx"]),
            int3(data["crop_shape_vox_zyx"]),
            int3(data["stored_shape_vox_zyx"]),
            (float(sz), float(sy), float(sx)),
        )


def int3(values: Sequence[Any]) -> Int3:
    """Exactly three integers. Raises ValueError for any other number of values."""
    z, y, x = (int(v) for v in values)
    return z, y, x


def grid_difference_vox(a: Grid, b: Grid) -> float:
    """Largest distance between equal corners of two grids of one shape, in units of a's smallest spacing.

    This is what a wrong header costs in voxels, whichever of origin, spacing or direction differs.
    """
    z, y, x = (n - 1 for n in a.shape_vox_zyx)
    corners = np.array([[i, j, k, 1.0] for i in (0, x) for j in (0, y) for k in (0, z)]).T
    return float(np.linalg.norm((a.affine - b.affine) @ corners, axis=0).max() / min(a.spacing_mm_zyx))
