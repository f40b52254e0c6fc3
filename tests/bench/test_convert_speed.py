"""CPU seconds of whole commands, conversion against a MONAI pipeline, on the same volumes in one process each.

MONAI: LoadImage, Orientation RAS, Spacing 1.5 mm (bilinear / nearest), ScaleIntensityRange clip, NormalizeIntensity, saved as
`.npy`. Ours does the same interpolation, and besides checks gzip and labels, hashes, crops to the body, compresses and writes a
manifest. Start-up counts on both sides. Run: `pytest -m bench -s tests/bench/test_convert_speed.py`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

OURS = [sys.executable, "-c", "from data_tools.cli import main; main()"]
MONAI = """
import sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import numpy as np
from monai.transforms import (Compose, EnsureChannelFirstd, LoadImaged, NormalizeIntensityd, Orientationd,
                              ScaleIntensityRanged, Spacingd)
root, out = Path(sys.argv[1]), Path(sys.argv[2])
keys = ["image", "label"]
steps = Compose([LoadImaged(keys), EnsureChannelFirstd(keys), Orientationd(keys, axcodes="RAS", labels=None),
                 Spacingd(keys, pixdim=(1.5, 1.5, 1.5), mode=("bilinear", "nearest")),
                 ScaleIntensityRanged(["image"], -990, 500, -990, 500, clip=True), NormalizeIntensityd(["image"])])
for image in sorted((root / "imagesTr").glob("*.nii.gz")):
    name = image.name.replace("_0000.nii.gz", "")
    case = steps({"image": str(image), "label": str(root / "labelsTr" / f"{name}.nii.gz")})
    np.save(out / f"{name}.npy", case["image"].numpy().astype(np.float32))
    np.save(out / f"{name}_label.npy", case["label"].numpy().astype(np.uint8))
"""


def cpu_seconds(*command):
    """User and system seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, timeout=550)
    assert result.returncode == 0, result.stderr[-2000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_scans(root, *, cases, shape, spacing, labels):
    """CT-like scans of smooth tissue with noise, and blocks of `labels` classes; LPS axes."""
    rng = np.random.default_rng(0)
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    coarse = [-(-n // 16) for n in shape]
    for case in range(cases):
        blocks = np.kron(rng.integers(0, labels + 1, coarse).astype(np.uint8), np.ones((16, 16, 16), np.uint8))
        label = blocks[tuple(slice(n) for n in shape)]
        image = (label.astype(np.int16) * 8 - 100 + rng.normal(0, 12, shape)).astype(np.int16)
        for folder, name, array in (("imagesTr", f"c{case}_0000", image), ("labelsTr", f"c{case}", label)):
            nib.save(nib.Nifti1Image(array.T, affine), root / folder / f"{name}.nii.gz")
    names = {"background": 0, **{f"class_{v}": v for v in range(1, labels + 1)}}
    description = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": cases, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.mark.bench
@pytest.mark.parametrize(
    ("name", "scans", "ratio"),
    [
        ("2 CT to 256 x 256 x 200", {"cases": 2, "shape": (200, 341, 341), "spacing": (1.5, 1.125, 1.125), "labels": 3}, 1.5),
        ("2 CT, 61 labels", {"cases": 2, "shape": (160, 256, 256), "spacing": (1.5, 1.2, 1.2), "labels": 61}, 1.5),
        ("60 small volumes", {"cases": 60, "shape": (36, 50, 35), "spacing": (1.0, 1.0, 1.0), "labels": 2}, 1.0),
    ],
)
def test_less_cpu_than_monai(name, scans, ratio, tmp_path):
    root = write_scans(tmp_path / "Dataset001_Bench", **scans)
    (tmp_path / "monai").mkdir()
    ours = cpu_seconds(*OURS, "convert", root, "--out", tmp_path / "store")
    theirs = cpu_seconds(sys.executable, "-c", MONAI, root, tmp_path / "monai")
    stored = sum(p.stat().st_size for p in (tmp_path / "store").rglob("*") if p.is_file())
    plain = sum(p.stat().st_size for p in (tmp_path / "monai").iterdir())
    print(f"\n{name}: ours {ours:.1f} CPU s, {stored / 1e6:.1f} MB; MONAI {theirs:.1f} CPU s, {plain / 1e6:.1f} MB", end="; ")
    print(f"{theirs / ours:.1f} x")
    assert theirs >= ratio * ours
