"""One block of voxels ↔ bytes: blosc (LZ4HC, byte shuffle) and crc32c.

Blosc 1 compresses a block in independent slices ("blosc blocks", here two z planes of 64 × 64 int16). A crop that needs some z
planes of a block therefore decompresses those slices alone, through the C library that numcodecs ships; where its symbols are
not exported the whole block is decompressed instead. Nothing is decompressed before its checksum matched and its header stated
exactly the expected number of bytes, so a damaged or hostile block cannot write outside its buffer or blow up in memory.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]: a compiled module without stub

from hermes_dist.errors import CorruptShardError

BLOSC_HEADER_BYTES = 16
SLICE_BYTES = 16384
"""Size of the independently compressed slices inside one block."""
LEVEL = 5
_SIZES = struct.Struct("<III").unpack_from


def crc32c(data: bytes | memoryview | np.ndarray, before: int | None = None) -> int:
    """Checksum of a contiguous buffer (Castagnoli, as zarr's crc32c codec); `before` = that of what precedes it."""
    view: Any = np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data  # it takes arrays, but no memoryviews
    return int(google_crc32c.value(view) if before is None else google_crc32c.extend(before, view))


def compress(block: np.ndarray, cname: str = "lz4hc") -> bytes:
    """Compress one C-contiguous block; readable by every blosc 1 library (zarr's blosc codec)."""
    shuffle = blosc.NOSHUFFLE if block.itemsize == 1 else blosc.SHUFFLE
    return bytes(blosc.compress(np.ascontiguousarray(block), cname.encode(), LEVEL, shuffle, SLICE_BYTES))


def check_header(data: memoryview, expected_bytes: int, item_bytes: int, where: object) -> None:
    """Refuse a block whose header does not state exactly `expected_bytes` of such items and its own length.

    Raises:
        CorruptShardError: too short, another length, or another decompressed size (a "zip bomb").
    """
    if len(data) < BLOSC_HEADER_BYTES:
        raise CorruptShardError(f"{where}: block of {len(data)} bytes is too short; convert this case again")
    n_bytes, _, c_bytes = _SIZES(data, 4)
    if n_bytes != expected_bytes or c_bytes != len(data) or data[3] != item_bytes:
        raise CorruptShardError(
            f"{where}: block states {n_bytes} bytes of {data[3]}-byte items in {c_bytes}, expected {expected_bytes} of "
            f"{item_bytes} in {len(data)}; convert this case again"
        )


@cache
def _getitem() -> Callable[[int, int, int, int], int] | None:
    """`blosc_getitem(source, first item, items, destination)`, or None where the symbol is not exported."""
    try:
        function = ctypes.CDLL(blosc.__file__).blosc_getitem
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


class Scratch:
    """A buffer that blocks are decompressed into, with its address (asking numpy for it each time costs 2 µs)."""

    def __init__(self, n_items: int, dtype: np.dtype) -> None:
        self.array = np.empty(n_items, dtype)
        self.address = self.array.ctypes.data


def decompress_items(data: memoryview, scratch: Scratch, first: int, count: int, *, total: int, where: object) -> np.ndarray:
    """Items `first … first + count` of a block of `total` items, as a view of `scratch`.

    Raises:
        CorruptShardError: the header or the compressed stream is wrong; the message begins with `where`.
    """
    out = scratch.array[:count]
    check_header(data, total * out.itemsize, out.itemsize, where)
    getitem = _getitem()
    if getitem is not None:
        if getitem(np.frombuffer(data, np.uint8).ctypes.data, first, count, scratch.address) != out.nbytes:
            raise CorruptShardError(f"{where}: blosc could not decompress the block; convert this case again")
        return out
    try:
        whole = np.frombuffer(blosc.decompress(data), out.dtype)
    except RuntimeError as error:
        raise CorruptShardError(f"{where}: {error}; convert this case again") from None
    out[:] = whole[first : first + count]
    return out
