"""nnU-Net v2's own loader, storage and default training augmentation, in this process (`nnUNet_n_proc_DA=0`).

Cases are stored as its preprocessing does (blosc2, chunks chosen by its own function for the patch); batches of two, a third of
them centred on foreground, transforms of `nnUNetTrainer.get_training_transforms`. Left out in its favour: the targets of deep
supervision. Needs nnunetv2, in an environment of its own (see docs/results/streaming.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

BATCH = 2
ROTATION = (-np.pi / 6, np.pi / 6)
"""What its trainer chooses for isotropic patches."""


def open_loader(
    cases: Sequence[tuple[np.ndarray, np.ndarray]], patch: tuple[int, int, int], folder: Path, *, augmented: bool = True
) -> Callable[[int], Any]:
    """A function that returns a batch of BATCH samples."""
    folder.mkdir()
    for number, (image, label) in enumerate(cases):
        _save(folder / f"case{number}", image, label, patch)
    values = range(1, 1 + max(int(label.max()) for _, label in cases))
    labels = LabelManager({"background": 0, **{f"organ{v}": v for v in values}}, None)
    read_vox = get_patch_size(patch, ROTATION, ROTATION, ROTATION, (0.85, 1.25)) if augmented else np.asarray(patch)
    transforms = nnUNetTrainer.get_training_transforms(patch, ROTATION, None, (0, 1, 2), False, [False])
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(folder)),
        BATCH,
        read_vox,
        patch,
        labels,
        oversample_foreground_percent=0.33,
        transforms=transforms if augmented else ComposeTransforms([]),
    )
    return lambda _: next(loader)


def _save(path: Path, image: np.ndarray, label: np.ndarray, patch: tuple[int, int, int]) -> None:
    data, seg = image[None].astype(np.float32), label[None].astype(np.int8)
    blocks, chunks = comp_blosc2_params(data.shape, patch, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, patch, seg.itemsize)
    rng = np.random.default_rng(0)
    places: dict[int, np.ndarray] = {}
    for value in range(1, int(label.max()) + 1):
        found = np.argwhere(seg == value)
        places[value] = found[rng.integers(0, len(found), min(len(found), 10_000))] if len(found) else found
    nnUNetDatasetBlosc2.save_case(data, seg, {"class_locations": places}, str(path), chunks, blocks, chunks_seg, blocks_seg)
