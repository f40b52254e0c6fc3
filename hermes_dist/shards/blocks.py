"""A volume as a grid of compressed blocks, and reading any box out of it.

zarr chunks (no overlap, edge blocks padded to full size) and tar bricks (overlapping by a margin, edge blocks cut) are the same
thing here: a `BlockGrid` says which voxels each block holds, a `BlockTable` where its bytes lie. So both formats share one reader
and give the same bits. A box touches as few blocks as possible: blocks that overlap are chosen greedily along each axis, hence
a box no larger than margin + 1 always lies in a single block.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np

from hermes_dist.errors import CorruptShardError
from hermes_dist.shards.codec import Scratch, crc32c, decompress_items

Vox3 = tuple[int, int, int]
Bounds = tuple[int, int, int]
"""Along one axis: block index, first voxel, one past the last voxel."""


SLAB_VOX = 8
"""Parts of blocks are left out in steps of so many z planes."""


class Reach(Protocol):
    """What of a box is needed (`volume.augment.Reach` for a rotated patch)."""

    def touches(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Which boxes of voxels [low, high), int64 (…, 3) each, are needed: bool (…,)."""
        ...


@dataclass(frozen=True)
class BlockGrid:
    """Which voxels the blocks of a volume hold; blocks are numbered in C order of their grid.

    Attributes:
        shape_vox_zyx: the volume.
        block_vox_zyx: voxels of a full block.
        margin_vox: voxels that neighbouring blocks share.
        padded: edge blocks are stored at full size (zarr) instead of being cut.
    """

    shape_vox_zyx: Vox3
    block_vox_zyx: Vox3
    margin_vox: int = 0
    padded: bool = False

    def stride(self, axis: int) -> int:
        """Voxels between the starts of neighbouring blocks."""
        return self.block_vox_zyx[axis] - self.margin_vox

    @cached_property
    def counts(self) -> Vox3:
        """Blocks along each axis."""
        z, y, x = (max(1, -(-(self.shape_vox_zyx[a] - self.margin_vox) // self.stride(a))) for a in range(3))
        return z, y, x

    @property
    def n_blocks(self) -> int:
        """Blocks in all."""
        z, y, x = self.counts
        return z * y * x

    def start(self, index_zyx: Sequence[int]) -> Vox3:
        """First voxel of a block."""
        z, y, x = (index_zyx[a] * self.stride(a) for a in range(3))
        return z, y, x

    def stored_shape(self, index_zyx: Sequence[int]) -> Vox3:
        """Voxels that are stored for a block."""
        z, y, x = (self.side(a, index_zyx[a]) for a in range(3))
        return z, y, x

    def side(self, axis: int, index: int) -> int:
        """Voxels that are stored along one axis for the blocks of one index."""
        block = self.block_vox_zyx[axis]
        return block if self.padded else min(block, self.shape_vox_zyx[axis] - index * self.stride(axis))

    def indices(self) -> Iterator[Vox3]:
        """All block indices in C order."""
        z, y, x = self.counts
        return product(range(z), range(y), range(x))

    def cover(self, axis: int, first: int, stop: int) -> list[Bounds]:
        """The fewest blocks along an axis that hold voxels `first … stop`, each with the part that is taken from it."""
        stride, last = self.stride(axis), self.counts[axis] - 1
        parts: list[Bounds] = []
        while first < stop:
            index = min(first // stride, last)
            end = min(stop, index * stride + self.block_vox_zyx[axis])
            parts.append((index, first, end))
            first = end
        return parts


@dataclass(frozen=True)
class BlockTable:
    """Where the blocks of one array lie. A block of length 0 holds `fill` everywhere.

    Attributes:
        path: the object that holds them, relative to the store.
        grid: which voxels each block holds.
        dtype: stored type.
        fill: value of absent blocks.
        offsets, lengths: int64 per block.
        crc32c: uint32 per block, or None where each block ends with its own four bytes of checksum (zarr's crc32c codec).
        codec: `blosc`, or `npy` (a plain .npy file).
    """

    path: str
    grid: BlockGrid
    dtype: np.dtype
    fill: float
    offsets: np.ndarray
    lengths: np.ndarray
    crc32c: np.ndarray | None
    codec: str = "blosc"


class BlockPart(NamedTuple):
    """One block of a plan: its number, what is stored, and which box of it goes where."""

    number: int
    stored_shape: Vox3
    source: tuple[slice, slice, slice]
    target: tuple[slice, slice, slice]


class BlockName(NamedTuple):
    """A block in an error message (formatted only when there is an error)."""

    url: str
    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.url}/{self.path} block {self.number}"


def plan_parts(grid: BlockGrid, start_vox_zyx: Sequence[int], stop_vox_zyx: Sequence[int]) -> list[BlockPart]:
    """The blocks that a box inside the volume needs, in ascending order; targets are relative to the box."""
    _, n_y, n_x = grid.counts
    axes = [_axis_parts(grid, axis, start_vox_zyx[axis], stop_vox_zyx[axis]) for axis in range(3)]
    return [
        BlockPart((z[0] * n_y + y[0]) * n_x + x[0], (z[1], y[1], x[1]), (z[2], y[2], x[2]), (z[3], y[3], x[3]))
        for z, y, x in product(*axes)
    ]


def _axis_parts(grid: BlockGrid, axis: int, start: int, stop: int) -> list[tuple[int, int, slice, slice]]:
    """Along one axis: block index, stored side, source and target slice."""
    parts: list[tuple[int, int, slice, slice]] = []
    for index, first, end in grid.cover(axis, start, stop):
        origin = index * grid.stride(axis)
        parts.append((index, grid.side(axis, index), slice(first - origin, end - origin), slice(first - start, end - start)))
    return parts


def trim_parts(parts: Sequence[BlockPart], start_vox_zyx: Sequence[int], reach: Reach) -> list[BlockPart]:
    """Leave out what `reach` does not touch: parts become thinner along z, or vanish. `start_vox_zyx`: what targets begin at."""
    if not parts:
        return []
    target = np.asarray([[(s.start, s.stop) for s in part.target] for part in parts], np.int64)
    first, stop = target[:, :, 0] + np.asarray(start_vox_zyx), target[:, :, 1] + np.asarray(start_vox_zyx)
    count = -(-int((stop - first)[:, 0].max()) // SLAB_VOX)
    low, high = np.repeat(first[:, None], count, axis=1), np.repeat(stop[:, None], count, axis=1)
    low[:, :, 0] += SLAB_VOX * np.arange(count)
    high[:, :, 0] = np.minimum(low[:, :, 0] + SLAB_VOX, stop[:, None, 0])
    needed = reach.touches(low, high) & (low[:, :, 0] < stop[:, None, 0])
    kept: list[BlockPart] = []
    for i in np.flatnonzero(needed.any(axis=1)).tolist():
        slabs = np.flatnonzero(needed[i])
        before, after = int(low[i, slabs[0], 0] - first[i, 0]), int(stop[i, 0] - high[i, slabs[-1], 0])
        (from_z, *from_yx), (to_z, *to_yx) = parts[i].source, parts[i].target
        source = (slice(from_z.start + before, from_z.stop - after), *from_yx)
        kept.append(parts[i]._replace(source=source, target=(slice(to_z.start + before, to_z.stop - after), *to_yx)))
    return kept


def payload(table: BlockTable, data: memoryview, name: BlockName) -> memoryview:
    """A block's bytes without its checksum, verified.

    Raises:
        CorruptShardError: the checksum does not match.
    """
    if table.crc32c is None:
        data, expected = data[:-4], int.from_bytes(data[-4:], "little")
    else:
        expected = int(table.crc32c[name.number])
    found = crc32c(data)
    if found != expected:
        raise CorruptShardError(f"{name} has checksum {found:08x}, expected {expected:08x}; convert this case again")
    return data


def decode_part(table: BlockTable, part: BlockPart, data: memoryview, scratch: Scratch, name: BlockName) -> np.ndarray:
    """The box `part.source` of a block as a view; only its z planes are decompressed.

    Raises:
        CorruptShardError: checksum, header or compressed stream are wrong.
    """
    data = payload(table, data, name)
    z, y, x = part.source
    n_z, n_y, n_x = part.stored_shape
    if table.codec == "npy":
        return read_npy(data, part.stored_shape, table.dtype, name)[z, y, x]
    plane = n_y * n_x
    items = decompress_items(data, scratch, z.start * plane, (z.stop - z.start) * plane, total=n_z * plane, where=name)
    return items.reshape(-1, n_y, n_x)[:, y, x]


def read_npy(data: memoryview, shape: Vox3, dtype: np.dtype, where: object) -> np.ndarray:
    """A .npy member without copy. Raises CorruptShardError unless it holds exactly this shape and type (never a pickle)."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found = read_header(stream)
    except ValueError as error:
        raise CorruptShardError(f"{where}: not a .npy file: {error}; convert this case again") from None
    body = data[stream.tell() :]
    if found != (shape, False, dtype) or len(body) != int(np.prod(shape)) * dtype.itemsize:
        raise CorruptShardError(f"{where}: holds {found}, expected {shape} {dtype}; convert this case again")
    return np.frombuffer(body, dtype).reshape(shape)
