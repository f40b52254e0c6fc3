"""NIfTI-1 and -2 (.nii, .nii.gz): one pass over the file, voxels in their stored type, geometry by nibabel's rules.

nibabel parses the header (it knows every corner of the format); voxels are read by `inflate.ByteReader`, because nibabel
decompresses with zlib, does not demand the end of the stream, and scales to float64.
"""

from __future__ import annotations

import io
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.spatialimages import HeaderDataError

from data_tools.files import write_bytes
from data_tools.findings import Finding
from data_tools.sources.inflate import ByteReader
from data_tools.sources.raw import RawVolume
from hermes_dist.errors import GeometryError
from hermes_dist.volume.geometry import Grid, grid_difference_vox

MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}
DIFFERENT_VOX = 0.05
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


def read_nifti(path: Path) -> RawVolume:
    """Read one file. Raises RejectedError (gzip, truncated, header, geometry, dimensions)."""
    with ByteReader(path) as reader:
        findings: list[Finding] = []
        header, shape, dtype = _begin(reader, findings)
        array = reader.array(shape, dtype)
        if surplus := reader.finish():
            findings.append(Finding("surplus", "note", f"{surplus} surplus bytes after the voxels", "harmless", str(path)))
        slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
        if not np.isfinite([slope, intercept]).all() or slope == 0:
            slope, intercept = 1.0, 0.0
        grid = _grid(reader, header, (shape[-3], shape[-2], shape[-1]), findings)
        return RawVolume(array, grid, reader.digest, slope, intercept, findings)


def measure_nifti(path: Path) -> tuple[Grid, int]:
    """(grid, bytes per voxel of all channels) from the header alone. Raises RejectedError."""
    with ByteReader(path) as reader:
        header, shape, dtype = _begin(reader, [])
        channels = shape[0] if len(shape) == 4 else 1
        return _grid(reader, header, (shape[-3], shape[-2], shape[-1]), []), channels * dtype.itemsize


def _begin(reader: ByteReader, findings: list[Finding]) -> tuple[nib.Nifti1Header, tuple[int, ...], np.dtype]:
    """Header, shape and type; the reader then stands at the first voxel."""
    if reader.peek(2) == b"\x1f\x8b":
        reader.inflate("gzip")
    elif reader.path.suffix == ".gz":
        findings.append(Finding("gzip", "note", "named .gz but not compressed; read as it is", "rename it", str(reader.path)))
    header, consumed = _read_header(reader)
    offset = int(np.nan_to_num(header["vox_offset"]))
    if not consumed <= offset <= 1 << 26:
        raise reader.reject("header", f"voxel offset {offset} is impossible", "the header is damaged; obtain the file anew")
    reader.read(offset - consumed)
    return header, _shape(reader, header), _dtype(reader, header)


def _read_header(reader: ByteReader) -> tuple[nib.Nifti1Header, int]:
    block = reader.read(348)
    size = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    if 348 in size:
        if block[344:347] == b"ni1":
            raise reader.reject("header", "a header/image pair (.hdr + .img)", "convert it to a single .nii.gz file")
        if block[344:347] != b"n+1":
            raise reader.reject("header", "no NIfTI magic (Analyze 7.5?)", "convert it to NIfTI with its true orientation")
        return nib.Nifti1Header(block, check=False), 348
    if 540 in size:
        return nib.Nifti2Header(block + reader.read(192), check=False), 540
    raise reader.reject("header", "not a NIfTI file", "the file is damaged or of another format; obtain it anew")


def _shape(reader: ByteReader, header: nib.Nifti1Header) -> tuple[int, ...]:
    dims = [int(d) for d in header["dim"]]
    if not 2 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise reader.reject("dimensions", f"impossible dimensions {dims}", "the header is damaged; obtain the file anew")
    sides = dims[1 : dims[0] + 1] + [1] * (3 - dims[0])
    rest = [d for d in sides[3:] if d > 1]
    if len(rest) > 1:
        raise reader.reject("dimensions", f"{len(sides)} dimensions {sides}", "split it into 3D volumes")
    return (*rest, sides[2], sides[1], sides[0])


def _dtype(reader: ByteReader, header: nib.Nifti1Header) -> np.dtype:
    code = int(header["datatype"])
    if code not in TYPES:
        raise reader.reject(
            "type", f"voxel type {code} is not a plain number", "convert RGB, complex or bit data to a scalar type"
        )
    return np.dtype(TYPES[code]).newbyteorder(header.endianness)


def _grid(reader: ByteReader, header: nib.Nifti1Header, shape: tuple[int, int, int], findings: list[Finding]) -> Grid:
    """Form with a code > 0: sform first, then qform; neither: the spacing alone, with x from right to left, as nibabel does."""
    unit = MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    found: dict[str, Grid] = {}
    broken: list[str] = []
    for name, get in (("sform", header.get_sform), ("qform", header.get_qform)):
        if int(header[f"{name}_code"]) > 0:
            try:
                affine = np.array(get(), np.float64)
                affine[:3] *= unit
                found[name] = Grid(affine, shape)
            except (GeometryError, HeaderDataError, ValueError) as error:
                broken.append(f"{name}: {error}")
    if unit != 1:
        findings.append(Finding("units", "note", f"units of {unit} mm converted to mm", "none needed", str(reader.path)))
    if found:
        if broken:
            findings.append(
                Finding("form", "warn", f"{broken[0]}; {next(iter(found))} used", "repair the header", str(reader.path))
            )
        if len(found) == 2 and (difference := grid_difference_vox(found["sform"], found["qform"])) > DIFFERENT_VOX:
            message = f"sform and qform differ by {difference:.2f} voxels; sform used"
            findings.append(Finding("form", "warn", message, "make both forms equal", str(reader.path)))
        return next(iter(found.values()))
    if broken:
        raise reader.reject("geometry", broken[0], "repair the header (a spacing of zero or NaN is the usual cause)")
    try:
        affine = np.array(header.get_best_affine(), np.float64)
        affine[:3] *= unit
        grid = Grid(affine, shape)
    except (GeometryError, HeaderDataError, ValueError) as error:
        raise reader.reject("geometry", str(error), "repair the header") from None
    message = (
        "the header states no orientation (both form codes are 0); x taken as right-to-left, y and z as RAS (nibabel's rule)"
    )
    hint = "compare left and right with the original scan, and set sform or qform"
    findings.append(Finding("form", "warn", message, hint, str(reader.path)))
    return grid


def write_nifti(path: Path, volume_zyx: np.ndarray, grid: Grid, *, slope: float | None = None) -> None:
    """Write a volume atomically and reproducibly (no time stamp); gzip by suffix.

    `slope` stores real values as int16 × slope, as PET often comes.
    """
    if slope is not None:
        volume_zyx = np.clip(np.round(volume_zyx / slope), -32768, 32767).astype(np.int16)
    image = nib.Nifti1Image(volume_zyx.T, grid.affine)
    image.header.set_xyzt_units("mm")
    image.header.set_sform(grid.affine, code=1)
    image.header.set_qform(grid.affine, code=1)
    buffer = io.BytesIO(image.to_bytes())
    if slope is not None:
        header = nib.Nifti1Header(buffer.getvalue()[:348], check=False)
        header["scl_slope"], header["scl_inter"] = slope, 0
        buffer.write(header.binaryblock)
    data = buffer.getvalue()
    write_bytes(path, igzip.compress(data, 3, mtime=0) if path.suffix == ".gz" else data)
