"""Reading a store: `open_store(url)` → crops and whole cases, verified, the same bits from every format and place.

A `ShardStore` is cheap to open and can be pickled (it re-opens itself), so it travels to workers by value. It keeps shard indices
and manifest row groups in small bounded caches; voxels are cached only where a disk cache was asked for.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hermes_dist.errors import CorruptShardError, StoreError, nearest
from hermes_dist.shards import STORES
from hermes_dist.shards.blocks import BlockGrid, BlockName, BlockPart, BlockTable, Reach, decode_part, plan_parts, trim_parts
from hermes_dist.shards.cache import CachedStorage, DiskCache
from hermes_dist.shards.codec import Scratch
from hermes_dist.shards.collection import COLLECTION_FILE, Collection, load, open_manifest, recover
from hermes_dist.shards.layout import ARRAYS, CaseFormat, Layout
from hermes_dist.shards.manifest import ManifestRow
from hermes_dist.shards.remote import open_storage
from hermes_dist.shards.storage import LocalStorage, Storage
from hermes_dist.shards.writer import StoreWriter
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

TABLES_KEPT = 2048


@dataclass
class ReadCounters:
    """What reading has cost since the store was opened; for attributing waits.

    `bytes_read` counts what the local cache answered, too; `bytes_fetched` only what came from the store itself.
    """

    reads: int = 0
    bytes_read: int = 0
    bytes_fetched: int = 0
    storage_s: float = 0.0
    decode_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0


class _Job(NamedTuple):
    """Fill `out` with the box at `start_vox_zyx` of one array: stored values times `scale` (None = as stored), `pad` outside.

    With `reach`, what it does not touch is not read: `pad` in floats, anything in integers. `plans` is shared by jobs of one box,
    so that it is cut into blocks once.
    """

    array: str
    start_vox_zyx: Sequence[int]
    out: np.ndarray
    scale: np.float32 | None
    pad: float
    reach: Reach | None = None
    plans: dict[BlockGrid, list[BlockPart]] | None = None


class ShardStore:
    """Read access to one store; made by `open_store`.

    Attributes:
        collection: task table, preprocessing, digest.
        manifest: the cases.
        counters: what reading has cost so far.
        cache: the disk cache in front of a remote store, or None.

    Raises:
        StoreError, CorruptShardError: the manifest is missing or does not match the collection.
    """

    def __init__(
        self, origin: Storage, cache: DiskCache | None, collection: Collection, form: CaseFormat, reopen: tuple[Any, ...]
    ) -> None:
        self._origin = origin
        self.cache = cache
        self._storage = CachedStorage(origin, cache) if cache is not None else origin
        self._form = form
        self._reopen = reopen
        self._parallel: ThreadPoolExecutor | None = None
        self._tables: OrderedDict[tuple[str, str], BlockTable] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()
        self.counters = ReadCounters()
        self.collection = collection
        self.manifest = open_manifest(origin, collection)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open_store, self._reopen

    @property
    def url(self) -> str:
        """The store's URL."""
        return self._storage.url

    def read_crop(
        self,
        row: int | ManifestRow,
        start_vox_zyx: Sequence[int],
        size_vox_zyx: Sequence[int],
        *,
        reach: Reach | None = None,
        stored: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """A box of a case as (normalised image float32, label uint8 or uint16), both of the asked size.

        The box may stick out of the volume on any side: there the image has the case's minimum ("air"), the label 0.

        Args:
            row: row number or row of the manifest.
            start_vox_zyx, size_vox_zyx: the box.
            reach: leave out what it does not touch: air in a float32 image, unspecified in stored integers and labels.
            stored: the image as it is stored; the row's `image_step` times that are the normalised intensities.

        Raises:
            CorruptShardError: a checksum does not match. StoreError: missing. TransientStorageError: may work again.
            StorageAccessError: refused.
        """
        case = self.manifest.row(row) if isinstance(row, int | np.integer) else row
        if len(start_vox_zyx) != 3 or len(size_vox_zyx) != 3 or min(size_vox_zyx) < 1:
            raise StoreError(
                f"{case.name}: a crop needs three starts and three positive sides, got {start_vox_zyx} and {size_vox_zyx}"
            )
        dtype, fill = case.array_type("image")
        scale = None if stored or case.image_dtype != "int16" else np.float32(case.image_step)
        image = np.empty(tuple(size_vox_zyx), dtype if stored else np.float32)
        label = np.empty(tuple(size_vox_zyx), case.array_type("label")[0])
        plans: dict[BlockGrid, list[BlockPart]] = {}
        jobs = [
            _Job("image", start_vox_zyx, image, scale, fill if stored else case.air, reach, plans),
            _Job("label", start_vox_zyx, label, None, 0, reach, plans),
        ]
        if isinstance(self._storage, LocalStorage):
            for job in jobs:
                self._read(case, job)
        else:
            if self._parallel is None:
                self._parallel = ThreadPoolExecutor(2, thread_name_prefix="shards")
            for wait in [self._parallel.submit(self._read, case, job) for job in jobs]:
                wait.result()
        return image, label

    def read_case(self, row: int | ManifestRow) -> tuple[np.ndarray, np.ndarray]:
        """A whole case as (normalised image float32, label). Errors as `read_crop`."""
        case = self.manifest.row(row) if isinstance(row, int | np.integer) else row
        return self.read_crop(case, (0, 0, 0), case.shape_vox_zyx)

    def read_stored_crop(
        self, row: int | ManifestRow, array: str, start_vox_zyx: Sequence[int], size_vox_zyx: Sequence[int]
    ) -> np.ndarray:
        """A box of `image` or `label` as it is stored, without scaling. Errors as `read_crop`."""
        case = self.manifest.row(row) if isinstance(row, int | np.integer) else row
        dtype, fill = case.array_type(array)
        out = np.empty(tuple(size_vox_zyx), dtype)
        self._read(case, _Job(array, start_vox_zyx, out, None, fill))
        return out

    def read_stored(self, row: int | ManifestRow) -> tuple[np.ndarray, np.ndarray]:
        """A whole case as it is stored (for verification and plain copies)."""
        case = self.manifest.row(row) if isinstance(row, int | np.integer) else row
        image, label = (self.read_stored_crop(case, array, (0, 0, 0), case.shape_vox_zyx) for array in ARRAYS)
        return image, label

    def close(self) -> None:
        """Stop the helper threads (they also end with the process)."""
        if self._parallel is not None:
            self._parallel.shutdown()
            self._parallel = None

    def _table(self, storage: Storage, case: ManifestRow, name: str) -> BlockTable:
        key = (case.uri, name)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = self._form.locate(storage, case, name, self.collection.layout)
        with self._lock:
            self._tables[key] = table
            if len(self._tables) > TABLES_KEPT:
                self._tables.popitem(last=False)
        return table

    def _read(self, case: ManifestRow, job: _Job) -> None:
        try:
            self._fill(self._storage, case, job)
        except CorruptShardError:
            if isinstance(self._origin, LocalStorage):
                raise
            # What is damaged may be the copy on this host, or what came over the network: asked for again, and kept instead.
            again = self._origin if self.cache is None else CachedStorage(self._origin, self.cache, anew=True)
            self._fill(again, case, job)

    def _fill(self, storage: Storage, case: ManifestRow, job: _Job) -> None:
        began = time.perf_counter()
        start, out, scale = job.start_vox_zyx, job.out, job.scale
        table = self._table(storage, case, job.array)
        low = [min(max(s, 0), side) for s, side in zip(start, case.shape_vox_zyx, strict=True)]
        high = [min(max(s + n, 0), side) for s, n, side in zip(start, out.shape, case.shape_vox_zyx, strict=True)]
        parts = _parts(table.grid, low, high, job)
        inside = tuple(slice(a - s, max(b, a) - s) for a, b, s in zip(low, high, start, strict=True))
        inner = out[inside]
        if not parts or (job.reach is not None and out.dtype.kind == "f"):
            out.fill(job.pad)
        else:
            _fill_around(out, inside, job.pad)
        present = [part for part in parts if table.lengths[part.number]]
        if len(present) != len(parts):
            for part in parts:
                if not table.lengths[part.number]:
                    inner[part.target] = job.pad
        numbers = [part.number for part in present]
        ranges = list(zip(table.offsets[numbers].tolist(), table.lengths[numbers].tolist(), strict=True))
        scratch = self._scratch(table)
        decode_s = 0.0
        for part, view in zip(present, storage.read_ranges(table.path, ranges), strict=True):
            fetched = time.perf_counter()
            box = decode_part(table, part, view, scratch, BlockName(self.url, table.path, part.number))
            if scale is None:
                inner[part.target] = box
            else:
                np.multiply(box, scale, out=inner[part.target])
            decode_s += time.perf_counter() - fetched
        self._count(sum(length for _, length in ranges), time.perf_counter() - began - decode_s, decode_s)

    def _count(self, n_bytes: int, storage_s: float, decode_s: float) -> None:
        with self._lock:
            self.counters.reads += 1
            self.counters.bytes_read += n_bytes
            self.counters.storage_s += storage_s
            self.counters.decode_s += decode_s
            if isinstance(self._storage, CachedStorage):
                self.counters.cache_hits, self.counters.cache_misses = self._storage.hits, self._storage.misses
                self.counters.bytes_fetched = self._storage.missed_bytes
            else:
                self.counters.bytes_fetched += n_bytes

    def _scratch(self, table: BlockTable) -> Scratch:
        """A buffer of one block per thread and type: fresh memory would cost page faults for every crop."""
        kept: dict[str, Scratch] = self._local.__dict__.setdefault("scratch", {})
        size = math.prod(table.grid.block_vox_zyx)
        if table.dtype.str not in kept or kept[table.dtype.str].array.size < size:
            kept[table.dtype.str] = Scratch(size, table.dtype)
        return kept[table.dtype.str]


def _parts(grid: BlockGrid, low: Sequence[int], high: Sequence[int], job: _Job) -> list[BlockPart]:
    """The parts of blocks that a job reads."""
    if job.plans is not None and grid in job.plans:
        return job.plans[grid]
    parts = plan_parts(grid, low, high) if all(a < b for a, b in zip(low, high, strict=True)) else []
    if job.reach is not None:
        parts = trim_parts(parts, low, job.reach)
    if job.plans is not None:
        job.plans[grid] = parts
    return parts


def _fill_around(out: np.ndarray, inside: Sequence[slice], value: float) -> None:
    """Set what lies outside of the box `inside`; nothing if that is everything."""
    for axis, part in enumerate(inside):
        before = tuple(inside[:axis])
        out[(*before, slice(0, part.start))] = value
        out[(*before, slice(part.stop, None))] = value


def open_store(url: str, cache_dir: str | None = None, cache_mib: int = 0) -> ShardStore:
    """Open a finished store by path or URL (file, s3, gs, az, http, https).

    Args:
        url: the store.
        cache_dir: folder of a local disk cache for remote stores, shared by all processes of a host.
        cache_mib: bound of that cache (0 = none).

    Raises:
        StoreError: no finished store there, another format version or an unknown format. CorruptShardError: a damaged
        manifest. TransientStorageError: storage that may work again.
    """
    storage = open_storage(url)
    collection = load(storage)
    remote = not isinstance(storage, LocalStorage)
    cache = DiskCache(cache_dir, cache_mib << 20) if cache_dir and cache_mib and remote else None
    return ShardStore(storage, cache, collection, _form(collection.format), (url, cache_dir, cache_mib))


def create_store(
    url: str, format: str, *, tasks: TaskTable, preprocessing: Preprocessing, layout: Layout | None = None
) -> StoreWriter:
    """A writer for a new store, or one that adds to the store that is there.

    Args:
        url: path or URL.
        format: name in `STORES`.
        tasks: the resolved task table.
        preprocessing: parameters of the stored volumes; `image_dtype` decides how images are stored.
        layout: how volumes are cut (default: the format's own).

    Raises:
        StoreError: unknown format, or a store of another format or layout lies there.
    """
    form = _form(format)
    storage = open_storage(url)
    layout = layout or form.default_layout
    form.check_layout(layout)
    recover(storage)
    published = load(storage) if storage.size(COLLECTION_FILE) is not None else None
    if published is not None and (published.format, published.layout) != (format, layout):
        raise StoreError(
            f"{url} holds a store of format {published.format} with {published.layout}; this conversion wants {format} "
            f"with {layout}: convert to another URL"
        )
    return StoreWriter(url, Collection(tasks, preprocessing, format=format, layout=layout), form, published)


def _form(name: str) -> CaseFormat:
    if name not in STORES:
        raise StoreError(f"store format {name!r} is not one of {', '.join(STORES)}.{nearest(name, list(STORES))}")
    return STORES[name]
