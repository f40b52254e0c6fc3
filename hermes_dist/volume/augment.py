"""Augmentation of the paper: one affine (rotation, scale, shear), then intensity changes, all drawn from one seed.

`draw` turns a seed into plain numbers; `source_box` says which voxels the affine needs, so that the reader fetches those and
no more; `warp` interpolates once for all spatial changes; `change_intensity` does the rest in the published order. The same
draw can be applied on the training device (`augment_device`): the numbers, and even the noise, are the same there.

Ranges follow the paper and its released code, with three differences: outside of the volume there is air instead of zero,
the surroundings of the patch are read instead of being cut off 15 voxels away, and blur replicates edges.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Float64, Integer, Num

from hermes_dist.config import AugmentConfig, Vox3
from hermes_dist.volume import augment_kernels as kernels

Image = Float32[np.ndarray, "Z Y X"]
Label = Integer[np.ndarray, "Z Y X"]
Source = Num[np.ndarray, "Z Y X"]
PatchImage = Float32[np.ndarray, "Pz Py Px"]
PatchLabel = Integer[np.ndarray, "Pz Py Px"]
Matrix = Float64[np.ndarray, "3 3"]

_HUGE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Draw:
    """All numbers of one sample's augmentation; None = that change is not made.

    `affine` maps an offset from the patch's centre to an offset from the same point in the source, in voxels Z Y X.
    """

    affine: npt.NDArray[np.float64] | None = None
    brightness: float | None = None
    brightness_add: float | None = None
    gamma: float | None = None
    contrast: float | None = None
    blur_sigma_vox: float | None = None
    noise_std: float | None = None
    noise_key: int = 0


@dataclass(frozen=True)
class Reach:
    """The voxels that an affine of a patch reads: a parallelepiped, with the neighbours that interpolation takes.

    A box around it has two to four times its volume, and most of that need not be read.

    Attributes:
        centre_vox_zyx: its centre in the volume's voxels.
        inverse: 3 × 3 map from offsets in the volume to offsets in the patch.
        half_vox_zyx: half the sides of the patch, from its first voxel's centre to its last one's.
    """

    centre_vox_zyx: npt.NDArray[np.float64]
    inverse: npt.NDArray[np.float64]
    half_vox_zyx: npt.NDArray[np.float64]

    def touches(self, low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which boxes of voxels [low, high), (…, 3) each, may be read; false only where that is certain.

        Separating axes: the patch's own; those of the volume are the caller's, who asks about parts of the patch's box only.
        """
        middle = (low + high - 1) / 2 - self.centre_vox_zyx
        wide = (high - low - 1) / 2 + 1.001  # the next voxel on each side takes part in interpolation
        inside = np.abs(middle @ self.inverse.T) <= self.half_vox_zyx + wide @ np.abs(self.inverse).T
        return np.asarray(inside.all(axis=-1))


def draw(seed: int, config: AugmentConfig) -> Draw:
    """Draw one sample's augmentation.

    Args:
        seed: 64-bit seed of the sample; equal seeds give equal draws on any machine and any NumPy version.
        config: ranges and probabilities; `enabled` false gives a draw that changes nothing.
    """
    if not config.enabled:
        return Draw()
    # Raw output of a bit generator is stable between NumPy versions; distributions of a Generator are not.
    raw = np.random.Philox(key=seed & 0xFFFFFFFFFFFFFFFF).random_raw(32)
    u: list[float] = ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).tolist()

    def value(slot: int, low: float, high: float) -> float | None:
        return low + (high - low) * u[slot + 1] if u[slot] < config.intensity_probability else None

    offset = value(15, 0.0, 1.0)
    if offset is not None:
        offset = config.brightness_add_std * NormalDist().inv_cdf(min(max(offset, 1e-12), 1 - 1e-12))
    return Draw(
        affine=_affine(u[1:13], config) if u[0] < config.spatial_probability else None,
        brightness=value(13, 1 - config.brightness, 1 + config.brightness),
        brightness_add=offset,
        gamma=value(17, *config.gamma),
        contrast=value(19, 1 - config.contrast, 1 + config.contrast),
        blur_sigma_vox=value(21, *config.blur_sigma_vox),
        noise_std=value(23, 0.0, config.noise_std),
        noise_key=int(raw[25]),
    )


