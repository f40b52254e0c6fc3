"""`collection.json` of a store: what is inside, how it was made, and the hash by which a resumed run recognises it.

The digest covers the task table, the preprocessing and the stored voxels of every case (with its split), not how they are laid
out: the same conversion to zarr and to webdataset has the same digest, and a run may change from one to the other.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from hermes_dist.errors import CorruptShardError, StoreError
from hermes_dist.shards.codec import crc32c
from hermes_dist.shards.layout import Layout
from hermes_dist.shards.manifest import Manifest
from hermes_dist.shards.remote import open_storage
from hermes_dist.shards.storage import LocalStorage, Storage
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

FORMAT_VERSION = 1
DIGESTS_FILE = "stores.json"
"""In a run directory: which contents of its stores a run has read."""
COLLECTION_FILE = "collection.json"
MANIFEST_FILE = "manifest.parquet"
STAGED_FILE = ".staging/collection.json"
"""The next `collection.json`, written before the next manifest: a publication killed between the two can be finished."""
LIMIT_BYTES = 64 << 20
PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class Collection:
    """A store's description.

    Attributes:
        tasks: the resolved task table.
        preprocessing: how scans became the stored volumes.
        version: of the format on disk.
        digest: content hash; empty until the store is finished.
        format: name in `STORES`.
        layout: how volumes are cut into blocks.
        n_cases: rows of the manifest.
        manifest_bytes, manifest_crc32c: size and checksum of `manifest.parquet`.
    """

    tasks: TaskTable
    preprocessing: Preprocessing
    version: int = FORMAT_VERSION
    digest: str = ""
    format: str = "zarr"
    layout: Layout = field(default_factory=Layout)
    n_cases: int = 0
    manifest_bytes: int = 0
    manifest_crc32c: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {
            "version": self.version,
            "digest": self.digest,
            "format": self.format,
            "layout": self.layout.to_json(),
            "n_cases": self.n_cases,
            "manifest_bytes": self.manifest_bytes,
            "manifest_crc32c": self.manifest_crc32c,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "tasks": self.tasks.to_json(),
        }

    @staticmethod
    def from_json(data: dict[str, Any], name: str) -> Collection:
        """Inverse of `to_json`.

        Raises:
            StoreError: another format version, or fields that are missing or wrong; names the file.
        """
        version = data.get("version")
        if version != FORMAT_VERSION:
            raise StoreError(f"{name}: format version {version!r}, this program reads version {FORMAT_VERSION}; convert again")
        try:
            return Collection(
                tasks=TaskTable.from_json(data["tasks"]),
                preprocessing=Preprocessing.model_validate(data["preprocessing"]),
                layout=Layout(**data["layout"]),
                **{k: data[k] for k in ("version", "digest", "format", "n_cases", "manifest_bytes", "manifest_crc32c")},
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise StoreError(f"{name}: {error}; this file was not written by this program, convert again") from None


def dump(collection: Collection) -> bytes:
    """The bytes of `collection.json`."""
    return (json.dumps(collection.to_json(), indent=1, ensure_ascii=False) + "\n").encode()


def load(storage: Storage) -> Collection:
    """Read `collection.json` of an opened storage. Raises StoreError or CorruptShardError."""
    name = f"{storage.url}/{COLLECTION_FILE}"
    if storage.size(COLLECTION_FILE) is None:
        raise StoreError(
            f"{name} does not exist: {storage.url} is no finished shard store; run `hermes-shard convert` to the end"
        )
    try:
        data = json.loads(storage.read(COLLECTION_FILE, LIMIT_BYTES))
    except ValueError as error:
        raise CorruptShardError(f"{name} is no JSON: {error}; convert again") from None
    if not isinstance(data, dict):
        raise CorruptShardError(f"{name} is no JSON object; convert again")
    return Collection.from_json(data, name)


def recover(storage: Storage) -> None:
    """Finish or forget a publication that was killed between manifest and collection; nothing happens in a whole store.

    Raises:
        StoreError, CorruptShardError, TransientStorageError: as reading and writing do.
    """
    if storage.size(STAGED_FILE) is None or storage.size(COLLECTION_FILE) is None:
        return
    staged = storage.read(STAGED_FILE, LIMIT_BYTES)
    following = Collection.from_json(json.loads(staged), f"{storage.url}/{STAGED_FILE}")
    whole = storage.size(MANIFEST_FILE) == following.manifest_bytes
    if whole and object_crc32c(storage, MANIFEST_FILE, following.manifest_bytes) == following.manifest_crc32c:
        storage.write(COLLECTION_FILE, staged)
    storage.delete(STAGED_FILE)


def object_crc32c(storage: Storage, path: str, n_bytes: int) -> int:
    """Checksum of a whole object, read in pieces."""
    checksum = 0
    for piece in _pieces(storage, path, n_bytes):
        checksum = crc32c(piece, checksum)
    return checksum


def _pieces(storage: Storage, path: str, n_bytes: int) -> Iterator[memoryview]:
    """A whole object, some megabytes at a time; a piece is valid until the next one is asked for."""
    for start in range(0, n_bytes, PIECE_BYTES):
        yield from storage.read_ranges(path, [(start, min(PIECE_BYTES, n_bytes - start))])


def open_manifest(storage: Storage, collection: Collection) -> Manifest:
    """The manifest of an opened store.

    Raises:
        StoreError: missing. CorruptShardError: another size or checksum than the collection states.
    """
    name = f"{storage.url}/{MANIFEST_FILE}"
    datasets = [d.name for d in collection.tasks.datasets]
    if isinstance(storage, LocalStorage):
        size = storage.size(MANIFEST_FILE)
        if size is None:
            raise StoreError(
                f"{name} does not exist, but collection.json does; restore it from a copy, or convert to another URL"
            )
        if size != collection.manifest_bytes:
            raise CorruptShardError(
                f"{name} has {size} bytes, collection.json says {collection.manifest_bytes}; run `hermes-shard merge`"
            )
        return Manifest(str(Path(storage.url, MANIFEST_FILE)), name, datasets)
    with tempfile.NamedTemporaryFile(prefix="manifest.", suffix=".parquet") as copy:  # a million rows would fill the memory
        checksum = 0
        for piece in _pieces(storage, MANIFEST_FILE, collection.manifest_bytes):
            checksum = crc32c(piece, checksum)
            copy.write(piece)
        copy.flush()
        if storage.size(MANIFEST_FILE) != collection.manifest_bytes or checksum != collection.manifest_crc32c:
            raise CorruptShardError(f"{name} does not match collection.json (size or checksum); run `hermes-shard merge`")
        return Manifest(pa.OSFile(copy.name), name, datasets)  # the open file outlives its name


def read_collection(url: str) -> Collection:
    """The collection of a store by URL.

    Raises:
        StoreError: no store there, or another version. TransientStorageError: storage that may work again.
    """
    return load(open_storage(url))


def joined_digest(collections: Iterable[Collection]) -> str:
    """Content hash over the stores of a run, in order."""
    return "+".join(collection.digest for collection in collections)


def recorded_digests(run_dir: Path) -> list[str]:
    """`joined_digest` of the stores at each start of a run, each once, oldest first; empty for runs that recorded none."""
    path = run_dir / DIGESTS_FILE
    return json.loads(path.read_text())["digests"] if path.is_file() else []


def content_digest(tasks: TaskTable, preprocessing: Preprocessing, cases: Iterable[tuple[str, str, str, str]]) -> str:
    """Hash of what a store holds; `cases` are (dataset, case id, split, data hash) in manifest order."""
    digest = hashlib.blake2b(digest_size=16)
    head = {"tasks": tasks.to_json(), "preprocessing": preprocessing.model_dump(mode="json")}
    digest.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    for case in cases:
        digest.update(("\n" + json.dumps(case)).encode())
    return digest.hexdigest()
