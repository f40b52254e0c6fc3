"""Bytes out of a file that is read once: hashed as it is read, inflated where it is compressed, never more than was declared.

A header says how large the volume is; the reader allocates that much only if the file could hold it (deflate cannot expand more
than about 1032 times), inflates exactly that much, and then demands the end of the stream, so that the gzip checksum is verified.
That refuses truncated files and decompression bombs by the same rule.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal, cast

import numpy as np
from isal import isal_zlib

from data_tools.findings import RejectedError

Compression = Literal["none", "gzip", "zlib"]
WINDOW_BITS = {"gzip": 31, "zlib": 15}
DAMAGED = cast(type[Exception], isal_zlib.IsalError)  # the stub declares an instance where the module has a class
MAX_EXPANSION = 1040
CHUNK_BYTES = 1 << 20
MAX_STEP_BYTES = 32 << 20
MAX_TRAILING_BYTES = 1 << 20


def file_digest(path: Path) -> str:
    """The `digest` that a ByteReader has after it has read this file. Raises RejectedError."""
    with ByteReader(path) as reader:
        reader.finish_raw()
        return reader.digest


class ByteReader:
    """Reads one file from front to back.

    `digest` is the BLAKE2b of everything that was read from disk, complete after `finish()`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            self.file_bytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise RejectedError(
                "unreadable", f"cannot be opened ({error.strerror})", "check the path and its permissions", str(path)
            ) from None
        self._hash = hashlib.blake2b(digest_size=16)
        self._pending = b""
        self._read_bytes = 0
        self._inflater: isal_zlib.Decompress | None = None
        self._compression: Compression = "none"

    def __enter__(self) -> ByteReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def digest(self) -> str:
        """Hex digest of the bytes read so far."""
        return self._hash.hexdigest()

    def reject(self, check: str, message: str, suggestion: str) -> RejectedError:
        """The exception that names this file."""
        return RejectedError(check, message, suggestion, str(self.path))

    def _more(self) -> bytes:
        try:
            data = self._file.read(CHUNK_BYTES)
        except OSError as error:
            raise self.reject("unreadable", f"reading failed ({error.strerror})", "check the disk, copy the file anew") from None
        self._hash.update(data)
        self._read_bytes += len(data)
        return data

    def peek(self, count: int) -> bytes:
        """The next bytes of the raw file without consuming them (before `inflate`)."""
        while len(self._pending) < count and (data := self._more()):
            self._pending += data
        return self._pending[:count]

    def inflate(self, compression: Compression) -> None:
        """From the current position on, the file is compressed like this."""
        self._compression = compression
        self._inflater = isal_zlib.decompressobj(wbits=WINDOW_BITS[compression]) if compression != "none" else None

    def line(self) -> bytes:
        """The next line of a plain text header, without its newline."""
        limit = 1 << 16
        while b"\n" not in self._pending and len(self._pending) < limit and (data := self._more()):
            self._pending += data
        head, newline, rest = self._pending.partition(b"\n")
        if not newline or len(head) > limit:
            raise self.reject(
                "header", "the text header does not end", "the file is damaged or of another format; obtain it anew"
            )
        self._pending = rest
        return head.rstrip(b"\r")

    @property
    def position(self) -> int:
        """Where the next byte lies in the file (before `inflate`)."""
        return self._read_bytes - len(self._pending)

    def skip(self, count: int) -> None:
        """Pass over bytes before plain voxels. Raises RejectedError where the file has not so many."""
        if not 0 <= count <= self.file_bytes - self.position:
            message = f"{count:,} bytes are to be skipped at byte {self.position:,} of {self.file_bytes:,}"
            raise self.reject("truncated", message, "repair the skip in the header, or copy or download the file again")
        while count:
            count -= len(self.read(min(count, MAX_STEP_BYTES)))

    def check_declared(self, declared_bytes: int) -> None:
        """Refuse a declared size that this file cannot hold. Call before allocating."""
        possible = self.file_bytes * (MAX_EXPANSION if self._inflater else 1)
        if declared_bytes > possible:
            raise self.reject(
                "truncated",
                f"the header declares {declared_bytes:,} bytes of voxels, which a file of {self.file_bytes:,} bytes cannot hold",
                "the file is truncated or its header is damaged; copy or download it again",
            )

    def read_into(self, target: memoryview) -> None:
        """Fill `target` completely. Raises RejectedError where the data end early or are damaged."""
        filled = 0
        while filled < len(target):
            data = self._next(min(len(target) - filled, MAX_STEP_BYTES))
            if not data:
                raise self.reject(
                    "truncated",
                    f"data end {len(target) - filled:,} bytes early",
                    "the file is truncated; copy or download it again",
                )
            target[filled : filled + len(data)] = data
            filled += len(data)

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of this shape in native byte order, read in C order."""
        count = 1
        for side in shape:
            count *= int(side)
        self.check_declared(count * dtype.itemsize)
        array = np.empty(shape, dtype)
        self.read_into(array.reshape(-1).view(np.uint8).data)
        if not dtype.isnative:
            array = array.byteswap(inplace=True).view(dtype.newbyteorder("="))
        return array

    def demand_end(self) -> None:
        """As `finish`, for formats whose header says where the voxels lie: a surplus means that it is wrong."""
        if surplus := self.finish():
            hint = "repair sizes, type and skip in the header: the voxels may be shifted"
            raise self.reject("surplus", f"{surplus:,} bytes more than the header declares", hint)

    def finish(self) -> int:
        """Read to the end of the file (this verifies the checksum); returns the number of surplus bytes, at most 1 MiB."""
        surplus = 0
        while data := self._next(MAX_STEP_BYTES):
            surplus += len(data)
            if surplus > MAX_TRAILING_BYTES:
                raise self.reject(
                    "surplus",
                    f"more than {MAX_TRAILING_BYTES:,} bytes follow the declared voxels",
                    "the header is wrong or the file is a decompression bomb; obtain it anew",
                )
        self.finish_raw()
        return surplus

    def finish_raw(self) -> None:
        """Hash the rest of the file without looking at it."""
        while self._more():
            pass

    def _next(self, limit: int) -> bytes:
        if self._inflater is None:
            data = self._pending or self._more()
            self._pending = data[limit:]
            return data[:limit]
        while True:
            if self._inflater.eof:
                # gzip allows several members in a row; zero padding after the last one is common and harmless
                self._pending = (self._inflater.unused_data or self._more()).lstrip(b"\0")
                if not self._pending or self._compression != "gzip":
                    return b""
                self.inflate("gzip")
            source = self._pending or self._more()
            try:
                data = self._inflater.decompress(source, limit)
            except (DAMAGED, OSError) as error:
                raise self.reject(
                    "gzip", f"compressed data are damaged ({error})", "the file is corrupt; copy or download it again"
                ) from None
            self._pending = self._inflater.unconsumed_tail
            if data:
                return data
            if not source and not self._inflater.eof:
                raise self.reject("truncated", "compressed data end early", "the file is truncated; copy or download it again")
