"""From a prepared case to what the manifest says of it: class counts, foreground samples, statistics, hashes and safe names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hermes_dist.errors import DataError
from hermes_dist.shards.layout import CaseArrays, StoredFiles
from hermes_dist.shards.manifest import ManifestEntry, ManifestRow
from hermes_dist.shards.quantise import quantise
from hermes_dist.tasks import DatasetTasks

FOREGROUND_PER_CLASS = 200
FOREGROUND_PER_CASE = 4000
NAME_LIMIT = 100
MAX_VOXELS = 2**32


@dataclass(frozen=True)
class CaseRecord:
    """What conversion knows of a case beside its voxels.

    Attributes:
        dataset, case_id, modality, split: who it is (any text; names on disk are escaped).
        spacing_mm_zyx: of the stored grid.
        placement: JSON text of the `Placement`.
        content_hash: hash of the inputs and of all parameters that shape the result.
        stats: numbers worth keeping (intensities of the raw scan, …).
    """

    dataset: str
    case_id: str
    modality: str
    split: str
    spacing_mm_zyx: tuple[float, float, float]
    placement: str
    content_hash: str
    stats: dict[str, float] = field(default_factory=dict[str, float])


def safe_name(name: str) -> str:
    """A name for paths, URLs and tar members.

    ASCII letters, digits, `_` and `-` stay, other bytes become `=XX`; long names are cut and hashed.
    """
    text = "".join(chr(b) if (b < 128 and chr(b).isalnum()) or b in b"_-" else f"={b:02X}" for b in name.encode())
    if len(text) <= NAME_LIMIT:
        return text
    return f"{text[:60]}={hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def prepare_arrays(
    record: CaseRecord, image_zyx: np.ndarray, label_zyx: np.ndarray, tasks: DatasetTasks, image_dtype: str
) -> CaseArrays:
    """Check and quantise a case.

    Raises:
        DataError: shapes differ or are not 3D, an empty side, a label that is no whole number or above 65535, NaN or Inf.
    """
    if image_zyx.ndim != 3 or image_zyx.shape != label_zyx.shape or not image_zyx.size or image_zyx.size >= MAX_VOXELS:
        raise DataError(
            f"{record.dataset}/{record.case_id}: image {image_zyx.shape} and label {label_zyx.shape} must be the same 3D shape, "
            f"not empty and below {MAX_VOXELS} voxels"
        )
    low, high = int(label_zyx.min()), int(label_zyx.max())
    if label_zyx.dtype.kind not in "iub" or low < 0 or high > 65535:
        raise DataError(
            f"{record.dataset}/{record.case_id}: label of type {label_zyx.dtype} with values {low} … {high}; "
            "expected whole numbers 0 … 65535"
        )
    try:
        stored, step = quantise(image_zyx, image_dtype)
    except DataError as error:
        raise DataError(f"{record.dataset}/{record.case_id}: {error}") from None
    attributes: dict[str, Any] = {
        "dataset": record.dataset,
        "case_id": record.case_id,
        "modality": record.modality,
        "split": record.split,
        "spacing_mm_zyx": list(record.spacing_mm_zyx),
        "classes": {c.name: list(c.values) for c in tasks.classes},
    }
    label = np.ascontiguousarray(label_zyx, np.uint8 if high <= 255 else np.uint16)
    return CaseArrays(stored, label, step, attributes)


def data_hash(image: np.ndarray, label: np.ndarray, step: float) -> str:
    """Hash of stored voxels, independent of how they are cut into blocks."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([list(image.shape), str(image.dtype), str(label.dtype), step]).encode())
    digest.update(np.ascontiguousarray(image).data)
    digest.update(np.ascontiguousarray(label).data)
    return digest.hexdigest()


