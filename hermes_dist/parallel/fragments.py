"""Pieces of tensors in safetensors files, found again by parameter name: written by any world, read by any other.

A rank writes what it owns as flat tensors plus a table "parameter, from element, so many elements → file, tensor, offset".
A reader asks for any stretch of any parameter and gets it from wherever it lies. So world size and ZeRO stage are free at
resume, no conversion step exists, and whole weights for export are one more read. Files are plain safetensors; no pickle.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from hermes_dist.errors import CheckpointError

_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Fragment:
    """Where `length` elements of parameter `name`, from flat position `start`, lie: tensor `key` of a file, from `offset`."""

    name: str
    start: int
    length: int
    key: str
    offset: int

    def to_json(self) -> list[Any]:
        """A compact row; `Fragment(*row)` is its inverse."""
        return [self.name, self.start, self.length, self.key, self.offset]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write a safetensors file and flush it to the disk; returns its size and CRC-32, computed on the way.

    Written here rather than by the library, whose call holds the interpreter's lock for the whole file: training goes on beside.
    """
    header: dict[str, Any] = {}
    position = 0
    for key, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc, size = 0, 0
    with path.open("wb") as file:
        for block in _blocks([len(text).to_bytes(8, "little"), text], tensors.values()):
            file.write(block)
            crc = zlib.crc32(block, crc)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc}


def _blocks(head: list[bytes], tensors: Iterable[Tensor]) -> Iterable[bytes | memoryview]:
    yield from head
    for tensor in tensors:
        data = _as_bytes(tensor).data
        for low in range(0, len(data), _BLOCK_BYTES):
            yield data[low : low + _BLOCK_BYTES]


def _as_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def measure_file(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, as `write_tensors` returns them."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return {"bytes": size, "crc32": crc}


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically: a temporary name, flushed to the disk, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    # Opened before the rename: whoever waited for this file may rename the directory the moment it appears.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        temporary.rename(path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FragmentReader:
    """Reads stretches of parameters from the files of one checkpoint directory."""

    def __init__(self, directory: Path, fragments: Mapping[str, Iterable[Fragment]]) -> None:
        """`fragments`: rows by file name."""
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._rows: dict[tuple[str, str], list[tuple[str, Fragment]]] = {}
        for file, rows in fragments.items():
            for row in rows:
                kind = row.key.partition("/")[0]
                self._rows.setdefault((kind, row.name), []).append((file, row))

    def has(self, kind: str, name: str) -> bool:
        """Whether any piece of parameter `name` is stored under `kind` (param, ema, exp_avg, …)."""
        return (kind, name) in self._rows

    def read_into(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Fill the flat `target` with the elements of `name` from position `start`.

        Raises:
            CheckpointError: some of these elements are nowhere in the checkpoint.
        """
        filled, stop = 0, start + target.numel()
        for file, row in self._rows.get((kind, name), []):
            low, high = max(start, row.start), min(stop, row.start + row.length)
            if low < high:
                begin = row.offset + low - row.start
                piece = self._slice(file, row.key)[begin : begin + high - low]
                target[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != target.numel():
            missing = target.numel() - filled
            raise CheckpointError(
                f"{self._directory}: {kind} of {name!r} lacks {missing} of {target.numel()} elements from {start}; "
                "the checkpoint was written by another model or configuration"
            )

    def _slice(self, file: str, key: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self._directory / file, framework="pt")
        return self._files[file].get_slice(key)
