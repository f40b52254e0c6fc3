"""Grids and reorientation, against nibabel and by property."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation

from hermes_dist.errors import GeometryError
from hermes_dist.volume.geometry import Grid, Orientation, Placement, closest_ras, grid_difference_vox

angles = st.tuples(*[st.floats(-180, 180)] * 3)
spacings = st.tuples(*[st.floats(0.3, 12)] * 3)
origins = st.tuples(*[st.floats(-500, 500)] * 3)
shapes = st.tuples(*[st.integers(1, 7)] * 3)
turns = st.builds(Orientation, st.permutations(range(3)).map(tuple), st.tuples(*[st.booleans()] * 3))


def make_affine(angles_deg, spacing, origin):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix() * spacing
    affine[:3, 3] = origin
    return affine


@settings(max_examples=50, deadline=None)
@given(angles, spacings, origins, shapes, turns)
def test_a_turned_copy_of_a_scan_becomes_the_same_array(angles_deg, spacing, origin, shape, turn):
    grid = Grid(make_affine(angles_deg, spacing, origin), shape)
    array = np.arange(np.prod(shape)).reshape(shape)
    other_grid, other = turn.apply_to_grid(grid), turn.apply(array)
    assert other_grid.shape_vox_zyx == other.shape
    a, b = closest_ras(grid.affine), closest_ras(other_grid.affine)
    np.testing.assert_array_equal(a.apply(array), b.apply(other))
    np.testing.assert_allclose(a.apply_to_grid(grid).affine, b.apply_to_grid(other_grid).affine, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.floats(-40, 40)] * 3), spacings, origins, shapes, turns)
def test_agrees_with_nibabel(angles_deg, spacing, origin, shape, turn):
    grid = turn.apply_to_grid(Grid(make_affine(np.array(angles_deg) / 2, spacing, origin), shape))
    array = np.arange(np.prod(shape)).reshape(grid.shape_vox_zyx).astype(np.int16)
    ours = closest_ras(grid.affine)
    image = nib.Nifti1Image(array.T, grid.affine)
    theirs = image.as_reoriented(ornt_transform(io_orientation(grid.affine), axcodes2ornt("RAS")))
    np.testing.assert_array_equal(ours.apply(array), np.asarray(theirs.dataobj).T)
    np.testing.assert_allclose(ours.apply_to_grid(grid).affine, theirs.affine, atol=1e-9)


@given(shapes, turns)
def test_invert_is_exact(shape, turn):
    array = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(turn.invert(turn.apply(array)), array)


def test_spacing_is_in_array_order():
    assert Grid(np.diag([1.0, 2.0, 3.0, 1.0]), (4, 5, 6)).spacing_mm_zyx == (3.0, 2.0, 1.0)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 0.0, 1.0, 1.0]),
        np.full((4, 4), np.nan),
        np.eye(3),
        np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    ],
)
def test_impossible_affines_are_refused(affine):
    with pytest.raises(GeometryError):
        Grid(affine, (2, 2, 2))


def test_shear_is_measured():
    affine = np.eye(4)
    affine[0, 1] = 0.2
    assert Grid(affine, (2, 2, 2)).shear == pytest.approx(0.2 / np.hypot(1, 0.2))
    assert Grid(make_affine((10, 20, 30), (1, 2, 3), (0, 0, 0)), (2, 2, 2)).shear < 1e-12


@settings(max_examples=50, deadline=None)
@given(angles, spacings, origins, shapes, turns)
def test_placement_survives_json_and_places_centres(angles_deg, spacing, origin, shape, turn):
    grid = Grid(make_affine(angles_deg, spacing, origin), shape)
    turned = tuple(shape[a] for a in turn.axes_zyx)
    placement = Placement(grid, turn, (0, 0, 0), turned, (3, 4, 5), (0.7, 1.0, 2.5))
    again = Placement.from_json(json.loads(json.dumps(placement.to_json())))
    assert again == placement
    assert again.stored == placement.stored
    centre_stored = placement.stored.affine @ [2, 1.5, 1, 1]
    z, y, x = ((n - 1) / 2 for n in shape)
    np.testing.assert_allclose(centre_stored, grid.affine @ [x, y, z, 1], atol=1e-6)


def test_grid_difference_is_the_worst_corner():
    a = Grid(np.diag([1.0, 1.0, 2.0, 1.0]), (11, 5, 5))
    affine = a.affine.copy()
    affine[2, 2] = 2.01
    assert grid_difference_vox(a, Grid(affine, (11, 5, 5))) == pytest.approx(0.1)
