"""Format `webdataset`: one plain tar a case, of bricks that may overlap by a margin.

Each sample (brick) is `<dataset>/<case>/<number>` with `.json`, `.image.blosc` and `.label.blosc` (codec `npy`: `.image.npy` and
`.label.npy`, which plain `.decode()` turns into arrays); no pickle anywhere. The manifest holds every member's offset, length and
checksum, so one brick is one byte range and the archive is never scanned. Names are escaped (`.` becomes `=2E`), since webdataset
cuts them at the first dot.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from hermes_dist.errors import CorruptShardError, StoreError
from hermes_dist.shards.blocks import BlockTable, Vox3
from hermes_dist.shards.codec import compress, crc32c
from hermes_dist.shards.layout import ARRAYS, CaseArrays, Layout, StoredFiles, block_grid
from hermes_dist.shards.manifest import ManifestRow
from hermes_dist.shards.storage import Storage, check_path

MEMBER_LIMIT_BYTES = 1 << 31
NAME_LIMIT = 512


def encode_block(block: np.ndarray, codec: str) -> bytes:
    """One brick's bytes."""
    if codec == "blosc":
        return compress(block)
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(block), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


class _TarBuilder:
    """A tar in memory, with the offset of each member. Times and owners are fixed, so equal input gives equal bytes."""

    def __init__(self) -> None:
        self._stream = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._stream, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._stream.tell() - padded

    def close(self) -> memoryview:
        """The finished archive."""
        self._tar.close()
        return self._stream.getbuffer()


class TarFormat:
    """See `layout.CaseFormat`."""

    name = "webdataset"
    default_layout = Layout(block_vox=96, margin_vox=0)

    def check_layout(self, layout: Layout) -> None:
        """Bricks of 32 to 1024 voxels with a margin below their side."""
        if (
            not 32 <= layout.block_vox <= 1024
            or not 0 <= layout.margin_vox < layout.block_vox
            or layout.codec not in ("blosc", "npy")
        ):
            raise StoreError(f"{layout}: bricks have 32 … 1024 voxels a side, a smaller margin, and the codec blosc or npy")

    def write(self, storage: Storage, uri: str, case: CaseArrays, layout: Layout) -> StoredFiles:
        """Write a case's tar in one go; the caller publishes it by its manifest row."""
        block_vox: Vox3 = (layout.block_vox, layout.block_vox, layout.block_vox)
        grid = block_grid(case.shape_vox_zyx, block_vox, layout, padded=False)
        builder = _TarBuilder()
        prefix = uri.removesuffix(".tar").partition("/")[2]
        placed: dict[str, list[tuple[int, int, int]]] = {name: [] for name in ARRAYS}
        for number, index_zyx in enumerate(grid.indices()):
            z, y, x = grid.start(index_zyx)
            dz, dy, dx = grid.stored_shape(index_zyx)
            sample: dict[str, Any] = {
                **case.attributes,
                "brick": number,
                "start_vox_zyx": [z, y, x],
                "shape_vox_zyx": [dz, dy, dx],
            }
            encoded: dict[str, bytes] = {}
            for name in ARRAYS:
                volume, _ = case.array(name)
                encoded[name] = encode_block(volume[z : z + dz, y : y + dy, x : x + dx], layout.codec)
                sample[name] = {"dtype": str(volume.dtype), "codec": layout.codec, "crc32c": crc32c(encoded[name])}
            sample["image"]["scale"] = case.step
            key = f"{prefix}/{number:06d}"
            builder.add(f"{key}.json", json.dumps(sample, allow_nan=False).encode())
            for name, data in encoded.items():
                placed[name].append((builder.add(f"{key}.{name}.{layout.codec}", data), len(data), sample[name]["crc32c"]))
        archive = builder.close()
        storage.write(uri, archive)
        members = [entry for name in ARRAYS for entry in placed[name]]
        offsets, lengths, checksums = (list(column) for column in zip(*members, strict=True))
        return StoredFiles(block_vox, [len(archive)], [crc32c(archive)], offsets, lengths, checksums)

    def files(self, row: ManifestRow) -> list[str]:
        """Objects whose size and checksum the manifest holds, in its order."""
        return [row.uri]

    def locate(self, storage: Storage, row: ManifestRow, name: str, layout: Layout) -> BlockTable:
        """Slice the manifest row; nothing is read."""
        grid = block_grid(row.shape_vox_zyx, row.block_vox_zyx, layout, padded=False)
        n = grid.n_blocks
        if not len(row.block_offsets) == len(row.block_lengths) == len(row.block_crc32c) == 2 * n:
            raise CorruptShardError(
                f"{storage.url}/{row.uri}: the manifest lists {len(row.block_offsets)} bricks, expected {2 * n}"
            )
        part = slice(ARRAYS.index(name) * n, (ARRAYS.index(name) + 1) * n)
        dtype, fill = row.array_type(name)
        offsets, lengths = np.array(row.block_offsets[part]), np.array(row.block_lengths[part])
        if (offsets < 0).any() or (lengths < 1).any() or (offsets + lengths > row.file_bytes[0]).any():
            raise CorruptShardError(f"{storage.url}/{row.uri}: the manifest points outside the shard; convert this case again")
        checksums = np.array(row.block_crc32c[part], np.uint32)
        return BlockTable(row.uri, grid, dtype, fill, offsets, lengths, checksums, layout.codec)

    def finish(self, storage: Storage, datasets: list[str]) -> None:
        """Nothing: a tar is complete in itself."""

    def check_case(self, storage: Storage, row: ManifestRow, layout: Layout) -> Iterator[str]:  # noqa: ARG002
        """Problems beyond checksums: members that no store of ours holds (links, devices, names that leave the folder)."""
        yield from inspect_tar(storage.read(row.uri, row.file_bytes[0] + 1))


def inspect_tar(archive: bytes) -> Iterator[str]:
    """What is wrong or dangerous in a tar: unsafe names, anything but plain files, sizes beyond the archive, duplicates."""
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for info in tar:
                yield from _inspect_member(info, seen, len(archive))
                seen.add(info.name)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        yield f"not a readable tar: {error}"


def _inspect_member(info: Any, seen: set[str], archive_bytes: int) -> Iterator[str]:
    if not info.isreg() or info.issparse():
        yield f"member {info.name!r} is no plain file (type {info.type!r})"
    if info.size > MEMBER_LIMIT_BYTES or info.offset_data + info.size > archive_bytes:
        yield f"member {info.name!r} states {info.size} bytes, more than the archive holds"
    if info.name in seen:
        yield f"member {info.name!r} occurs twice"
    if len(info.name) > NAME_LIMIT:
        yield f"member {info.name[:40]!r}… has a name of {len(info.name)} characters"
    try:
        check_path(info.name)
    except StoreError as error:
        yield f"member: {error}"
