"""MONAI's loaders with its fastest settings: no metadata, cached foreground indices, volumes in RAM or as .pt files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai import transforms as mt
from monai.data.dataset import CacheDataset, PersistentDataset
from monai.data.meta_obj import set_track_meta

KEYS = ("image", "label")


def _deterministic_part() -> list[Any]:
    return [
        mt.EnsureTyped(keys=KEYS, track_meta=False),
        mt.FgBgToIndicesd(keys="label", image_key=None),
    ]


def _random_part(patch: tuple[int, int, int]) -> list[Any]:
    """The augmentation list of `hermes_dist.volume.augment` with its probabilities and ranges."""
    p, r = 0.15, np.deg2rad(30)
    return [
        mt.RandCropByPosNegLabeld(
            keys=KEYS, label_key="label", spatial_size=patch, pos=1, neg=1, num_samples=1,
            fg_indices_key="label_fg_indices", bg_indices_key="label_bg_indices", allow_smaller=False,
        ),
        mt.SelectItemsd(keys=KEYS),
        mt.RandAffined(
            keys=KEYS, prob=0.5, rotate_range=(r, r, r), scale_range=((-0.3, 0.43),) * 3, shear_range=(0.1,) * 6,
            mode=("bilinear", "nearest"), padding_mode="border", cache_grid=True, spatial_size=patch,
        ),
        mt.RandScaleIntensityd(keys="image", factors=0.3, prob=p),
        mt.RandShiftIntensityd(keys="image", offsets=0.1, prob=p),
        mt.RandAdjustContrastd(keys="image", gamma=(0.7, 1.5), retain_stats=True, prob=p),
        mt.RandScaleIntensityFixedMeand(keys="image", factors=0.3, preserve_range=True, prob=p),
        mt.RandGaussianSmoothd(keys="image", sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1), prob=p),
        mt.RandGaussianNoised(keys="image", std=0.1, prob=p),
    ]  # fmt: skip


def open_loader(
    kind: str, cases: Sequence[tuple[np.ndarray, np.ndarray]], patch: tuple[int, int, int], folder: Path
) -> Callable[[int], Any]:
    """A function that returns the i-th sample of a `CacheDataset` (RAM) or `PersistentDataset` (disk), warm."""
    set_track_meta(False)
    folder.mkdir()
    data = [{"image": image[None], "label": label[None]} for image, label in cases]
    transform = mt.Compose(_deterministic_part() + _random_part(patch))
    transform.set_random_state(0)
    if kind == "CacheDataset":
        dataset: Any = CacheDataset(data, transform, cache_rate=1.0, num_workers=1, progress=False, copy_cache=False)
    else:
        paths: list[dict[str, Any]] = []
        for number, item in enumerate(data):
            torch.save({k: torch.from_numpy(v) for k, v in item.items()}, folder / f"{number}.pt")
            paths.append({"path": str(folder / f"{number}.pt")})
        dataset = PersistentDataset(paths, mt.Compose([_load, *transform.transforms]), cache_dir=folder / "cache")
    for number in range(len(data)):
        dataset[number]
    return lambda i: dataset[i % len(data)]


def _load(item: dict[str, Any]) -> dict[str, Any]:
    return torch.load(item["path"], weights_only=True)
