"""The augmentation of `augment`, on the training device: the same numbers, the same formulas, in torch.

Used where workers cannot keep up and the device has time to spare. Results agree with the compiled CPU loops to rounding; the
noise is even the same to the bit, because it is a hash of the voxel's number.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Float64, Integer
from torch import Tensor
from torch.nn import functional

from hermes_dist.config import Vox3
from hermes_dist.volume.augment import Draw, gaussian_kernel, normal_quantiles

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SPREAD_MIN = 1e-7


def apply(
    image: Float32[Tensor, "Z Y X"],
    label: Integer[Tensor, "Z Y X"],
    numbers: Draw,
    patch_start_vox_zyx: Vox3,
    patch_vox_zyx: Vox3,
) -> tuple[Float32[Tensor, "Pz Py Px"], Integer[Tensor, "Pz Py Px"]]:
    """Apply one sample's draw.

    Args:
        image: source box (`augment.source_box`), or the patch itself if the draw has no affine.
        label: labels of the same box.
        numbers: the draw.
        patch_start_vox_zyx: first voxel of the unrotated patch in the box's own indices.
        patch_vox_zyx: sides of the result.

    Returns:
        Augmented image and label of the patch, on the device of the arguments; the arguments are not changed.
    """
    if numbers.affine is not None:
        image, label = warp(image, label, numbers.affine, patch_start_vox_zyx, patch_vox_zyx)
    return change_intensity(image, numbers), label


def warp(
    image: Float32[Tensor, "Z Y X"],
    label: Integer[Tensor, "Z Y X"],
    affine: Float64[np.ndarray, "3 3"],
    patch_start_vox_zyx: Vox3,
    patch_vox_zyx: Vox3,
) -> tuple[Float32[Tensor, "Pz Py Px"], Integer[Tensor, "Pz Py Px"]]:
    """Resample a box once: trilinear for the image, nearest for the label (see `augment.warp`)."""
    half = (np.asarray(patch_vox_zyx) - 1) / 2
    origin = np.asarray(patch_start_vox_zyx) + half - affine @ half
    steps = [torch.arange(n, device=image.device, dtype=torch.float32) for n in patch_vox_zyx]
    z, y, x = torch.meshgrid(*steps, indexing="ij")
    matrix, top = affine.astype(np.float32).tolist(), [n - 1 for n in image.shape]
    at = [
        (matrix[a][0] * z + matrix[a][1] * y + float(origin[a]) + matrix[a][2] * x).clamp(0, top[a])  # as the CPU loop adds up
        for a in range(3)
    ]
    grid = torch.stack([2 * at[a] / max(top[a], 1) - 1 for a in (2, 1, 0)], dim=-1)
    sampled = functional.grid_sample(image[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)
    nearest = [(c + 0.5).long() for c in at]
    return sampled[0, 0], label[nearest[0], nearest[1], nearest[2]]


def change_intensity(image: Float32[Tensor, "Z Y X"], numbers: Draw) -> Float32[Tensor, "Z Y X"]:
    """The intensity changes of a draw, in the published order; a new tensor unless nothing changes."""
    if numbers.brightness is not None or numbers.brightness_add is not None:
        image = image * (1.0 if numbers.brightness is None else numbers.brightness) + (numbers.brightness_add or 0.0)
    if numbers.gamma is not None:
        image = _gamma(image, numbers.gamma)
    if numbers.contrast is not None:
        low, high, mean = image.amin(), image.amax(), image.double().mean().float()
        image = (image * numbers.contrast + mean * (1 - numbers.contrast)).clamp(low, high)
    if numbers.blur_sigma_vox:
        image = _blur(image, torch.from_numpy(gaussian_kernel(numbers.blur_sigma_vox)).to(image.device))
    if numbers.noise_std is not None:
        image = image + numbers.noise_std * noise(image.numel(), numbers.noise_key, image.device).view_as(image)
    return image


def noise(count: int, key: int, device: torch.device) -> Float32[Tensor, " N"]:
    """Standard normal noise of the first `count` voxels: quantile number (16 bits of hash(key, i // 4)) for voxel i."""
    block = torch.arange(1, (count + 3) // 4 + 1, device=device, dtype=torch.int64)
    h = block * _signed(_GOLDEN) + _signed(key)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        h = (h ^ _shift(h, shift)) * _signed(factor)
    h = h ^ _shift(h, 31)
    index = torch.stack([_shift(h, 16 * i) & 0xFFFF if i else h & 0xFFFF for i in range(4)], dim=1).reshape(-1)[:count]
    return torch.from_numpy(normal_quantiles()).to(device)[index]


def _gamma(image: Tensor, exponent: float) -> Tensor:
    low, high = image.amin(), image.amax()
    std, mean = torch.std_mean(image.double(), correction=0)
    if not float(high - low) > _SPREAD_MIN:
        return image
    curved = ((image - low) / (high - low)).clamp(0, 1) ** exponent
    new_std, new_mean = torch.std_mean(curved.double(), correction=0)
    factor = std / new_std.clamp(min=_SPREAD_MIN)
    return (curved * factor + (mean - factor * new_mean)).float()


def _blur(image: Tensor, kernel: Tensor) -> Tensor:
    radius = kernel.numel() // 2
    out = functional.pad(image[None, None], (radius,) * 6, mode="replicate")
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = -1
        out = functional.conv3d(out, kernel.view(shape))
    return out[0, 0]


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64: torch multiplies and adds modulo 2^64 either way."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
