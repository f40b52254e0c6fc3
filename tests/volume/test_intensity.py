"""Body box, clipping and z-score."""

from __future__ import annotations

import numpy as np
import pytest

from hermes_dist.volume.intensity import body_box, clip_and_standardise, clip_range


def test_body_box_finds_tissue_in_air():
    ct = np.full((10, 12, 14), -1000, np.int16)
    ct[3:5, 2:9, 4:13] = 40
    ct[3:5, 4:6, 6:8] = -850  # lung inside the body does not matter
    assert body_box(ct, "CT") == (slice(3, 5), slice(2, 9), slice(4, 13))
    mr = np.zeros((10, 12, 14), np.float32)
    mr[1:4, 5:7, 0:2] = 300
    assert body_box(mr, "T1") == (slice(1, 4), slice(5, 7), slice(0, 2))


@pytest.mark.parametrize("modality", ["CT", "T2"])
def test_body_box_of_nothing_is_everything(modality):
    empty = np.full((3, 4, 5), -1000, np.int16)
    assert body_box(empty, modality) == (slice(0, 3), slice(0, 4), slice(0, 5))


def test_noise_in_the_background_means_no_crop():
    noisy = np.random.default_rng(0).rayleigh(50, (8, 8, 8)).astype(np.float32)
    noisy[2:4] += 500
    assert body_box(noisy, "T1") == (slice(0, 8), slice(0, 8), slice(0, 8))


def test_clip_range_by_modality():
    image = np.arange(101, dtype=np.float32).reshape(1, 1, 101)
    assert clip_range(image, "ct", ct_clip_hu=(-990.0, 500.0), percentiles=(2.0, 98.0)) == (-990, 500)
    assert clip_range(image, "PET", ct_clip_hu=(-990.0, 500.0), percentiles=(2.0, 98.0)) == (2, 98)


def test_z_score_agrees_with_numpy():
    image = (np.random.default_rng(1).normal(size=(40, 50, 60)) * 700 - 100).astype(np.float32)
    expected = np.clip(image.astype(np.float64), -990, 500)
    mean, std = clip_and_standardise(image, -990.0, 500.0)
    assert mean == pytest.approx(expected.mean(), rel=1e-5)
    assert std == pytest.approx(expected.std(), rel=1e-5)
    np.testing.assert_allclose(image, (expected - expected.mean()) / expected.std(), atol=1e-4)


def test_a_constant_volume_becomes_zeros():
    image = np.full((3, 3, 3), 1.7e6, np.float32)
    assert clip_and_standardise(image, 0.0, 2e6) == (pytest.approx(1.7e6), 0.0)
    assert not image.any()


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1.0, 1e15, 1e30])
def test_the_unit_of_an_image_does_not_matter(unit):
    """An ADC map in m2/s was set to zeros (std below 1e-6), and so was one whose squares left float32."""
    plain = np.random.default_rng(2).uniform(0.5, 3, (20, 20, 20))
    image = (plain * unit).astype(np.float32)
    _, std = clip_and_standardise(image, 0.5 * unit, 3 * unit)
    assert std == pytest.approx(plain.std() * unit, rel=1e-4)
    np.testing.assert_allclose(image, (plain - plain.mean()) / plain.std(), atol=1e-4)


def test_values_that_leave_single_precision_have_no_z_score():
    image = np.array([[[-3.4e38, 3.4e38, 3.4e38]]], np.float32)
    assert not np.isfinite(clip_and_standardise(image, -3.4e38, 3.4e38)[1])
    assert not image.any()
