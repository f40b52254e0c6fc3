"""Augmentation: against scipy, its own device twin, and the promises of its docstrings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from hermes_dist.config import AugmentConfig
from hermes_dist.volume import augment_device
from hermes_dist.volume.augment import (
    Draw,
    augment,
    change_intensity,
    draw,
    gaussian_kernel,
    normal_quantiles,
    source_box,
    warp,
)

CONFIG = AugmentConfig()
ALWAYS = AugmentConfig(spatial_probability=1, intensity_probability=1)
PATCH = (14, 17, 20)


def volume(shape: tuple[int, int, int] = (40, 44, 48), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image and labels 0–3."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=shape), 2).astype(np.float32) * 10
    return image, (np.digitize(image, [-1, 0, 1])).astype(np.uint8)


def affine(seed: int) -> np.ndarray:
    """The affine of a draw that has one."""
    matrix = draw(seed, ALWAYS).affine
    assert matrix is not None
    return matrix


@pytest.mark.parametrize("seed", range(6))
def test_warp_of_a_box_is_scipys_warp_of_the_whole_volume(seed: int) -> None:
    """Only the box is read, and outside of the volume there is air."""
    image, label = volume()
    start = [(0, 0, 0), (26, 27, 28), (13, 10, 20), (-3, 5, 28), (5, 27, 0), (20, 0, 10)][seed]
    matrix = affine(seed)
    air = float(image.min())
    low, sides = source_box(matrix, start, PATCH, (40, 44, 48))
    padded = np.pad(image, 60, constant_values=air)
    padded_label = np.pad(label, 60)
    box = tuple(slice(a + 60, a + 60 + n) for a, n in zip(low, sides, strict=True))
    inside = tuple(s - a for s, a in zip(start, low, strict=True))
    got, got_label = warp(padded[box], padded_label[box], matrix, inside, PATCH)
    half = (np.asarray(PATCH) - 1) / 2
    offset = np.asarray(start) + 60 + half - matrix @ half
    options = {"offset": offset, "output_shape": PATCH, "mode": "nearest"}
    expected = ndimage.affine_transform(padded.astype(np.float64), matrix, order=1, **options)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    wanted = ndimage.affine_transform(padded_label, matrix, order=0, **options)
    assert (got_label != wanted).mean() < 2e-3  # ties of rounding


def test_box_is_tight() -> None:
    """Without rotation and scale the box is the patch; it never reaches more than one voxel out of the volume."""
    assert source_box(np.eye(3), (5, 6, 7), PATCH, (40, 44, 48)) == ((5, 6, 7), PATCH)
    for seed in range(200):
        low, sides = source_box(affine(seed), (13, 13, 14), PATCH, (40, 44, 48))
        assert all(a >= -1 and n >= 2 for a, n in zip(low, sides, strict=True))
        assert all(a + n <= s + 1 for a, n, s in zip(low, sides, (40, 44, 48), strict=True))


def test_identity_affine_is_a_crop() -> None:
    image, label = volume()
    got, got_label = warp(image, label, np.eye(3), (5, 6, 7), PATCH)
    crop = (slice(5, 19), slice(6, 23), slice(7, 27))
    np.testing.assert_allclose(got, image[crop], atol=1e-5)
    assert np.array_equal(got_label, label[crop])


def test_changes_against_plain_formulas() -> None:
    image = volume(PATCH)[0]

    def change(**numbers: float) -> np.ndarray:
        return change_intensity(image.copy(), Draw(**numbers))

    np.testing.assert_allclose(change(brightness=1.2, brightness_add=0.1), image * 1.2 + 0.1, rtol=1e-5, atol=1e-6)
    bent = ((image - image.min()) / np.ptp(image)).astype(np.float64) ** 1.4
    expected = (bent - bent.mean()) / bent.std() * image.std(dtype=np.float64) + image.mean(dtype=np.float64)
    np.testing.assert_allclose(change(gamma=1.4), expected, atol=1e-4)
    mean = image.mean(dtype=np.float64)
    expected = np.clip(mean + (image - mean) * 1.3, image.min(), image.max())
    np.testing.assert_allclose(change(contrast=1.3), expected, atol=1e-5)
    for sigma in (0.5, 0.8, 1.0):
        kernel = gaussian_kernel(sigma)
        assert len(kernel) == 2 * np.ceil(3 * sigma) + 1
        expected = image.astype(np.float64)
        for axis in range(3):
            expected = ndimage.correlate1d(expected, kernel.astype(np.float64), axis=axis, mode="nearest")
        np.testing.assert_allclose(change(blur_sigma_vox=sigma), expected, atol=1e-5)


def test_noise_is_normal_and_independent() -> None:
    zeros = np.zeros((50, 50, 41), np.float32)
    a = change_intensity(zeros.copy(), Draw(noise_std=1.0, noise_key=7)).ravel()
    b = change_intensity(zeros.copy(), Draw(noise_std=1.0, noise_key=8)).ravel()
    assert stats.kstest(a, "norm").pvalue > 1e-3
    for other in (b, np.roll(a, 1), np.roll(a, 2), np.roll(a, 4), np.roll(a, 41), np.roll(a, 2050)):
        assert abs(np.corrcoef(a, other)[0, 1]) < 0.015
    table = normal_quantiles()
    assert table.shape == (65536,)
    assert abs(float(table.astype(np.float64).mean())) < 1e-9
    assert float(table.astype(np.float64).std()) == pytest.approx(1, abs=2e-4)


def test_constant_patches_survive() -> None:
    flat = np.full(PATCH, 3.0, np.float32)
    got = change_intensity(flat.copy(), Draw(gamma=1.3, contrast=0.8, blur_sigma_vox=0.7))
    np.testing.assert_allclose(got, flat, atol=1e-5)


def test_draws_keep_to_their_ranges_and_probabilities() -> None:
    draws = [draw(seed, CONFIG) for seed in range(1500)]
    rates = {
        name: np.mean([getattr(d, name) is not None for d in draws]) for name in ("affine", "gamma", "noise_std", "contrast")
    }
    assert rates["affine"] == pytest.approx(0.5, abs=0.05)
    assert all(rates[n] == pytest.approx(0.15, abs=0.035) for n in ("gamma", "noise_std", "contrast"))
    for name, low, high in [
        ("brightness", 0.7, 1.3),
        ("gamma", 0.7, 1.5),
        ("contrast", 0.7, 1.3),
        ("blur_sigma_vox", 0.5, 1.0),
        ("noise_std", 0.0, 0.1),
    ]:
        values = [getattr(d, name) for d in draws if getattr(d, name) is not None]
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values) <= high
    offsets = [d.brightness_add for d in draws if d.brightness_add is not None]
    assert np.std(offsets) == pytest.approx(0.1, rel=0.2)
    assert draw(1, AugmentConfig(enabled=False)) == Draw()


def test_affines_are_rotations_scales_and_shears_of_the_stated_size() -> None:
    only_rotation = AugmentConfig(spatial_probability=1, scale=1, shear=0)
    for seed in range(50):
        matrix = draw(seed, only_rotation).affine
        assert matrix is not None
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1)
    only_scale = AugmentConfig(spatial_probability=1, rotation_deg=0, shear=0)
    diagonals = np.stack([np.diag(draw(seed, only_scale).affine) for seed in range(200)])  # pyright: ignore[reportArgumentType]
    assert 0.7 <= diagonals.min() < 0.72
    assert 1.40 < diagonals.max() <= 1 / 0.7


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_augment_is_a_function_of_its_seed(seed: int) -> None:
    image, label = volume(PATCH)
    before = image.copy()
    first, second = (augment(image, label, seed, ALWAYS) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert first[0].shape == first[1].shape == PATCH
    assert first[1].dtype == label.dtype
    assert np.isfinite(first[0]).all()
    assert np.array_equal(image, before)
    other, _ = augment(image, label, seed ^ 1, ALWAYS)
    assert not np.array_equal(first[0], other)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), everything=st.booleans())
def test_device_agrees_with_the_worker(seed: int, everything: bool) -> None:
    image, label = volume()
    numbers = draw(seed, ALWAYS if everything else CONFIG)
    start, inside = (13, 13, 14), (13, 13, 14)
    if numbers.affine is None:
        image, label, inside = image[13:27, 13:30, 14:34].copy(), label[13:27, 13:30, 14:34], (0, 0, 0)
        worker_image, worker_label = image.copy(), label
    else:
        low, sides = source_box(numbers.affine, start, PATCH, (40, 44, 48))
        image = np.pad(image, 1, constant_values=image.min())[
            tuple(slice(a + 1, a + 1 + n) for a, n in zip(low, sides, strict=True))
        ]
        label = np.pad(label, 1)[tuple(slice(a + 1, a + 1 + n) for a, n in zip(low, sides, strict=True))]
        inside = (start[0] - low[0], start[1] - low[1], start[2] - low[2])
        worker_image, worker_label = warp(image, label, numbers.affine, inside, PATCH)
    worker_image = change_intensity(worker_image, numbers)
    got, got_label = augment_device.apply(
        torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(np.ascontiguousarray(label)), numbers, inside, PATCH
    )
    np.testing.assert_allclose(got.numpy(), worker_image, atol=2e-3)
    assert (got_label.numpy() != worker_label).mean() < 2e-3


def test_device_noise_is_the_workers_to_the_bit() -> None:
    numbers = Draw(noise_std=1.0, noise_key=2**64 - 12345)
    worker = change_intensity(np.zeros((7, 9, 11), np.float32), numbers).ravel()
    assert np.array_equal(augment_device.noise(693, numbers.noise_key, torch.device("cpu")).numpy(), worker)


def test_order_of_changes_is_the_published_one() -> None:
    """All at once equals one after the other."""
    image = volume(PATCH)[0]
    numbers = Draw(brightness=1.1, brightness_add=-0.2, gamma=0.8, contrast=1.2, blur_sigma_vox=0.6, noise_std=0.05, noise_key=3)
    expected = image.copy()
    for names in (("brightness", "brightness_add"), ("gamma",), ("contrast",), ("blur_sigma_vox",), ("noise_std", "noise_key")):
        expected = change_intensity(expected, replace(Draw(), **{n: getattr(numbers, n) for n in names}))
    np.testing.assert_allclose(change_intensity(image.copy(), numbers), expected, atol=1e-6)


def test_ranges_of_zero_width_change_nothing() -> None:
    """The natural way to say "off" for one change: no NaN, no empty kernel."""
    off = {"rotation_deg": 0, "scale": 1, "shear": 0, "brightness": 0, "brightness_add_std": 0, "gamma": (1, 1), "contrast": 0}
    always = {"spatial_probability": 1, "intensity_probability": 1}
    config = AugmentConfig.model_validate({**off, **always, "blur_sigma_vox": (0, 0), "noise_std": 0})
    image, label = volume(PATCH)
    got_image, got_label = augment(image, label, 3, config)
    np.testing.assert_allclose(got_image, image, atol=1e-4)
    np.testing.assert_array_equal(got_label, label)
    on_device = augment_device.change_intensity(torch.from_numpy(image), draw(3, config)).numpy()
    np.testing.assert_allclose(on_device, image, atol=1e-4)
