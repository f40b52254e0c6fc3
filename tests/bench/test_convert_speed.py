"""CPU seconds of whole commands, conversion against nnU-Net and a MONAI pipeline: the same volumes, one worker process each.

Start-up counts on every side. The peers live in an environment of their own (`peers.txt`), named by HERMES_PEERS (its `bin`
folder); without it nnU-Net is left out, and MONAI runs from this environment.

* nnU-Net: `nnUNetv2_plan_and_preprocess -c 3d_fullres -np 1 -npfp 1`, target spacing 1.5 mm: fingerprint, plan, crop,
  normalise, cubic images (order 3 splines), linear labels (one pass per label), blosc2. Ours beside it: cubic (Keys) images,
  linear labels (largest share).
* MONAI: LoadImage, Orientation RAS, Spacing 1.5 mm (bilinear / nearest), clip, NormalizeIntensity, `.npy`. Ours beside it:
  linear, nearest.

Ours besides checks gzip and labels, hashes, crops to the body, compresses and writes a manifest. Scans are synthetic CT.
Run: `HERMES_PEERS=ENV/bin pytest -m bench -s tests/bench/test_convert_speed.py`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

OURS = [sys.executable, "-c", "from data_tools.cli import main; main()"]
PEERS = os.environ.get("HERMES_PEERS")
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


def cpu_seconds(*command, **environment):
    """User and system seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **{k: str(v) for k, v in environment.items()},
    }
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, timeout=3000)
    assert result.returncode == 0, result.stderr[-2000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def megabytes(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def run_ours(root, out, **preprocessing):
    """(CPU seconds, MB) of `hermes-shard convert` with these settings."""
    collection = out.with_suffix(".json")
    entry = {"name": "bench", "path": str(root), "layout": "nnunet"}
    collection.write_text(json.dumps({"datasets": [entry], "preprocessing": preprocessing}))
    return cpu_seconds(*OURS, "convert", "--collection", collection, "--out", out), megabytes(out)


def run_monai(root, out):
    """(CPU seconds, MB) of the MONAI pipeline."""
    out.mkdir()
    python = Path(PEERS, "python") if PEERS else sys.executable
    return cpu_seconds(python, "-c", MONAI, root, out), megabytes(out)


def run_nnunet(root, out):
    """(CPU seconds, MB of the training volumes) of nnU-Net's own command."""
    places = {"nnUNet_raw": root.parent, "nnUNet_preprocessed": out, "nnUNet_results": out}
    command = [Path(PEERS, "nnUNetv2_plan_and_preprocess"), "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar"]
    spacing = ["-overwrite_target_spacing", "1.5", "1.5", "1.5", "-overwrite_plans_name", "plans15mm"]
    seconds = cpu_seconds(*command, *spacing, **places)
    (volumes,) = [p for p in (out / root.name).iterdir() if p.name.endswith("3d_fullres")]
    return seconds, megabytes(volumes)


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
@pytest.mark.timeout(6000)
@pytest.mark.parametrize(
    ("name", "scans", "against_nnunet", "against_monai"),
    [
        ("4 CT to 256 x 256 x 200", {"cases": 4, "shape": (200, 341, 341), "spacing": (1.5, 1.125, 1.125), "labels": 3}, 5, 1.5),
        ("3 CT, 61 labels", {"cases": 3, "shape": (160, 256, 256), "spacing": (1.5, 1.2, 1.2), "labels": 61}, 5, 1.5),
        ("60 small volumes", {"cases": 60, "shape": (36, 50, 35), "spacing": (1.0, 1.0, 1.0), "labels": 2}, 1, 1),
    ],
)
def test_less_cpu_than_nnunet_and_monai(name, scans, against_nnunet, against_monai, tmp_path):
    root = write_scans(tmp_path / "raw" / "Dataset001_Bench", **scans)
    ours = run_ours(root, tmp_path / "linear")
    monai = run_monai(root, tmp_path / "monai")
    print(f"\n{name}")
    print(
        f"  linear, nearest   ours {ours[0]:6.1f} CPU s {ours[1]:7.1f} MB   MONAI   {monai[0]:6.1f} CPU s {monai[1]:7.1f} MB",
        end="",
    )
    print(f"   {monai[0] / ours[0]:5.1f} x")
    assert monai[0] >= against_monai * ours[0]
    if PEERS is None:
        pytest.skip("nnU-Net left out: HERMES_PEERS names no environment (tests/bench/peers.txt)")
    ours = run_ours(root, tmp_path / "cubic", interpolation="cubic", label_interpolation="linear")
    nnunet = run_nnunet(root, tmp_path / "nnunet")
    print(
        f"  cubic, linear     ours {ours[0]:6.1f} CPU s {ours[1]:7.1f} MB   nnU-Net {nnunet[0]:6.1f} CPU s {nnunet[1]:7.1f} MB",
        end="",
    )
    print(f"   {nnunet[0] / ours[0]:5.1f} x")
    assert nnunet[0] >= against_nnunet * ours[0]
    assert nnunet[1] >= ours[1]
