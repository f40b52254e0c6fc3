"""MetaImage (.mha, and .mhd with its .raw or .zraw beside it). Directions are LPS, as ITK writes and reads them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from data_tools.sources.inflate import ByteReader, Compression
from data_tools.sources.nrrd import beside
from data_tools.sources.raw import RawVolume
from hermes_dist.errors import GeometryError
from hermes_dist.volume.geometry import Grid

TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
MAX_HEADER_LINES = 4096


def read_metaimage(path: Path) -> RawVolume:
    """Read one file. Raises RejectedError (header, truncated, gzip, geometry, type)."""
    with ByteReader(path) as reader:
        fields = _fields(reader)
        shape, dtype = _shape(reader, fields)
        grid = _grid(reader, fields, shape)
        compression: Compression = "zlib" if fields.get("compresseddata", "").lower() == "true" else "none"
        name = fields["elementdatafile"]
        if name == "LOCAL":
            return RawVolume(_voxels(reader, fields, shape, dtype, compression), grid, reader.digest)
        reader.finish()
        with ByteReader(beside(reader, name)) as data:
            array = _voxels(data, fields, shape, dtype, compression)
            return RawVolume(array, grid, reader.digest + data.digest)


def metaimage_data_files(path: Path) -> list[Path]:
    """The second file of a detached header."""
    with ByteReader(path) as reader:
        name = _fields(reader)["elementdatafile"]
        return [] if name == "LOCAL" else [beside(reader, name)]


def measure_metaimage(path: Path) -> tuple[Grid, int]:
    """(grid, bytes per voxel) from the header alone. Raises RejectedError."""
    with ByteReader(path) as reader:
        fields = _fields(reader)
        shape, dtype = _shape(reader, fields)
        return _grid(reader, fields, shape), dtype.itemsize


def _shape(reader: ByteReader, fields: dict[str, str]) -> tuple[tuple[int, int, int], np.dtype]:
    sides = _numbers(reader, fields, "dimsize")
    if len(sides) != 3 or min(sides) < 1 or any(s != int(s) for s in sides) or math.prod(sides) > 1 << 40:
        raise reader.reject("dimensions", f"DimSize {fields.get('dimsize')!r}, expected three sides", "split it into 3D volumes")
    if fields.get("elementnumberofchannels", "1") != "1":
        raise reader.reject("dimensions", "several channels per voxel", "split it into one file a channel")
    kind = fields.get("elementtype", "").upper()
    if kind not in TYPES:
        raise reader.reject("type", f"voxel type {kind!r}", "convert it to an integer or float type")
    big = "true" in (fields.get("binarydatabyteordermsb", "").lower(), fields.get("elementbyteordermsb", "").lower())
    dtype = np.dtype(TYPES[kind]).newbyteorder(">" if big else "<")
    shape = (int(sides[2]), int(sides[1]), int(sides[0]))
    return shape, dtype


def _voxels(
    reader: ByteReader, fields: dict[str, str], shape: tuple[int, int, int], dtype: np.dtype, compression: Compression
) -> np.ndarray:
    try:
        start = int(fields.get("headersize", "0") or 0)
    except ValueError:
        start = -2
    if start < -1 or (start and compression != "none"):
        message = f"HeaderSize {fields['headersize']!r}, expected a whole number from -1, and 0 for compressed data"
        raise reader.reject("header", message, "write the file anew without HeaderSize")
    if start == -1:
        start = reader.file_bytes - math.prod(shape) * dtype.itemsize
    if start:  # counted from the start of the file that holds the voxels
        reader.skip(start - reader.position)
    reader.inflate(compression)
    array = reader.array(shape, dtype)
    reader.demand_end()
    return array


def _fields(reader: ByteReader) -> dict[str, str]:
    fields: dict[str, str] = {}
    for _ in range(MAX_HEADER_LINES):
        key, separator, value = reader.line().decode("utf-8", "replace").partition("=")
        if not separator:
            break
        fields[key.strip().lower()] = value.strip()
        if key.strip().lower() == "elementdatafile":
            return fields
    raise reader.reject("header", "not a MetaImage header that ends with ElementDataFile", "the file is damaged; obtain it anew")


def _numbers(reader: ByteReader, fields: dict[str, str], *names: str) -> list[float]:
    text = next((fields[n] for n in names if n in fields), "")
    try:
        return [float(v) for v in text.split()]
    except ValueError:
        raise reader.reject("header", f"{names[0]} {text!r} is not a list of numbers", "repair the header") from None


def _grid(reader: ByteReader, fields: dict[str, str], shape: tuple[int, int, int]) -> Grid:
    matrix = _numbers(reader, fields, "transformmatrix", "rotation", "orientation") or [1, 0, 0, 0, 1, 0, 0, 0, 1]
    origin = _numbers(reader, fields, "offset", "position", "origin") or [0, 0, 0]
    spacing = _numbers(reader, fields, "elementspacing", "elementsize") or [1, 1, 1]
    affine = np.eye(4)
    try:
        affine[:3, :3] = np.array(matrix).reshape(3, 3).T * np.array(spacing)
        affine[:3, 3] = origin
        affine[:2] *= -1
        return Grid(affine, shape)
    except (ValueError, GeometryError) as error:
        raise reader.reject("geometry", f"directions cannot be used: {error}", "repair the header") from None
