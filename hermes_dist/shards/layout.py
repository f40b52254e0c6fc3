"""What the two formats share: the arrays of a case, how blocks are laid out, and the protocol of a format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hermes_dist.shards.blocks import BlockGrid, BlockTable, Vox3
from hermes_dist.shards.manifest import ManifestRow
from hermes_dist.shards.storage import Storage

ARRAYS = ("image", "label")


@dataclass(frozen=True)
class Layout:
    """How volumes are cut into blocks; stored in `collection.json`, chosen by the bench in docs/results/shards.md.

    Attributes:
        block_vox: side of a block (zarr: inner chunk, 32–64; webdataset: brick).
        margin_vox: voxels that neighbouring bricks share; a patch of at most `margin_vox + 1` lies in one brick. zarr: 0.
        codec: `blosc`, or `npy` (webdataset only: members that plain `.decode()` turns into arrays, uncompressed).
    """

    block_vox: int = 64
    margin_vox: int = 0
    codec: str = "blosc"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {"block_vox": self.block_vox, "margin_vox": self.margin_vox, "codec": self.codec}


@dataclass(frozen=True)
class CaseArrays:
    """A case ready to be stored: quantised image, label map, and what describes them to a plain reader.

    Attributes:
        image: int16, float16 or float32, Z Y X.
        label: uint8 or uint16, Z Y X.
        step: `image * step` are the normalised intensities.
        attributes: JSON-able, for people and plain readers (dataset, case, spacing, class names …).
    """

    image: np.ndarray
    label: np.ndarray
    step: float
    attributes: dict[str, Any]

    @property
    def shape_vox_zyx(self) -> Vox3:
        """Voxels Z Y X."""
        z, y, x = self.image.shape
        return z, y, x

    def array(self, name: str) -> tuple[np.ndarray, float]:
        """`image` or `label`, and its fill value: the image's minimum ("air"), label 0."""
        return (self.image, self.image.min().item()) if name == "image" else (self.label, 0)


@dataclass(frozen=True)
class StoredFiles:
    """What a format wrote: per file its bytes and checksum; per block (webdataset) offset, length and checksum."""

    block_vox_zyx: Vox3
    file_bytes: list[int]
    file_crc32c: list[int]
    block_offsets: list[int] = field(default_factory=list[int])
    block_lengths: list[int] = field(default_factory=list[int])
    block_crc32c: list[int] = field(default_factory=list[int])


class CaseFormat(Protocol):
    """One format on disk. Stateless; the registry is `STORES` in `hermes_dist/shards/__init__.py`."""

    name: str
    default_layout: Layout

    def check_layout(self, layout: Layout) -> None:
        """Raises StoreError if the format cannot be cut like that."""
        ...

    def write(self, storage: Storage, uri: str, case: CaseArrays, layout: Layout) -> StoredFiles:
        """Write all objects of a case below (or at) `uri`."""
        ...

    def files(self, row: ManifestRow) -> list[str]:
        """Objects whose size and checksum the manifest holds, in its order."""
        ...

    def locate(self, storage: Storage, row: ManifestRow, name: str, layout: Layout) -> BlockTable:
        """Where the blocks of `image` or `label` lie."""
        ...

    def finish(self, storage: Storage, datasets: list[str]) -> None:
        """What a plain reader needs beyond the cases."""
        ...

    def check_case(self, storage: Storage, row: ManifestRow, layout: Layout) -> Iterator[str]:
        """Problems of a case beyond sizes and checksums."""
        ...


def block_grid(shape_vox_zyx: Vox3, block_vox_zyx: Vox3, layout: Layout, *, padded: bool) -> BlockGrid:
    """The grid of a volume's blocks."""
    return BlockGrid(shape_vox_zyx, block_vox_zyx, layout.margin_vox, padded)
