"""NRRD (.nrrd, and .nhdr with its data file beside it): raw, gzip and zlib encodings, LPS or RAS directions."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from data_tools.findings import Finding
from data_tools.sources.inflate import ByteReader, Compression
from data_tools.sources.raw import RawVolume
from hermes_dist.errors import GeometryError
from hermes_dist.volume.geometry import Grid

TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1",
    "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1",
    "short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2", "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2", "uint16": "u2", "uint16_t": "u2",
    "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4",
    "uint": "u4", "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4",
    "longlong": "i8", "long long": "i8", "int64": "i8", "int64_t": "i8",
    "ulonglong": "u8", "unsigned long long": "u8", "uint64": "u8", "uint64_t": "u8",
    "float": "f4", "double": "f8",
}  # fmt: skip
ENCODINGS: dict[str, Compression] = {"raw": "none", "gzip": "gzip", "gz": "gzip"}
NOT_MM = frozenset({"m", "meter", "cm", "centimeter", "um", "µm", "micron", "microns", "micrometer", "nm", "in", "inch"})
TO_RAS = {
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
}  # fmt: skip
MAX_HEADER_LINES = 4096


def read_nrrd(path: Path) -> RawVolume:
    """Read one file. Raises RejectedError (header, truncated, gzip, geometry, type)."""
    with ByteReader(path) as reader:
        if reader.peek(7) != b"NRRD000":
            raise reader.reject("header", "not an NRRD file", "the file is damaged or of another format; obtain it anew")
        fields = _fields(reader)
        findings: list[Finding] = []
        shape, dtype = _shape(reader, fields), _dtype(reader, fields)
        grid = _grid(reader, fields, (shape[0], shape[1], shape[2]), findings)
        encoding = fields.get("encoding", "raw").lower()
        if encoding not in ENCODINGS:
            raise reader.reject("encoding", f"encoding {encoding!r}", "write it with encoding raw or gzip")
        detached = fields.get("data file") or fields.get("datafile")
        if detached is None:
            array = _voxels(reader, fields, shape, dtype, ENCODINGS[encoding])
            return RawVolume(array, grid, reader.digest, findings=findings)
        reader.finish()
        with ByteReader(beside(reader, detached)) as data:
            array = _voxels(data, fields, shape, dtype, ENCODINGS[encoding])
            return RawVolume(array, grid, reader.digest + data.digest, findings=findings)


def nrrd_data_files(path: Path) -> list[Path]:
    """The second file of a detached header."""
    with ByteReader(path) as reader:
        fields = _fields(reader)
        name = fields.get("data file") or fields.get("datafile")
        return [beside(reader, name)] if name else []


def measure_nrrd(path: Path) -> tuple[Grid, int]:
    """(grid, bytes per voxel of all channels) from the header alone. Raises RejectedError."""
    with ByteReader(path) as reader:
        fields = _fields(reader)
        shape = _shape(reader, fields)
        return _grid(reader, fields, (shape[0], shape[1], shape[2]), []), math.prod(shape[3:]) * _dtype(reader, fields).itemsize


def beside(reader: ByteReader, name: str) -> Path:
    """The data file of a detached header: a plain name in the same folder, so that a header cannot read any other file."""
    if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise reader.reject(
            "data file", f"data file {name!r} is not in the header's own folder", "put both files into one folder"
        )
    return reader.path.parent / name


def _voxels(
    reader: ByteReader, fields: dict[str, str], shape: tuple[int, ...], dtype: np.dtype, compression: Compression
) -> np.ndarray:
    lines, count = (_skip(reader, fields, name, compression) for name in ("line", "byte"))
    for _ in range(lines):
        reader.line()
    if count == -1:
        count = reader.file_bytes - reader.position - math.prod(shape) * dtype.itemsize
    reader.skip(count)
    reader.inflate(compression)
    array = reader.array(shape, dtype)
    reader.demand_end()
    return np.moveaxis(array, -1, 0) if len(shape) == 4 else array  # the list axis varies fastest on disk


def _skip(reader: ByteReader, fields: dict[str, str], name: str, compression: Compression) -> int:
    text = fields.get(f"{name} skip", fields.get(f"{name}skip", "0"))
    lowest = -1 if name == "byte" else 0
    if not re.fullmatch(r"-1|\d{1,15}", text) or int(text) < lowest or (int(text) and compression != "none"):
        message = f"{name} skip {text!r}, expected a whole number from {lowest}, and 0 for compressed data"
        raise reader.reject("header", message, "write the file anew without a skip")
    return int(text)


def _fields(reader: ByteReader) -> dict[str, str]:
    fields: dict[str, str] = {}
    reader.line()
    for _ in range(MAX_HEADER_LINES):
        if "data file" in fields and not reader.peek(1):
            return fields  # a detached header may end without an empty line
        line = reader.line().decode("utf-8", "replace")
        if not line:
            return fields
        key, separator, value = line.partition(":")
        if separator and not line.startswith("#"):
            fields[key.strip().lower()] = value.removeprefix("=").strip()
    raise reader.reject("header", "the text header does not end", "the file is damaged; obtain it anew")


def _shape(reader: ByteReader, fields: dict[str, str]) -> tuple[int, ...]:
    try:
        sizes = [int(v) for v in fields["sizes"].split()]
    except (KeyError, ValueError):
        sizes = []
    if len(sizes) not in (3, 4) or min(sizes) < 1 or math.prod(sizes) > 1 << 40:
        raise reader.reject("dimensions", f"sizes {fields.get('sizes')!r}, expected three or four", "split it into 3D volumes")
    kinds = fields.get("space directions", "").split()
    if len(sizes) == 4 and kinds[:1] not in (["none"], ["(nan,nan,nan)"]):
        raise reader.reject("dimensions", "four dimensions without a leading list axis", "split it into 3D volumes")
    return tuple(reversed(sizes))


def _dtype(reader: ByteReader, fields: dict[str, str]) -> np.dtype:
    name = fields.get("type", "").lower()
    if name not in TYPES:
        raise reader.reject("type", f"voxel type {name!r}", "convert it to an integer or float type")
    order = ">" if fields.get("endian", "little").lower() == "big" else "<"
    return np.dtype(TYPES[name]).newbyteorder(order)


def _vector(text: str) -> list[float]:
    return [float(v) for v in text.strip("()").split(",")]


def _grid(reader: ByteReader, fields: dict[str, str], shape: tuple[int, int, int], findings: list[Finding]) -> Grid:
    space = fields.get("space", "").lower()
    units = re.findall(r'"([^"]*)"', fields.get("space units", "") + fields.get("units", ""))
    if wrong := next((u for u in units if u.strip().lower() in NOT_MM), None):
        raise reader.reject("spacing", f"positions in {wrong!r}, expected mm", "write directions and origin in mm")
    affine = np.eye(4)
    try:
        directions = [_vector(v) for v in re.findall(r"\([^)]*\)", fields.get("space directions", "")) if "nan" not in v]
        if directions:
            affine[:3, :3] = np.array(directions).T
            affine[:3, 3] = _vector(fields.get("space origin", "(0,0,0)"))
        else:
            affine[:3, :3] = np.diag([float(v) for v in fields.get("spacings", "1 1 1").split() if v.lower() != "nan"])
        if space in TO_RAS:
            affine[:3] *= np.array(TO_RAS[space])[:, None]
        else:
            message = f"space {space!r} states no known axes; taken as RAS"
            findings.append(Finding("form", "warn", message, "state `space: left-posterior-superior`", str(reader.path)))
        return Grid(affine, shape)
    except (ValueError, GeometryError) as error:
        raise reader.reject("geometry", f"directions cannot be used: {error}", "repair the header") from None
