"""`manifest.parquet`: one row a case, a million rows in about a second.

Opening reads three narrow columns (dataset, case id, split); everything else is read when a row is asked for, one row group (at
most 256 rows) at a time, and the newest row groups stay in a bounded cache. The file is not mapped: mapped pages count as memory,
and a mapped file that is cut short kills the process. Rows are sorted by dataset (in the order of the collection) and case id, so
a dataset is one contiguous range and a case is found by bisection.

A row is there twice: in columns, for people and their tools, and packed into one value, for training. Decoding nineteen columns
of 256 rows takes eight times as long as one, and a random case of a large collection nearly always needs a row group of its own.
Only training's columns are stored uncompressed. Manifests without packed rows are read too.

Coordinates are voxels Z Y X on the stored grid. Foreground coordinates are kept as flat C-order indices, uint32 little-endian in
one binary value a row: lists would be decoded number by number, for all rows of a group. Older manifests with lists are read too.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hermes_dist.errors import CorruptShardError, HermesError, StoreError, nearest
from hermes_dist.shards.storage import storage_error

Vox3 = tuple[int, int, int]
ROWS_PER_GROUP = 256
BYTES_PER_GROUP = 1 << 20
"""A row group is closed at 256 rows or 1 MiB of foreground and packed rows: many classes or blocks do not make rows slow."""
NARROW = ("dataset", "case_id", "split")
LABELS = ("dataset", "modality", "split")
CACHE_BYTES = 32 << 20
ROWS_KEPT = 256
"""Rows that stay as Python objects, so that small collections parse each of theirs once."""


@dataclass(frozen=True)
class ManifestRow:
    """One case. The fields are the columns of the manifest, apart from `foreground` (see `Manifest.foreground`).

    Attributes:
        dataset, case_id, modality, split: who it is.
        shape_vox_zyx, spacing_mm_zyx: the stored grid.
        placement: JSON text of the `Placement` that maps the stored grid to the scan's own.
        class_voxels: voxels per class, in class order of the dataset.
        stats: intensity statistics (conversion's own, and `stored_min/max/mean/std` of the normalised image).
        content_hash: hash of inputs and parameters, by which conversion recognises unchanged cases.
        data_hash: hash of the stored voxels, the same for both formats.
        uri: path of the case's zarr group or tar shard, relative to the store.
        image_dtype, image_step, image_fill, label_dtype: `image = stored * image_step`; `image_fill` = stored minimum ("air").
        block_vox_zyx: shape of a full block.
        file_bytes, file_crc32c: per file of the case.
        block_offsets, block_lengths, block_crc32c: per block, image then label (webdataset; zarr keeps its index in the shard).
    """

    dataset: str
    case_id: str
    modality: str
    split: str
    shape_vox_zyx: Vox3
    spacing_mm_zyx: tuple[float, float, float]
    placement: str
    class_voxels: tuple[int, ...]
    stats: dict[str, float]
    content_hash: str
    data_hash: str
    uri: str
    image_dtype: str
    image_step: float
    image_fill: float
    label_dtype: str
    block_vox_zyx: Vox3
    file_bytes: tuple[int, ...]
    file_crc32c: tuple[int, ...]
    block_offsets: tuple[int, ...] = ()
    block_lengths: tuple[int, ...] = ()
    block_crc32c: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """`dataset/case_id`."""
        return f"{self.dataset}/{self.case_id}"

    @property
    def air(self) -> float:
        """The normalised image's minimum, used outside the volume."""
        return float(np.float32(self.image_fill) * np.float32(self.image_step))

    def array_type(self, array: str) -> tuple[np.dtype, float]:
        """Stored type and fill value of `image` or `label`."""
        return (np.dtype(self.image_dtype), self.image_fill) if array == "image" else (np.dtype(self.label_dtype), 0)


_TYPES = {
    "dataset": pa.dictionary(pa.int32(), pa.string()),
    "modality": pa.dictionary(pa.int32(), pa.string()),
    "split": pa.dictionary(pa.int32(), pa.string()),
    "shape_vox_zyx": pa.list_(pa.int32()),
    "spacing_mm_zyx": pa.list_(pa.float64()),
    "class_voxels": pa.list_(pa.int64()),
    "image_step": pa.float64(),
    "image_fill": pa.float64(),
    "block_vox_zyx": pa.list_(pa.int32()),
    "file_bytes": pa.list_(pa.int64()),
    "file_crc32c": pa.list_(pa.uint32()),
    "block_offsets": pa.list_(pa.int64()),
    "block_lengths": pa.list_(pa.int64()),
    "block_crc32c": pa.list_(pa.uint32()),
}
ROW_COLUMNS = tuple(f.name for f in fields(ManifestRow))
OTHER_COLUMNS = tuple(name for name in ROW_COLUMNS if name not in NARROW)
SCHEMA = pa.schema(
    [(name, _TYPES.get(name, pa.string())) for name in ROW_COLUMNS]
    + [("foreground", pa.binary()), ("foreground_counts", pa.list_(pa.int32())), ("packed", pa.binary())]
)
TRAINING_COLUMNS = ("foreground", "packed")
PLAIN_COLUMNS = (*NARROW, *TRAINING_COLUMNS)
COMPRESSION = {name: "NONE" if name in PLAIN_COLUMNS else "ZSTD" for name in SCHEMA.names}


@dataclass(frozen=True)
class ManifestEntry:
    """A row with its foreground: flat C-order indices of all classes, one after the other, and how many each class has."""

    row: ManifestRow
    foreground: np.ndarray
    foreground_counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description (a row file of an unfinished conversion)."""
        data = {name: getattr(self.row, name) for name in ROW_COLUMNS}
        return {**data, "foreground": self.foreground.tolist(), "foreground_counts": list(self.foreground_counts)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> ManifestEntry:
        """Inverse of `to_json`. Raises StoreError if fields are missing or unknown."""
        try:
            row = _row({k: v for k, v in data.items() if k in ROW_COLUMNS})
            return ManifestEntry(row, np.array(data["foreground"], np.uint32), tuple(data["foreground_counts"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreError(
                f"row file of {data.get('dataset')}/{data.get('case_id')}: {error}; convert this case again"
            ) from None


def write_manifest(entries: Iterable[ManifestEntry], sink: Any) -> int:
    """Write entries (already sorted) to a path or file object; returns how many. Memory is bounded by a row group."""
    count, n_bytes, batch = 0, 0, list[tuple[ManifestEntry, bytes]]()
    labels: Any = list(LABELS)  # pyarrow's annotation says bool, its documentation bool or list
    compression: Any = COMPRESSION
    with pq.ParquetWriter(sink, SCHEMA, compression=compression, use_dictionary=labels, write_statistics=False) as writer:
        for entry in entries:
            packed = _pack(entry)
            batch.append((entry, packed))
            count += 1
            n_bytes += 4 * len(entry.foreground) + len(packed)
            if len(batch) == ROWS_PER_GROUP or n_bytes >= BYTES_PER_GROUP:
                writer.write_table(_table(batch), row_group_size=ROWS_PER_GROUP)
                n_bytes, batch = 0, []
        if batch or not count:
            writer.write_table(_table(batch), row_group_size=ROWS_PER_GROUP)
    return count


def _row(data: dict[str, Any]) -> ManifestRow:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return ManifestRow(**values)


def _pack(entry: ManifestEntry) -> bytes:
    """All but what the manifest holds in memory anyway, and the coordinates."""
    fields = {name: getattr(entry.row, name) for name in OTHER_COLUMNS}
    return json.dumps({**fields, "foreground_counts": entry.foreground_counts}, separators=(",", ":")).encode()


def _table(batch: Sequence[tuple[ManifestEntry, bytes]]) -> pa.Table:
    entries = [entry for entry, _ in batch]
    columns: dict[str, list[Any]] = {name: [getattr(e.row, name) for e in entries] for name in ROW_COLUMNS}
    columns["stats"] = [json.dumps(s, sort_keys=True) for s in columns["stats"]]
    columns["foreground"] = [e.foreground.astype("<u4").tobytes() for e in entries]
    columns["foreground_counts"] = [e.foreground_counts for e in entries]
    columns["packed"] = [packed for _, packed in batch]
    return pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in SCHEMA}, schema=SCHEMA)


class Manifest:
    """Read access to a `manifest.parquet`.

    Args:
        source: a local path, or a file object of pyarrow.
        name: what error messages call it.
        datasets: dataset names in the order of the collection (default: order of appearance).
    """

    def __init__(self, source: Any, name: str = "manifest.parquet", datasets: Sequence[str] = ()) -> None:
        try:
            self._file = pq.ParquetFile(source, pre_buffer=False, read_dictionary=list(LABELS))
            table = self._file.read(columns=list(NARROW), use_threads=False).unify_dictionaries().combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            raise _failure(name, error, "run `hermes-shard merge` or convert again") from None
        self._packed = "packed" in self._file.schema_arrow.names
        columns = TRAINING_COLUMNS if self._packed else (*OTHER_COLUMNS, "foreground", "foreground_counts")
        paths = [self._file.schema.column(k).path.split(".")[0] for k in range(len(self._file.schema))]
        self._leaves = [k for k, path in enumerate(paths) if path in columns]
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.metadata.num_row_groups)]
        self._group_starts = np.cumsum([0, *sizes])[:-1]
        self.name = name
        self._lock = threading.RLock()
        self._cache: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._cache_bytes = 0
        self._rows: OrderedDict[int, tuple[ManifestRow, np.ndarray]] = OrderedDict()
        self._ids = _chunk(table, "case_id")
        labels = {column: _chunk(table, column) for column in ("dataset", "split")}
        found = labels["dataset"].dictionary.to_pylist()
        self.dataset_names: tuple[str, ...] = tuple(datasets or found)
        """Names of the datasets."""
        missing = sorted(set(found) - set(self.dataset_names))
        if missing:
            raise StoreError(f"{name} has rows of dataset {missing[0]!r}, which the collection does not declare; convert again")
        place = np.array([self.dataset_names.index(n) for n in found], np.int32)
        self.dataset_index: np.ndarray = place[_codes(labels["dataset"])] if found else np.zeros(0, np.int32)
        """int32 per row: index into `dataset_names`."""
        self.splits: tuple[str, ...] = tuple(labels["split"].dictionary.to_pylist())
        """Names of the splits."""
        self._split = _codes(labels["split"])
        self._bounds = np.searchsorted(self.dataset_index, np.arange(len(self.dataset_names) + 1))
        if (np.diff(self.dataset_index) < 0).any():
            raise StoreError(f"{name} is not sorted by dataset; run `hermes-shard merge` or convert again")
        pa.default_memory_pool().release_unused()  # what joining the columns took

    def __len__(self) -> int:
        return len(self._ids)

    @cached_property
    def case_ids(self) -> list[str]:
        """Case id per row (a list of all; `case_id(i)` for one)."""
        return self._ids.to_pylist()

    def case_id(self, i: int) -> str:
        """Case id of one row."""
        return self._ids[int(i)].as_py()

    def content_hashes(self) -> list[str]:
        """Content hash per row, read at once."""
        try:
            with self._lock:
                return self._file.read(columns=["content_hash"], use_threads=False).column(0).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise _failure(self.name, error, "convert again") from None

    def rows(self, dataset: str | None = None, split: str | None = None) -> np.ndarray:
        """int64 row numbers of a dataset and split (None = all), sorted by dataset and case id.

        Raises:
            StoreError: no such dataset; names the nearest one. A split without cases gives an empty array.
        """
        first, stop = (0, len(self)) if dataset is None else self._range(dataset)
        numbers = np.arange(first, stop, dtype=np.int64)
        if split is None:
            return numbers
        code = self.splits.index(split) if split in self.splits else -1
        return numbers[self._split[first:stop] == code]

    def _range(self, dataset: str) -> tuple[int, int]:
        if dataset not in self.dataset_names:
            raise StoreError(
                f"dataset {dataset!r} is not in {self.name} ({', '.join(self.dataset_names)})."
                f"{nearest(dataset, self.dataset_names)}"
            )
        index = self.dataset_names.index(dataset)
        return int(self._bounds[index]), int(self._bounds[index + 1])

    def find(self, dataset: str, case_id: str) -> int | None:
        """Row number of a case, or None. Raises StoreError if there is no such dataset."""
        first, last = self._range(dataset)
        stop = last
        while first < stop:
            middle = (first + stop) // 2
            if self.case_id(middle) < case_id:
                first = middle + 1
            else:
                stop = middle
        return first if first < last and self.case_id(first) == case_id else None

    def row(self, i: int) -> ManifestRow:
        """One row. Raises StoreError if there is no such row."""
        return self._row(i)[0]

    def foreground_counts(self, i: int) -> np.ndarray:
        """int32 per class: how many sampled foreground voxels the case has (`foreground` returns them)."""
        return self._row(i)[1]

    def foreground(self, i: int, class_index: int) -> np.ndarray:
        """int32 (n, 3) voxel coordinates Z Y X of sampled foreground of one class; (0, 3) if the case has none."""
        row, counts = self._row(i)
        if not 0 <= class_index < len(counts):
            raise StoreError(f"{self.name} row {i}: class {class_index} of {len(counts)} does not exist")
        first = int(counts[:class_index].sum())
        flat = _flat(*self._locate(i))[first : first + int(counts[class_index])]
        return np.stack(np.unravel_index(flat, row.shape_vox_zyx), axis=1).astype(np.int32)

    def _row(self, i: int) -> tuple[ManifestRow, np.ndarray]:
        """A row, and how many foreground samples each class has."""
        with self._lock:
            kept = self._rows.get(int(i))
            if kept is not None:
                self._rows.move_to_end(int(i))
                return kept
        data = self._fields(*self._locate(i))
        data["dataset"], data["case_id"] = self.dataset_names[int(self.dataset_index[i])], self.case_id(i)
        data["split"] = self.splits[int(self._split[i])]
        try:
            counts = np.asarray(data.pop("foreground_counts"), np.int32)
            row = _row(data)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptShardError(f"{self.name}, row {i} is damaged: {error}; convert again") from None
        with self._lock:
            self._rows[int(i)] = row, counts
            if len(self._rows) > ROWS_KEPT:
                self._rows.popitem(last=False)
        return row, counts

    def _fields(self, group: pa.RecordBatch, k: int) -> dict[str, Any]:
        """The fields of row `k` of a row group, apart from those in memory, and its foreground counts."""
        if not self._packed:
            data = {name: group.column(name)[k].as_py() for name in (*OTHER_COLUMNS, "foreground_counts")}
            return {**data, "stats": json.loads(data["stats"])}
        try:
            return json.loads(group.column("packed")[k].as_py())
        except ValueError as error:
            raise CorruptShardError(f"{self.name}: packed row {k} of its group is damaged: {error}; convert again") from None

    def entries(self, numbers: Iterable[int] | None = None) -> Iterator[ManifestEntry]:
        """Whole entries in row order (for rewriting the manifest)."""
        for i in range(len(self)) if numbers is None else numbers:
            row, counts = self._row(i)
            yield ManifestEntry(row, _flat(*self._locate(i)), tuple(counts.tolist()))

    def _locate(self, i: int) -> tuple[pa.RecordBatch, int]:
        """Row group of a row, and its place in it."""
        if not 0 <= i < len(self):
            raise StoreError(f"{self.name} has {len(self)} rows; row {i} does not exist")
        group = int(np.searchsorted(self._group_starts, i, side="right")) - 1
        return self._group(group), int(i) - int(self._group_starts[group])

    def _group(self, group: int) -> pa.RecordBatch:
        with self._lock:
            if group not in self._cache:
                self._cache[group] = batch = self._read_group(group)
                self._cache_bytes += batch.nbytes
            self._cache.move_to_end(group)
            while self._cache_bytes > CACHE_BYTES and len(self._cache) > 1:
                self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
            return self._cache[group]

    def _read_group(self, group: int) -> pa.RecordBatch:
        try:
            # The reader below: `ParquetFile.read_row_group` looks the columns' names up each time, as long as decoding takes.
            table = self._file.reader.read_row_group(group, column_indices=self._leaves, use_threads=False)
            return table.combine_chunks().to_batches()[0]  # single rows are found faster than in a table
        except (pa.ArrowInvalid, KeyError, IndexError, OSError) as error:
            raise _failure(f"{self.name}, row group {group}", error, "convert again") from None


def _failure(name: str, error: Exception, advice: str) -> HermesError:
    """Damage, or what the operating system said: pyarrow raises OSError for both, but only the latter has a number."""
    if isinstance(error, OSError) and error.errno is not None:
        return storage_error(name, error)
    return CorruptShardError(f"{name} is damaged: {error}; {advice}")


def _chunk(table: pa.Table, column: str) -> Any:
    chunks = table.column(column).chunks
    return chunks[0] if chunks else pa.array([], SCHEMA.field(column).type)


def _flat(table: pa.RecordBatch, k: int) -> np.ndarray:
    """Foreground indices of one row, uint32."""
    value = table.column("foreground")[k]
    if pa.types.is_binary(value.type):
        return np.frombuffer(value.as_buffer(), "<u4")
    return np.asarray(value.values, np.uint32)


def _codes(labels: Any) -> np.ndarray:
    return np.asarray(labels.indices, np.int32)