def sample_foreground(label_zyx: np.ndarray, tasks: DatasetTasks) -> tuple[list[int], np.ndarray, list[int]]:
    """Voxels per class, and up to 200 sampled foreground voxels per class (fewer where a case has more than 20 classes).

    The samples are stratified: one from each of n equal parts of the class' voxels in C order, at a golden-ratio position inside
    the part, so they spread over the structure and need no random numbers.

    Returns:
        voxels per class, flat C-order indices (uint32, class after class, ascending within), samples per class.
    """
    planes = label_zyx.reshape(label_zyx.shape[0], -1)
    counts, values = _plane_counts(planes)
    wanted = min(FOREGROUND_PER_CLASS, max(1, FOREGROUND_PER_CASE // max(1, len(tasks.classes))))
    class_voxels, samples = list[int](), list[np.ndarray]()
    asked: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    columns_of = [np.flatnonzero(np.isin(values, entry.values)) for entry in tasks.classes]
    for number, columns in enumerate(columns_of):
        stops = np.cumsum(counts[:, columns].sum(axis=1))
        total = int(stops[-1])
        n = min(wanted, total)
        jitter = (np.arange(1, n + 1) * 0.6180339887498949) % 1
        ranks = ((np.arange(n) + jitter) * (total / max(1, n))).astype(np.int64)
        class_voxels.append(total)
        samples.append(np.zeros(n, np.uint32))
        plane_of = np.searchsorted(stops, ranks, side="right")
        for z in np.unique(plane_of):
            places = np.flatnonzero(plane_of == z)
            asked.setdefault(int(z), []).append((number, places, ranks[places] - (stops[z - 1] if z else 0)))
    for z, requests in asked.items():
        flat = np.flatnonzero(planes[z])
        by_value = flat[np.argsort(planes[z][flat], kind="stable")]
        stops = np.cumsum(counts[z])
        for number, places, ranks in requests:
            parts = [by_value[stops[c] - counts[z, c] : stops[c]] for c in columns_of[number]]
            voxels = np.sort(np.concatenate(parts)) if len(parts) > 1 else parts[0]
            samples[number][places] = voxels[ranks] + z * planes.shape[1]
    return class_voxels, np.concatenate(samples) if samples else np.zeros(0, np.uint32), [len(s) for s in samples]


def _plane_counts(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(voxels per plane and value, the values above 0 that occur, ascending)."""
    per_plane = [np.bincount(plane) for plane in planes]
    top = max(len(n) for n in per_plane)
    values = np.flatnonzero(sum((np.pad(n, (0, top - len(n))) for n in per_plane), start=np.zeros(top, np.int64)))
    values = values[values > 0]
    counts = np.zeros((len(planes), len(values)), np.int64)
    for row, n in zip(counts, per_plane, strict=True):
        known = values < len(n)
        row[known] = n[values[known]]
    return counts, values


def _mean_std(image: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation in float64, plane by plane (numpy's own would make a whole copy in float64)."""
    mean = float(image.mean(dtype=np.float64))
    squares = sum(float(np.square(np.subtract(plane, mean, dtype=np.float64)).sum()) for plane in image)
    return mean, float(np.sqrt(squares / image.size))


def make_entry(record: CaseRecord, case: CaseArrays, tasks: DatasetTasks, uri: str, files: StoredFiles) -> ManifestEntry:
    """The manifest row of a case that was written."""
    class_voxels, foreground, sizes = sample_foreground(case.label, tasks)
    fill = case.array("image")[1]
    mean, std = _mean_std(case.image)
    stored = {"stored_min": fill, "stored_max": case.image.max().item(), "stored_mean": mean, "stored_std": std}
    row = ManifestRow(
        dataset=record.dataset,
        case_id=record.case_id,
        modality=record.modality,
        split=record.split,
        shape_vox_zyx=case.shape_vox_zyx,
        spacing_mm_zyx=record.spacing_mm_zyx,
        placement=record.placement,
        class_voxels=tuple(class_voxels),
        stats={**record.stats, **{name: float(value * case.step) for name, value in stored.items()}},
        content_hash=record.content_hash,
        data_hash=data_hash(case.image, case.label, case.step),
        uri=uri,
        image_dtype=str(case.image.dtype),
        image_step=case.step,
        image_fill=float(fill),
        label_dtype=str(case.label.dtype),
        block_vox_zyx=files.block_vox_zyx,
        file_bytes=tuple(files.file_bytes),
        file_crc32c=tuple(files.file_crc32c),
        block_offsets=tuple(files.block_offsets),
        block_lengths=tuple(files.block_lengths),
        block_crc32c=tuple(files.block_crc32c),
    )
    return ManifestEntry(row, foreground, tuple(sizes))
