"""Predicted masks as NIfTI on the scan's own grid, with a JSON that says what each value is. Complete or invisible.

Where the scan itself is NIfTI its header is the template: same affine, sform and qform codes and units, bit for bit. Everything
of a scan is written under a hidden name first and renamed at the end, so that a killed command leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.filebasedimages import ImageFileError

from data_tools.sources.volumes import suffix_of
from hermes_dist.volume.geometry import Grid

NamedMask = tuple[str, np.ndarray]
"""(`dataset/class`, boolean mask Z Y X)."""
OVERLAP_RULE = "where masks overlap, the smaller structure lies on top"


def write_separate(folder: Path, masks: Iterable[NamedMask], grid: Grid, *, like: Path, about: dict[str, Any]) -> list[Path]:
    """One file per task (0/1) and `prediction.json` in `folder`, which is replaced if it is there; returns the files."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        rows: list[dict[str, Any]] = []
        for name, mask in masks:
            file = temporary / f"{safe_name(name)}.nii.gz"
            file.write_bytes(_encode(mask.astype(np.uint8), grid, like))
            rows.append({"name": name, "file": file.name, "value": 1, **_extent(mask, grid)})
        (temporary / "prediction.json").write_text(json.dumps({**about, "tasks": rows}, indent=1) + "\n")
        for file in temporary.iterdir():
            _sync(file)
        if folder.is_dir():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return [folder / row["file"] for row in rows] + [folder / "prediction.json"]


def write_multilabel(file: Path, masks: Iterable[NamedMask], grid: Grid, *, like: Path, about: dict[str, Any]) -> list[Path]:
    """All tasks in one label map (values 1, 2, … in the order asked) and a JSON beside it; returns both.

    Masks wait as bits, so 61 classes cost 8 bytes a voxel.
    """
    packed: list[tuple[str, np.ndarray, int]] = [(n, np.packbits(m), int(np.count_nonzero(m))) for n, m in masks]
    label = np.zeros(grid.shape_vox_zyx, np.uint8 if len(packed) < 256 else np.uint16)
    overlap = 0
    rows: list[dict[str, Any]] = [{} for _ in packed]
    for index in sorted(range(len(packed)), key=lambda i: (-packed[i][2], i)):
        name, bits, _ = packed[index]
        mask = np.unpackbits(bits, count=label.size).reshape(label.shape).astype(bool)
        overlap += int(np.count_nonzero(label[mask]))
        label[mask] = index + 1
        rows[index] = {"name": name, "file": file.name, "value": index + 1, **_extent(mask, grid)}
    sidecar = file.with_name(f"{file.name.removesuffix('.nii.gz')}.json")
    text = json.dumps({**about, "overlap_rule": OVERLAP_RULE, "overlap_voxels": overlap, "tasks": rows}, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    pairs = [(sidecar, text.encode()), (file, _encode(label, grid, like))]
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}") for path, _ in pairs]
    try:
        for temporary, (_, data) in zip(temporaries, pairs, strict=True):
            temporary.write_bytes(data)
            _sync(temporary)
        for temporary, (path, _) in zip(temporaries, pairs, strict=True):
            temporary.replace(path)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    return [file, sidecar]


def safe_name(name: str) -> str:
    """`dataset/class` as a file name: `dataset__class`, anything unusual becomes `_`."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name.replace("/", "__")).lstrip(".") or "_"


def _extent(mask: np.ndarray, grid: Grid) -> dict[str, Any]:
    voxels = int(np.count_nonzero(mask))
    return {"voxels": voxels, "volume_ml": round(voxels * abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000, 4)}


def _encode(label_zyx: np.ndarray, grid: Grid, like: Path) -> bytes:
    """A gzipped NIfTI without a time stamp; equal masks give equal bytes."""
    template = _template(like)
    if template is not None and tuple(template.shape[:3]) == label_zyx.T.shape:
        header = template.header.copy()
        header.set_data_dtype(label_zyx.dtype)
        header["scl_slope"], header["scl_inter"], header["cal_min"], header["cal_max"] = np.nan, np.nan, 0, 0
        image = type(template)(label_zyx.T, template.affine, header)
    else:
        image = nib.Nifti1Image(label_zyx.T, grid.affine)
        image.header.set_xyzt_units("mm")
        image.header.set_sform(grid.affine, code=1)
        image.header.set_qform(grid.affine, code=1)
    return igzip.compress(image.to_bytes(), 3, mtime=0)


def _template(like: Path) -> nib.Nifti1Image | nib.Nifti2Image | None:
    """The scan's header if it is NIfTI (a file that is misnamed, which nibabel refuses, is written from its grid instead)."""
    if suffix_of(like) not in (".nii", ".nii.gz"):
        return None
    try:
        image = nib.load(like)
    except (ImageFileError, OSError):
        return None
    return image if isinstance(image, nib.Nifti1Image | nib.Nifti2Image) else None


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
