"""How large the store will be, and how much memory a case needs, from headers alone and before anything is converted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.findings import RejectedError
from data_tools.jobs import Job
from data_tools.progress import size_text
from data_tools.sources.volumes import measure_case
from hermes_dist.errors import GeometryError, StoreError
from hermes_dist.shards.storage import split_url
from hermes_dist.volume.preprocess import place

SAMPLE_CASES = 200
IMAGE_BYTES = {"int16": 2, "float16": 2, "float32": 4}
KEPT_SHARE = 0.65
"""Compressed share of an image, from docs/results/conversion.md (int16; air is cropped and not stored)."""
LABEL_BYTES_PER_VOXEL = 0.03
WORKER_BYTES = 300 << 20


@dataclass(frozen=True)
class Forecast:
    """Expected bytes of a store, and what the estimate rests on."""

    stored_bytes: int
    voxels: int
    measured_cases: int
    cases: int

    def __str__(self) -> str:
        return (
            f"forecast: about {size_text(self.stored_bytes)} for {self.cases} cases "
            f"({self.voxels / 1e6:.0f} million voxels; headers of {self.measured_cases} cases read)"
        )


def forecast(jobs: Sequence[Job]) -> Forecast:
    """Estimate from the headers of at most 200 cases per dataset; cases with unreadable headers count as none."""
    voxels, stored, measured = 0.0, 0.0, 0
    for dataset in dict.fromkeys(j.dataset for j in jobs):
        own = [j for j in jobs if j.dataset == dataset]
        sample = own[:: max(1, len(own) // SAMPLE_CASES)]
        sizes = [size for size in (stored_voxels(j) for j in sample) if size]
        measured += len(sizes)
        total = float(np.mean(sizes)) * len(own) if sizes else 0.0
        voxels += total
        stored += total * (IMAGE_BYTES[own[0].params.image_dtype] * KEPT_SHARE + LABEL_BYTES_PER_VOXEL)
    return Forecast(int(stored), int(voxels), measured, len(jobs))


def stored_voxels(job: Job) -> int:
    """Voxels of a case after resampling, before the body crop; 0 if the header cannot be used."""
    try:
        grid, _ = measure_case(job.case)
        return int(np.prod(place(grid, None, job.params).stored_shape_vox_zyx, dtype=np.int64))
    except (RejectedError, GeometryError):
        return 0


def peak_bytes(job: Job) -> int:
    """Memory that converting a case may need: the decoded scan (and its real values), the label, the resampled volume as float
    and as stored; more than tests/data_tools/test_memory.py measures.
    """
    try:
        grid, decoded_bytes = measure_case(job.case)
        stored = np.prod(place(grid, None, job.params).stored_shape_vox_zyx, dtype=np.int64)
        return WORKER_BYTES + 2 * decoded_bytes + 2 * int(np.prod(grid.shape_vox_zyx, dtype=np.int64)) + 6 * int(stored)
    except (RejectedError, GeometryError):
        return WORKER_BYTES


def require_space(expected: Forecast, url: str) -> str:
    """Compare with the free disk space, where the store is on a local disk; returns what to print.

    Raises:
        StoreError: it will not fit.
    """
    scheme, path = split_url(url)
    if scheme != "file":
        return str(expected)
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if expected.stored_bytes > free:
        raise StoreError(
            f"{url}: the store will need about {size_text(expected.stored_bytes)}, {size_text(free)} are free; "
            "choose another disk, a coarser spacing, or --no-forecast to try anyway"
        )
    return f"{expected}; {size_text(free)} free"
