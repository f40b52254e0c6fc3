"""Predicted masks as NIfTI on the scan's own grid, with a JSON that says what each value is. Complete or invisible.

Where the scan itself is NIfTI its header is the template: same affine, sform and qform codes and units, bit for bit. Everything
of a scan is written under a hidden name first and renamed at the end, so that a killed command leaves nothing half-written.
Only what this module wrote is ever replaced: scans and other people's files are refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Set
from itertools import count
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.filebasedimages import ImageFileError

from data_tools.sources.volumes import suffix_of
from hermes_dist.errors import UsageError
from hermes_dist.volume.geometry import Grid

NamedMask = tuple[str, np.ndarray]
"""(`dataset/class`, boolean mask Z Y X)."""
OVERLAP_RULE = "where masks overlap, the smaller structure lies on top"
SIDECAR = "prediction.json"


def check_targets(out: Path, scans: Mapping[str, Path], *, source: Path, multilabel: bool) -> None:
    """Refuse to start where a prediction would replace a scan, or anything else that is no prediction.

    Args:
        out: the folder for the masks.
        scans: case name → file or DICOM folder, as `find_scans(source)` gives them.
        source: where the scans were looked for.
        multilabel: whether label maps are written, or a folder for each scan.

    Raises:
        UsageError: a target is a scan, contains one or lies inside one, would be taken for a scan in `source` the next time,
            or exists and is no prediction.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    inputs = {scan.resolve(): scan for scan in scans.values()}
    folders = [resolved for resolved in inputs if resolved.is_dir()]
    holders = {parent: scan for resolved, scan in inputs.items() for parent in resolved.parents}
    for name in scans:
        target = target_of(out, name, multilabel=multilabel)
        resolved = target.resolve()
        scan = inputs.get(resolved) or holders.get(resolved)
        scan = scan or next((inputs[folder] for folder in folders if folder in resolved.parents), None)
        if scan is not None:
            raise UsageError(f"the prediction {target} would be written over or into the input {scan}; choose another --out")
        if multilabel and resolved.parent == source.resolve():
            raise UsageError(f"the prediction {target} would lie among the scans of {source}; choose another --out")
        (require_own_map if multilabel else require_own_folder)(target)


def target_of(out: Path, name: str, *, multilabel: bool) -> Path:
    """What is written for a scan: `OUT/NAME.nii.gz` (a label map), else the folder `OUT/NAME`."""
    return out / (f"{name}.nii.gz" if multilabel else name)


def require_own_folder(folder: Path) -> None:
    """Raises UsageError if `folder` is there and holds anything but masks of this module (hidden files are overlooked)."""
    if not folder.exists():
        return
    own = _listed(folder / SIDECAR)
    own |= {SIDECAR} if own else set()
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    others = [f.name for f in files if f.name not in own and not (f.name.startswith(".") and f.is_file())]
    if others or folder.is_symlink():
        said = f"it holds {', '.join(others[:3])}" if others else "a symbolic link"
        raise UsageError(f"{folder} exists and is not a folder of masks alone ({said}); move it away or choose another --out")


def require_own_map(label_map: Path) -> None:
    """Raises UsageError if a label map or its JSON is there, and the JSON is not of this module."""
    sidecar = _sidecar_of(label_map)
    present = [path for path in (label_map, sidecar) if path.exists()]
    if present and label_map.name not in _listed(sidecar):
        raise UsageError(f"{present[0]} exists and is no prediction; move it away or choose another --out")


def _listed(sidecar: Path) -> set[str]:
    """Names of the files that a sidecar of this module describes; none where it is missing or of another origin."""
    try:
        rows = json.loads(sidecar.read_text())["tasks"]
        return {str(row["file"]) for row in rows if {"name", "value", "voxels"} <= row.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _sidecar_of(label_map: Path) -> Path:
    return label_map.with_name(f"{label_map.name.removesuffix('.nii.gz')}.json")


def write_separate(folder: Path, masks: Iterable[NamedMask], grid: Grid, *, like: Path, about: dict[str, Any]) -> list[Path]:
    """One file per task (0/1) and `prediction.json` in `folder`; returns the files.

    An earlier prediction there is replaced. It is moved aside to `.NAME.old` first: killed in between, a command leaves both.

    Raises:
        UsageError: the folder is there and holds something else.
    """
    temporary, aside = folder.with_name(f".{folder.name}.{os.getpid()}"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        rows: list[dict[str, Any]] = []
        for name, mask in masks:
            file = temporary / f"{distinct_name(name, {row['file'] for row in rows})}.nii.gz"
            file.write_bytes(_encode(mask.astype(np.uint8), grid, like))
            rows.append({"name": name, "file": file.name, "value": 1, **_extent(mask, grid)})
        (temporary / SIDECAR).write_text(json.dumps({**about, "tasks": rows}, indent=1) + "\n")
        for file in temporary.iterdir():
            _sync(file)
        _swap(temporary, folder, aside)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return [folder / row["file"] for row in rows] + [folder / SIDECAR]


def _swap(temporary: Path, folder: Path, aside: Path) -> None:
    """`temporary` becomes `folder`; what was there is deleted only when that is done."""
    require_own_folder(folder)
    require_own_folder(aside)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)  # of a command that was killed after the new folder had its name
        folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_multilabel(file: Path, masks: Iterable[NamedMask], grid: Grid, *, like: Path, about: dict[str, Any]) -> list[Path]:
    """All tasks in one label map (values 1, 2, … in the order asked) and a JSON beside it; returns both.

    Masks wait as bits, so 61 classes cost 8 bytes a voxel.

    Raises:
        UsageError: the map or its JSON is there and is no prediction.
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
    sidecar = _sidecar_of(file)
    text = json.dumps({**about, "overlap_rule": OVERLAP_RULE, "overlap_voxels": overlap, "tasks": rows}, indent=1) + "\n"
    require_own_map(file)
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
    """`dataset/class` as a file name: `dataset__class`. Letters and digits of any script stay, anything unusual becomes `_`."""
    composed = unicodedata.normalize("NFC", name.replace("/", "__"))  # a letter and its accent as one character
    return re.sub(r"[^\w.+-]", "_", composed).lstrip(".") or "_"


def distinct_name(name: str, taken: Set[str]) -> str:
    """`safe_name`, numbered from 2 where that file is among `taken`, also on disks that know no upper case."""
    folded = {file.casefold() for file in taken}
    plain = safe_name(name)
    numbered = (plain if number == 1 else f"{plain}_{number}" for number in count(1))
    return next(stem for stem in numbered if f"{stem}.nii.gz".casefold() not in folded)


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
