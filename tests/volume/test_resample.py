"""Resampling against torch (anti-aliased, PIL's rule), against scipy, and by property."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from hermes_dist.volume.resample import bands, nearest_indices, resample_image, resample_label, source_positions


def dense(n_in, n_out, scale, interpolation):
    matrix = np.zeros((n_out, n_in))
    for row, start, weights in bands(n_in, n_out, scale=scale, interpolation=interpolation):
        matrix[row : row + weights.shape[0], start : start + weights.shape[1]] = weights
    return matrix


@pytest.mark.parametrize(("kind", "mode"), [("linear", "bilinear"), ("cubic", "bicubic")])
@pytest.mark.parametrize(("shape", "out"), [((1, 40, 31), (1, 17, 9)), ((1, 12, 70), (1, 6, 100)), ((1, 5, 200), (1, 5, 67))])
def test_agrees_with_torch_antialias(kind, mode, shape, out):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    ours = resample_image(image, out, scale_zyx=tuple(n / m for n, m in zip(shape, out, strict=True)), interpolation=kind)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None], out[1:], mode=mode, antialias=True, align_corners=False
    )
    # torch leaves out the widening where an axis grows, as we do
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(2, 20)] * 3), st.tuples(*[st.floats(0.2, 1)] * 3), st.integers(0, 9))
def test_refining_linearly_agrees_with_scipy(shape, scale, seed):
    image = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    out = tuple(max(1, round(n / s)) for n, s in zip(shape, scale, strict=True))
    ours = resample_image(image, out, scale_zyx=scale)
    where = [source_positions(n, m, s) for n, m, s in zip(shape, out, scale, strict=True)]
    theirs = map_coordinates(image.astype(np.float64), np.meshgrid(*where, indexing="ij"), order=1, mode="nearest")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.1, 9), st.sampled_from(["linear", "cubic"]))
def test_rows_sum_to_one_and_mirror(n_in, n_out, scale, interpolation):
    n_out = max(1, min(n_out, round(n_in / scale)))
    matrix = dense(n_in, n_out, scale, interpolation)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-5)


def test_cubic_is_exact_for_quadratics_inside():
    x = np.arange(30, dtype=np.float32)
    image = (0.1 * x * x - x).reshape(1, 1, 30)
    out = resample_image(image, (1, 1, 60), scale_zyx=(1, 1, 0.5), interpolation="cubic")[0, 0, 6:-6]
    p = source_positions(30, 60, 0.5)[6:-6]
    np.testing.assert_allclose(out, 0.1 * p * p - p, atol=1e-3)


def test_shrinking_does_not_alias():
    stripes = np.tile(np.array([0, 1], np.float32), 60).reshape(1, 1, 120)
    out = resample_image(stripes, (1, 1, 30), scale_zyx=(1, 1, 4.0))
    assert np.abs(out[..., 2:-2] - 0.5).max() < 0.01


def test_integer_and_strided_input_is_converted_and_never_changed():
    image = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    before = image.copy()
    out = resample_image(image.transpose(2, 1, 0)[::-1], (6, 5, 4), scale_zyx=(1, 1, 1))
    np.testing.assert_array_equal(out, image.transpose(2, 1, 0)[::-1].astype(np.float32))
    resample_image(image, (2, 5, 3), scale_zyx=(2, 1, 2))
    np.testing.assert_array_equal(image, before)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0.1, 1))
def test_nearest_round_trip_is_exact_when_refined(n, scale):
    m = max(1, int(np.floor(n / scale + 0.5)))
    there, back = nearest_indices(n, m, scale), nearest_indices(m, n, 1 / scale)
    np.testing.assert_array_equal(there[back], np.arange(n))


@given(st.integers(1, 40).map(lambda n: 2 * n), st.integers(1, 20))
def test_nearest_ties_mirror(n, m):
    indices = nearest_indices(n, 2 * m, 2.0)
    np.testing.assert_array_equal(indices, n - 1 - indices[::-1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.tuples(*[st.floats(0.4, 2.5)] * 3))
def test_linear_labels_equal_one_pass_per_class(seed, scale):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 5, (6, 7, 5))
    label = small.repeat(8, 0).repeat(7, 1).repeat(9, 2).astype(np.uint8) * 17
    out = tuple(max(1, round(n / s)) for n, s in zip(label.shape, scale, strict=True))
    ours = resample_label(label, out, scale_zyx=scale, interpolation="linear")
    shares = np.stack([resample_image((label == v).astype(np.float32), out, scale_zyx=scale) for v in np.unique(label)])
    best = np.sort(shares, axis=0)
    clear = best[-1] - best[-2] > 1e-4 if len(shares) > 1 else np.ones(out, bool)
    np.testing.assert_array_equal(ours[clear], np.unique(label)[shares.argmax(axis=0)][clear])
    assert set(np.unique(ours)) <= set(np.unique(label))