def augment(image: Image, label: Label, rng_seed: int, config: AugmentConfig) -> tuple[Image, Label]:
    """Augment a patch for itself; what the affine needs from outside of it is the patch's minimum, label 0.

    Args:
        image: float32 (Z, Y, X); label: integer (Z, Y, X) of the same shape. Neither is changed.
        rng_seed: equal seeds give equal results.
        config: ranges and probabilities.

    Returns:
        New image and label of the same shapes and dtypes.
    """
    numbers = draw(rng_seed, config)
    if numbers.affine is None:
        image, label = image.copy(), label.copy()
    else:
        shape = image.shape
        padded = np.pad(image, 1, constant_values=image.min())
        image, label = warp(padded, np.pad(label, 1), numbers.affine, (1, 1, 1), (shape[0], shape[1], shape[2]))
    return change_intensity(image, numbers), label


def source_box(affine: Matrix, start_vox_zyx: Vox3, patch_vox_zyx: Vox3, shape_vox_zyx: Vox3) -> tuple[Vox3, Vox3]:
    """The voxels that an affine of a patch reads.

    Args:
        affine: 3 × 3 map of offsets from the patch's centre.
        start_vox_zyx: first voxel of the patch in the volume.
        patch_vox_zyx: sides of the patch.
        shape_vox_zyx: sides of the volume. The box ends one voxel outside of it: that voxel is air, and so is all beyond.

    Returns:
        (start, sides) of the box in the volume's voxels; it may begin at -1 or end one voxel behind the volume.
    """
    half = (np.asarray(patch_vox_zyx) - 1) / 2
    centre = np.asarray(start_vox_zyx) + half
    reach = np.abs(affine) @ half
    first_inside = np.minimum(np.asarray(start_vox_zyx), 0) - 1
    last_inside = np.maximum(np.asarray(shape_vox_zyx), np.asarray(start_vox_zyx) + np.asarray(patch_vox_zyx))
    low = np.clip(np.floor(centre - reach), first_inside, last_inside - 1).astype(int)
    high = np.clip(np.ceil(centre + reach), low + 1, last_inside).astype(int)
    return _vox3(low), _vox3(high - low + 1)


def largest_box_vox(config: AugmentConfig, patch_vox_zyx: Vox3) -> int:
    """Voxels of the largest `source_box` among a thousand draws, where the volume has room for it; else those of the patch."""
    boundless = (1 << 20, 1 << 20, 1 << 20)
    drawn = (draw(seed, config).affine for seed in range(1000))
    boxes = [
        source_box(affine, _vox3(np.full(3, 1 << 19)), patch_vox_zyx, boundless)[1] for affine in drawn if affine is not None
    ]
    return max((math.prod(sides) for sides in boxes), default=math.prod(patch_vox_zyx))


def reach(affine: Matrix, start_vox_zyx: Vox3, patch_vox_zyx: Vox3) -> Reach:
    """What of the `source_box` an affine of a patch really reads (arguments as there).

    Beyond the box the outermost voxels continue; a box that was cut there ends in air, so nothing else is needed of it.
    """
    half = (np.asarray(patch_vox_zyx) - 1) / 2
    return Reach(np.asarray(start_vox_zyx) + half, np.linalg.inv(affine), half)


def warp(
    image: Source, label: Label, affine: Matrix, patch_start_vox_zyx: Vox3, patch_vox_zyx: Vox3, scale: float = 1.0
) -> tuple[PatchImage, PatchLabel]:
    """Resample a box once: trilinear for the image, nearest for the label.

    Args:
        image: source box, any number type (Z, Y, X), each side >= 2; its outermost voxels continue to infinity.
        label: labels of the same box.
        affine: 3 × 3 map of offsets from the patch's centre.
        patch_start_vox_zyx: first voxel of the unrotated patch in the box's own indices (may be negative).
        patch_vox_zyx: sides of the result.
        scale: factor of the image's values (stored integers become intensities in the same pass).

    Returns:
        Image float32 and label (dtype kept) of sides `patch_vox_zyx`.
    """
    half = (np.asarray(patch_vox_zyx) - 1) / 2
    origin = np.asarray(patch_start_vox_zyx) + half - affine @ half
    image_out = np.empty(patch_vox_zyx, np.float32)
    label_out = np.empty(patch_vox_zyx, label.dtype)
    image, label = np.ascontiguousarray(image), np.ascontiguousarray(label)
    places = label, affine.astype(np.float32), origin.astype(np.float32)
    if image.dtype == np.int16 and sys.byteorder == "little":
        head = image.reshape(-1)[:2].view(np.int32)
        pairs = np.lib.stride_tricks.as_strided(head, (image.size - 1,), (image.itemsize,), writeable=False)
        kernels.warp_pairs_into(pairs, *places, scale, image_out, label_out)
    else:
        scaled = image.astype(np.float32, copy=False) if scale == 1 else np.multiply(image, np.float32(scale), dtype=np.float32)
        kernels.warp_into(scaled, *places, image_out, label_out)
    return image_out, label_out


