"""Raw datasets made on the spot, each in one layout."""

from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest


def make_volume(seed=0, shape=(12, 16, 14), spacing=(3.0, 1.5, 1.5)):
    """(image int16, label uint8 with values 1 and 2, affine): Z Y X arrays, LPS axes."""
    rng = np.random.default_rng(seed)
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = rng.normal(0, 20, 3).round(2)
    image = rng.integers(-900, 400, shape).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[3:9, 4:12, 3:9] = 1
    label[5:7, 6:9, 5:7] = 2
    return image, label, affine


def save(path, array_zyx, affine, dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = array_zyx if dtype is None else array_zyx.astype(dtype)
    image = nib.Nifti1Image(np.ascontiguousarray(array.T), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def make_nnunet(root, cases=4, labels=None, seed=0):
    """An nnU-Net v2 raw dataset of CT; returns its folder."""
    for i in range(cases):
        image, label, affine = make_volume(seed + i)
        save(root / "imagesTr" / f"case_{i}_0000.nii.gz", image, affine)
        save(root / "labelsTr" / f"case_{i}.nii.gz", label, affine)
    description = {
        "channel_names": {"0": "CT"},
        "labels": labels or {"background": 0, "organ": 1, "tumour": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture(scope="session")
def raw():
    """The functions above, for tests that build their own datasets."""
    return SimpleNamespace(make_volume=make_volume, save=save, make_nnunet=make_nnunet)


@pytest.fixture
def nnunet(tmp_path):
    """Folder of an nnU-Net dataset with four cases."""
    return make_nnunet(tmp_path / "Dataset001_Toy")
