"""How large the store will be, and how much memory a case needs, from headers alone and before anything is converted."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.findings import RejectedError
from data_tools.jobs import Job, Outcome
from data_tools.progress import size_text
from data_tools.sources.inflate import MAX_EXPANSION
from data_tools.sources.volumes import DETACHED, measure_case, suffix_of
from hermes_dist.errors import GeometryError, StoreError
from hermes_dist.shards.case import MAX_VOXELS
from hermes_dist.shards.storage import split_url
from hermes_dist.volume.geometry import SPACING_RANGE_MM
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
    stored_cases: int = 0

    def __str__(self) -> str:
        return (
            f"forecast: about {size_text(self.stored_bytes)} for {self.cases} cases "
            f"({self.voxels / 1e6:.0f} million voxels; headers of {self.measured_cases} cases read)"
            + (f"; {self.stored_cases} more are stored already" if self.stored_cases else "")
        )


def is_stored(job: Job, outcomes: Iterable[Outcome]) -> bool:
    """Whether a case was converted with these parameters from as many bytes: it will be found unchanged, or be replaced by one of
    about the same size. Reading its files, to know for certain, takes as long as converting them.
    """
    input_bytes = sum(f.stat().st_size for f in job.case.files if f.is_file())
    done = [o for o in outcomes if o.status in ("converted", "unchanged") and o.input_bytes == input_bytes]
    return bool(done) and job.parameters in {o.parameters for o in done}


def forecast(jobs: Sequence[Job], stored_cases: int = 0) -> Forecast:
    """Estimate from the headers of at most 200 cases per dataset; cases with unreadable or absurd headers count as none.

    `stored_cases` are only mentioned: their bytes are there already.
    """
    voxels, stored, measured = 0.0, 0.0, 0
    for dataset in dict.fromkeys(j.dataset for j in jobs):
        own = [j for j in jobs if j.dataset == dataset]
        sample = own[:: max(1, len(own) // SAMPLE_CASES)]
        sizes = [size for size in (stored_voxels(j) for j in sample) if size]
        measured += len(sizes)
        total = float(np.mean(sizes)) * len(own) if sizes else 0.0
        voxels += total
        stored += total * (IMAGE_BYTES[own[0].params.image_dtype] * KEPT_SHARE + LABEL_BYTES_PER_VOXEL)
    return Forecast(int(stored), int(voxels), measured, len(jobs), stored_cases)


def stored_voxels(job: Job) -> int:
    """Voxels of a case after resampling, before the body crop; 0 if the header cannot be used."""
    return _measured(job)[2]


def _measured(job: Job) -> tuple[int, int, int]:
    """(decoded bytes, voxels, voxels after resampling) from headers; zeros for a case that conversion will reject.

    One header with a spacing of metres must not ask for more space than any disk has.
    """
    try:
        grid, decoded_bytes = measure_case(job.case)
        spacing = grid.spacing_mm_zyx
        stored = math.prod(place(grid, None, job.params).stored_shape_vox_zyx)
    except (RejectedError, GeometryError, ArithmeticError, ValueError, OSError):  # 1e30 mm leaves every integer
        return 0, 0, 0
    possible = spacing[0] > 0 and SPACING_RANGE_MM[0] <= min(spacing) and max(spacing) <= SPACING_RANGE_MM[1]
    if not possible or stored >= MAX_VOXELS or decoded_bytes > MAX_EXPANSION * _file_bytes(job):
        return 0, 0, 0
    return decoded_bytes, math.prod(grid.shape_vox_zyx), stored


def _file_bytes(job: Job) -> int:
    """Bytes of the image's files, detached voxels included."""
    files = list(job.case.images)
    for file in job.case.images:
        detached = DETACHED.get(suffix_of(file) or "")
        files += detached(file) if detached else []
    return sum(f.stat().st_size for f in files if f.is_file())


def peak_bytes(job: Job) -> int:
    """Memory that converting a case may need: the decoded scan (and its real values), the label, the resampled volume as float
    and as stored; more than tests/data_tools/test_memory.py measures.
    """
    decoded_bytes, voxels, stored = _measured(job)
    return WORKER_BYTES + 2 * decoded_bytes + 2 * voxels + 6 * stored


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