def change_intensity(image: Image, numbers: Draw) -> Image:
    """The intensity changes of a draw, in the published order. `image` must be contiguous and is overwritten."""
    flat = image.reshape(-1)
    if numbers.brightness is not None or numbers.brightness_add is not None:
        factor = 1.0 if numbers.brightness is None else numbers.brightness
        kernels.linear_clamped(flat, factor, numbers.brightness_add or 0.0, -_HUGE, _HUGE)
    if numbers.gamma is not None:
        _gamma(flat, numbers.gamma)
    if numbers.contrast is not None:
        low, high, mean, _ = kernels.moments(flat)
        kernels.linear_clamped(flat, numbers.contrast, mean * (1 - numbers.contrast), low, high)
    if numbers.blur_sigma_vox:  # 0 changes nothing, and has no kernel
        out = np.empty_like(image)
        kernels.blur_into(image, gaussian_kernel(numbers.blur_sigma_vox), np.empty_like(image), out)
        image, flat = out, out.reshape(-1)
    if numbers.noise_std is not None:
        kernels.add_noise(flat, np.uint64(numbers.noise_key), numbers.noise_std, normal_quantiles())
    return image


def gaussian_kernel(sigma_vox: float) -> npt.NDArray[np.float32]:
    """Normalised Gaussian of length 2⌈3σ⌉ + 1, float32."""
    radius = math.ceil(3 * sigma_vox)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_vox) ** 2)
    return (weights / weights.sum()).astype(np.float32)


@cache
def normal_quantiles() -> npt.NDArray[np.float32]:
    """The 65,536 quantiles of N(0, 1) that noise is made of (mean 0; standard deviation 1 to 1e-4; all within ±4.4)."""
    inverse = NormalDist().inv_cdf
    upper = np.asarray([inverse((i + 0.5) / 65536) for i in range(32768, 65536)], np.float32)
    return np.concatenate([-upper[::-1], upper])


def _gamma(flat: npt.NDArray[np.float32], exponent: float) -> None:
    """x ← ((x - min) / range)^exponent, brought back to the old mean and standard deviation."""
    low, high, mean, std = kernels.moments(flat)
    if not high - low > 1e-7:
        return
    kernels.linear_clamped(flat, 1 / (high - low), -low / (high - low), 0.0, 1.0)
    with np.errstate(divide="ignore"):  # log(0) = -inf is meant: exp(-inf) = 0
        np.log(flat, out=flat)
    np.multiply(flat, np.float32(exponent), out=flat)
    np.exp(flat, out=flat)
    _, _, new_mean, new_std = kernels.moments(flat)
    factor = std / max(new_std, 1e-7)
    kernels.linear_clamped(flat, factor, mean - factor * new_mean, -_HUGE, _HUGE)


def _affine(u: list[float], config: AugmentConfig) -> npt.NDArray[np.float64]:
    """Rz Ry Rx (scale on the diagonal, shear beside it), from twelve uniform numbers."""
    angles = np.deg2rad(config.rotation_deg) * (2 * np.asarray(u[0:3]) - 1)
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        rotation = np.eye(3)
        rotation[i, i] = rotation[j, j] = math.cos(angle)
        rotation[i, j], rotation[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ rotation
    stretch = np.diag(config.scale + (1 / config.scale - config.scale) * np.asarray(u[3:6]))
    stretch[~np.eye(3, dtype=bool)] = config.shear * (2 * np.asarray(u[6:12]) - 1)
    return matrix @ stretch


def _vox3(values: npt.NDArray[np.int_]) -> Vox3:
    return int(values[0]), int(values[1]), int(values[2])
