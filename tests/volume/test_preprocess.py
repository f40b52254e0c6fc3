"""Whole preprocessing: the same scan in any axis order gives the same volume, and predictions come back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from hermes_dist.errors import GeometryError
from hermes_dist.volume.geometry import Grid, Orientation, Placement
from hermes_dist.volume.preprocess import Preprocessing, preprocess_image, preprocess_label, restore_label, restore_probability

turns = st.builds(Orientation, st.permutations(range(3)).map(tuple), st.tuples(*[st.booleans()] * 3))


def scan(seed=0, shape=(14, 20, 24), spacing=(3.0, 1.2, 0.8), angle_deg=0.0):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    rotation = Rotation.from_euler("xyz", (angle_deg, angle_deg / 2, -angle_deg), degrees=True).as_matrix()
    affine[:3, :3] = rotation * np.array(spacing[::-1])
    affine[:3, 3] = rng.normal(size=3) * 50
    image = np.full(shape, -1000, np.int16)
    image[2:-2, 3:-3, 3:-3] = rng.integers(-100, 300, [shape[0] - 4, shape[1] - 6, shape[2] - 6])
    label = np.zeros(shape, np.uint8)
    label[4:9, 6:12, 8:16] = 3
    label[5:7, 8:10, 9:12] = 7
    return image, label, Grid(affine, shape)


@settings(max_examples=30, deadline=None)
@given(
    turns,
    st.integers(0, 99),
    st.tuples(st.floats(0.5, 6), st.floats(0.4, 3), st.floats(0.4, 3)),
    st.floats(-20, 20),
    st.sampled_from(["CT", "T1"]),
    st.sampled_from(["nearest", "linear"]),
)
def test_a_turned_copy_converts_to_the_same_volume(turn, seed, spacing, angle_deg, modality, label_mode):
    image, label, grid = scan(seed, spacing=spacing, angle_deg=angle_deg)
    params = Preprocessing(spacing_mm_zyx=(1.7, 1.6, 1.5), body_margin_mm=2, label_interpolation=label_mode)
    a = preprocess_image(image, grid, modality, params)
    other_grid = turn.apply_to_grid(grid)
    b = preprocess_image(np.ascontiguousarray(turn.apply(image)), other_grid, modality, params)
    np.testing.assert_allclose(a.image_zyx, b.image_zyx, atol=1e-5)
    np.testing.assert_allclose(a.placement.stored.affine, b.placement.stored.affine, atol=1e-6)
    la = preprocess_label(label, grid, a.placement, params)
    lb = preprocess_label(np.ascontiguousarray(turn.apply(label)), other_grid, b.placement, params)
    np.testing.assert_array_equal(la, lb)
    np.testing.assert_array_equal(turn.apply(restore_label(la, a.placement)), restore_label(lb, b.placement))


@settings(max_examples=20, deadline=None)
@given(turns, st.tuples(*[st.floats(1.5, 4)] * 3))
def test_labels_return_exactly_where_the_grid_was_refined(turn, spacing):
    image, label, grid = scan(spacing=spacing)
    image, label, grid = np.ascontiguousarray(turn.apply(image)), turn.apply(label), turn.apply_to_grid(grid)
    params = Preprocessing()
    prepared = preprocess_image(image, grid, "CT", params)
    stored = preprocess_label(label, grid, prepared.placement, params)
    placement = Placement.from_json(json.loads(json.dumps(prepared.placement.to_json())))
    np.testing.assert_array_equal(restore_label(stored, placement), label)


def test_stored_grid_is_ras_at_the_wanted_spacing():
    image, _, grid = scan(angle_deg=10)
    prepared = preprocess_image(image, grid, "CT", Preprocessing())
    stored = prepared.placement.stored
    assert stored.shape_vox_zyx == prepared.image_zyx.shape
    np.testing.assert_allclose(stored.spacing_mm_zyx, 1.5, rtol=1e-9)
    assert (np.diag(stored.affine)[:3] > 0).all()
    assert prepared.image_zyx.dtype == np.float32
    assert prepared.image_zyx.mean() == pytest.approx(0, abs=1e-4)
    assert prepared.image_zyx.std() == pytest.approx(1, abs=1e-3)


def test_body_crop_cuts_air_and_is_undone():
    image, label, grid = scan(spacing=(1.5, 1.5, 1.5))
    tight = Preprocessing(body_margin_mm=0)
    prepared = preprocess_image(image, grid, "CT", tight)
    assert prepared.image_zyx.shape == (10, 14, 18)
    stored = preprocess_label(label, grid, prepared.placement, tight)
    np.testing.assert_array_equal(restore_label(stored, prepared.placement), label)
    full = preprocess_image(image, grid, "CT", Preprocessing(crop_body=False))
    assert full.image_zyx.shape == image.shape


def test_probabilities_return_on_the_scans_grid():
    image, label, grid = scan(spacing=(3.0, 2.0, 2.0), angle_deg=8)
    params = Preprocessing(spacing_mm_zyx=(1.0, 1.0, 1.0), label_interpolation="linear")
    prepared = preprocess_image(image, grid, "CT", params)
    stored = preprocess_label(label, grid, prepared.placement, params)
    back = restore_probability((stored > 0).astype(np.float32), prepared.placement)
    assert back.shape == label.shape
    assert ((back > 0.5) == (label > 0)).mean() > 0.995


def test_the_input_is_left_alone():
    image, _, grid = scan(spacing=(1.5, 1.5, 1.5))
    image = image.astype(np.float32)
    before = image.copy()
    preprocess_image(image, grid, "CT", Preprocessing(crop_body=False))
    np.testing.assert_array_equal(image, before)


def test_wrong_shapes_and_shear_are_refused():
    image, label, grid = scan()
    params = Preprocessing()
    with pytest.raises(GeometryError, match="its own grid"):
        preprocess_image(image[1:], grid, "CT", params)
    prepared = preprocess_image(image, grid, "CT", params)
    with pytest.raises(GeometryError, match="another grid"):
        preprocess_label(label[:, :-1], grid, prepared.placement, params)
    with pytest.raises(GeometryError, match="its own placement"):
        restore_label(label, prepared.placement)
    sheared = grid.affine.copy()
    sheared[0, 2] += 1.5
    with pytest.raises(GeometryError, match="perpendicular"):
        preprocess_image(image, Grid(sheared, image.shape), "CT", params)


def test_spacing_null_keeps_every_scan_as_it_is():
    image, _, grid = scan(angle_deg=5)
    prepared = preprocess_image(image, grid, "CT", Preprocessing(spacing_mm_zyx=None, crop_body=False))
    assert prepared.image_zyx.shape == image.shape
    np.testing.assert_allclose(prepared.placement.stored.affine, grid.affine, atol=1e-9)
