"""Writing a store: cases in any order from any number of processes or hosts, then one `finish`.

A case is published by its row file `.staging/rows/<dataset>/<case>.json`, written last; before that nothing points at its bytes,
so a writer may be killed at any instant. `finish` merges row files with the manifest that was there and publishes manifest and
collection. Nothing is changed in place: a case that is converted again goes to a new path (it ends with its content hash), and
what is superseded is deleted only after the new manifest stands.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import tempfile
from collections.abc import Collection as Items
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from hermes_dist.errors import StoreError
from hermes_dist.shards.case import CaseRecord, make_entry, prepare_arrays, safe_name
from hermes_dist.shards.codec import crc32c
from hermes_dist.shards.collection import (
    COLLECTION_FILE,
    MANIFEST_FILE,
    STAGED_FILE,
    Collection,
    content_digest,
    dump,
    open_manifest,
)
from hermes_dist.shards.layout import CaseFormat
from hermes_dist.shards.manifest import Manifest, ManifestEntry, ManifestRow, write_manifest
from hermes_dist.shards.many import delete_each, read_each
from hermes_dist.shards.remote import open_storage

ROWS = ".staging/rows"
ROW_LIMIT_BYTES = 64 << 20
Key = tuple[str, str]


class StoreWriter:
    """Made by `hermes_dist.shards.create_store`; can be pickled to workers.

    Args:
        url: the store.
        collection: task table, preprocessing, format and layout.
        form: the format's writer.
        published: the collection that is there already, if any.
    """

    def __init__(self, url: str, collection: Collection, form: CaseFormat, published: Collection | None) -> None:
        self.collection = collection
        self._url = url
        self._form = form
        self._published = published
        self._storage = open_storage(url)
        self._manifest: Manifest | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_manifest": None}

    @property
    def url(self) -> str:
        """The store's URL."""
        return self._storage.url

    def write_case(self, record: CaseRecord, image_zyx: np.ndarray, label_zyx: np.ndarray) -> ManifestEntry:
        """Store one case and publish it to `finish`.

        Args:
            record: what is known of the case.
            image_zyx: normalised intensities, float32.
            label_zyx: whole numbers, the same shape.

        Raises:
            DataError: voxels that cannot be stored. TaskError: unknown dataset. StoreError, TransientStorageError: storage.
        """
        tasks = self.collection.tasks.dataset(record.dataset)
        case = prepare_arrays(record, image_zyx, label_zyx, tasks, self.collection.preprocessing.image_dtype)
        del image_zyx  # twice the size of what is stored; free it before compressing, if the caller let go of it
        suffix = hashlib.blake2b(record.content_hash.encode(), digest_size=4).hexdigest()
        tail = ".tar" if self._form.name == "webdataset" else ""
        uri = f"{self._form.name}/{safe_name(record.dataset)}/{safe_name(record.case_id)}-{suffix}{tail}"
        files = self._form.write(self._storage, uri, case, self.collection.layout)
        entry = make_entry(record, case, tasks, uri, files)
        before = self._staged(record.dataset, record.case_id)
        self._storage.write(_row_path(record.dataset, record.case_id), json.dumps(entry.to_json(), allow_nan=False).encode())
        if before is not None and before.row.uri not in (uri, self._published_uri(record.dataset, record.case_id)):
            self._delete_case(before.row.uri)
        return entry

    def existing(self, dataset: str, case_id: str) -> str | None:
        """Content hash of a case that is stored already (unfinished or published), or None."""
        staged = self._staged(dataset, case_id)
        row = staged.row if staged is not None else self._published_row(dataset, case_id)
        return None if row is None else row.content_hash

    def content_hashes(self) -> dict[Key, str]:
        """Content hash of every case that is stored already, as `existing`."""
        hashes: dict[Key, str] = {}
        old = self._old_manifest()
        if old is not None:
            names = [old.dataset_names[d] for d in old.dataset_index]
            hashes.update(zip(zip(names, old.case_ids, strict=True), old.content_hashes(), strict=True))
        for entry in self._read_rows(sorted(self._storage.list(ROWS))):
            hashes[entry.row.dataset, entry.row.case_id] = entry.row.content_hash
        return hashes

    def finish(self, keep: Items[Key] | None = None) -> Collection:
        """Publish everything that was written, and what was there before.

        Args:
            keep: (dataset, case id) pairs that belong to the store; others are dropped (None = keep all).

        Raises:
            StoreError: nothing was converted.
        """
        staged = dict(self._staged_keys())
        old = self._old_manifest()
        order = {d.name: i for i, d in enumerate(self.collection.tasks.datasets)}
        places: dict[Key, str | int] = {}
        if old is not None:
            names = old.dataset_names
            places.update(
                {(names[d], case_id): i for i, (d, case_id) in enumerate(zip(old.dataset_index, old.case_ids, strict=True))}
            )
        places.update(staged)
        wanted = [key for key in places if key[0] in order and (keep is None or key in keep)]
        if not wanted:
            raise StoreError(
                f"{self.url}: no case was converted, so there is no store to publish; see the integrity report for reasons"
            )
        wanted.sort(key=lambda key: (order[key[0]], key[1]))
        collection, uris = self._publish([places[key] for key in wanted], old)
        self._clean(staged.values(), uris)
        self._published, self._manifest = collection, None
        return collection

    def _publish(self, places: list[str | int], old: Manifest | None) -> tuple[Collection, set[str]]:
        cases: list[tuple[str, str, str, str]] = []
        uris: set[str] = set()

        def entries() -> Iterator[ManifestEntry]:
            staged = self._read_rows([place for place in places if isinstance(place, str)])
            for place in places:
                entry = next(staged) if isinstance(place, str) else next(old.entries([place])) if old else None
                assert entry is not None
                cases.append((entry.row.dataset, entry.row.case_id, entry.row.split, entry.row.data_hash))
                uris.add(entry.row.uri)
                yield entry

        with tempfile.TemporaryFile() as file:
            write_manifest(entries(), file)
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                collection = replace(
                    self.collection,
                    digest=content_digest(self.collection.tasks, self.collection.preprocessing, cases),
                    n_cases=len(cases),
                    manifest_bytes=len(data),
                    manifest_crc32c=crc32c(data),
                )
                self._storage.write(STAGED_FILE, dump(collection))
                self._storage.write(MANIFEST_FILE, data)
        names = [d.name for d in collection.tasks.datasets if d.name in {case[0] for case in cases}]
        self._form.finish(self._storage, [safe_name(name) for name in names])
        self._storage.write(COLLECTION_FILE, dump(collection))
        self._storage.delete(STAGED_FILE)
        return collection, uris

    def _clean(self, row_files: Items[str], uris: set[str]) -> None:
        """Delete row files, and cases that no row names any more."""
        delete_each(self._storage, row_files)
        for path in list(self._storage.list(self._form.name)):
            uri = path if path in uris else "/".join(path.split("/")[:3])
            if uri not in uris and path.count("/") >= 2 and path.split("/")[2] != "zarr.json":
                self._storage.delete(path)
        self._storage.sweep()

    def _delete_case(self, uri: str) -> None:
        for path in [uri] if uri.endswith(".tar") else list(self._storage.list(uri)):
            self._storage.delete(path)

    def _old_manifest(self) -> Manifest | None:
        if self._manifest is None and self._published is not None:
            self._manifest = open_manifest(self._storage, self._published)
        return self._manifest

    def _published_row(self, dataset: str, case_id: str) -> ManifestRow | None:
        manifest = self._old_manifest()
        number = manifest.find(dataset, case_id) if manifest is not None and dataset in manifest.dataset_names else None
        return None if manifest is None or number is None else manifest.row(number)

    def _published_uri(self, dataset: str, case_id: str) -> str | None:
        """Where the published manifest has a case; a staged row may name the same place, if parameters went there and back."""
        row = self._published_row(dataset, case_id)
        return None if row is None else row.uri

    def _staged_keys(self) -> Iterator[tuple[Key, str]]:
        paths = sorted(self._storage.list(ROWS))
        for entry, path in zip(self._read_rows(paths), paths, strict=True):
            yield (entry.row.dataset, entry.row.case_id), path

    def _staged(self, dataset: str, case_id: str) -> ManifestEntry | None:
        path = _row_path(dataset, case_id)
        return None if self._storage.size(path) is None else next(self._read_rows([path]))

    def _read_rows(self, paths: list[str]) -> Iterator[ManifestEntry]:
        for path, data in zip(paths, read_each(self._storage, paths, ROW_LIMIT_BYTES), strict=True):
            try:
                yield ManifestEntry.from_json(json.loads(data))
            except ValueError as error:
                raise StoreError(f"{self.url}/{path}: {error}; delete this file and convert again") from None


def _row_path(dataset: str, case_id: str) -> str:
    return f"{ROWS}/{safe_name(dataset)}/{safe_name(case_id)}.json"


def staged_rows(url: str) -> int:
    """Cases of an unfinished conversion at a URL."""
    return sum(1 for _ in open_storage(url).list(ROWS))
