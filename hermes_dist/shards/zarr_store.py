"""Format `zarr`: one zarr v3 group a case (`image`, `label`), each array one shard of compressed chunks.

Written and read here without zarr-python (whose partial reads cost several times more), byte for byte by the zarr v3
specification: codecs `sharding_indexed` [`bytes`, `blosc` lz4hc, `crc32c`], index at the end with its own crc32c. Chunks that
hold nothing but the fill value (label 0; the image's minimum, i.e. air) are not stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from hermes_dist.errors import CorruptShardError, StoreError
from hermes_dist.shards.blocks import BlockGrid, BlockTable, Vox3
from hermes_dist.shards.codec import LEVEL, SLICE_BYTES, compress, crc32c
from hermes_dist.shards.layout import ARRAYS, CaseArrays, Layout, StoredFiles, block_grid
from hermes_dist.shards.manifest import ManifestRow
from hermes_dist.shards.storage import Storage

MISSING = 2**64 - 1
"""Offset and length of an absent chunk in a shard's index (zarr specification)."""
SHARD_KEY = "c/0/0/0"


def array_metadata(grid: BlockGrid, dtype: np.dtype, fill: float, attributes: dict[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of one array: a single shard that covers the whole volume."""
    shard = [count * block for count, block in zip(grid.counts, grid.block_vox_zyx, strict=True)]
    endian: dict[str, Any] = {"endian": "little"} if dtype.itemsize > 1 else {}
    bytes_codec = {"name": "bytes", "configuration": endian} if endian else {"name": "bytes"}
    blosc_codec = {
        "name": "blosc",
        "configuration": {
            "typesize": dtype.itemsize,
            "cname": "lz4hc",
            "clevel": LEVEL,
            "shuffle": "noshuffle" if dtype.itemsize == 1 else "shuffle",
            "blocksize": SLICE_BYTES,
        },
    }
    sharding = {
        "chunk_shape": list(grid.block_vox_zyx),
        "codecs": [bytes_codec, blosc_codec, {"name": "crc32c"}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(grid.shape_vox_zyx),
        "data_type": str(dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": int(fill) if dtype.kind in "iu" else float(fill),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": attributes,
        "dimension_names": ["z", "y", "x"],
        "storage_transformers": [],
    }


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def encode_shard(volume_zyx: np.ndarray, grid: BlockGrid, fill: float) -> bytes:
    """All chunks of a volume, each followed by its checksum, and the index."""
    index = np.full((grid.n_blocks, 2), MISSING, np.uint64)
    parts: list[bytes] = []
    offset = 0
    for number, index_zyx in enumerate(grid.indices()):
        z, y, x = grid.start(index_zyx)
        dz, dy, dx = grid.block_vox_zyx
        inside = volume_zyx[z : z + dz, y : y + dy, x : x + dx]
        if (inside == fill).all():
            continue
        if inside.shape != grid.block_vox_zyx:
            block = np.full(grid.block_vox_zyx, fill, volume_zyx.dtype)
            block[tuple(slice(n) for n in inside.shape)] = inside
            inside = block
        data = compress(inside)
        parts += [data, crc32c(data).to_bytes(4, "little")]
        index[number] = offset, len(data) + 4
        offset += len(data) + 4
    tail = index.astype("<u8").tobytes()
    return b"".join([*parts, tail, crc32c(tail).to_bytes(4, "little")])


def decode_index(tail: memoryview, n_blocks: int, index_start: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths (int64; length 0 = absent) from a shard's index.

    Raises:
        CorruptShardError: the index' checksum does not match, or a chunk lies outside the shard.
    """
    if crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise CorruptShardError(f"{where}: the shard's index has a wrong checksum; convert this case again")
    index = np.frombuffer(tail[:-4], "<u8").reshape(n_blocks, 2)
    present = index[:, 0] != MISSING
    offsets = np.where(present, index[:, 0], 0).astype(np.int64)
    lengths = np.where(present, index[:, 1], 0).astype(np.int64)
    if (offsets < 0).any() or (lengths < 0).any() or (offsets + lengths > index_start).any() or (lengths[present] < 20).any():
        raise CorruptShardError(f"{where}: the shard's index points outside the shard; convert this case again")
    return offsets, lengths


class ZarrFormat:
    """See `layout.CaseFormat`."""

    name = "zarr"
    default_layout = Layout(block_vox=64)

    def check_layout(self, layout: Layout) -> None:
        """Chunks of 32 to 64 voxels, a multiple of 8, without margin."""
        if not 32 <= layout.block_vox <= 64 or layout.block_vox % 8 or layout.margin_vox or layout.codec != "blosc":
            raise StoreError(f"{layout}: a zarr store has chunks of 32, 40, 48, 56 or 64 voxels, no margin and the codec blosc")

    def block_shape(self, shape_vox_zyx: Vox3, layout: Layout) -> Vox3:
        """Small volumes get smaller chunks (at least 32 a side), so that they are not padded to 64."""
        z, y, x = (max(min(32, layout.block_vox), min(layout.block_vox, -(-side // 8) * 8)) for side in shape_vox_zyx)
        return z, y, x

    def write(self, storage: Storage, uri: str, case: CaseArrays, layout: Layout) -> StoredFiles:
        """Write a case's group; the caller publishes it by its manifest row."""
        grid = block_grid(case.shape_vox_zyx, self.block_shape(case.shape_vox_zyx, layout), layout, padded=True)
        sizes, checksums = list[int](), list[int]()
        for name in ARRAYS:
            volume, fill = case.array(name)
            attributes = {"scale": case.step, "unit": "normalised = stored × scale"} if name == "image" else {}
            shard = encode_shard(volume, grid, fill)
            storage.write(f"{uri}/{name}/{SHARD_KEY}", shard)
            storage.write(f"{uri}/{name}/zarr.json", _dump(array_metadata(grid, volume.dtype, fill, attributes)))
            sizes.append(len(shard))
            checksums.append(crc32c(shard))
        storage.write(f"{uri}/zarr.json", _dump(group_metadata(case.attributes)))
        return StoredFiles(grid.block_vox_zyx, sizes, checksums)

    def files(self, row: ManifestRow) -> list[str]:
        """Objects whose size and checksum the manifest holds, in its order."""
        return [f"{row.uri}/{name}/{SHARD_KEY}" for name in ARRAYS]

    def locate(self, storage: Storage, row: ManifestRow, name: str, layout: Layout) -> BlockTable:
        """Read a shard's index."""
        grid = block_grid(row.shape_vox_zyx, row.block_vox_zyx, layout, padded=True)
        path = f"{row.uri}/{name}/{SHARD_KEY}"
        index_bytes = 16 * grid.n_blocks + 4
        index_start = row.file_bytes[ARRAYS.index(name)] - index_bytes
        if index_start < 0:
            raise CorruptShardError(f"{storage.url}/{path}: too short for its index; convert this case again")
        (tail,) = storage.read_ranges(path, [(index_start, index_bytes)])
        offsets, lengths = decode_index(tail, grid.n_blocks, index_start, f"{storage.url}/{path}")
        dtype, fill = row.array_type(name)
        return BlockTable(path, grid, dtype, fill, offsets, lengths, None)

    def finish(self, storage: Storage, datasets: list[str]) -> None:
        """Write the parent groups, so that the store can be browsed with plain zarr."""
        for path in ["zarr", *(f"zarr/{name}" for name in datasets)]:
            storage.write(f"{path}/zarr.json", _dump(group_metadata({})))

    def check_case(self, storage: Storage, row: ManifestRow, layout: Layout) -> Iterator[str]:
        """Problems beyond checksums: metadata that plain zarr would read otherwise than we do."""
        grid = block_grid(row.shape_vox_zyx, row.block_vox_zyx, layout, padded=True)
        for name in ARRAYS:
            path = f"{row.uri}/{name}/zarr.json"
            found = json.loads(storage.read(path, 1 << 20))
            dtype, fill = row.array_type(name)
            if found != array_metadata(grid, dtype, fill, found.get("attributes", {})):
                yield f"{path} does not describe what the manifest states"


def _dump(metadata: dict[str, Any]) -> bytes:
    return (json.dumps(metadata, indent=1, allow_nan=False) + "\n").encode()
