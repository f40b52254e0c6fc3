"""Scans without labels, for prediction: a file of any supported format, a DICOM series, or a folder of either."""

from __future__ import annotations

from pathlib import Path

from data_tools.findings import RejectedError
from data_tools.sources.raw import RawVolume
from data_tools.sources.series import holds_series, read_series
from data_tools.sources.volumes import READERS, is_volume, read_volume, stem_of, volumes_in
from hermes_dist.errors import SourceError

CHANNEL = "_0000"


def find_scans(path: Path) -> dict[str, Path]:
    """Case name → file or DICOM folder, sorted by name.

    A name is the file's without its ending and without nnU-Net's channel `_0000`, or the folder's of a series.

    Raises:
        SourceError: nothing there, or two files of one name (`a.nii` beside `a.nii.gz`).
    """
    if is_volume(path) or (path.is_dir() and holds_series(path)):
        return {scan_name(path): path}
    if not path.exists():
        raise SourceError(f"{path} does not exist; expected a scan ({', '.join(READERS)}), a DICOM folder, or a folder of those")
    if path.is_file():
        raise SourceError(f"{path}: no reader for this file ending; supported: {', '.join(READERS)}, or a folder of DICOM slices")
    found: dict[str, Path] = {}
    for scan in (*volumes_in(path), *sorted(p for p in path.iterdir() if p.is_dir() and holds_series(p))):
        name = scan_name(scan)
        if name in found:
            raise SourceError(f"{found[name]} and {scan} would both be case {name!r}; move one of them away")
        found[name] = scan
    if not found:
        raise SourceError(f"{path} holds no scan; expected files ending in {', '.join(READERS)}, or DICOM folders")
    return dict(sorted(found.items()))


def scan_name(path: Path) -> str:
    """The case name of a file or DICOM folder."""
    name = stem_of(path).removesuffix(CHANNEL)
    return path.resolve().name if name in ("", "..") else name


def read_scan(path: Path) -> RawVolume:
    """Read one scan.

    Raises:
        RejectedError: it is damaged, or has several channels.
    """
    volume = read_series(path) if path.is_dir() else read_volume(path)
    if volume.array.ndim != 3:
        message = f"{volume.array.ndim} dimensions, {volume.array.shape[0]} channels"
        raise RejectedError("channels", message, "give one 3D channel per file", str(path))
    return volume
