"""Every checksum of a store, and that manifest, files and voxels agree; for `hermes-shard verify`.

Three layers: sizes and checksums of files, checksums of blocks while every voxel is decompressed, and hashes and class counts of
the voxels against the manifest. Problems are sentences; a store that cannot be read for a passing reason raises instead.
"""

from __future__ import annotations

from collections.abc import Iterator

from hermes_dist.errors import CorruptShardError, StoreError, TaskError
from hermes_dist.shards import STORES
from hermes_dist.shards.case import data_hash, sample_foreground
from hermes_dist.shards.collection import MANIFEST_FILE, content_digest, object_crc32c
from hermes_dist.shards.manifest import ManifestRow
from hermes_dist.shards.remote import open_storage
from hermes_dist.shards.store import ShardStore


def store_problems(store: ShardStore) -> Iterator[str]:
    """What is wrong with collection and manifest; the cases have `case_problems`.

    Raises:
        TransientStorageError: storage that may work again.
    """
    collection, manifest = store.collection, store.manifest
    if object_crc32c(open_storage(store.url), MANIFEST_FILE, collection.manifest_bytes) != collection.manifest_crc32c:
        yield f"{MANIFEST_FILE} has another checksum than collection.json states"
        return
    if len(manifest) != collection.n_cases:
        yield f"{MANIFEST_FILE} has {len(manifest)} rows, collection.json says {collection.n_cases}"
    rows = [manifest.row(i) for i in range(len(manifest))]
    cases = [(row.dataset, row.case_id, row.split, row.data_hash) for row in rows]
    if content_digest(collection.tasks, collection.preprocessing, cases) != collection.digest:
        yield "the content digest of collection.json does not match the manifest"
    if len({case[:2] for case in cases}) != len(cases):
        yield f"{MANIFEST_FILE} names a case twice"


def case_problems(store: ShardStore, row: ManifestRow) -> Iterator[str]:
    """What is wrong with one stored case. May be called from several threads.

    Raises:
        TransientStorageError: storage that may work again.
    """
    form, storage = STORES[store.collection.format], open_storage(store.url)
    try:
        for path, size, checksum in zip(form.files(row), row.file_bytes, row.file_crc32c, strict=True):
            found = storage.size(path)
            if found != size:
                yield f"{path} has {found} bytes, the manifest says {size}" if found is not None else f"{path} is missing"
                return
            if object_crc32c(storage, path, size) != checksum:
                yield f"{path} has another checksum than the manifest"
                return
        yield from form.check_case(storage, row, store.collection.layout)
        image, label = store.read_stored(row)
        if data_hash(image, label, row.image_step) != row.data_hash:
            yield "voxels have another hash than the manifest"
        if sample_foreground(label, store.collection.tasks.dataset(row.dataset))[0] != list(row.class_voxels):
            yield "voxels per class differ from the manifest"
    except (CorruptShardError, StoreError, TaskError, ValueError) as error:
        yield str(error)
